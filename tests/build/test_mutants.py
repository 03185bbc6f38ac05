from __future__ import annotations

import os
import subprocess
from pathlib import Path

import mutants
import mutate
import pytest
from mutants import KINDS, Mutant, mutants_in, mutants_of, weave

ROOT = Path(__file__).resolve().parents[2]
KERNEL = """\
// a < b, a[i], __syncthreads();
#pragma once
#define LEAST(a, b) ((a) < (b) ? \\
                     (a) : (b) + 1)

template <typename T, int kSize = 4 - 1>
struct Part {
  static constexpr int kHalf = kSize == 1 ? 1 : kSize / 2;
  static_assert(kSize > 1, "a < b");
  [[nodiscard]] __device__ float first() const { return v[0]; }
  T v[kSize + 1];
};

template <int kSize, typename T>
__global__ void __launch_bounds__(kThreads + 1) kernel(const T (&from)[kSize], T* to, int n) {
  PMOD_SHARED(float, scratch, 32);
  const Part<T, kSize - 1> part = load<kSize + 1>(from);
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i + 1];
#pragma unroll
  for (int j = 0; j <= n; ++j) part.v[j] = 'x';
  if constexpr (kSize == 1) {
    __syncthreads();
  } else if (n != 0 && -n < +1) {
    to[n > 1 ? 2 : 3] = 1.0e+3F - scratch[0];
  }
  const auto f = [&](int v) { return v >> 1; };
  let_successor_start();
  /* n > 1 */ if (n > 1) __syncwarp();
}
"""


def changes(source: str, kind: str) -> list[tuple[int, str, str]]:
    return [(m.line, m.before, m.after) for m in mutants_of("a.cuh", source) if m.kind == kind]


def in_function(statement: str) -> list[tuple[str, str, str]]:
    found = mutants_of("a.cuh", f"void f() {{\n  {statement}\n}}\n")
    return [(m.kind, m.before, m.after) for m in found]


def test_barriers_are_taken_out() -> None:
    assert changes(KERNEL, "barrier") == [(22, "__syncthreads()", ""), (28, "__syncwarp()", "")]


def test_comparisons_are_flipped() -> None:
    assert changes(KERNEL, "comparison") == [
        (18, "<", "<="),
        (20, "<=", "<"),
        (23, "!=", "=="),
        (23, "<", "<="),
        (24, ">", ">="),
        (28, ">", ">="),
    ]


def test_subscripts_are_shifted() -> None:
    assert changes(KERNEL, "subscript") == [
        (18, "i", "i + 1"),
        (18, "i + 1", "i + 1 + 1"),
        (20, "j", "j + 1"),
        (24, "n > 1 ? 2 : 3", "(n > 1 ? 2 : 3) + 1"),
    ]


def test_loops_that_are_not_unrolled_end_early() -> None:
    assert changes(KERNEL, "bound") == [(18, "n", "n - 1")]
    assert ("bound", "0", "0 + 1") in in_function("for (int s = 4; s > 0; s /= 2) g(s);")
    assert ("bound", "a & b", "(a & b) - 1") in in_function("for (; i < a & b; ++i) g(i);")


def test_signs_between_operands_are_swapped() -> None:
    assert changes(KERNEL, "sign") == [(18, "+", "-"), (24, "-", "+")]


@pytest.mark.parametrize(
    "statement",
    [
        "float v[kSize];",
        "Values<kSize> v[n], w;",
        "auto f = [i](int) { return -1; };",
        "f<g<3>, a - 1>(b);",
        "using A = B<c - 1>;",
        "constexpr int kA = b < c ? 1 : 2;",
        "__threadfence();",
        "bool operator<(A b);",
        "for (const int a : b) f(a);",
        "f(v[0]);",
        "g(sizeof(a[i]));",
    ],
)
def test_nothing_else_is_changed(statement: str) -> None:
    assert in_function(statement) == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("return a[i];", ("i", "i + 1")),
        ("else_(b).c[i] = 1;", ("i", "i + 1")),
        ("x = a.b->c[i];", ("i", "i + 1")),
        ("(*x)[i] = 1;", ("i", "i + 1")),
        ("f(a<b>(c)[i]);", ("i", "i + 1")),
        ("x = a[f(b, c)];", ("f(b, c)", "f(b, c) + 1")),
        ("x = a[b << c];", ("b << c", "(b << c) + 1")),
    ],
)
def test_what_a_subscript_is(statement: str, expected: tuple[str, str]) -> None:
    found = [change[1:] for change in in_function(statement) if change[0] == "subscript"]
    assert found == [expected]


def test_a_mutant_says_what_it_changes() -> None:
    lines = KERNEL.splitlines()
    for mutant in mutants_of("a.cuh", KERNEL):
        line = lines[mutant.line - 1]
        assert line[mutant.column - 1 :].startswith(mutant.before)
        assert mutant.text == line.strip()
        assert mutant.kind in KINDS


def test_all_mutants_are_woven_into_one_source() -> None:
    source = "#pragma once\nvoid f() {\n  for (; a + 1 < b[i];) __syncthreads();\n}\n"
    numbered = dict(enumerate(mutants_of("a.cuh", source)))
    assert [m.kind for m in numbered.values()] == [
        *("sign", "comparison", "bound", "subscript", "barrier")
    ]
    assert weave(source, numbered).splitlines() == [
        "#pragma once",
        '#include "mutant.h"',
        "void f() {",
        "  for (; a + ::mutant::Other<0>{} + 1 < ::mutant::Other<1>{} < "
        "(b[(i) + ::mutant::step<3>()]) - ::mutant::step<2>();) "
        "(::mutant::acts<4>() ? void() : __syncthreads());",
        "}",
    ]


def test_only_the_mutant_that_is_asked_for_acts(tmp_path: Path) -> None:
    source = """\
#pragma once
inline int barriers = 0;
inline void __syncthreads() { ++barriers; }
inline int f(const int* a, int n) {
  int sum = 0;
  for (int i = 0; i < n - 1; ++i) sum += a[i];
  __syncthreads();
  return sum;
}
inline long distance(const int* a, const int* b) { return b - a; }
"""
    found = mutants_of("a.cuh", source)
    (tmp_path / "a.h").write_text(weave(source, dict(enumerate(found))))
    (tmp_path / "main.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\n"
        '#include "a.h"\n'
        "int main(int argc, char**) {\n"
        "  const int a[] = {1, 10, 100, 1000, 10000};\n"
        "  const long apart = argc > 1 ? distance(a, a + 2) : 0;\n"
        "  const int sum = f(a, 3);\n"
        '  std::printf("%d %d %ld", sum, barriers, apart);\n}\n'
    )
    program = tmp_path / "main"
    compiler = os.environ.get("CXX", "c++")
    include = ROOT / "tests" / "emulator"
    command = [compiler, "-std=c++20", "-w", "-I", include, tmp_path / "main.cpp", "-o", program]
    subprocess.run(command, check=True)

    reached = tmp_path / "reached"

    def run(number: int, *arguments: str) -> tuple[int, str]:
        environment = {
            **os.environ,
            "PMOD_MUTANT": str(number),
            "PMOD_MUTANTS_REACHED": str(reached),
        }
        done = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    expected = {
        ("comparison", "<"): "111 1 0",
        ("bound", "n - 1"): "1 1 0",
        ("sign", "-"): "1111 1 0",
        ("subscript", "i"): "110 1 0",
        ("barrier", "__syncthreads()"): "11 0 0",
    }
    assert run(-1) == (0, "11 1 0")
    assert sorted(map(int, reached.read_text().split())) == list(range(len(found) - 1))
    got = {(m.kind, m.before): run(n)[1] for n, m in enumerate(found) if m.line < 10}
    assert got == expected
    assert run(len(found) - 1, "distance") == (mutate.NO_CODE, "")


def test_keys_stay_when_lines_move() -> None:
    keys = [m.key for m in mutants_of("a.cuh", KERNEL)]
    assert len(set(keys)) == len(keys)
    moved = [m.key for m in mutants_of("a.cuh", "// A comment.\n\n" + KERNEL)]
    assert moved == keys
    twice = [m.key for m in mutants_of("a.cuh", "void f() {\n  a[i];\n  a[i];\n}\n")]
    assert [key[-1] for key in twice] == [1, 2]


def test_the_order_is_that_of_files_and_places(tmp_path: Path) -> None:
    for name in ("b.cuh", "a.cuh", "c.cu"):
        (tmp_path / name).write_text("void f() {\n  a[i] = b < c;\n}\n")
    found = mutants_in(tmp_path)
    assert [(m.file, m.kind) for m in found] == [
        *(("a.cuh", "subscript"), ("a.cuh", "comparison")),
        *(("b.cuh", "subscript"), ("b.cuh", "comparison")),
    ]


def test_every_barrier_of_the_kernels_has_a_mutant() -> None:
    def barriers(file: Path) -> int:
        calls = [t.text for t in mutants.tokens_of(file.read_text())]
        return sum(map(calls.count, mutants.BARRIERS))

    folder = ROOT / "csrc" / "cuda"
    found: list[Mutant] = mutants_in(folder)
    for file in folder.glob("*.cuh"):
        of_file = [m for m in found if (m.file, m.kind) == (file.name, "barrier")]
        assert len(of_file) == barriers(file)
