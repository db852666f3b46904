"""A log-log line chart as SVG, drawn with nothing but text: how a cost grows with the work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 56, 56
COLOURS = ("#0b6e99", "#c4501b", "#7a7a7a", "#6b4fa0")
"""Of the lines in order; the last ones repeat."""


def loglog(lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> str:
    """An SVG document with one labelled line per entry, of points (x, y) above zero; x is marked at powers of two."""
    points = [point for line in lines.values() for point in line]
    low_x, high_x = (f(p[0] for p in points) for f in (min, max))
    low_y = 10 ** math.floor(math.log10(min(p[1] for p in points)))
    high_y = 10 ** math.ceil(math.log10(max(p[1] for p in points)))

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(value / low_x) / math.log(max(high_x / low_x, 2))

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(value / low_y) / math.log(max(high_y / low_y, 10))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="16" font-weight="bold">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="{LEFT}" y="{TOP - 10}" text-anchor="end">{escape(y)}</text>',
    ]
    for tick in _powers(2, low_x, high_x):
        place = f"{across(tick):.1f}"
        parts.append(f'<path d="M{place} {TOP}V{HEIGHT - BOTTOM}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{place}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:g}</text>')
    for tick in _powers(10, low_y, high_y):
        place = up(tick)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{tick:g}</text>')
    taken: list[float] = []
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[min(number, len(COLOURS) - 1)]
        path = "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        parts += [f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3" fill="{colour}"/>' for a, b in line]
        end_x, end_y = line[-1]
        label = up(end_y) + 4
        while any(abs(label - other) < 16 for other in taken):  # lines that end together keep readable names
            label += 4
        taken.append(label)
        place = f'x="{across(end_x) + 9:.1f}" y="{label:.1f}"'
        parts.append(f'<text {place} fill="{colour}" font-weight="bold">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _powers(base: int, low: float, high: float) -> list[float]:
    """Powers of the base within low..high."""
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    return [float(base) ** k for k in range(first, last + 1)]
