"""Statistics of weighted items, their bootstrap intervals and chance levels, so that a score is never a bare number.

A statistic is a function of the weights of n items. With equal weights it is the score; with the weights of resamples
it gives the score's interval; and with the same resamples for two models, the interval of their difference.

Letters: n items, R resamples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmcontrast.randomness import fold_seed

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Weights [R, n] -> [R]; NaN where the weighted items leave it undefined."""

RESAMPLES = 1000
_NUMBERS = 1 << 22  # of weights held at once: 32 MB


def mean(values: ArrayLike) -> Statistic:
    """Of [n] values; items whose value is NaN are not counted."""
    items = np.asarray(values, dtype=np.float64)
    known = (~np.isnan(items)).astype(np.float64)
    filled = np.nan_to_num(items, nan=0.0)
    return lambda weights: _ratio(weights @ filled, weights @ known)


def median(values: ArrayLike) -> Statistic:
    """The lower median of [n] values."""
    items = np.asarray(values, dtype=np.float64)
    order = np.argsort(items, kind="stable")

    def of(weights: Floats) -> Floats:
        rising = weights[:, order].cumsum(1)
        return items[order[(rising >= rising[:, -1:] / 2).argmax(1)]]

    return of


def mean_of_classes(values: ArrayLike, classes: ArrayLike) -> Statistic:
    """The mean over classes of the mean of their items; classes without items are not counted."""
    items, numbers = np.asarray(values, dtype=np.float64), np.asarray(classes)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=numbers.min() - 1))

    def of(weights: Floats) -> Floats:
        by_class = weights[:, order]
        count = np.add.reduceat(by_class, starts, axis=1)
        found = _ratio(np.add.reduceat(by_class * items[order], starts, axis=1), count)
        return _ratio(np.nansum(found, axis=1), (count > 0).sum(1).astype(np.float64))

    return of


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int) -> Statistic:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, eq. 3): |confidence - accuracy| over equal bins.

    Args:
        confidence: [n] probabilities of what is named.
        right: [n], whether it is right.
        bins: equal parts of 0..1, each with its upper end.
    """
    said, gap = np.asarray(confidence, dtype=np.float64), np.asarray(confidence) - np.asarray(right, dtype=np.float64)
    signed = np.zeros((len(said), bins))
    signed[np.arange(len(said)), bin_of(said, bins)] = gap
    return lambda weights: _ratio(np.abs(weights @ signed).sum(1), weights.sum(1))


def bin_of(values: Floats, bins: int) -> NDArray[np.int64]:
    """Which of `bins` equal parts of 0..1 each value is in, each part with its upper end; 0 is in the first."""
    return np.clip(np.ceil(values * bins).astype(np.int64) - 1, 0, bins - 1)


def resampled(
    statistics: Mapping[str, Statistic], count: int, groups: NDArray[np.int64] | None = None
) -> dict[str, Floats]:
    """Every statistic of 1000 resamples of the items, or of whole groups; always the same ones (Efron 1979).

    Args:
        statistics: name -> statistic of n items.
        count: n.
        groups: [n], 0..G-1: items with equal numbers, such as those of one patient, are drawn together.
    """
    found: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in _weights(count, groups):
        for name, statistic in statistics.items():
            found[name].append(statistic(weights))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(values: Floats, *, level: float = 0.95) -> tuple[float, float] | None:
    """The middle `level` of resampled values; None where they are not defined."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def value(statistic: Statistic, count: int) -> float | None:
    """The statistic of the items as they are."""
    (found,) = statistic(np.ones((1, count)))
    return None if np.isnan(found) else float(found)


def _weights(count: int, groups: NDArray[np.int64] | None) -> Iterator[Floats]:
    """How often each item is drawn, [r, n] for some of the resamples at a time."""
    units = count if groups is None else int(groups.max()) + 1
    rng = np.random.Generator(np.random.Philox(key=fold_seed("bootstrap", units)))
    step = max(1, _NUMBERS // count)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = rng.integers(0, units, (rows, units)) + np.arange(rows)[:, None] * units
        times = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)
        yield times if groups is None else times[:, groups]


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.full_like(a, np.nan), where=b > 0)


def chance_recall(candidates: int, positives: ArrayLike, k: int) -> float:
    """Expected recall@k of a random order: mean over queries of 1 - C(N - p, k) / C(N, k)."""
    p = np.asarray(positives, dtype=np.float64)
    miss = np.ones_like(p)
    for i in range(min(k, candidates)):
        miss *= np.clip((candidates - p - i) / (candidates - i), 0, 1)
    return float((1 - miss).mean())
