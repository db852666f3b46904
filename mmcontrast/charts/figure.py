"""What every chart is made of: colours, axes, and the figure around a drawing.

A chart says in words what it shows, keeps its numbers in a table below it, tells its lines apart by dashes as well as
by colour, and is read without a script; `SCRIPT` adds the values under the pointer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmcontrast.page import Html, Node, tag

COLOURS = 8
"""Colours that can be told apart, also by the colour-blind; further lines repeat them with other dashes."""

_LIGHT = ("#1f6fb4", "#c4501b", "#1b8a6b", "#8e5bb5", "#94700a", "#5f6b75", "#c2417c", "#2b8ca8")
_DARK = ("#6cb2f0", "#f29264", "#4fc7a2", "#c3a0e6", "#e0bb55", "#aab4be", "#f08bb6", "#74cbe0")


def _palette(colours: Sequence[str]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


STYLE = (
    f":root {{ {_palette(_LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_palette(_DARK)} }} }}\n"
    + "".join(f".c{i} {{ --own: var(--c{i}); }}\n" for i in range(COLOURS))
    + Path(__file__).with_name("style.css").read_text("utf-8")
)
"""For `mmcontrast.page.page`, of every page with charts."""
SCRIPT = Path(__file__).with_name("hover.js").read_text("utf-8")
"""For `mmcontrast.page.page`: the values under the pointer."""


@dataclass(frozen=True)
class Axis:
    """Values low..high over from..to of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    base: int = 10  # of the logarithms' round values

    def at(self, value: float) -> float:
        """Where a value lies."""
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values within it."""
        if self.log and self.base != 10:
            powers = [math.log(end, self.base) for end in (self.low, self.high)]
            found = [
                float(self.base) ** k for k in range(math.ceil(powers[0] - 1e-9), math.floor(powers[1] + 1e-9) + 1)
            ]
            return found[:: max(1, -(-len(found) // most))]
        if self.log:
            first, last = math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9)
            steps = (1, 2, 5) if last - first < 2 else (1, 3) if last - first < 3 else (1,)
            found = [m * 10.0**k for k in range(first, last + 1) for m in steps]
            found = [t for t in found if self.low * (1 - 1e-9) <= t <= self.high * (1 + 1e-9)]
            return found[:: max(1, -(-len(found) // most))]
        step = _round_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{k * step:.12g}") for k in range(first, last + 1)]

    def told(self, name: str) -> dict[str, float | bool | str]:
        """For the script."""
        return {
            "name": name, "low": self.low, "high": self.high, "from": self.start, "to": self.stop, "log": self.log
        }  # fmt: skip


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def fitted(values: Sequence[float], start: float, stop: float, *, log: bool, most: int, tight: bool) -> Axis:
    """An axis with room for all values; `tight` ends where they end, otherwise at round values."""
    low, high = min(values), max(values)
    if log:
        if low == high:
            low, high = low / 2, high * 2
        return Axis(low, high, start, stop, log=True) if tight else Axis(low / 1.15, high * 1.15, start, stop, True)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = (low, low + 1) if tight else (low - room, high + room)
    if tight:
        return Axis(low, high, start, stop)
    step = _round_step((high - low) / most)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, start, stop)


def px(value: float) -> str:
    """A length in a drawing."""
    return f"{value:.1f}"


def figure(
    title: str, head: Node, parts: Node, told: object, *, said: str, numbers: Node, view: tuple[int, int]
) -> Html:
    """A drawing with its title, what is said of it, and its numbers.

    Args:
        title: what it shows.
        head: what stands below the title, such as a legend.
        parts: of the drawing.
        told: what `SCRIPT` shows of it, as JSON; None shows nothing.
        said: the drawing in words.
        numbers: a table of what it shows.
        view: width and height of the drawing.
    """
    drawn = tag(
        "svg",
        tag("title", title),
        tag("desc", said[:2000]),
        parts,
        view_box=f"0 0 {view[0]} {view[1]}",
        role="img",
        data_chart=None if told is None else json.dumps(told, separators=(",", ":"), allow_nan=False),
    )
    below = tag("details", tag("summary", "Numbers"), numbers) if numbers else None
    return tag("figure", tag("figcaption", tag("b", title), head), drawn, below, class_="chart")
