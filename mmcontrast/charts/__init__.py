"""Charts for pages that stand alone (`mmcontrast.page`), as SVG and HTML."""

from __future__ import annotations

from mmcontrast.charts.bars import Bar, Bin, bars, histogram
from mmcontrast.charts.fields import Point, cloud, heat
from mmcontrast.charts.figure import COLOURS, SCRIPT, STYLE
from mmcontrast.charts.lines import Line, Mark, line_chart, line_drawing

__all__ = [
    "COLOURS",
    "SCRIPT",
    "STYLE",
    "Bar",
    "Bin",
    "Line",
    "Mark",
    "Point",
    "bars",
    "cloud",
    "heat",
    "histogram",
    "line_chart",
    "line_drawing",
]
