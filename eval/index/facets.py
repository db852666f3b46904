"""What the columns of an index hold, as far as a person needs it to choose a filter: types, values, ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmcontrast.eval.index.filters import kind_of
from mmcontrast.eval.index.rows import COLUMNS
from mmcontrast.eval.index.stored import Stored

MOST_VALUES = 50
_CHOSEN_FROM = 200  # values of a text column; above, or where most samples have one of their own, they are names
_FEW = 10
_LONGEST = 100  # characters of a value


@dataclass(frozen=True)
class Facet:
    """A column of the metadata.

    Attributes:
        name: of the column.
        kind: text, whole number, number, or true or false.
        values: of texts and of true or false, the most frequent first, each with the number of its samples; none where
            there are so many that nobody chooses from them.
        low: the least number.
        high: the greatest number.
        lacking: samples without a value.
    """

    name: str
    kind: str
    values: list[tuple[str | bool, int]]
    low: float | None
    high: float | None
    lacking: int


def facets(index: Stored) -> list[Facet]:
    """The columns of the metadata that have values, of what is not deleted."""
    live = [pa.array(mask) for mask in index.passing(None)]
    found: list[Facet] = []
    for name, kind in index.columns.items():
        if name in COLUMNS.names or kind == "null":
            continue
        parts = [index.column(s, name).filter(mask) for s, mask in zip(index.segments, live, strict=True)]
        column = pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type)
        if column.null_count < len(column):
            found.append(_facet(name, kind, column))
    return found


def _facet(name: str, kind: str, column: pa.ChunkedArray) -> Facet:
    values: list[tuple[str | bool, int]] = []
    low = high = None
    if kind in ("string", "bool"):
        counted: Any = pc.call_function("value_counts", [column.drop_null()])
        if len(counted) <= max(_FEW, min(_CHOSEN_FROM, (len(column) - column.null_count) // 2)):
            pairs: list[tuple[Any, int]] = [(pair["values"], pair["counts"]) for pair in counted.to_pylist()]
            values = [(v, n) for v, n in pairs if isinstance(v, bool) or len(v) <= _LONGEST]
            values = sorted(values, key=_first)[:MOST_VALUES]
    else:
        ends = pc.call_function("min_max", [column]).as_py()
        low, high = (float(ends[end]) if math.isfinite(ends[end]) else None for end in ("min", "max"))
    return Facet(name, kind_of(kind), values, low, high, column.null_count)


def _first(value: tuple[str | bool, int]) -> tuple[int, str]:
    return -value[1], str(value[0])
