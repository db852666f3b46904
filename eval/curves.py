"""How well scores part those that have a class from those that do not, averaged over classes, as weighted statistics.

Letters: n items, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcontrast.eval.statistics import Floats, Statistic


class Curve(NamedTuple):
    """What one class's scores reach; NaN where the weights leave it undefined.

    Attributes:
        auroc: [R], area under the ROC curve: the share of pairs of one with and one without the class in which the one
            with it scores higher; ties count half.
        average_precision: [R], sum over thresholds of the recall gained there times the precision.
        f1: [R], the largest F1 of any threshold.
        threshold: [R], the score from which on that F1 says yes.
    """

    auroc: Floats
    average_precision: Floats
    f1: Floats
    threshold: Floats


class Curves:
    """Of scores [n, C] and which of them are right [n, C]; items with equal scores stand on one side of a threshold."""

    def __init__(self, scores: Floats, right: NDArray[np.bool_]) -> None:
        self.scores, self.right = scores, right
        self.known = [c for c in range(right.shape[1]) if right[:, c].any()]
        """Classes that an item has; the others are left out of every mean."""
        self._order = np.argsort(-scores, axis=0, kind="stable")
        self._last: tuple[Floats, Mapping[str, Floats]] | None = None

    def of(self, c: int, weights: Floats) -> Curve:
        """One class, for weights [R, n]."""
        order = self._order[:, c]
        falling, right = self.scores[order, c], self.right[order, c]
        ends = np.append(np.flatnonzero(np.diff(falling)), len(falling) - 1)
        drawn = weights[:, order]
        with_it = (drawn * right).cumsum(1)[:, ends]
        above = drawn.cumsum(1)[:, ends]
        without = above - with_it
        p, n = with_it[:, -1], without[:, -1]
        with np.errstate(divide="ignore", invalid="ignore"):
            gained = np.diff(with_it, axis=1, prepend=0)
            area = (np.diff(without, axis=1, prepend=0) * (with_it - gained / 2)).sum(1) / (p * n)
            precision = np.divide(with_it, above, out=np.zeros_like(above), where=above > 0)
            average = (gained * precision).sum(1) / p
            f1 = 2 * with_it / (p[:, None] + above)
        best = np.nan_to_num(f1).argmax(1)
        return Curve(area, average, np.where(p > 0, f1.max(1), np.nan), falling[ends][best])

    def statistics(self) -> dict[str, Statistic]:
        """Means over classes that have both sides among the weighted items: macro AUROC, mAP, macro largest F1."""
        return {name: self._mean(name) for name in ("macro_auroc", "mean_average_precision", "macro_max_f1")}

    def _mean(self, name: str) -> Statistic:
        def of(weights: Floats) -> Floats:
            # All three are asked of the same resamples: the curves are made once.
            if self._last is None or self._last[0] is not weights:
                self._last = (weights, self._means(weights))
            return self._last[1][name]

        return of

    def _means(self, weights: Floats) -> Mapping[str, Floats]:
        curves = [self.of(c, weights) for c in self.known]
        return {
            "macro_auroc": _mean_of_known([c.auroc for c in curves]),
            "mean_average_precision": _mean_of_known([c.average_precision for c in curves]),
            "macro_max_f1": _mean_of_known([c.f1 for c in curves]),
        }


def _mean_of_known(of_classes: list[Floats]) -> Floats:
    stacked = np.stack(of_classes)
    count = (~np.isnan(stacked)).sum(0).astype(np.float64)
    return np.divide(np.nansum(stacked, axis=0), count, out=np.full(len(count), np.nan), where=count > 0)
