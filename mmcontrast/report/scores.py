"""What evaluations said while a run trained: newest scores with their intervals, and how they came about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmcontrast.charts import Bar, Line, bars, line_chart
from mmcontrast.eval.result import chance_of
from mmcontrast.page import Html, Node, number, section, table, tag
from mmcontrast.report.history import History
from mmcontrast.report.measures import line_of, style_of

_ENDS = ("_low", "_high")
_COUNTS = ("classes", "samples", "queries", "candidates", "pairs", "items", "positives", "labels")


@dataclass(frozen=True)
class Question:
    """One evaluator's numbers in the runs.

    Attributes:
        name: of the evaluator; that of the averaged weights says so.
        prefix: of its curves.
        metrics: those that are scores.
        counts: how many.
        facts: further numbers without an interval.
    """

    name: str
    prefix: str
    metrics: list[str]
    counts: list[str]
    facts: list[str]


def questions(runs: Mapping[str, History]) -> list[Question]:
    """All evaluators, in the order in which they were asked."""
    found: dict[str, list[str]] = {}
    for run in runs.values():
        for name in run.curves:
            if match := re.fullmatch(r"(eval(?:_ema)?/.+)/([^/]+)", name):
                names = found.setdefault(match[1], [])
                if match[2] not in names:
                    names.append(match[2])
    return [_question(prefix, names) for prefix, names in found.items()]


def _question(prefix: str, names: list[str]) -> Question:
    kind, _, name = prefix.partition("/")
    ends = {f"{n}{end}" for n in names for end in _ENDS}
    chance = [n for n in names if "chance" in n.split("@")[0].split("_")]
    counts = [n for n in names if n in _COUNTS or n.endswith("_items")]
    left = [n for n in names if n not in ends and n not in chance and n not in counts]
    metrics = [n for n in left if f"{n}_low" in names]
    facts = [n for n in left if n not in metrics]
    return Question(f"{name}, averaged weights" if kind == "eval_ema" else name, prefix, metrics, counts, facts)


def scores(runs: Mapping[str, History]) -> Node:
    """The section; nothing where nothing was asked."""
    asked = questions(runs)
    if not asked:
        return None
    said = "Lines over the bars are 95 % intervals, upright marks what chance reaches"
    many = any(c.count > 1 for run in runs.values() for n, c in run.curves.items() if n.startswith(asked[0].prefix))
    said += "; what a score was at first stands behind it." if many else "."
    return section("Evaluation", tag("p", said, class_="quiet"), [_newest(runs, q) for q in asked])


def _newest(runs: Mapping[str, History], q: Question) -> Html:
    """Scores of the newest evaluation as bars, others as numbers; over the steps, if there were several."""
    drawn: list[Bar] = []
    others: list[tuple[str, list[Node]]] = []
    for metric in [*q.metrics, *q.facts]:
        of_runs = {name: _score(run, q.prefix, metric) for name, run in runs.items()}
        if metric in q.metrics and "rank" not in metric and all(_is_share(b) for b in of_runs.values()):
            for colour, (name, bar) in enumerate(of_runs.items()):
                told = f"{words(metric)}: {name}" if len(runs) > 1 else words(metric)
                drawn.append(replace(bar, name=told, colour=colour))
        else:
            others.append((words(metric), [_in_words(bar) for bar in of_runs.values()]))
    steps = sorted({b.step for run in runs.values() for n in run.curves if n.startswith(f"{q.prefix}/")
                    for b in run.curves[n].buckets[-1:]})  # fmt: skip
    counts = ", ".join(f"{number(run.last(f'{q.prefix}/{n}'))} {n.replace('_', ' ')}" for run in list(runs.values())[:1]
                       for n in q.counts if run.last(f"{q.prefix}/{n}") is not None)  # fmt: skip
    at = f"Step {', '.join(number(round(step)) for step in steps[:4])}" + (f": {counts}." if counts else ".")
    return tag(
        "div",
        tag("h3", q.name),
        tag("p", at, class_="quiet"),
        bars(drawn) if drawn else None,
        table(["", *(runs if len(runs) > 1 else [""])], [[name, *cells] for name, cells in others]) if others else None,
        tag("div", _charts(runs, q), class_="charts"),
    )


def _score(run: History, prefix: str, metric: str) -> Bar:
    at = f"{prefix}/{metric}"
    known = {n.removeprefix(f"{prefix}/"): c.last for n, c in run.curves.items() if n.startswith(f"{prefix}/")}
    curve = run.curves.get(at)
    first = ""
    if curve is not None and curve.count > 1:
        first = f"was {number(round(curve.first, 3))}"
    return Bar(
        metric, run.last(at), run.last(f"{at}_low"), run.last(f"{at}_high"), chance_of(metric, known), note=first
    )


def _is_share(bar: Bar) -> bool:
    return bar.value is None or (0 <= bar.value <= 1 and (bar.high is None or bar.high <= 1))


def words(metric: str) -> str:
    """A name as a person reads it."""
    return metric.replace("_", " ")


def _in_words(bar: Bar) -> str:
    ends = "" if bar.low is None else f" [{number(_short(bar.low))}, {number(_short(bar.high))}]"
    return f"{number(_short(bar.value))}{ends} {bar.note}".strip()


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _charts(runs: Mapping[str, History], q: Question) -> list[Html]:
    """Curves of the scores that were asked several times; recall@1, @5 and @10 share a chart."""
    families: dict[str, list[str]] = {}
    for metric in [*q.metrics, *q.facts]:
        if any(q_curve.count > 1 for run in runs.values() if (q_curve := run.curves.get(f"{q.prefix}/{metric}"))):
            stem = metric.partition("@")[0] if "@" in metric else re.sub(r"(?<=acc)\d+$", "", metric)
            families.setdefault(stem, []).append(metric)
    return [_chart(runs, q, stem, metrics) for stem, metrics in families.items()]


def _chart(runs: Mapping[str, History], q: Question, stem: str, metrics: list[str]) -> Html:
    lines: list[Line] = []
    for i, (name, run) in enumerate(runs.items()):
        for k, metric in enumerate(metrics):
            at = f"{q.prefix}/{metric}"
            if at in run.curves:
                kind = metric.removeprefix(stem) if "@" in metric else metric
                told = [name if len(runs) > 1 else "", kind if len(metrics) > 1 else ""]
                label = ": ".join(part for part in told if part)
                ends = [run.curves.get(f"{at}{end}") for end in _ENDS]
                colour, dash = style_of(i, k, len(runs))
                curve = run.curves[at]
                lines.append(
                    line_of(curve, label, colour=colour, dash=dash, low=ends[0], high=ends[1], dots=curve.count <= 60)
                )
    chance: dict[str, float] = {}
    if len(metrics) == 1:
        known = {n.removeprefix(f"{q.prefix}/"): c.last for n, c in next(iter(runs.values())).curves.items()}
        level = chance_of(metrics[0], known)
        chance = {} if level is None else {f"chance: {number(round(level, 3))}": level}
    title = words(stem if len(metrics) > 1 and "@" in metrics[0] else ", ".join(metrics))
    banded = "Bands are 95 % intervals." if any(line.low for line in lines) else ""
    return line_chart(lines, title=title, about=banded, levels=chance)
