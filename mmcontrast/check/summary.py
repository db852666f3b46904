"""Counted values -> what a person wants of them: least, middle, most, and bars for a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmcontrast.charts import Bin

_BINS = 30
_SPREAD = 30.0  # the largest over the least value, beyond which bins grow with their values


@dataclass(frozen=True)
class Numbers:
    """One measure of many samples. low and high are the 1st and the 99th percentile."""

    count: int
    least: float
    low: float
    median: float
    high: float
    most: float
    mean: float
    bins: list[Bin]


def summarise(values: Mapping[float, int]) -> Numbers:
    """Value -> how many samples have it; at least one."""
    ordered = sorted(values.items())
    count = sum(values.values())
    return Numbers(
        count,
        ordered[0][0],
        _percentile(ordered, count, 0.01),
        _percentile(ordered, count, 0.5),
        _percentile(ordered, count, 0.99),
        ordered[-1][0],
        sum(value * n for value, n in ordered) / count,
        bins(values),
    )


def _percentile(ordered: list[tuple[float, int]], count: int, share: float) -> float:
    """The least value that at least this share of the samples do not exceed."""
    below = 0
    for value, n in ordered:
        below += n
        if below >= share * count:
            return value
    return ordered[-1][0]


def bins(values: Mapping[float, int]) -> list[Bin]:
    """At most some 30 bins on round edges; equal ratios instead of equal widths where values spread widely."""
    low, high = min(values), max(values)
    if low == high:
        return [Bin(low, high, sum(values.values()))]
    if low > 0 and high / low > _SPREAD:
        ratio = (high / low) ** (1 / _BINS)
        edges = [low * ratio**i for i in range(_BINS)] + [high]
    else:
        step = _round_up((high - low) / (_BINS - 2))
        if all(value == int(value) for value in (low, high, *list(values)[:100])):
            step = max(1.0, math.ceil(step))
        first, last = math.floor(low / step), math.floor(high / step) + 1
        edges = [round(step * i, 10) for i in range(first, last + 1)]
    counts = [0] * (len(edges) - 1)
    at = 0
    for value, n in sorted(values.items()):
        while at < len(counts) - 1 and value >= edges[at + 1]:
            at += 1
        counts[at] += n
    return [Bin(a, b, n) for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def _round_up(step: float) -> float:
    size = 10 ** math.floor(math.log10(step))
    return next(size * f for f in (1, 2, 2.5, 5, 10) if size * f >= step * (1 - 1e-9))
