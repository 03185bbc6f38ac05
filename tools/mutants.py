"""Makes mutants of device code: small changes, each of which some test should notice.

    barrier     a barrier is taken out: `__syncthreads()`, `__syncwarp()`, `wait_for_predecessor()`
    comparison  `<` and `<=`, `>` and `>=`, `==` and `!=` change places
    subscript   `a[i]` becomes `a[i + 1]`, unless i is a literal, which names a part of a vector
    bound       a loop ends one step early: `i < n` becomes `i < n - 1`; not where it is unrolled,
                which is done for the parts of a vector, and one step too many shows as much
    sign        `+` and `-` change places, between two operands

Left alone is what decides which code there is, rather than what it does: comments, strings,
preprocessor lines, template parameters and arguments, `if constexpr`, `static_assert`,
`__launch_bounds__`, sizes of arrays, the values of constants, and aliases. So are
`let_successor_start()` and memory fences: without the one a kernel only starts later, and the
emulator runs every access in order.

The code is read as tokens. It must be formatted by clang-format: comparisons are told from the
brackets of templates by the spaces around them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
      | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<number>\d(?:[eE][+-]|['\w.])*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<sign><=>|<<=|>>=|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\S)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
BARRIERS = ("__syncthreads", "__syncwarp", "wait_for_predecessor")
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
OPPOSITE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+"}
UNROLLED = re.compile(r"#pragma unroll\s*\Z")  # before the loop
CLOSING = {"(": ")", "[": "]", "{": "}"}
FROZEN_ARGUMENTS = ("constexpr", "static_assert", "__launch_bounds__", "sizeof", "PMOD_SHARED")
STATEMENTS = ("return", "else", "case", "do")  # words before an expression, not types before a name
ARITHMETIC = ("+", "-", "*", "/", "%", ".", "->", "::", "(", ")", "[", "]", ",")
KINDS = ("barrier", "comparison", "subscript", "bound", "sign")


class Token(NamedTuple):
    """A word of the source, and where it is."""

    kind: str
    text: str
    begin: int
    end: int


class Change(NamedTuple):
    """What replaces the text from begin to end."""

    kind: str
    begin: int
    end: int
    after: str


class Mutant(NamedTuple):
    """A change in a file. Its key stays the same when other lines come and go."""

    file: str
    line: int  # from 1
    column: int
    kind: str
    before: str
    after: str
    text: str  # the whole line
    occurrence: int  # among the mutants of this kind in lines with this text
    begin: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a reason that was written for this mutant is found by."""
        return self.file, self.text, self.kind, self.occurrence

    def woven(self, number: int) -> tuple[str, str, str]:
        """What stands before, for and after its text where tests/emulator/mutant.h switches it."""
        if self.kind == "barrier":
            return f"(::mutant::acts<{number}>() ? void() : ", self.before, ")"
        if self.kind in ("comparison", "sign"):
            return f"{self.before} ::mutant::Other<{number}>{{}} ", self.before, ""
        by = self.after[-len("- 1") :][0]
        return "(", self.before, f") {by} ::mutant::step<{number}>()"

    def __str__(self) -> str:
        change = f"`{self.before}` -> `{self.after}`" if self.after else f"without `{self.before}`"
        return f"{self.file}:{self.line}:{self.column}: {self.kind}: {change} in `{self.text}`"


def tokens_of(source: str) -> list[Token]:
    """Returns what the compiler sees, without directives."""
    found = (
        Token(match.lastgroup or "", match[0], match.start(), match.end())
        for match in TOKEN.finditer(source)
    )
    return [token for token in found if token.kind not in ("comment", "directive")]


class Code:
    """The tokens of a file, and which of them are left alone."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens = tokens_of(source)
        self.partner: dict[int, int] = {}  # of brackets, both ways
        self._match_brackets()
        self.frozen = {i for begin, end in self._frozen() for i in range(begin, end + 1)}

    def text(self, i: int) -> str:
        """The text of a token, empty beyond the first and the last."""
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def is_spaced(self, i: int) -> bool:
        """Whether a token stands alone, as binary operators do."""
        token = self.tokens[i]
        around = self.source[token.begin - 1 : token.begin] + self.source[token.end : token.end + 1]
        return len(around) == 2 and around.isspace()

    def find(self, begin: int, *wanted: str) -> int:
        """The next of the wanted tokens, at the same depth of brackets."""
        i = begin
        while i < len(self.tokens) and self.text(i) not in wanted:
            i = self.partner.get(i, i) + 1 if self.text(i) in CLOSING else i + 1
        return min(i, len(self.tokens) - 1)

    def declares(self, bracket: int) -> bool:
        """Whether the bracket after a name declares an array."""
        first = bracket - 1
        while True:
            first = self.partner.get(first, first)
            if self.text(first) in ("(", "[") and self.tokens[first - 1].kind == "name":
                first -= 1
            elif self.text(first - 1) in (".", "->", "::"):
                first -= 2
            else:
                break
        if self.text(first) == "(":
            return self.text(first + 1) == "&"  # a reference to an array
        before = first - 1
        return (self.tokens[before].kind == "name" and self.text(before) not in STATEMENTS) or (
            self.text(before) == ">" and not self.is_spaced(before)
        )

    def _match_brackets(self) -> None:
        opened: list[int] = []
        for i, token in enumerate(self.tokens):
            if token.kind == "sign" and token.text in CLOSING:
                opened.append(i)
            elif token.kind == "sign" and token.text in CLOSING.values():
                begin = opened.pop()
                self.partner |= {begin: i, i: begin}

    def _is_list(self, i: int) -> bool:
        """Whether template arguments begin here."""
        before = self.tokens[i - 1]
        return before.kind == "name" and before.end == self.tokens[i].begin

    def _end_of_template(self, begin: int) -> int:
        """The bracket that closes the template's bracket at `begin`."""
        depth, i = 0, begin
        while True:
            depth += {"<": 1, ">": -1, ">>": -2}.get(self.text(i), 0)
            if depth == 0 or i + 1 == len(self.tokens):
                return i
            i = self.partner[i] + 1 if self.text(i) in CLOSING else i + 1

    def _frozen(self) -> Iterator[tuple[int, int]]:
        for i, token in enumerate(self.tokens):
            following = self.text(i + 1)
            if following == "<" and (token.text == "template" or self._is_list(i + 1)):
                yield i, self._end_of_template(i + 1)
            elif token.text in FROZEN_ARGUMENTS and following == "(":
                yield i, self.partner[i + 1]
            elif token.text == "[" and self.declares(i):
                yield i, self.partner[i]
            elif token.text in ("constexpr", "using"):
                yield i, self.find(i, ";", "{")


def barriers(code: Code) -> Iterator[Change]:
    """Calls of barriers that are statements."""
    for i, token in enumerate(code.tokens):
        if token.text in BARRIERS and code.text(i + 1) == "(":
            end = code.partner[i + 1]
            if code.text(end + 1) == ";" and code.text(i - 1) in (";", "{", "}", ")", "else"):
                yield Change("barrier", token.begin, code.tokens[end].end, "")


def operators(kind: str, *wanted: str) -> Callable[[Code], Iterator[Change]]:
    """Binary operators, each of which becomes its opposite."""

    def changes(code: Code) -> Iterator[Change]:
        for i, token in enumerate(code.tokens):
            if token.text in wanted and code.is_spaced(i):
                yield Change(kind, token.begin, token.end, OPPOSITE[token.text])

    return changes


def shifted(code: Code, first: int, last: int, by: str) -> str:
    """The expression from token `first` to token `last`, and one more or less."""
    text = code.source[code.tokens[first].begin : code.tokens[last].end]
    plain = all(t.kind != "sign" or t.text in ARITHMETIC for t in code.tokens[first : last + 1])
    return f"{text} {by} 1" if plain else f"({text}) {by} 1"


def subscripts(code: Code) -> Iterator[Change]:
    """Subscripts of expressions: no lambda's captures, no attributes, no declarations."""
    for i, token in enumerate(code.tokens):
        before = code.tokens[i - 1]
        named = before.kind == "name" and before.text not in STATEMENTS
        if token.text != "[" or not (named or before.text in (")", "]")):
            continue
        first, last = i + 1, code.partner[i] - 1
        literal = first == last and code.tokens[first].kind == "number"
        if first <= last and not literal and not code.declares(i):
            begin, end = code.tokens[first].begin, code.tokens[last].end
            yield Change("subscript", begin, end, shifted(code, first, last, "+"))


def bounds(code: Code) -> Iterator[Change]:
    """What a loop's counter is compared with."""
    for i, token in enumerate(code.tokens):
        if token.text != "for" or UNROLLED.search(code.source, 0, token.begin):
            continue
        begin = code.find(i + 2, ";", ":")
        end = code.find(begin + 1, ";")
        for operator in range(begin, end):
            if code.text(operator) in COMPARISONS and code.is_spaced(operator):
                by = "-" if code.text(operator) in ("<", "<=") else "+"
                first, last = operator + 1, end - 1
                after = shifted(code, first, last, by)
                yield Change("bound", code.tokens[first].begin, code.tokens[last].end, after)
                break


GENERATORS: Sequence[Callable[[Code], Iterator[Change]]] = (
    barriers,
    operators("comparison", *COMPARISONS),
    subscripts,
    bounds,
    operators("sign", "+", "-"),
)


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Returns all mutants of a source, in order of their place."""
    code = Code(source)
    alone = {code.tokens[i].begin for i in code.frozen}
    changes = [c for make in GENERATORS for c in make(code) if c.begin not in alone]
    occurrences: Counter[tuple[str, str]] = Counter()
    found = []
    for change in sorted(changes, key=lambda c: (c.begin, KINDS.index(c.kind))):
        start = source.rfind("\n", 0, change.begin) + 1
        text = source[start:].partition("\n")[0].strip()
        occurrences[change.kind, text] += 1
        found.append(
            Mutant(
                file,
                source.count("\n", 0, change.begin) + 1,
                change.begin - start + 1,
                change.kind,
                source[change.begin : change.end],
                change.after,
                text,
                occurrences[change.kind, text],
                change.begin,
            )
        )
    return found


def weave(source: str, numbered: Mapping[int, Mutant]) -> str:
    """Returns the source with mutants of it, each of which acts where its number is asked for."""
    inserted: list[tuple[int, str]] = []  # innermost last where one ends and first where it begins
    for number, mutant in numbered.items():
        before, _, after = mutant.woven(number)
        end = mutant.begin + len(mutant.before)
        inserted += [(mutant.begin, before), (end, after)]
    include = source.index("#pragma once\n") + len("#pragma once\n")
    inserted.append((include, '#include "mutant.h"\n'))
    woven, done = [], 0
    for place, text in sorted(inserted, key=lambda pair: pair[0]):
        woven += [source[done:place], text]
        done = place
    return "".join([*woven, source[done:]])


def mutants_in(folder: Path) -> list[Mutant]:
    """Returns the mutants of all headers of device code in a folder."""
    headers = sorted(folder.glob("*.cuh"))
    return [mutant for file in headers for mutant in mutants_of(file.name, file.read_text())]
