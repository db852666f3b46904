"""Clouds of points, and tables of counts as colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcontrast.charts.figure import COLOURS, figure, fitted, px
from mmcontrast.page import Html, Node, number, tag


@dataclass(frozen=True)
class Point:
    """A point of a cloud; `said` is told of it."""

    x: float
    y: float
    said: str


def cloud(
    groups: Mapping[str, Sequence[Point]], *, title: str, about: str, ties: Sequence[tuple[int, int]] = ()
) -> Html:
    """Points of two or more kinds in a plane whose axes mean nothing by themselves.

    Args:
        groups: kind -> points; each kind has its own colour and shape.
        title: what it shows.
        about: what it means.
        ties: lines from a point of the first kind to one of the second, by their places.
    """
    every = [p for points in groups.values() for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not every:
        return Html()
    width, height, room = 560, 420, 14
    across = fitted([p.x for p in every], room, width - room, log=False, most=5, tight=True)
    up = fitted([p.y for p in every], height - room, room, log=False, most=5, tight=True)
    # One scale for both: distances in the picture are distances in the projection.
    scale = max((across.high - across.low) / (width - 2 * room), (up.high - up.low) / (height - 2 * room))
    x0, y0 = (across.low + across.high) / 2, (up.low + up.high) / 2

    def at(p: Point) -> tuple[float, float]:
        return width / 2 + (p.x - x0) / scale, height / 2 - (p.y - y0) / scale

    kinds = list(groups.items())
    parts: list[Node] = []
    for a, b in ties:
        (x1, y1), (x2, y2) = at(kinds[0][1][a]), at(kinds[1][1][b])
        parts.append(tag("line", class_="tie", x1=px(x1), y1=px(y1), x2=px(x2), y2=px(y2)))
    told: list[dict[str, object]] = []
    legend: list[Node] = []
    for k, (name, points) in enumerate(kinds):
        for p in points:
            x, y = at(p)
            parts.append(_shape(k, x, y, 3.2))
            told.append({"x": round(x, 1), "y": round(y, 1), "name": name, "said": p.said})
        key = tag("svg", _shape(k, 8, 5, 4.2), view_box="0 0 16 10", aria_hidden="true")
        legend.append(tag("li", key, f"{name} ({number(len(points))})"))
    counts = ", ".join(f"{number(len(points))} of {name}" for name, points in kinds)
    return figure(
        title, [tag("span", about), tag("ul", legend, class_="legend")], parts, {"points": told},
        said=f"A cloud of points: {counts}", numbers=None, view=(width, height),
    )  # fmt: skip


def _shape(kind: int, x: float, y: float, r: float) -> Html:
    """A disc, a square, a triangle, a diamond."""
    name = f"point c{kind % COLOURS}"
    if kind % 4 == 0:
        return tag("circle", class_=name, cx=px(x), cy=px(y), r=r)
    corners = {
        1: ((-r, -r), (r, -r), (r, r), (-r, r)),
        2: ((0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)),
        3: ((0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)),
    }[kind % 4]
    return tag("path", class_=name, d="M" + "L".join(f"{px(x + a)} {px(y + b)}" for a, b in corners) + "Z")


def heat(counts: Sequence[Sequence[int]], names: Sequence[str], *, title: str, about: str) -> Html:
    """[C, C] counts: rows what is right, columns what was answered; right ones in one colour, wrong ones in another.

    The depth of the colour is the share of the row.
    """
    n = len(names)
    side = max(11.0, min(34.0, 420 / n))
    letters, size = min(26, max(map(len, names), default=0)), min(11.0, side * 0.95)
    long = 0.6 * size * letters + 8
    left, top = long, 0.87 * long + 6  # names above are turned, and lean out to the right
    width, height = left + n * side + 0.5 * long, top + n * side + 4
    parts: list[Node] = []
    for i, name in enumerate(names):
        short = name if len(name) <= letters else name[: letters - 1] + "…"
        middle = (i + 0.5) * side + size * 0.35
        row = {"x": px(left - 5), "y": px(top + middle), "text_anchor": "end"}
        column = {"transform": f"translate({px(left + middle)} {px(top - 5)}) rotate(-60)"}
        for where in (row, column):
            parts.append(tag("text", tag("title", name), short, style=f"font-size:{size:.1f}px", **where))
    for i, row in enumerate(counts):
        total = sum(row)
        for j, count in enumerate(row):
            if not count:
                continue
            said = f"{names[i]} called {names[j]}: {number(count)} of {number(total)}"
            box = tag(
                "rect", tag("title", said), class_=f"cell {'right' if i == j else 'wrong'}",
                x=px(left + j * side), y=px(top + i * side), width=px(side), height=px(side),
                fill_opacity=f"{0.12 + 0.78 * count / total:.2f}",
            )  # fmt: skip
            parts.append(box)
            if side >= 18:
                where = {"x": px(left + (j + 0.5) * side), "y": px(top + (i + 0.5) * side + 4)}
                parts.append(tag("text", str(count), class_="count", text_anchor="middle", **where))
    rim = tag("rect", class_="grid", fill="none", x=left, y=top, width=px(n * side), height=px(n * side))
    said = f"{n} classes; rows are right answers, columns what was answered"
    view = (int(width), int(height))
    shown = figure(title, tag("span", about), [rim, parts], None, said=said, numbers=None, view=view)
    return tag("div", shown, class_="heat wide", style=f"max-width:{max(26, width / 13):.0f}rem")
