"""Which rows may be answers, said in words: `label = 'dog' and rate >= 16000`.

    filter  = all {"or" all}                all   = not {"and" not}
    not     = "not" not | "(" filter ")" | test
    test    = COLUMN ("=" | "!=" | "<" | "<=" | ">" | ">=") VALUE
            | COLUMN ["not"] "in" "(" VALUE {"," VALUE} ")"
            | COLUMN "is" ["not"] "null"

A value is a number, true, false, or a text in quotes, where a quote is written twice. A column is a word, or in quotes
if its name is none. What is compared with null is unknown, as in SQL: neither the test nor its `not` lets the row pass.
A filter is parsed into a tree of our own and computed by Arrow's kernels on the columns; nothing of it is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, suggest

MAX_LENGTH = 4000
_MAX_DEPTH = 50
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")
    |(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
    |(?P<word>[^\W\d][\w.-]*)
    |(?P<sign><=|>=|!=|<>|==|[=<>(),])
    )""",
    re.VERBOSE,
)
_COMPARED = {"=": "equal", "!=": "not_equal", "<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal"}
_SAME = {"==": "=", "<>": "!="}
_KINDS = {
    "string": "text",
    "int32": "whole number",
    "int64": "whole number",
    "double": "number",
    "bool": "true or false",
}

Mask = NDArray[np.bool_]
Value = str | int | float | bool
Columns = Callable[[str], pa.ChunkedArray]
"""Name of a column -> its values, [n]."""


@dataclass(frozen=True)
class Test:
    """A column compared with values: `=`, `!=` … with one, `in` with one or more, `null` with none."""

    column: str
    sign: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Not:
    """What is not so."""

    part: Tree


@dataclass(frozen=True)
class Joined:
    """All of the parts ("and"), or any ("or")."""

    word: str
    parts: tuple[Tree, ...]


Tree = Test | Not | Joined


class Filter:
    """A filter, parsed; to be computed on the rows of one segment after the other."""

    def __init__(self, said: str) -> None:
        """Parse.

        Raises:
            ConfigError: it is no filter; what is wrong with it, and where.
        """
        if len(said) > MAX_LENGTH:
            raise ConfigError(f"the filter has {len(said)} characters; at most {MAX_LENGTH}")
        self.said = said
        self.tree = _Parser(said).whole()

    def check(self, columns: Mapping[str, str]) -> None:
        """Compare with the columns that there are, name -> type as Arrow writes it.

        Raises:
            ConfigError: a column that is not there, or a value that is of another type than it.
        """
        for test in _tests(self.tree):
            if test.column not in columns:
                known = ", ".join(f"{name} ({kind_of(kind)})" for name, kind in columns.items())
                near = suggest(test.column, columns)
                hint = near if near.startswith("; did") else ""
                raise ConfigError(f"the filter asks for the column {test.column!r}{hint}; columns: {known[:1000]}")
            kind = columns[test.column]
            for value in test.values:
                if not _fits(value, kind, test.sign):
                    raise ConfigError(
                        f"the filter compares {test.column!r}, which is {kind_of(kind)}, "
                        f"by {test.sign} with {_written(value)}, which is {_named(value)}; {_instead(kind)}"
                    )

    def mask(self, columns: Columns) -> Mask:
        """[n] which rows pass; `columns` gives their values, of the types that were checked."""
        passing = pc.call_function("coalesce", [_computed(self.tree, columns), pa.scalar(False)])
        return passing.to_numpy(zero_copy_only=False) if isinstance(passing, pa.Array) else passing.to_numpy()


def kind_of(kind: str) -> str:
    """A column's type for people."""
    return _KINDS.get(kind, "empty" if kind == "null" else kind)


def _tests(tree: Tree) -> Iterator[Test]:
    if isinstance(tree, Test):
        yield tree
    else:
        for part in (tree.part,) if isinstance(tree, Not) else tree.parts:
            yield from _tests(part)


def _fits(value: Value, kind: str, sign: str) -> bool:
    if kind == "null":  # nothing is in it, and nothing equals it
        return True
    if kind == "bool":
        return isinstance(value, bool) and sign in ("=", "!=", "in")
    if kind == "string":
        return isinstance(value, str)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _instead(kind: str) -> str:
    if kind == "bool":
        return "ask for = true or = false"
    return "put the text in quotes" if kind == "string" else "give a number without quotes"


def _named(value: Value) -> str:
    return "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)[:60]


def _computed(tree: Tree, columns: Columns) -> Any:
    """[n] true, false or null."""
    if isinstance(tree, Not):
        return pc.call_function("invert", [_computed(tree.part, columns)])
    if isinstance(tree, Joined):
        found = _computed(tree.parts[0], columns)
        for part in tree.parts[1:]:
            found = pc.call_function(f"{tree.word}_kleene", [found, _computed(part, columns)])
        return found
    column = columns(tree.column)
    if tree.sign == "null":
        return pc.call_function("is_null", [column])
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.bool_())
    found = None
    for value in tree.values:
        sign = "equal" if tree.sign == "in" else _COMPARED[tree.sign]
        one = _compared(sign, column, value)
        found = one if found is None else pc.call_function("or_kleene", [found, one])
    return found


def _compared(sign: str, column: pa.ChunkedArray, value: Value) -> Any:
    if isinstance(value, (str, bool)):
        return pc.call_function(sign, [column, pa.scalar(value)])
    if not pa.types.is_integer(column.type):
        return pc.call_function(sign, [column, pa.scalar(float(value))])
    # Whole numbers stay whole: those above 2^53 would be lost if they were compared as float64.
    whole = math.floor(value)
    if whole != value and sign in ("less", "greater_equal"):
        sign = {"less": "less_equal", "greater_equal": "greater"}[sign]
    inside = -(1 << 63) <= whole < 1 << 63
    if inside and (whole == value or sign not in ("equal", "not_equal")):
        return pc.call_function(sign, [column, pa.scalar(whole)])
    # No whole number of 64 bits equals it, or all of them are on one side of it.
    passes = sign == "not_equal" or (not inside and sign.startswith("less" if whole > 0 else "greater"))
    return pc.call_function("equal" if passes else "not_equal", [column, column])


class _Parser:
    """Tokens from left to right; one method for each rule of the grammar."""

    def __init__(self, said: str) -> None:
        self.said, self.tokens, self.at, self.depth = said, list[tuple[str, str, int]](), 0, 0
        place = 0
        while said[place:].strip():
            found = _TOKEN.match(said, place)
            if found is None:
                rest = said[place:].lstrip()
                why = "a quote that is not closed" if rest[0] in "'\"" else f"{rest[:20]!r}, which no filter has"
                raise ConfigError(f"the filter {_short(said)} has {why}, at character {len(said) - len(rest) + 1}")
            kind = str(found.lastgroup)
            self.tokens.append((kind, found[kind], found.start(kind)))
            place = found.end()

    def whole(self) -> Tree:
        if not self.tokens:
            raise ConfigError("the filter is empty; write one such as label = 'dog' and rate >= 16000")
        tree = self.any()
        if self.at < len(self.tokens):
            raise self.wrong("and, or, or the end")
        return tree

    def any(self) -> Tree:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ConfigError(f"the filter has more than {_MAX_DEPTH} brackets or nots within each other")
        parts = [self.all()]
        while self.took("or"):
            parts.append(self.all())
        self.depth -= 1
        return parts[0] if len(parts) == 1 else Joined("or", tuple(parts))

    def all(self) -> Tree:
        parts = [self.single()]
        while self.took("and"):
            parts.append(self.single())
        return parts[0] if len(parts) == 1 else Joined("and", tuple(parts))

    def single(self) -> Tree:
        nots = 0
        while self.took("not"):
            nots += 1
        if self.took("("):
            tree = self.any()
            self.need(")")
        else:
            tree = self.test()
        return Not(tree) if nots % 2 else tree

    def test(self) -> Tree:
        kind, said, _ = self.next("a column")
        if kind not in ("word", "text") or (kind == "word" and said.lower() in ("and", "or", "in", "is", "null")):
            self.at -= 1
            raise self.wrong("a column")
        column = _unquoted(said) if kind == "text" else said
        if self.took("is"):
            negated = self.took("not")
            self.need("null")
            found: Tree = Test(column, "null", ())
            return Not(found) if negated else found
        negated = self.took("not")
        if self.took("in"):
            self.need("(")
            values = [self.value()]
            while self.took(","):
                values.append(self.value())
            self.need(")")
            found = Test(column, "in", tuple(values))
            return Not(found) if negated else found
        kind, said, _ = self.next("=, !=, <, <=, >, >=, in, or is") if not negated else ("", "", 0)
        sign = _SAME.get(said, said)
        if sign not in _COMPARED or kind != "sign":
            self.at -= not negated
            raise self.wrong("in" if negated else "=, !=, <, <=, >, >=, in, or is")
        return Test(column, sign, (self.value(),))

    def value(self) -> Value:
        kind, said, _ = self.next("a value")
        if kind == "text":
            return _unquoted(said)
        if kind == "number":
            number = int(said) if re.fullmatch(r"[-+]?\d{1,300}", said) else float(said)
            if not math.isfinite(number):
                raise ConfigError(f"the filter {_short(self.said)} has the number {said[:40]}, which is too large")
            return number
        if kind == "word" and said.lower() in ("true", "false"):
            return said.lower() == "true"
        self.at -= 1
        if kind == "word" and said.lower() == "null":
            raise ConfigError(f"the filter {_short(self.said)} compares with null; ask for COLUMN is null instead")
        raise self.wrong("a number, true, false, or a text in quotes")

    def next(self, wanted: str) -> tuple[str, str, int]:
        if self.at == len(self.tokens):
            raise self.wrong(wanted)
        self.at += 1
        return self.tokens[self.at - 1]

    def took(self, word: str) -> bool:
        """Whether the next token is this word or sign; if so, it is taken."""
        if self.at < len(self.tokens) and self.tokens[self.at][0] != "text":
            if self.tokens[self.at][1].lower() == word:
                self.at += 1
                return True
        return False

    def need(self, word: str) -> None:
        if not self.took(word):
            raise self.wrong(repr(word))

    def wrong(self, wanted: str) -> ConfigError:
        if self.at == len(self.tokens):
            return ConfigError(f"the filter {_short(self.said)} ends where it needs {wanted}")
        _, said, place = self.tokens[self.at]
        return ConfigError(
            f"the filter {_short(self.said)} has {said[:40]!r} at character {place + 1}, where it needs {wanted}"
        )


def _unquoted(said: str) -> str:
    return said[1:-1].replace(said[0] * 2, said[0])


def _short(said: str) -> str:
    return repr(said if len(said) <= 100 else f"{said[:99]}…")
