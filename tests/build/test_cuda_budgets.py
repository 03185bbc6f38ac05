from __future__ import annotations

from pathlib import Path

import cuda_budgets
import cuobjdump
import pytest
from cuda_budgets import LIMITS, Limits, occupancy
from cuobjdump import Usage

import pmod_ops

SMALL = Limits(warps=4, blocks=2, shared=4096, registers=4096, shared_reserved=128)
GATHER = Usage(32, 0, 0, 128, 1024, 7, 6, 0, 0, 2)
NAME = "gather<bf16,aligned>"


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "limits", "expected"),
    [
        # 32 registers * 32 lanes = 1024 a warp: 64 warps, two blocks of 32
        (32, 0, 1024, LIMITS["80"], 1.0),
        # 33 registers are 1056 a warp, allocated as 1280: 51 warps, 48 in fours, one block
        (33, 0, 1024, LIMITS["80"], 0.5),
        # the same with 8 warps a block: six blocks
        (33, 0, 256, LIMITS["90"], 0.75),
        # 1536 threads hold one block of 1024
        (32, 0, 1024, LIMITS["120"], 32 / 48),
        # 64 registers: 32 warps, four blocks of 8
        (64, 0, 256, LIMITS["100"], 0.5),
        # 48 KB and 1 KB of the system's: two of 100 KB
        (32, 48 << 10, 256, LIMITS["120"], 16 / 48),
        # 32 blocks at most, of a warp each; 24 there
        (16, 0, 32, LIMITS["90"], 0.5),
        (16, 0, 32, LIMITS["120"], 0.5),
        # 33 threads are two warps: two blocks of them
        (16, 0, 33, SMALL, 1.0),
        # 2049 bytes and 128 are allocated as 2304: one block
        (16, 2049, 64, SMALL, 0.5),
        # 200 registers are 6400 a warp: none fits
        (200, 0, 32, SMALL, 0.0),
    ],
)
def test_occupancy(registers, shared, threads, limits, expected) -> None:
    assert occupancy(registers, shared, threads, limits) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void pmod::cuda::gather_kernel<pmod::cuda::Share<float, false, 4, true> >(pmod::cuda::Gather, int)",
            "gather<fp32,unaligned>",
        ),
        (
            "void pmod::cuda::f_kernel<pmod::cuda::Share<pmod::Bf16, true, 1, false>, pmod::cuda::Absent, float>"
            "(pmod::cuda::F, int)",
            "f<bf16,none,fp32,short,aligned>",
        ),
        (
            "void pmod::cuda::f_kernel<pmod::cuda::Share<pmod::F16, false, 4, true>, pmod::cuda::Either<pmod::F16> >"
            "(pmod::cuda::F, int)",
            "f<fp16,any,unaligned>",
        ),
        (
            "void pmod::cuda::score_kernel<pmod::F16, float, true>(pmod::cuda::Score, long)",
            "score<fp16,fp32,aligned>",
        ),
        (
            "void pmod::cuda::select_kernel<256, 4, true>(pmod::cuda::Gate, pmod::cuda::Select)",
            "select<256,4,true>",
        ),
        ("pmod::cuda::sum_kernel(float const*, long, float*)", "sum"),
        ("_ZN4pmod", "_ZN4pmod"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert cuobjdump.short_name(name) == short


LISTINGS = {
    "-lelf": "ELF file    1: a.1.sm_120.cubin\nELF file    2: a.2.sm_80.cubin\n",
    "-res-usage": """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fi:
  REG:42 STACK:16 SHARED:1152 LOCAL:8 CONSTANT[0]:980 TEXTURE:0 SURFACE:0 SAMPLER:0
""",
    "-elf": """
    7   36b4    1b0  0  4                    CUDA_INFO        0    3        0 .nv.info
    9   3888     7c  0  4                    CUDA_INFO       40    3       17 .nv.info._Z1fi
.nv.info._Z1fi
	<0x1>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0x40
	<0x8>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x2 0x1
	<0x9>
	Attribute:	EIATTR_CRS_STACK_SIZE
	Value:	0x0
""",
    "-sass": """
	code for sm_120
		Function : _Z1fi
	.headerflags	@"EF_CUDA_SM120"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.LTC128B R3, desc[UR4][R2.64] ;
        /*0040*/                   LDS.128 R8, [R2] ;
        /*0050*/             @!UP0 STG.E.128 desc[UR4][R2.64], R8 ;
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   BSYNC B0 ;
        /*0090*/                   ATOMS.POPC.INC.32 RZ, [R2] ;
        /*00a0*/                   REDUX.SUM UR4, R2 ;
       /*10b0*/              @P0   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R8 ;
""",
}


def test_what_cuobjdump_says_of_a_kernel(tmp_path: Path) -> None:
    program = tmp_path / "cuobjdump"
    program.write_text('#!/bin/sh\ncat "$(dirname "$0")/$1"\n')
    program.chmod(0o755)
    for name, text in LISTINGS.items():
        (tmp_path / name).write_text(text)
    kernels = cuobjdump.read(tmp_path / "library.so", program)
    with_reserved = Usage(42, 16, 8, 1152, 512, 2, 1, 2, 1, 1)
    assert kernels == {"f": {"80": with_reserved, "120": with_reserved._replace(shared=128)}}


def test_a_cuobjdump_that_fails_is_an_error() -> None:
    with pytest.raises(cuobjdump.subprocess.CalledProcessError):
        list(cuobjdump.lines_of(Path("/bin/false")))


def problems(usage: Usage, same_nvcc: bool = True, name: str = NAME) -> list[str]:
    """Of a kernel on sm_90, whose budget is what GATHER uses."""
    budgets = cuda_budgets.budgets_of({name: {"90": GATHER}})
    return cuda_budgets.compare({name: {"90": usage}}, budgets, same_nvcc)[0]


def test_a_kernel_may_use_less() -> None:
    assert problems(GATHER) == []
    assert problems(GATHER._replace(registers=20, shared=0, barriers=1)) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 33}, "33 registers, 32 allowed"),
        ({"stack": 8}, "spills: 8 bytes of stack, 0 of local memory"),
        ({"local": 8}, "spills: 0 bytes of stack, 8 of local memory"),
        ({"loads_128": 6}, "6 loads of 128 bits, 7 in the budget"),
        ({"stores_128": 0}, "0 stores of 128 bits, 6 in the budget"),
        ({"shared": 256}, "shared: 256, 128 in the budget"),
        ({"barriers": 3}, "barriers: 3, 2 in the budget"),
        ({"atomics": 1}, "atomics: 1, 0 in the budget"),
        ({"threads": 512}, "512 threads, 1024 in the budget"),
    ],
)
def test_a_kernel_beyond_its_budget(change: dict[str, int], text: str) -> None:
    assert problems(GATHER._replace(**change)) == [f"{NAME}, sm_90: {text}"]


def test_floats_are_not_added_atomically() -> None:
    (line, _) = problems(GATHER._replace(float_atomics=1, atomics=1))
    assert line.endswith("1 atomic operations on floats")


def test_an_aligned_kernel_needs_wide_accesses_whatever_its_budget() -> None:
    bare = GATHER._replace(loads_128=0, stores_128=0)
    for name, count in ((NAME, 1), ("gather<bf16,unaligned>", 0), ("sum", 0)):
        budgets = cuda_budgets.budgets_of({name: {"90": bare}})
        found, _ = cuda_budgets.compare({name: {"90": bare}}, budgets, True)
        assert len(found) == count


def test_another_nvcc_has_some_leeway() -> None:
    usage = GATHER._replace(registers=36, loads_128=3, barriers=4)
    budgets = cuda_budgets.budgets_of({NAME: {"90": GATHER}})
    found, notes = cuda_budgets.compare({NAME: {"90": usage}}, budgets, False)
    assert (found, notes) == ([], [f"{NAME}, sm_90: 36 registers, budget 32"])
    assert len(problems(usage._replace(registers=37), same_nvcc=False)) == 1
    assert len(problems(usage._replace(loads_128=0), same_nvcc=False)) == 1
    assert len(problems(usage._replace(stack=4), same_nvcc=False)) == 1


def test_kernels_that_come_and_go() -> None:
    budgets = cuda_budgets.budgets_of({"old": {"90": GATHER, "80": GATHER}, "one": {"90": GATHER}})
    kernels = {"new": {"90": GATHER}, "one": {"80": GATHER}}
    found, _ = cuda_budgets.compare(kernels, budgets, True)
    assert found == [
        "new: has no budget",
        "old: not in the library",
        "one, sm_80: has no budget",
        "one, sm_90: not built",
    ]


def test_only_what_was_built_is_looked_at() -> None:
    budgets = cuda_budgets.budgets_of({NAME: {"80": GATHER, "90": GATHER}})
    assert cuda_budgets.compare({NAME: {"90": GATHER, "86": GATHER}}, budgets, True) == ([], [])


def test_the_file_has_a_line_per_kernel() -> None:
    budgets = cuda_budgets.budgets_of({NAME: {"80": GATHER, "120": GATHER}, "sum": {"80": GATHER}})
    text = cuda_budgets.encode(budgets, "13.0")
    assert cuda_budgets.decode(text) == ("13.0", budgets)
    assert len([line for line in text.splitlines() if "[" in line and "columns" not in line]) == 2
    figures = {"registers": 32, "occupancy": 66, "occupancy_256": 100}
    assert figures.items() <= budgets[NAME]["120"].items()


def library() -> Path:
    path = Path(pmod_ops.__file__).parent / "_C_cuda.abi3.so"
    if not path.is_file():
        pytest.skip("this build has no CUDA library: there was no nvcc")
    return path


@pytest.mark.slow
def test_the_library_keeps_its_budgets() -> None:
    built = library()
    program = cuobjdump.find()
    if program is None:
        pytest.skip(cuda_budgets.NO_CUOBJDUMP)
    expected, budgets = cuda_budgets.decode(cuda_budgets.BUDGETS.read_text())
    same = cuobjdump.compiled_with(built) == expected
    found, _ = cuda_budgets.compare(cuobjdump.read(built, program), budgets, same)
    assert found == []
