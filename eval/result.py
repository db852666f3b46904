"""What a task found: scores with their intervals, what chance reaches, of how many items; and two models compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.eval.statistics import Statistic, interval, resampled, value


class Metric(NamedTuple):
    """A score and its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Items:
    """What a task asked about one by one, and the statistics over it.

    Attributes:
        keys: [n] names of the items, equal for every model that is asked the same.
        statistics: metric -> statistic of the n items' weights.
        groups: [n], 0..G-1: items that are resampled together; None resamples single items.
    """

    keys: Sequence[str]
    statistics: Mapping[str, Statistic]
    groups: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Result:
    """What a task found.

    Attributes:
        task: its name, that of CLIP_benchmark where it has the task.
        items: what it asked about; every metric stands in one of them.
        facts: numbers without interval.
        chance: name -> what a random answer reaches.
        counts: name -> how many.
        undefined: metrics that these data leave undefined.
        renamed: another name -> metric that is also known by it.
        warnings: sentences on what may mislead.
        details: what a report can draw, by name.
    """

    task: str
    items: Sequence[Items] = ()
    facts: Mapping[str, float | None] = field(default_factory=dict[str, "float | None"])
    chance: Mapping[str, float] = field(default_factory=dict[str, float])
    counts: Mapping[str, int] = field(default_factory=dict[str, int])
    undefined: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    warnings: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """Name -> score with interval."""
        found: dict[str, Metric] = {}
        for part in self.items:
            draws = resampled(part.statistics, len(part.keys), part.groups)
            for name, statistic in part.statistics.items():
                found[name] = Metric(value(statistic, len(part.keys)), *(interval(draws[name]) or ()))
        found |= {name: Metric(number) for name, number in self.facts.items()}
        return found | {name: Metric(None) for name in self.undefined}

    def flat(self) -> dict[str, float | None]:
        """Everything by name: `acc1`, `acc1_low`, `acc1_high`, chance and counts."""
        found: dict[str, float | None] = {}
        for name, metric in self.metrics.items():
            found[name] = metric.value
            if metric.low is not None:
                found |= {f"{name}_low": metric.low, f"{name}_high": metric.high}
        return found | {**self.chance, **{name: float(count) for name, count in self.counts.items()}}

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a report that is drawn later."""
        return {
            "task": self.task,
            "metrics": {name: list(metric) for name, metric in self.metrics.items()},
            "chance": dict(self.chance),
            "counts": dict(self.counts),
            "warnings": list(self.warnings),
            "details": dict(self.details),
        }


def chance_of(metric: str, known: Mapping[str, float]) -> float | None:
    """What a random answer reaches of a metric, where results say so: `chance`, `WAY_chance@k` and so on."""
    if metric in ("acc1", "mean_per_class_recall", "zero_shot_acc1") or re.fullmatch(r"(blend_)?acc1@\d+shot", metric):
        return known.get("chance", known.get("chance@1"))
    if match := re.fullmatch(r"(?:(.*_)?recall@|acc)(\d+)", metric):
        return known.get(f"{match[1] or ''}chance@{match[2]}", known.get(f"chance@{match[2]}"))
    return known.get(f"{metric}_chance")


class Difference(NamedTuple):
    """One model's score less another's, with the 95 % interval over the same resamples of the same items."""

    value: float
    low: float
    high: float


def compare(ours: Result, theirs: Result) -> dict[str, Difference]:
    """Metric -> ours less theirs. An interval without 0 is a difference that the items bear out.

    The items are resampled together for both models, so what both find hard does not widen the interval.

    Raises:
        ConfigError: the two did not answer the same questions.
    """
    found: dict[str, Difference] = {}
    for a, b in zip(ours.items, theirs.items, strict=False):
        if list(a.keys) != list(b.keys):
            raise ConfigError(
                f"{ours.task}: the models were not asked the same: {len(a.keys)} and {len(b.keys)} items, of which "
                f"{len(set(a.keys) & set(b.keys))} are common; compare them on data that both can read"
            )
        names = [name for name in a.statistics if name in b.statistics]
        drawn = [resampled({n: part.statistics[n] for n in names}, len(part.keys), a.groups) for part in (a, b)]
        for name in names:
            values = [value(part.statistics[name], len(part.keys)) for part in (a, b)]
            ends = interval(drawn[0][name] - drawn[1][name])
            if values[0] is not None and values[1] is not None and ends is not None:
                found[name] = Difference(values[0] - values[1], *ends)
    return found
