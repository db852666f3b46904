"""Lines over one axis, with bands, marks and a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmcontrast.charts.figure import COLOURS, STYLE, Axis, figure, fitted, px
from mmcontrast.page import THEME, Html, Node, number, table, tag

_ROWS = 24  # of the table below a chart; of more numbers, some at equal distances are shown
_WIDTH, _HEIGHT = 380, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 14, 34
_DASHES = (None, "7 3", "2 3", "9 3 2 3", "4 4", "12 4", "1 4", "6 2 2 2 2 2")


@dataclass(frozen=True)
class Line:
    """P points that belong together; where y is None or not finite the line is broken.

    Attributes:
        name: for the legend.
        x: [P].
        y: [P].
        low: [P] lower ends of a band around it.
        high: [P] upper ends.
        colour: which of the `COLOURS`; None is its place among the lines.
        dash: which dashes; None is its place among the lines.
        dots: mark every point.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    colour: int | None = None
    dash: int | None = None
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at x: `label` stands on the chart, `text` is read by those who point at it."""

    x: float
    label: str
    text: str


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x: str = "step",
    y: str = "",
    about: str = "",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    levels: Mapping[str, float] | None = None,
    marks: Sequence[Mark] = (),
) -> Html:
    """L lines over one axis; nothing at all where no line has a point.

    Args:
        lines: what is drawn; on an axis with logarithms only what is above 0.
        title: what it shows.
        x: what the horizontal axis counts.
        y: unit of the vertical axis.
        about: a sentence for those who want to know what it means.
        log_x: logarithms across.
        log_y: logarithms upwards.
        zero: the vertical axis begins at 0.
        levels: name -> value of a dotted line across, such as what guessing gives.
        marks: what happened at some x.
    """
    drawn = [_known(line, i, log_x, log_y) for i, line in enumerate(lines)]
    drawn = [line for line in drawn if line.x]
    if not drawn:
        return Html()
    known = {name: v for name, v in (levels or {}).items() if math.isfinite(v) and (v > 0 or not log_y)}
    heights = [v for line in drawn for part in (line.y, line.low, line.high) for v in part or () if v is not None]
    heights += [*known.values(), *([0.0] if zero and not log_y else [])]
    across = fitted([v for li in drawn for v in li.x], _LEFT, _WIDTH - _RIGHT, log=log_x, most=5, tight=True)
    up = fitted(heights, _HEIGHT - _BOTTOM, _TOP, log=log_y, most=5, tight=False)
    parts: list[Node] = [_frame(across, up, x, y)]
    for name, value in known.items():
        height = up.at(value)
        parts.append(tag("line", class_="level", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=px(height), y2=px(height)))
        parts.append(tag("text", name, x=_WIDTH - _RIGHT, y=px(height - 4), text_anchor="end"))
    parts += [_band(line, across, up) for line in drawn] + [_path(line, across, up) for line in drawn]
    parts += _flags([m for m in marks if across.low <= m.x <= across.high and (m.x > 0 or not log_x)], across)
    told = {
        "x": across.told(x),
        "y": up.told(y),
        "lines": [
            {"name": li.name, "x": list(li.x), "y": _rounded(li.y), "colour": li.colour}
            | ({} if li.low is None or li.high is None else {"low": _rounded(li.low), "high": _rounded(li.high)})
            for li in drawn
        ],
    }
    legend = [_key(line) for line in drawn] if len(drawn) > 1 or (drawn[0].name and drawn[0].name != title) else None
    return figure(
        title, [about, tag("ul", legend, class_="legend") if legend else None], parts, told,
        said=_in_words(drawn, x, marks), numbers=_numbers(drawn, x), view=(_WIDTH, _HEIGHT),
    )  # fmt: skip


def line_drawing(lines: Sequence[Line], *, title: str, x: str, y: str, base_x: int = 10) -> str:
    """L lines over axes with logarithms as an SVG file of its own, each named at its end.

    Args:
        lines: values above 0.
        title: what it shows.
        x: what the horizontal axis counts; marked at powers of `base_x`.
        y: unit of the vertical axis.
        base_x: 10, or 2 for what is doubled.
    """
    drawn = [_known(line, i, True, True) for i, line in enumerate(lines)]
    heights = [v for line in drawn for v in line.y if v is not None]
    across = fitted([v for li in drawn for v in li.x], _LEFT, _WIDTH - _RIGHT, log=True, most=8, tight=True)
    across = replace(across, base=base_x)
    up = fitted(heights, _HEIGHT - _BOTTOM, _TOP, log=True, most=5, tight=False)
    parts: list[Node] = [_frame(across, up, x, y, most=8), [_path(line, across, up) for line in drawn]]
    names: list[float] = []
    for line in sorted(drawn, key=lambda line: up.at(line.y[-1] or 1.0)):
        at = max(up.at(line.y[-1] or 1.0) + 4, names[-1] + 16 if names else 0.0)  # ends that meet keep readable names
        names.append(at)
        end = across.at(line.x[-1])
        parts.append(tag("text", line.name, class_=f"name c{line.colour}", x=px(end + 8), y=px(at)))
    style = "text { font: 11px system-ui, sans-serif; fill: var(--quiet); } text.name { fill: var(--own); }"
    head = tag("text", title, x=2, y=-14, style="font-size: 13px; font-weight: 600; fill: var(--ink)")
    return tag(
        "svg", tag("title", title), tag("style", Html(THEME + STYLE + style)), head, parts,
        xmlns="http://www.w3.org/2000/svg", view_box=f"0 -32 {_WIDTH + 110} {_HEIGHT + 34}", role="img",
    ) + "\n"  # fmt: skip


def _known(line: Line, place: int, log_x: bool, log_y: bool) -> Line:
    """Without what cannot be drawn at its ends or as a logarithm; colour and dash decided."""

    def usable(value: float | None, log: bool) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not log)

    kept = [i for i, value in enumerate(line.x) if usable(value, log_x)]
    while kept and not usable(line.y[kept[-1]], log_y):
        kept.pop()

    def of(values: Sequence[float | None]) -> list[float | None]:
        return [v if usable(v := values[i], log_y) else None for i in kept]

    return Line(
        line.name, [line.x[i] for i in kept], of(line.y),
        None if line.low is None or line.high is None else of(line.low),
        None if line.low is None or line.high is None else of(line.high),
        (place if line.colour is None else line.colour) % COLOURS,
        (place if line.dash is None else line.dash) % len(_DASHES), line.dots,
    )  # fmt: skip


def _frame(across: Axis, up: Axis, x: str, y: str, most: int = 5) -> Node:
    parts: list[Node] = []
    for tick in up.ticks(5):
        place = up.at(tick)
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=px(place), y2=px(place)))
        parts.append(tag("text", _tick(tick), x=_LEFT - 6, y=px(place + 4), text_anchor="end"))
    for tick in across.ticks(most):
        parts.append(tag("text", _tick(tick), x=px(across.at(tick)), y=_HEIGHT - _BOTTOM + 15, text_anchor="middle"))
    parts.append(tag("text", x, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 4, text_anchor="middle"))
    parts.append(tag("text", y, x=2, y=9) if y else None)
    return parts


def _tick(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return number(value)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.5g}") for v in values]


def _runs(values: Sequence[float | None]) -> list[range]:
    """Stretches without None."""
    found: list[range] = []
    start = 0
    for i in range(len(values) + 1):
        if i == len(values) or values[i] is None:
            if i > start:
                found.append(range(start, i))
            start = i + 1
    return found


def _path(line: Line, across: Axis, up: Axis) -> Node:
    parts: list[Node] = []
    stretches = _runs(line.y)

    def at(i: int) -> tuple[str, str]:
        return px(across.at(line.x[i])), px(up.at(line.y[i] or 0.0))

    moves = ["M" + "L".join(" ".join(at(i)) for i in r) for r in stretches]
    parts.append(tag("path", class_=f"line c{line.colour}", d="".join(moves), stroke_dasharray=_DASHES[line.dash or 0]))
    alone = [r.start for r in stretches if len(r) == 1]  # a path of one point cannot be seen
    for i in (i for r in stretches for i in r) if line.dots else alone:
        x, y = at(i)
        parts.append(tag("circle", class_=f"dot c{line.colour}", cx=x, cy=y, r=2.6))
    return parts


def _band(line: Line, across: Axis, up: Axis) -> Node:
    if line.low is None or line.high is None:
        return None
    low, high = line.low, line.high
    both = [None if a is None or b is None else a for a, b in zip(low, high, strict=True)]
    shapes: list[str] = []
    whiskers: list[Node] = []
    for r in _runs(both):
        top = [f"{px(across.at(line.x[i]))} {px(up.at(high[i] or 0.0))}" for i in r]
        bottom = [f"{px(across.at(line.x[i]))} {px(up.at(low[i] or 0.0))}" for i in reversed(r)]
        if len(r) > 1:
            shapes.append("M" + "L".join([*top, *bottom]) + "Z")
        elif low[r.start] != high[r.start]:
            x, (y1, y2) = px(across.at(line.x[r.start])), (px(up.at(v[r.start] or 0.0)) for v in (low, high))
            whiskers.append(tag("line", class_=f"whisker c{line.colour}", x1=x, x2=x, y1=y1, y2=y2))
    return [tag("path", class_=f"band c{line.colour}", d="".join(shapes)) if shapes else None, whiskers]


def _flags(marks: Sequence[Mark], across: Axis) -> list[Node]:
    parts: list[Node] = []
    taken: list[tuple[float, int]] = []
    for mark in marks:
        at = across.at(mark.x)
        row = next(r for r in range(len(taken) + 1) if all(r != o or abs(at - p) > 16 for p, o in taken))
        taken.append((at, row))
        y = 7 + 15 * (row % 6)
        shape: list[Node] = [
            tag("title", mark.text),
            tag("line", class_="notice", x1=px(at), x2=px(at), y1=y, y2=_HEIGHT - _BOTTOM),
            tag("circle", class_="flag", cx=px(at), cy=y, r=7),
            tag("text", mark.label, x=px(at), y=y + 3.5, text_anchor="middle"),
        ]
        parts.append(tag("g", shape))
    return parts


def _key(line: Line) -> Html:
    """A line of the legend: how it is drawn, and its name."""
    dash = _DASHES[line.dash or 0]
    drawn = tag("line", class_=f"line c{line.colour}", x1=0, x2=26, y1=5, y2=5, stroke_dasharray=dash)
    return tag("li", tag("svg", drawn, view_box="0 0 26 10", aria_hidden="true"), line.name)


def _in_words(lines: Sequence[Line], x: str, marks: Sequence[Mark]) -> str:
    said: list[str] = []
    for line in lines:
        known = [(a, b) for a, b in zip(line.x, line.y, strict=True) if b is not None]
        (first, begin), (last, end) = known[0], known[-1]
        name = f"{line.name}: " if line.name else ""
        said.append(f"{name}{number(begin)} at {x} {number(first)}, {number(end)} at {x} {number(last)}")
    return ". ".join([*said, *(f"At {x} {number(m.x)}: {m.text}" for m in marks)])


def _numbers(lines: Sequence[Line], x: str) -> Node:
    """The table below."""
    by_x = [dict(zip(line.x, range(len(line.x)), strict=True)) for line in lines]
    places = sorted({value for line in lines for value in line.x})
    step = max(1.0, (len(places) - 1) / (_ROWS - 1))
    chosen = [places[round(i * step)] for i in range(min(len(places), _ROWS))]

    def cell(line: Line, i: int | None) -> Node:
        if i is None or line.y[i] is None:
            return "-"
        low, high = (None if ends is None else ends[i] for ends in (line.low, line.high))
        ends = f" [{number(low)}, {number(high)}]" if low is not None and high is not None and low != high else ""
        return number(line.y[i]) + ends

    rows = [
        [number(value), *(cell(line, at.get(value)) for line, at in zip(lines, by_x, strict=True))] for value in chosen
    ]
    few = f"{len(chosen)} of {number(len(places))}" if len(chosen) < len(places) else ""
    return [table([x, *(line.name or "value" for line in lines)], rows), tag("p", few, class_="quiet") if few else None]
