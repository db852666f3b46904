"""Exact ranks in both directions from one blocked pass over the scores.

A query's rank is how many wrong candidates stand before its best right one: those that score higher, and those that
tie with it, so that equal embeddings never score. Scores are compared in float32; what lies too close to tell there is
compared again in float64, and within float64's rounding it is a tie. So no rank depends on the block, on the order of
the candidates, or on how a machine adds up its products.

Letters: n queries, m candidates, D dimensions, K right candidates looked at, S rows of a strip.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEPTH = 10
"""Of the mean average precision: no more right candidates than this can stand within it."""
_STRIP = 64  # rows compared at once: what is compared stays in the cache
_NUMBERS = 1 << 18  # of each side of the pairs that are scored in float64 at once: 2 MB
_LARGE = 32  # right candidates from which a matrix product is faster than pair by pair


@dataclass(frozen=True)
class Ranks:
    """Where the right candidates of n queries stand.

    Attributes:
        best: [n] int64, wrong candidates before the best right one; all wrong ones where no right one can be scored.
        positives: [n] int64, right candidates.
        average_precision: [n] float64, at 10: the mean over right candidates (ten at most) of the share of right ones
            among the candidates up to it, 0 for one that is not within the first ten.
        candidates: m.
    """

    best: Tensor
    positives: Tensor
    average_precision: Tensor
    candidates: int


def rank_both_ways(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, *, block: int = 1024
) -> tuple[Ranks, Ranks]:
    """Ranks of y for queries x, and of x for queries y, from one matrix product.

    Beside its inputs it holds [block, m] scores, and strips of 64 rows of them three times.

    Args:
        x: [n, D] float32; a score is an inner product. Where a row is not finite, nothing is found with it, and it
            stands before all right candidates of the other side.
        y: [m, D].
        x_labels: [n] int64; those of y with the same label are right.
        y_labels: [m].
        block: rows of x that are scored at once.

    Raises:
        ValueError: `block` is below 1.
    """
    forward, backward = _run(x, y, x_labels, y_labels, block, both=True)
    assert backward is not None
    return forward, backward


def rank(x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, *, block: int = 1024) -> Ranks:
    """Ranks of y for queries x alone; as `rank_both_ways`."""
    return _run(x, y, x_labels, y_labels, block, both=False)[0]


@dataclass
class _Direction:
    """Queries, candidates and what has been counted.

    Attributes:
        right: [n, K] float64, scores of the best right candidates, falling; +inf where there are fewer.
        high: [n, K] float32: a score above it is surely above `right`.
        low: [n, K] float32: a score below it is surely below `right`.
        slack: [n] float64, within which scores tie.
        before: [n, K] int64, wrong candidates so far that stand before each.
    """

    queries: Tensor
    candidates: Tensor
    right: Tensor
    high: Tensor = field(init=False)
    low: Tensor = field(init=False)
    slack: Tensor = field(init=False)
    before: Tensor = field(init=False)
    depths: list[int] = field(init=False)  # of each strip, the most right candidates that a query of it has

    def __post_init__(self) -> None:
        d = self.queries.shape[1]
        largest = torch.linalg.vector_norm(self.candidates, dim=1).max()
        length = torch.linalg.vector_norm(self.queries, dim=1).double() * largest
        # Of an inner product of D terms and its threshold (Higham 2002, 3.1): D u |x| |y| at most, in any order.
        bound = (length * (d + 8) * 2**-24)[:, None]
        self.high, self.low = (self.right + bound).float(), (self.right - bound).float()
        self.slack = length * (d + 8) * 2**-53
        self.before = torch.zeros(self.right.shape, dtype=torch.int64, device=self.right.device)
        counts = self.right.isfinite().sum(1)
        self.depths = [int(part.max()) for part in counts.split(_STRIP)]

    def count(self, strip: Tensor, first_query: int, first_candidate: int, dim: int, buffer: Tensor) -> None:
        """Compare a strip of scores, right candidates at -inf; its queries lie across `dim`, candidates along it."""
        queries = slice(first_query, first_query + strip.shape[1 - dim])
        depth = self.depths[first_query // _STRIP] if dim == 1 else max(self.depths)
        for k in range(depth):
            high, low = self.high[queries, k].unsqueeze(dim), self.low[queries, k].unsqueeze(dim)
            # Comparisons written as floats: torch adds those up six times as fast as booleans.
            sure = torch.gt(strip, high, out=buffer).sum(dim).long()
            close = (torch.ge(strip, low, out=buffer).sum(dim).long() > sure).nonzero()[:, 0]
            self.before[queries, k] += sure
            if len(close):
                among = strip.index_select(1 - dim, close)
                among = among if dim == 1 else among.T
                high, low = (t[queries, k][close, None] for t in (self.high, self.low))
                i, j = ((among >= low) & ~(among > high)).nonzero().unbind(1)
                self._compare_exactly(close[i] + first_query, j + first_candidate, k)

    def _compare_exactly(self, i: Tensor, j: Tensor, k: int) -> None:
        step = max(1, _NUMBERS // self.queries.shape[1])
        for a, b in zip(i.split(step), j.split(step), strict=True):
            scores = _inner(self.queries[a], self.candidates[b])
            stands_before = scores >= self.right[a, k] - self.slack[a]
            self.before[:, k].index_add_(0, a, stands_before.long())


def _run(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, block: int, *, both: bool
) -> tuple[Ranks, Ranks | None]:
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    # What is not finite compares with nothing: it is taken out here, and counted as said at the end.
    x_finite, y_finite = (z.sum(1).isfinite() for z in (x, y))
    x_known, y_known = (z if bool(ok.all()) else z[ok] for z, ok in ((x, x_finite), (y, y_finite)))
    a, b = x_labels[x_finite], y_labels[y_finite]
    forward = _Direction(x_known, y_known, _best_right(x_known, y_known, a, b)) if len(a) and len(b) else None
    backward = _Direction(y_known, x_known, _best_right(y_known, x_known, b, a)) if forward and both else None
    if forward is not None:
        with _full_precision():
            _count(forward, backward, a, b, min(block, len(a)))
    found = _ranks(forward, x_finite, y_finite, x_labels, y_labels)
    return found, _ranks(backward, y_finite, x_finite, y_labels, x_labels) if both else None


def _count(forward: _Direction, backward: _Direction | None, a: Tensor, b: Tensor, block: int) -> None:
    x, y = forward.queries, forward.candidates
    right = _Right(a, b)
    scores = x.new_empty(block, len(y))
    buffer = x.new_empty(min(_STRIP, block), len(y))
    for start in range(0, len(x), block):
        tile = scores[: min(block, len(x) - start)]
        torch.mm(x[start : start + len(tile)], y.T, out=tile)
        first = start
        # Strips begin at multiples of their height, whatever the block: the depths are those of such strips.
        while first < start + len(tile):
            last = min(start + len(tile), (first // _STRIP + 1) * _STRIP)
            strip = tile[first - start : last - start]
            if int(right.count[first:last].sum()) < strip.numel() // 8:
                strip[right.pairs(torch.arange(first, last, device=x.device))[::2]] = -torch.inf
            else:
                strip.masked_fill_(a[first:last, None] == b, -torch.inf)
            forward.count(strip, first, 0, 1, buffer[: len(strip)])
            if backward is not None:
                backward.count(strip, 0, first, 0, buffer[: len(strip)])
            first = last


def _ranks(
    counted: _Direction | None, finite: Tensor, candidates_finite: Tensor, labels: Tensor, candidate_labels: Tensor
) -> Ranks:
    """Counts of what is finite -> ranks of all."""
    m = len(candidate_labels)
    positives = _occurrences(labels, candidate_labels)
    best = m - positives
    precision = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    if counted is not None:
        lost = candidate_labels[~candidates_finite]
        more = len(lost) - _occurrences(labels, lost)
        before = counted.before + more[finite, None]
        place = torch.arange(before.shape[1], device=labels.device)
        stands = (counted.right < torch.inf) & (before + place < DEPTH)
        terms = torch.where(stands, (place + 1) / (before + place + 1).double(), 0.0).sum(1)
        precision[finite] = terms / positives[finite].clamp(1, DEPTH)
        best[finite] = torch.where(counted.right[:, 0] < torch.inf, before[:, 0], best[finite])
    return Ranks(best, positives, precision, m)


def _occurrences(labels: Tensor, among: Tensor) -> Tensor:
    """How often each label stands in `among`."""
    rising = among.sort().values
    return torch.searchsorted(rising, labels, right=True) - torch.searchsorted(rising, labels)


class _Right:
    """Which candidates are right, by label."""

    def __init__(self, labels: Tensor, candidate_labels: Tensor) -> None:
        self.order = candidate_labels.argsort(stable=True)
        rising = candidate_labels[self.order]
        self.start = torch.searchsorted(rising, labels)
        self.count = torch.searchsorted(rising, labels, right=True) - self.start  # [n]

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Right candidates of some queries: place in `rows`, how many of the query stand before it, candidate."""
        count = self.count[rows]
        i = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
        place = torch.arange(len(i), device=rows.device) - (count.cumsum(0) - count)[i]
        return i, place, self.order[self.start[rows[i]] + place]


def _best_right(x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor) -> Tensor:
    """[n, K] float64: scores of the best right candidates, falling, +inf where there are fewer."""
    right = _Right(x_labels, y_labels)
    k = min(DEPTH, max(1, int(right.count.max())))
    found = torch.full((len(x), k), -torch.inf, dtype=torch.float64, device=x.device)
    few = ((right.count > 0) & (right.count <= _LARGE)).nonzero()[:, 0]
    width = max(k, int(right.count[few].max())) if len(few) else k
    for rows in few.split(max(1, _NUMBERS // (x.shape[1] * width))):
        i, place, j = right.pairs(rows)
        scores = found.new_full((len(rows), width), -torch.inf)
        scores[i, place] = _inner(x[rows[i]], y[j])
        found[rows] = scores.topk(k).values
    for label in x_labels[right.count > _LARGE].unique():
        columns = (y_labels == label).nonzero()[:, 0]
        for rows in (x_labels == label).nonzero()[:, 0].split(_STRIP):
            for part in columns.split(max(1, _NUMBERS // x.shape[1])):
                scores = torch.cat([found[rows], x[rows].double() @ y[part].double().T], 1)
                found[rows] = scores.topk(k).values
    return torch.where(found > -torch.inf, found, torch.inf)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """[p, D], [p, D] -> [p] float64."""
    return (a.double() * b.double()).sum(1)


@contextmanager
def _full_precision() -> Generator[None]:
    """Products of float32 in float32: with fewer bits the bound of their error would not hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
