"""Copies among many samples, by 64-bit marks: equal ones, and ones that differ in few bits.

Letters: n marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Marks = NDArray[np.uint64]
Places = NDArray[np.int64]

NEAR = 3
"""Bits in which the looks of two pictures may differ and still be called alike."""
_BANDS = NEAR + 1  # of 16 bits each: marks that differ in at most NEAR bits agree in one of them
_ONES = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)


class Groups(NamedTuple):
    """Samples with equal marks, by descending size of the group.

    Attributes:
        first: [groups] place of each group's first sample.
        size: [groups] samples of each.
    """

    first: Places
    size: Places

    @property
    def surplus(self) -> int:
        """Samples beyond the first of each group."""
        return int((self.size - 1).sum())

    @property
    def chance(self) -> float:
        """Probability that two different samples are of one group: sum of s (s - 1) over n (n - 1)."""
        n = int(self.size.sum())
        return float((self.size * (self.size - 1)).sum()) / (n * (n - 1)) if n > 1 else 0.0


def groups(marks: Marks) -> Groups:
    """Groups of equal marks [n]; among those of one size, the earlier one stands first."""
    _, first, size = np.unique(marks, return_index=True, return_counts=True)
    order = np.lexsort((first, -size))
    return Groups(first[order].astype(np.int64), size[order].astype(np.int64))


def met(batches: Sequence[Places], marks: Marks) -> float:
    """Others of its mark that a sample of a batch meets in it, on average; marks are by position, 0 is none."""
    pairs = 0
    for batch in batches:
        found = marks[batch]
        size = groups(found[found > 0]).size
        pairs += int((size * (size - 1)).sum())
    return pairs / max(1, sum(map(len, batches)))


def distance(a: Marks, b: Marks) -> NDArray[np.int64]:
    """[n], [n] -> bits in which they differ."""
    return _ONES[(a ^ b).view(np.uint8).reshape(-1, 8)].sum(1, dtype=np.int64)


def near_pairs(a: Marks, b: Marks) -> Places:
    """All (i, j) with a[i] and b[j] within `NEAR` bits, as [pairs, 2] in ascending order."""
    found: list[Places] = []
    for band in range(_BANDS):
        shift = np.uint64(16 * band)
        of_a, of_b = (a >> shift) & np.uint64(0xFFFF), (b >> shift) & np.uint64(0xFFFF)
        order = np.argsort(of_b, kind="stable")
        low = np.searchsorted(of_b[order], of_a, side="left")
        high = np.searchsorted(of_b[order], of_a, side="right")
        rows = np.flatnonzero(high > low)
        turn = 0
        while len(rows):  # the first candidate of every row, then the second, ...: no product of all is ever held
            others = order[low[rows] + turn]
            good = distance(a[rows], b[others]) <= NEAR
            found.append(np.stack([rows[good], others[good]], 1))
            turn += 1
            rows = rows[low[rows] + turn < high[rows]]
    if not found:
        return np.zeros((0, 2), dtype=np.int64)
    return np.unique(np.concatenate(found).astype(np.int64), axis=0)


class Alike(NamedTuple):
    """Samples that look like another one without being the same file.

    Attributes:
        samples: how many.
        pairs: [few, 2] places of examples, the nearest first.
        bits: [few] in which they differ.
    """

    samples: int
    pairs: Places
    bits: Places


def alike(look: Marks, content: Marks, *, examples: int = 8) -> Alike:
    """Samples whose look is within `NEAR` bits of another one's that has other content. Both [n]; look 0 has none."""
    there = np.flatnonzero(look)
    # One sample stands for all with its look and content: a picture that comes a thousand times makes no million pairs.
    kinds, first, which = np.unique(
        np.stack([look[there], content[there]], 1), axis=0, return_index=True, return_inverse=True
    )
    looks, of_kind = np.unique(kinds[:, 0], return_inverse=True)
    near = near_pairs(looks, looks)
    near = near[near[:, 0] < near[:, 1]]
    touched = np.bincount(of_kind, minlength=len(looks)) > 1  # one look, several contents
    same = np.flatnonzero(touched)
    touched[near] = True
    several = touched[of_kind][which.reshape(-1)]
    representative = np.full(len(looks), len(look), dtype=np.int64)
    np.minimum.at(representative, of_kind, there[first])
    pairs = [(0, *_first_two(there[first][of_kind == k])) for k in same[: 4 * examples]]
    bits = distance(looks[near[:, 0]], looks[near[:, 1]]) if len(near) else np.zeros(0, dtype=np.int64)
    for i in np.argsort(bits, kind="stable")[: 4 * examples]:
        x, y = sorted(representative[near[i]].tolist())
        pairs.append((int(bits[i]), x, y))
    chosen = sorted(pairs)[:examples]
    return Alike(
        int(several.sum()),
        np.array([p[1:] for p in chosen], dtype=np.int64).reshape(-1, 2),
        np.array([p[0] for p in chosen], dtype=np.int64),
    )


def _first_two(places: Places) -> tuple[int, int]:
    x, y = np.sort(places)[:2].tolist()
    return x, y


class Overlap(NamedTuple):
    """Samples of one set that are found in another.

    Attributes:
        first: [k] places in the first set, ascending.
        second: [k] for each, the place of one it equals.
        others: how many samples of the second set are found in the first.
    """

    first: Places
    second: Places
    others: int


def overlap(a: Marks, b: Marks, *, near: bool = False) -> Overlap:
    """Samples of a [n] whose mark b [m] has, or has within `NEAR` bits; the mark 0 equals none."""
    of_a, of_b = np.unique(a[a > 0]), np.unique(b[b > 0])
    if near:
        pairs = near_pairs(of_a, of_b)
        left, right = of_a[pairs[:, 0]], of_b[pairs[:, 1]]
        best = np.lexsort((distance(left, right), left)) if len(left) else np.zeros(0, dtype=np.int64)
        left, right = left[best], right[best]
    else:
        left = right = np.intersect1d(of_a, of_b, assume_unique=True)
    first = np.flatnonzero(np.isin(a, left))
    matched = right[np.searchsorted(left, a[first], side="left")] if len(left) else a[first]
    order = np.argsort(b, kind="stable")
    second = order[np.searchsorted(b[order], matched, side="left")] if len(first) else first
    return Overlap(first, second.astype(np.int64), int(np.isin(b, right).sum()))
