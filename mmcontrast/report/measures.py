"""Which charts a run has: every number that it writes has its place, and those that are not known get one of their own.

Letters: m a modality, x-y a pair of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from mmcontrast.charts import COLOURS, Line, Mark, line_chart
from mmcontrast.page import Html, number
from mmcontrast.report.history import Curve, History

_LEFT_OUT = re.compile(r"data/|epoch$|batch/|chance/|geometry/rank_limit/")  # in tables, or as dotted lines


@dataclass(frozen=True)
class Chart:
    """Curves that belong on one chart.

    Attributes:
        title: what it shows.
        names: pattern of the curves; its group, if it has one, tells them apart.
        y: unit.
        about: what the numbers mean.
        rules: beginnings of the rules of health that speak of it; "" are all.
        log: logarithms, where values differ by more than a factor of fifty.
        zero: begins at 0.
        shown: what is drawn of a value.
    """

    title: str
    names: str
    y: str = ""
    about: str = ""
    rules: tuple[str, ...] = ()
    log: bool = False
    zero: bool = False
    shown: Callable[[float], float] = field(default=float)


LEARNING = (
    Chart("Loss", r"loss", about="Of the whole batch, weighted terms added up.", rules=("",)),
    Chart("Terms of the loss", r"(\w+)\.loss", about="Each before its weight.", rules=("chance",)),
    Chart(
        "Temperature",
        r"(\w+)\.logit_scale(\.[^.]+)?",
        about="One divided by the logit scale.",
        rules=("limit",),
        shown=lambda scale: 1 / scale if scale else 0.0,
    ),
    Chart("Learning rate", r"lr", zero=True),
    Chart("Gradient norm", r"grad_norm", about="Of all weights together, before it is clipped.", log=True),
    Chart(
        "Gradient norm by tower",
        r"gradient/(.+)",
        about="A tower far below the others is hardly trained.",
        rules=("gradient",),
        log=True,
    ),
    Chart("Weights of the terms", r"(\w+)\.weight"),
)
GEOMETRY = (
    Chart(
        "Alignment", r"geometry/alignment/(.+)", about="Mean squared distance of a pair; lower is closer.", zero=True
    ),
    Chart(
        "Uniformity", r"geometry/uniformity/(.+)", about="log mean exp(-2 d²) within a modality; lower is more even."
    ),
    Chart(
        "Distance of the centroids",
        r"geometry/centroid_distance/(.+)",
        about="The gap between two modalities; at most 2.",
        zero=True,
    ),
    Chart(
        "Effective rank",
        r"geometry/effective_rank/(.+)",
        about="Dimensions that the embeddings spread over; a fall towards 1 is a collapse.",
        rules=("collapse",),
        zero=True,
    ),
    Chart("Cosine within a modality", r"geometry/cosine/(.+)", about="Mean over any two rows; 1 is a collapse."),
)
SPEED = (
    Chart("Samples per second", r"samples_per_second", rules=("slow",), zero=True),
    Chart(
        "Waiting for data", r"data_wait", y="%", about="Share of the time.", rules=("data_wait",), zero=True,
        shown=lambda share: 100 * share,
    ),
    Chart("Memory", r"memory_gb", y="GB", about="The most of the accelerator; without one, of the process.", zero=True),
)  # fmt: skip
_NAMED = (*LEARNING, *GEOMETRY, *SPEED)


def charts(runs: Mapping[str, History], wanted: Sequence[Chart]) -> list[Html]:
    """Those of the wanted charts that the runs have numbers for."""
    return [drawn for chart in wanted if (drawn := _draw(runs, chart))]


def other_charts(runs: Mapping[str, History], most: int = 24) -> tuple[list[Html], list[str]]:
    """What no chart is named for, each as its own, at most `most`; and the names of those beyond."""
    known = re.compile("|".join(f"(?:{chart.names})" for chart in _NAMED))
    names = dict.fromkeys(
        name
        for run in runs.values()
        for name in run.curves
        if not known.fullmatch(name) and not _LEFT_OUT.match(name) and not name.startswith(("eval/", "eval_ema/"))
    )
    listed = list(names)
    found = charts(runs, [Chart(name, re.escape(name)) for name in listed[:most]])
    return found, listed[most:]


def flags(runs: Mapping[str, History], rules: Sequence[str] = ("",)) -> list[Mark]:
    """What health said, numbered as in the list of it."""
    if len(runs) > 1:
        return []
    return [
        Mark(notice.step, str(i), notice.text)
        for run in runs.values()
        for i, notice in enumerate(run.notices[:99], 1)
        if notice.rule.startswith(tuple(rules))
    ]


def _draw(runs: Mapping[str, History], chart: Chart) -> Html:
    pattern = re.compile(chart.names)
    found: dict[tuple[str, str], Curve] = {}  # (run, what tells its curves apart) -> curve
    for run, history in runs.items():
        for name, curve in history.curves.items():
            if match := pattern.fullmatch(name):
                found[run, "".join(part or "" for part in match.groups())] = curve
    kinds = list(dict.fromkeys(kind for _, kind in found))
    if chart.title == "Terms of the loss" and len(kinds) == 1:
        return Html()  # it is the loss
    lines: list[Line] = []
    for (run, kind), curve in found.items():
        told = [run if len(runs) > 1 else "", kind if len(runs) == 1 or len(kinds) > 1 else ""]
        label = ": ".join(part for part in told if part)
        colour, dash = style_of(list(runs).index(run), kinds.index(kind), len(runs))
        lines.append(line_of(curve, label, colour=colour, dash=dash, shown=chart.shown))
    values = [v for line in lines for v in line.y if v is not None and v > 0]
    return line_chart(
        lines,
        title=chart.title,
        y=chart.y,
        about=chart.about,
        zero=chart.zero,
        log_y=chart.log and bool(values) and max(values) > 50 * min(values),
        levels=_levels(runs, chart),
        marks=flags(runs, chart.rules) if chart.rules else (),
    )


def style_of(run: int, kind: int, runs: int) -> tuple[int, int]:
    """Colour and dashes of a line: the colour tells runs apart where there are several, otherwise kinds."""
    return (run if runs > 1 else kind) % COLOURS, kind


def line_of(
    curve: Curve, name: str, *, colour: int = 0, dash: int = 0, shown: Callable[[float], float] = float,
    low: Curve | None = None, high: Curve | None = None, dots: bool = False,
) -> Line:  # fmt: skip
    """A curve to be drawn: where values were merged, their mean within their range; or between two other curves."""
    buckets = curve.buckets
    steps, y = [b.step for b in buckets], [shown(b.mean) for b in buckets]
    line = partial(Line, name, steps, y, colour=colour, dash=dash, dots=dots)
    if low is not None and high is not None:
        ends = [{b.step: shown(b.mean) for b in c.buckets} for c in (low, high)]
        return line(low=[ends[0].get(step) for step in steps], high=[ends[1].get(step) for step in steps])
    if any(b.count > 1 for b in buckets):
        both = [sorted((shown(b.low), shown(b.high))) for b in buckets]
        return line(low=[a for a, _ in both], high=[b for _, b in both])
    return line()


def _levels(runs: Mapping[str, History], chart: Chart) -> dict[str, float]:
    """What guessing gives, where there is one loss; where the gradient is clipped."""
    (history, *more) = runs.values()
    if chart.title == "Loss" and not more:
        chance = {
            name.removeprefix("chance/"): c.last for name, c in history.curves.items() if name.startswith("chance/")
        }
        losses = [name for name in history.curves if name.endswith(".loss")]
        # It is the term's chance before its weight.
        if len(chance) == len(losses) == 1 and _weight(history, *chance) == 1:
            (value,) = chance.values()
            return {f"guessing: {number(round(value, 3))}": value}
    if chart.title == "Gradient norm" and not more:
        limit = history.config.get("clip_norm")
        if isinstance(limit, (int, float)) and not isinstance(limit, bool):
            return {f"clipped at {number(limit)}": float(limit)}
    return {}


def _weight(history: History, term: str) -> float:
    """Of a term of the loss, 1 where nothing else is said."""
    terms = history.config.get("objectives")
    config = cast(Mapping[str, Any], terms).get(term) if isinstance(terms, Mapping) else None
    found = cast(Mapping[str, Any], config).get("weight", 1) if isinstance(config, Mapping) else 1
    return float(found) if isinstance(found, (int, float)) else 0.0
