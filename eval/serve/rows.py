"""The rows of an opened index, found by where their samples lie: clients name samples, never rows, which move."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcontrast.eval.index.stored import Stored

_POSITION_BITS = 44


class Place(NamedTuple):
    """Where a sample lies: which source of the index, and its number there."""

    source: int
    position: int

    def __str__(self) -> str:
        """As clients name it."""
        return f"{self.source}-{self.position}"

    @classmethod
    def of(cls, name: str) -> Place:
        """The inverse."""
        source, _, position = name.partition("-")
        return cls(int(source), int(position))


class Rows:
    """Live rows of one generation of an index, numbered as its searches number them."""

    def __init__(self, index: Stored) -> None:
        self._segments = index.segments
        self._starts = np.cumsum([0, *map(len, index.segments)])
        places = [self._places(number) for number in range(len(index.segments))]
        numbers = [np.flatnonzero(np.ones(len(s), np.bool_) if s.live is None else s.live) for s in index.segments]
        self._rows = np.concatenate([n + start for n, start in zip(numbers, self._starts, strict=False)])
        sought = np.concatenate([p[n] for p, n in zip(places, numbers, strict=True)])
        order = np.argsort(sought, kind="stable")
        self._sought, self._rows = sought[order], self._rows[order]

    def __len__(self) -> int:
        return len(self._rows)

    def _places(self, segment: int) -> NDArray[np.int64]:
        source, position = (self._segments[segment].column(n).to_numpy() for n in ("source", "position"))
        return (source.astype(np.int64) << _POSITION_BITS) | position

    def find(self, place: Place) -> int | None:
        """The row of a sample; None where the index does not have it, or not any more."""
        if place.source >= 1 << (63 - _POSITION_BITS) or place.position >= 1 << _POSITION_BITS:
            return None
        sought = (place.source << _POSITION_BITS) | place.position
        at = int(np.searchsorted(self._sought, sought))
        return int(self._rows[at]) if at < len(self._sought) and self._sought[at] == sought else None

    def vector(self, row: int) -> NDArray[np.float32]:
        """[D], unit norm."""
        segment, number = self._locate(row)
        return np.array(self._segments[segment].vectors[number], np.float32)

    def facts(self, row: int) -> dict[str, Any]:
        """All columns of a row."""
        segment, number = self._locate(row)
        return self._segments[segment].row(number)

    def _locate(self, row: int) -> tuple[int, int]:
        segment = int(np.searchsorted(self._starts, row, side="right")) - 1
        return segment, row - int(self._starts[segment])
