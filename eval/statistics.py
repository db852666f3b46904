"""Intervals and chance levels, so that a score is never a bare number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from mmcontrast.randomness import fold_seed


def bootstrap(values: ArrayLike, *, resamples: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n] over resampled items (Efron 1979); always the same."""
    items = np.asarray(values, dtype=np.float64)
    rng = np.random.Generator(np.random.Philox(key=fold_seed("bootstrap", len(items))))
    means = np.array([items[rng.integers(0, len(items), len(items))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def chance_recall(candidates: int, positives: ArrayLike, k: int) -> float:
    """Expected recall@k of a random order: mean over queries of 1 - C(N - p, k) / C(N, k)."""
    p = np.asarray(positives, dtype=np.float64)
    miss = np.ones_like(p)
    for i in range(min(k, candidates)):
        miss *= np.clip((candidates - p - i) / (candidates - i), 0, 1)
    return float((1 - miss).mean())
