"""Near-duplicates: samples whose vectors are close to each other, in groups that are connected by such pairs.

Two samples are a pair where their cosine reaches the threshold, and a group is whatever a chain of pairs connects. All
pairs are looked at where that takes reasonable time; in larger indices each sample's nearest neighbours, found through
the structure, of which there is a stated number: then a group whose samples have more close neighbours than that may
fall into parts, and pairs that the structure misses are missed. Letters: n samples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.stored import Hit, Stored
from mmcontrast.eval.index.vectors import Floats, Ints

EXACT_MOST = 200_000
"""Samples up to which all pairs are looked at, unless it is said otherwise."""
NEIGHBOURS = 32
_ROWS = 4096
_HELD = 1 << 20  # pairs that wait to be joined


@dataclass(frozen=True)
class Group:
    """Samples that are close to each other.

    Attributes:
        members: by row; the score of each is its largest cosine with another of the group.
    """

    members: list[Hit]


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        threshold: on the cosine.
        looked_at: samples.
        neighbours: of each sample that were looked at; None for all pairs.
        count: of groups.
        groups: the largest first; maybe not all of them.
        redundant: samples beyond the first of each group.
        truncated: samples all of whose neighbours that were looked at are close: they may have more.
    """

    threshold: float
    looked_at: int
    neighbours: int | None
    count: int
    groups: list[Group]
    redundant: int
    truncated: int


def find_duplicates(
    index: Stored,
    threshold: float = 0.95,
    *,
    where: str | None = None,
    neighbours: int | None = None,
    most: int | None = None,
    progress: bool = False,
) -> Duplicates:
    """Groups of near-duplicates among the samples that pass a filter.

    Args:
        index: that holds them.
        threshold: the least cosine of a pair.
        where: a filter; see `filters`.
        neighbours: of each sample to look at; by default all pairs up to `EXACT_MOST` samples, above it `NEIGHBOURS`.
            0 looks at all pairs of however many.
        most: groups that are described, the largest ones; all of them are counted. None describes all.
        progress: show a bar on standard error.

    Raises:
        ConfigError: a threshold or a number of neighbours that makes no sense, or no filter.
    """
    if not -1 <= threshold <= 1:
        raise ConfigError(f"threshold is {threshold}; a cosine is from -1 to 1, and near-duplicates have 0.9 or more")
    if neighbours is not None and neighbours < 0:
        raise ConfigError(f"neighbours is {neighbours}; look at 1 or more of each sample, or at all pairs with 0")
    places = index.rows(where)
    n = len(places)
    if neighbours is None and n > EXACT_MOST:
        neighbours = NEIGHBOURS
    links, truncated = _Links(n), 0
    if not neighbours:
        for one, other, scores in _all_pairs(index, places, threshold, progress):
            links.add(one, other, scores)
    else:
        for one, other, scores, cut in _nearest_pairs(index, places, threshold, neighbours, where, progress):
            links.add(one, other, scores)
            truncated += cut
    labels, best = links.done()
    order = np.argsort(labels, kind="stable")
    found = [rows for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if len(rows) > 1]
    found.sort(key=len, reverse=True)
    groups = [Group([index.hit(float(best[i]), int(places[i])) for i in rows]) for rows in found[:most]]
    redundant = sum(len(rows) - 1 for rows in found)
    return Duplicates(threshold, n, neighbours or None, len(found), groups, redundant, truncated)


class _Links:
    """Pairs -> groups, and the best score of each sample, in memory for n samples and some pairs."""

    def __init__(self, n: int) -> None:
        self._labels = np.arange(n)
        self._best = np.full(n, -np.inf, np.float32)
        self._held: list[Ints] = []
        self._count = 0

    def add(self, one: Ints, other: Ints, scores: Floats) -> None:
        np.maximum.at(self._best, one, scores)
        np.maximum.at(self._best, other, scores)
        pairs = np.stack([self._labels[one], self._labels[other]])
        self._held.append(pairs[:, pairs[0] != pairs[1]])
        self._count += self._held[-1].shape[1]
        if self._count > _HELD:
            self._join()

    def _join(self) -> None:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self._count:
            pairs, n = np.concatenate(self._held, 1), len(self._labels)
            graph = coo_array((np.ones(pairs.shape[1], np.bool_), (pairs[0], pairs[1])), shape=(n, n))
            _, merged = connected_components(graph, directed=False)
            self._labels = merged[self._labels].astype(np.int64)
        self._held, self._count = [], 0

    def done(self) -> tuple[Ints, Floats]:
        """[n] numbers of groups, and [n] the best scores."""
        self._join()
        return self._labels, self._best


def _all_pairs(index: Stored, places: Ints, threshold: float, progress: bool) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Close pairs, each once, block by block."""
    from tqdm import tqdm

    n = len(places)
    with tqdm(total=n * n // 2, desc="pairs", unit="pair", unit_scale=True, disable=not progress) as bar:
        for start in range(0, n, _ROWS):
            rows = index.vectors(places[start : start + _ROWS])
            for first in range(start, n, _ROWS):
                scores = rows @ (rows if first == start else index.vectors(places[first : first + _ROWS])).T
                one, other = np.nonzero(np.triu(scores >= threshold, 1) if first == start else scores >= threshold)
                yield one + start, other + first, scores[one, other]
                bar.update(scores.size // (2 if first == start else 1))


def _nearest_pairs(
    index: Stored, places: Ints, threshold: float, neighbours: int, where: str | None, progress: bool
) -> Iterator[tuple[Ints, Ints, Floats, int]]:
    """Close pairs among the nearest of each sample, and how many samples may have more."""
    from tqdm import tqdm

    n = len(places)
    with tqdm(total=n, desc="neighbours", unit="sample", unit_scale=True, disable=not progress) as bar:
        for start in range(0, n, _ROWS):
            own = places[start : start + _ROWS]
            scores, found = index.nearest(index.vectors(own), neighbours + 1, where)
            close = (scores >= threshold) & (found >= 0) & (found != own[:, None])
            one, column = np.nonzero(close)
            other = np.searchsorted(places, found[one, column])
            cut = int(np.count_nonzero(close.sum(1) >= min(neighbours, n - 1))) if neighbours < n - 1 else 0
            yield one + start, other, scores[one, column], cut
            bar.update(len(own))


def as_json(found: Duplicates) -> dict[str, Any]:
    """What a file of JSON says."""
    return {
        "threshold": found.threshold,
        "looked_at": found.looked_at,
        "neighbours": found.neighbours,
        "truncated": found.truncated,
        "redundant": found.redundant,
        "groups": [
            [
                {"key": m.key, "shard": m.shard, "source": m.source, "position": m.position, "text": m.text}
                | {"score": round(m.score, 6)}
                for m in group.members
            ]
            for group in found.groups
        ],
    }
