"""What a classifier's scores are worth, whichever classifier gave them: one class per sample, or several.

Letters: n samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.eval.curves import Curves
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.statistics import Floats, Statistic, bin_of, calibration_error, mean, mean_of_classes

Scores = Callable[[slice], Floats]
"""Scores [b, C] of some of the samples, higher is likelier; -inf is never."""
BINS = 15
"""Of confidence, as Guo et al. 2017 have it."""
SHOWN = 100
"""Mistakes that a result's details name."""
_BLOCK = 4096


def softmax(scale: float) -> Callable[[Floats], Floats]:
    """Probabilities of scores [b, C] at a scale; 0 where a score is not a number."""

    def of(scores: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            powers = np.exp(scale * (scores - scores.max(1, keepdims=True)))
        return np.nan_to_num(powers / powers.sum(1, keepdims=True))

    return of


@dataclass(frozen=True, kw_only=True)
class Classified:
    """n samples, and a classifier's scores of them.

    Attributes:
        task: name of the result.
        names: [n] of the items.
        positions: [n] places of the samples in their data.
        classes: [C] names.
        scores: of any of the samples.
        probabilities: scores [b, C] -> probabilities; None where that is not known.
        groups: [n], see `Items`.
        facts, chance, counts, warnings: of the result, beside those that follow from the scores.
        renamed: CLIP_benchmark's name -> metric.
    """

    task: str
    names: Sequence[str]
    positions: Sequence[int]
    classes: Sequence[str]
    scores: Scores
    probabilities: Callable[[Floats], Floats] | None = None
    groups: NDArray[np.int64] | None = None
    facts: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    chance: dict[str, float] = field(default_factory=dict[str, float])
    counts: dict[str, int] = field(default_factory=dict[str, int])
    warnings: Sequence[str] = ()
    renamed: dict[str, str] = field(default_factory=dict[str, str])

    def of_one(self, truth: NDArray[np.int64], before: NDArray[np.int64] | None = None) -> Result:
        """Each sample has one class, `truth` [n].

        - acc1, acc5 (undefined below five classes): the right class scores highest, or is among the five that do.
        - mean_per_class_recall: acc1 of each class that has samples, averaged.
        - ece: expected calibration error of the named class's probability, in 15 bins.

        A class that ties with the right one stands before it. Details: `confusion` (true, predicted, count),
        `reliability` (of each bin that has samples), and as `mistakes` those of the greatest margin, at most 100.

        Args:
            truth: [n] right classes.
            before: [n] how many classes stand before the right one, where that is already known.
        """
        outcome = self._outcomes(truth, before)
        hit1, hit5 = ((outcome.before < k).astype(np.float64) for k in (1, 5))
        five = len(self.classes) >= 5
        statistics: dict[str, Statistic] = {"acc1": mean(hit1), **({"acc5": mean(hit5)} if five else {})}
        statistics["mean_per_class_recall"] = mean_of_classes(hit1, truth)
        if self.probabilities is not None:
            statistics["ece"] = calibration_error(outcome.confidence, hit1, BINS)
        counts = np.bincount(truth, minlength=len(self.classes))
        return Result(
            self.task,
            [Items(self.names, statistics, self.groups)],
            facts=self.facts,
            chance={"chance": 1 / len(self.classes), **self.chance},
            counts={"classes": len(self.classes), "samples": len(truth), **self.counts},
            undefined=() if five else ("acc5",),
            renamed=self.renamed,
            warnings=[*self.warnings, *_empty(self.classes, counts)],
            details={
                "classes": list(self.classes),
                "confusion": _confusion(truth, outcome.predicted, len(self.classes)),
                "mistakes": self._mistakes(outcome, truth),
                **({"reliability": _reliability(outcome.confidence, hit1)} if self.probabilities is not None else {}),
            },
        )

    def of_several(self, right: NDArray[np.bool_]) -> Result:
        """Each sample has any number of classes, `right` [n, C]; means over the classes that samples have.

        - macro_auroc, chance .5; mean_average_precision, chance the mean share of samples that have a class;
          macro_max_f1: the largest F1 of any threshold, one for each class, chance that of always saying yes.

        Details: `per_class` (name, samples, auroc, average_precision, max_f1, its threshold).
        """
        curves = Curves(self.scores(slice(0, len(right))), right)
        once = np.ones((1, len(right)))
        per_class: list[dict[str, Any]] = []
        for c in curves.known:
            found = curves.of(c, once)
            per_class.append(
                {
                    "class": self.classes[c],
                    "samples": int(right[:, c].sum()),
                    "auroc": _number(found.auroc[0]),
                    "average_precision": _number(found.average_precision[0]),
                    "max_f1": _number(found.f1[0]),
                    "threshold": _number(found.threshold[0]),
                }
            )
        share = right.mean(0)[curves.known]
        return Result(
            self.task,
            [Items(self.names, curves.statistics(), self.groups)],
            facts=self.facts,
            chance={
                "macro_auroc_chance": 0.5,
                "mean_average_precision_chance": float(share.mean()),
                "macro_max_f1_chance": float((2 * share / (1 + share)).mean()),
            },
            counts={
                "classes": len(self.classes),
                "classes_with_samples": len(curves.known),
                "samples": len(right),
                "labels": int(right.sum()),
                **self.counts,
            },
            renamed=self.renamed,
            warnings=[*self.warnings, *_empty(self.classes, right.sum(0))],
            details={"classes": list(self.classes), "per_class": per_class},
        )

    def _outcomes(self, truth: NDArray[np.int64], before: NDArray[np.int64] | None) -> _Outcomes:
        parts: list[_Outcomes] = []
        for start in range(0, len(truth), _BLOCK):
            part = slice(start, start + _BLOCK)
            found, right = np.array(self.scores(part), dtype=np.float64), truth[part]
            rows = np.arange(len(right))
            probabilities = np.full_like(found, np.nan) if self.probabilities is None else self.probabilities(found)
            of_right = found[rows, right]
            ahead = (~(found < of_right[:, None])).sum(1) - 1 if before is None else before[part]
            found[rows, right] = -np.inf
            named = np.where(ahead == 0, right, found.argmax(1))
            found[rows, right] = of_right
            parts.append(_Outcomes(ahead, named, found[rows, named], probabilities[rows, named], of_right))
        return _Outcomes(
            *(np.concatenate([getattr(p, name) for p in parts]) for name in _Outcomes.__dataclass_fields__)
        )

    def _mistakes(self, outcome: _Outcomes, truth: NDArray[np.int64]) -> list[dict[str, Any]]:
        wrong = np.flatnonzero(outcome.before > 0)
        with np.errstate(invalid="ignore"):
            margin = outcome.score[wrong] - outcome.right_score[wrong]
        hardest = wrong[np.argsort(-np.nan_to_num(margin, nan=0.0), kind="stable")[:SHOWN]]
        return [
            {
                "item": self.names[i],
                "position": int(self.positions[i]),
                "label": self.classes[int(truth[i])],
                "predicted": self.classes[int(outcome.predicted[i])],
                "score": _number(outcome.score[i]),
                "right_score": _number(outcome.right_score[i]),
                "confidence": _number(outcome.confidence[i]),
                "rank": int(outcome.before[i]) + 1,
            }
            for i in hardest.tolist()
        ]


@dataclass(frozen=True)
class _Outcomes:
    """[n] each: classes before the right one; the class that is named, its score and probability; the right's score."""

    before: NDArray[np.int64]
    predicted: NDArray[np.int64]
    score: Floats
    confidence: Floats
    right_score: Floats


def _reliability(confidence: Floats, right: Floats) -> list[dict[str, float]]:
    """Bins that have samples: their ends, how many, how sure and how often right on average."""
    places = bin_of(confidence, BINS)
    return [
        {
            "low": b / BINS,
            "high": (b + 1) / BINS,
            "count": int((places == b).sum()),
            "confidence": float(confidence[places == b].mean()),
            "accuracy": float(right[places == b].mean()),
        }
        for b in np.unique(places).tolist()
    ]


def _confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> list[list[int]]:
    """(true class, named class, samples) of the pairs that occur."""
    pairs, counts = np.unique(truth * classes + predicted, return_counts=True)
    return [[int(pair) // classes, int(pair) % classes, int(n)] for pair, n in zip(pairs, counts, strict=True)]


def _empty(classes: Sequence[str], counts: NDArray[Any]) -> list[str]:
    empty = [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]
    if not empty:
        return []
    listed = ", ".join(map(repr, empty[:5])) + (" …" if len(empty) > 5 else "")
    return [f"{len(empty)} of {len(classes)} classes have no sample: {listed}"]


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
