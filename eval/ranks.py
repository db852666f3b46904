"""Exact ranks in both directions from one blocked pass over the scores.

A query's rank is how many wrong candidates stand before its best right one: those that score higher, and those that
tie with it, so that equal embeddings never score. How they are counted is in `counting.py`.

Letters: n queries, m candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.eval.counting import BLOCK, Direction, Right, best_right, count

DEPTH = 10
"""Of the mean average precision: no more right candidates than this can stand within it."""


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
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, *, block: int = BLOCK
) -> tuple[Ranks, Ranks]:
    """Ranks of y for queries x, and of x for queries y, from one matrix product.

    Beside its inputs it holds, in each thread, [block, 1984] scores and 3 MB.

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


def rank(x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, *, block: int = BLOCK) -> Ranks:
    """Ranks of y for queries x alone; as `rank_both_ways`."""
    return _run(x, y, x_labels, y_labels, block, both=False)[0]


def _run(
    x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor, block: int, *, both: bool
) -> tuple[Ranks, Ranks | None]:
    if block < 1:
        raise ValueError(f"block is {block}; it must be at least 1")
    # What is not finite compares with nothing: it is taken out here, and counted as said at the end.
    x_finite, y_finite = (z.sum(1).isfinite() for z in (x, y))
    x_known, y_known = (z if bool(ok.all()) else z[ok] for z, ok in ((x, x_finite), (y, y_finite)))
    a, b = x_labels[x_finite], y_labels[y_finite]
    forward = backward = None
    if len(a) and len(b):
        right = Right(a, b)
        with _alone() as threads:
            forward = Direction(x_known, y_known, best_right(x_known, y_known, right, DEPTH, threads))
            if both:
                backward = Direction(y_known, x_known, best_right(y_known, x_known, Right(b, a), DEPTH, threads))
            count(forward, backward, right, block, threads)
    found = _ranks(forward, x_finite, y_finite, x_labels, y_labels)
    return found, _ranks(backward, y_finite, x_finite, y_labels, x_labels) if both else None


@contextmanager
def _alone() -> Generator[int]:
    """Operations of one thread, and how many threads there may be.

    Torch's helpers go on to spin for some milliseconds after an operation that they shared, in the way of our threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _ranks(
    counted: Direction | None, finite: Tensor, candidates_finite: Tensor, labels: Tensor, candidate_labels: Tensor
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
