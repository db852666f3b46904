"""Bars: scores below each other, and how often values come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcontrast.charts.figure import COLOURS
from mmcontrast.page import Html, Node, number, tag

_WIDTH, _HEIGHT, _BOTTOM = 320, 120, 18  # of a histogram


@dataclass(frozen=True)
class Bin:
    """How many values lie in low <= value < high (the last bin holds its upper end)."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Bar:
    """A score with its interval and what chance reaches.

    `said` stands instead of the numbers, `note` behind them; `colour` is one of the `COLOURS`.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    note: str = ""
    colour: int = 0
    said: str = ""


def bars(rows: Sequence[Bar], *, most: float = 1.0) -> Html:
    """Scores from 0 to `most` below each other, with their intervals, what chance reaches, and the numbers."""
    found: list[Node] = []
    for row in rows:
        parts: list[Node] = []
        if row.value is not None:
            parts.append(tag("i", class_="bar", style=f"width:{_percent(row.value, most)}"))
        if row.low is not None and row.high is not None:
            left, right = _percent(row.low, most), _percent(row.high - row.low, most)
            parts.append(tag("i", class_="range", style=f"left:{left};width:{right}"))
        if row.chance is not None:
            parts.append(tag("i", class_="chance", style=f"left:{_percent(row.chance, most)}", title="chance"))
        ends = "" if row.low is None else f" [{number(_three(row.low))}, {number(_three(row.high))}]"
        note = tag("span", row.note, class_="quiet")
        figures = tag("td", row.said or number(_three(row.value)) + ends, " ", note, class_="figures")
        scale = tag("span", parts, class_=f"scale c{row.colour % COLOURS}")
        found.append(tag("tr", tag("td", row.name), tag("td", scale), figures))
    return tag("table", tag("tbody", found), class_="bars")


def _three(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _percent(value: float, most: float) -> str:
    return f"{100 * min(max(value / most, 0.0), 1.0):.2f}%"


def histogram(bins: Sequence[Bin], *, title: str, below: Node = None, marks: Mapping[str, float] | None = None) -> Html:
    """Bars of equal width, one per bin, with the ends of the axis and dashed lines at `marks` (label -> value)."""
    most = max((b.count for b in bins), default=0)
    if not most:
        return Html()
    step, floor = _WIDTH / len(bins), _HEIGHT - _BOTTOM
    parts: list[Node] = []
    for i, b in enumerate(bins):
        if b.count:
            height = max(1.0, (floor - 14) * b.count / most)
            shape = tag("title", f"{number(b.low)} to {number(b.high)}: {number(b.count)}")
            parts.append(
                tag(
                    "rect",
                    shape,
                    class_="bar",
                    x=f"{i * step:.2f}",
                    y=f"{floor - height:.2f}",
                    width=f"{max(step - 1, 0.5):.2f}",
                    height=f"{height:.2f}",
                )
            )
    parts.append(tag("line", class_="axis", x1=0, y1=floor, x2=_WIDTH, y2=floor))
    for label, value in (marks or {}).items():
        if bins[0].low <= value <= bins[-1].high:
            x = _across(bins, value) * step
            parts.append(tag("line", class_="mark", x1=f"{x:.2f}", y1=0, x2=f"{x:.2f}", y2=floor))
            end = x > _WIDTH / 2
            at = x - 4 if end else x + 4
            parts.append(tag("text", label, class_="mark", x=f"{at:.2f}", y=9, text_anchor="end" if end else None))
    ends = [(0.0, bins[0].low, "start"), (float(_WIDTH), bins[-1].high, "end")]
    if len(bins) > 3:
        ends.insert(1, (len(bins) // 2 * step, bins[len(bins) // 2].low, "middle"))
    for x, value, anchor in ends:
        parts.append(tag("text", number(float(f"{value:.3g}")), x=f"{x:.2f}", y=_HEIGHT - 4, text_anchor=anchor))
    drawn = tag("svg", parts, view_box=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"histogram of {title}")
    return tag("figure", tag("figcaption", tag("b", title), " ", below), drawn)


def _across(bins: Sequence[Bin], value: float) -> float:
    """Where a value lies, in bins from the left."""
    for i, b in enumerate(bins):
        if value < b.high:
            return i + (value - b.low) / (b.high - b.low)
    return float(len(bins))
