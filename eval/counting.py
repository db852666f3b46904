"""How many wrong candidates stand before the right ones of each query, both ways from one pass over the scores.

Scores are compared in float32; what lies too close to tell there is compared again in float64, and within float64's
rounding it is a tie. So no count depends on the block, on the order of the candidates, or on how a machine adds up its
products.

A tile of scores is one matrix product, in memory that is used again, since fresh pages would cost more than what is
done with them. Of every few candidates of a query the best score is taken; most do not reach the query's right ones,
and only the others are looked through.

Letters: n queries, m candidates, D dimensions, K right candidates looked at; a tile has R rows and W columns, and a
group G candidates of one query in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mmcontrast.data.threads import in_threads
from mmcontrast.eval.together import world

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 512
"""Rows of a tile: with its columns 4 MB of scores."""
_WIDTH = 31 * 64  # with a power of two all of a column would fall into the same few lines of a cache
_GROUP = 64  # G, or what divides a narrower tile
_GROUPS = 1 << 11  # that are looked through at once: with two copies 1.5 MB, a core's cache
_NUMBERS = 1 << 16  # of each side of the pairs that are scored in float64 at once: 0.75 MB with their copies
_PAIRS = 1 << 13  # that a thread takes at once; fewer pass sooner than threads start
_NEAR = 1 << 10  # pairs that wait to be scored together
_ROWS = 64  # that are scored in float64 at once
_LARGE = 32  # right candidates from which a matrix product is faster than pair by pair


class Right:
    """Which candidates are right, by label.

    Attributes:
        count: [n] right candidates.
    """

    def __init__(self, labels: Tensor, candidate_labels: Tensor) -> None:
        self.labels, self.candidate_labels = labels, candidate_labels
        self.order = candidate_labels.argsort(stable=True)
        rising = candidate_labels[self.order]
        self.start = torch.searchsorted(rising, labels)
        self.count = torch.searchsorted(rising, labels, right=True) - self.start

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Right candidates of some queries: place in `rows`, how many of the query stand before it, candidate."""
        count = self.count[rows]
        i = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
        place = torch.arange(len(i), device=rows.device) - (count.cumsum(0) - count)[i]
        return i, place, self.order[self.start[rows[i]] + place]

    def excluder(self, rows: slice) -> Callable[[Tensor, int], None]:
        """What sets the scores of these queries' right candidates to -inf in a tile that begins at some candidate."""
        labels, candidate_labels = self.labels[rows, None], self.candidate_labels
        if int(self.count[rows].sum()) > len(labels) * len(candidate_labels) // 8:
            return lambda tile, first: _fill(tile, labels == candidate_labels[first : first + tile.shape[1]])
        i, _, j = self.pairs(torch.arange(rows.start, rows.stop, device=labels.device))
        j, order = j.sort()
        i = i[order]

        def exclude(tile: Tensor, first: int) -> None:
            start, stop = torch.searchsorted(j, j.new_tensor([first, first + tile.shape[1]])).tolist()
            tile[i[start:stop], j[start:stop] - first] = -torch.inf

        return exclude


def _fill(tile: Tensor, right: Tensor) -> None:
    tile.masked_fill_(right, -torch.inf)


class Pairs:
    """Scores of single pairs in float64."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.sides = x, y
        rows = max(1, _NUMBERS // x.shape[1])
        self._single = [z.new_empty(rows, z.shape[1]) for z in self.sides]
        self._double = [z.double() for z in self._single]

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        """Places in x and y, [p] each -> [p]."""
        step = len(self._single[0])
        return torch.cat([self._some(*places) for places in zip(i.split(step), j.split(step), strict=True)])

    def turned(self, j: Tensor, i: Tensor) -> Tensor:
        """Places in y and x."""
        return self(i, j)

    def _some(self, i: Tensor, j: Tensor) -> Tensor:
        n = len(i)
        for z, at, single, double in zip(self.sides, (i, j), self._single, self._double, strict=True):
            double[:n].copy_(torch.index_select(z, 0, at, out=single[:n]))
        a, b = self._double
        return a[:n].mul_(b[:n]).sum(1)


@dataclass
class Direction:
    """Queries, candidates and what has been counted.

    Attributes:
        right: [n, K] float64, scores of the best right candidates, falling; +inf where there are fewer.
        high: [K, n] float32: a score above it is surely above `right`.
        low: [K, n] float32: a score below it is surely below `right`.
        slack: [n] float64, within which scores tie.
        before: [n, K] int64, wrong candidates that stand before each.
        depths: of every `BLOCK` queries, the most right candidates that one of them has.
    """

    queries: Tensor
    candidates: Tensor
    right: Tensor
    high: Tensor = field(init=False)
    low: Tensor = field(init=False)
    slack: Tensor = field(init=False)
    before: Tensor = field(init=False)
    depths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        d = self.queries.shape[1]
        largest = torch.linalg.vector_norm(self.candidates, dim=1).max()
        length = torch.linalg.vector_norm(self.queries, dim=1).double() * largest
        # Of an inner product of D terms and its threshold (Higham 2002, 3.1): D u |x| |y| at most, in any order.
        bound = length * (d + 8) * 2**-24
        self.high, self.low = (self.right.T + bound).float().contiguous(), (self.right.T - bound).float().contiguous()
        self.slack = length * (d + 8) * 2**-53
        self.before = torch.zeros(self.right.shape, dtype=torch.int64, device=self.right.device)
        self.depths = [int(part.max()) for part in self.right.isfinite().sum(1).split(BLOCK)]

    def depth(self, queries: slice) -> int:
        """Right candidates that one of these queries has, or more, up to K."""
        return max(self.depths[queries.start // BLOCK : -(-queries.stop // BLOCK)])


class _Tally:
    """What one block of scores adds to `before` of one direction.

    Pairs that are too close to tell in float32 wait until they are enough to be scored together.

    Attributes:
        counts: [K, q] int64, of the queries from `first` on.
    """

    def __init__(self, direction: Direction, queries: slice, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        """`score` takes queries and candidates, [p] each, and gives their scores in float64."""
        self.direction, self.first, self.score = direction, queries.start, score
        self.counts = direction.before.new_zeros(direction.depth(queries), queries.stop - queries.start)
        # One piece of memory: small ones that stay would keep the large ones between them from being used again.
        self._near = self.counts.new_empty(3, _NEAR)
        self._pairs = 0

    def add(self, tile: Tensor, dim: int, queries: slice, first_candidate: int) -> None:
        """Count in a tile, of which the queries are the rows (`dim` 1) or the columns (0); right ones are at -inf."""
        size = math.gcd(tile.shape[dim], _GROUP)
        groups = tile.unflatten(dim, (-1, size))  # [R, W / G, G], or [R / G, G, W]
        best = groups.amax(dim + 1)
        for k in range(self.direction.depth(queries)):
            high, low = self.direction.high[k, queries], self.direction.low[k, queries]
            counts = self.counts[k, queries.start - self.first :]
            below = best < (low[:, None] if dim == 1 else low)
            for marked in (~below).nonzero().split(_GROUPS):  # so also where a score overflowed
                query, group = marked.unbind(1)[:: 1 if dim == 1 else -1]
                scores = groups[query, group] if dim == 1 else groups[group, :, query]
                above, reached = scores > high[query, None], scores >= low[query, None]
                counts.index_add_(0, query, above.sum(1))
                at, within = (reached & ~above).nonzero().unbind(1)
                self._wait(k, query[at] + queries.start, group[at] * size + within + first_candidate)

    def _wait(self, k: int, queries: Tensor, candidates: Tensor) -> None:
        for i, j in zip(queries.split(_NEAR), candidates.split(_NEAR), strict=True):
            if self._pairs + len(i) > _NEAR:
                self.settle()
            room = self._near[:, self._pairs : self._pairs + len(i)]
            room[0], room[1], room[2] = k, i, j
            self._pairs += len(i)

    def settle(self) -> None:
        """Score and count the pairs that wait."""
        k, i, j = self._near[:, : self._pairs]
        stands_before = self.score(i, j) >= self.direction.right[i, k] - self.direction.slack[i]
        self.counts.index_put_((k, i - self.first), stands_before.long(), accumulate=True)
        self._pairs = 0


class _Counting:
    """Counts of one block after the other, in the same memory."""

    def __init__(self, forward: Direction, backward: Direction | None, right: Right, block: int) -> None:
        self.directions = [forward] if backward is None else [forward, backward]
        self.right, self.pairs = right, Pairs(forward.queries, forward.candidates)
        self.tile = forward.queries.new_empty(self._rows(block) * min(_WIDTH, len(forward.candidates)))

    def _rows(self, n: int) -> int:
        """Rows of a tile: whole groups, where columns are queries, too."""
        return -(-n // _GROUP) * _GROUP if len(self.directions) > 1 else n

    def count(self, rows: slice) -> list[Tensor]:
        """What these queries add to `before` of theirs, and of all candidates: [K', q] each."""
        n, m = rows.stop - rows.start, len(self.right.candidate_labels)
        queries, scores = (rows, slice(0, m)), (self.pairs, self.pairs.turned)
        tallies = [_Tally(*of) for of in zip(self.directions, queries, scores, strict=False)]
        x, y = self.pairs.sides
        exclude = self.right.excluder(rows)
        for first in range(0, m, _WIDTH):
            columns = slice(first, min(first + _WIDTH, m))
            # Without gaps between rows, also where it is narrower than the others.
            tile = self.tile[: self._rows(n) * (columns.stop - first)].view(self._rows(n), -1)
            torch.mm(x[rows], y[columns].T, out=tile[:n])
            exclude(tile[:n], first)
            tile[n:] = -torch.inf
            tallies[0].add(tile[:n], 1, rows, first)
            if len(tallies) > 1:
                tallies[1].add(tile, 0, columns, rows.start)
        for tally in tallies:
            tally.settle()
        return [tally.counts for tally in tallies]


def count(forward: Direction, backward: Direction | None, right: Right, block: int, threads: int) -> None:
    """Fill `before` of both, on all ranks that share the work."""
    n, ranks = len(forward.queries), world()
    blocks = [slice(start, min(start + block, n)) for start in range(0, n, block)][ranks.rank :: ranks.size]
    idle: list[_Counting] = []  # as many as there are threads, in the end

    def some(rows: slice) -> list[Tensor]:
        try:
            counting = idle.pop()
        except IndexError:
            counting = _Counting(forward, backward, right, min(block, n))
        found = counting.count(rows)
        idle.append(counting)
        return found

    with _full_precision():
        for rows, found in zip(blocks, _on_cores(some, blocks, threads), strict=True):
            forward.before[rows, : len(found[0])] += found[0].T
            if backward is not None:
                backward.before[:, : len(found[1])] += found[1].T
    for direction in (forward, backward):
        if direction is not None:
            direction.before = ranks.sum([direction.before.to(ranks.device)])[0].cpu()


def _on_cores(function: Callable[[T], R], pieces: Sequence[T], threads: int) -> Iterator[R]:
    """`function` of every piece, in order.

    Each core goes through its cache alone. One operation after another on all cores would end thousands of times with a
    wait for the slowest.
    """
    return in_threads((partial(function, piece) for piece in pieces), max(1, min(threads, len(pieces))))


def best_right(x: Tensor, y: Tensor, right: Right, depth: int, threads: int) -> Tensor:
    """[n, K] float64: scores of the best right candidates, `depth` at most, falling; +inf where there are fewer."""
    labels = right.labels
    k = min(depth, max(1, int(right.count.max())))
    found = torch.full((len(x), k), -torch.inf, dtype=torch.float64)
    few = ((right.count > 0) & (right.count <= _LARGE)).nonzero()[:, 0]
    width = max(k, int(right.count[few].max())) if len(few) else k

    def some(rows: Tensor) -> Tensor:
        i, place, j = right.pairs(rows)
        scores = found.new_full((len(rows), width), -torch.inf)
        scores[i, place] = Pairs(x, y)(rows[i], j)
        return scores.topk(k).values

    if len(few):
        pieces = few.split(max(1, _PAIRS // width))
        found[few] = torch.cat(list(_on_cores(some, pieces, threads)))
    for label in labels[right.count > _LARGE].unique():
        columns = (right.candidate_labels == label).nonzero()[:, 0]
        for rows in (labels == label).nonzero()[:, 0].split(_ROWS):
            for part in columns.split(max(1, 2 * _NUMBERS // x.shape[1])):
                scores = torch.cat([found[rows], x[rows].double() @ y[part].double().T], 1)
                found[rows] = scores.topk(k).values
    return torch.where(found > -torch.inf, found, torch.inf)


@contextmanager
def _full_precision() -> Generator[None]:
    """Products of float32 in float32: with fewer bits the bound of their error would not hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
