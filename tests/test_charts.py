"""Charts: what is drawn stands where its numbers say, and is also said in words and in a table."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from mmcontrast.charts import COLOURS, Bar, Line, Mark, Point, bars, cloud, heat, line_chart, line_drawing
from tests.test_page import HOSTILE, Reader


def path(read: Reader, name: str) -> list[list[tuple[float, float]]]:
    """Stretches of the first path of a class."""
    found = next(a["d"] for a in read.named("path") if (a["class"] or "").startswith(name)) or ""
    return [
        [(float(a), float(b)) for a, b in (point.rstrip("Z").split() for point in part.split("L"))]
        for part in found.split("M")[1:]
    ]


def told(read: Reader) -> dict[str, object]:
    return json.loads(next(a["data-chart"] for a in read.named("svg") if a.get("data-chart")) or "")


@pytest.mark.parametrize("log", [False, True])
def test_a_line_stands_where_its_numbers_say(log: bool) -> None:
    x, y = [1.0, 10.0, 100.0, 1000.0], [3.0, 30.0, 7.0, 1.0]
    read = Reader(line_chart([Line("a", x, y)], title="t", log_x=log, log_y=log))
    (points,) = path(read, "line")
    place = np.log(x) if log else np.array(x)
    height = np.log(y) if log else np.array(y)
    for drawn, meant in (([p[0] for p in points], place), ([-p[1] for p in points], height)):
        # Linear in what is meant, and upwards.
        slope, at = np.polyfit(meant, drawn, 1)
        assert slope > 0 and np.allclose(slope * meant + at, drawn, atol=0.06)
    ticks = {float(t.replace(",", "")) for t in read.text if t.replace(",", "").replace(".", "").isdigit()}
    assert ticks & {10.0, 100.0} if log else {0.0, 10.0, 20.0, 30.0} <= ticks


def test_a_line_is_broken_where_nothing_is_known() -> None:
    y = [1.0, None, 2.0, 3.0, math.nan, 4.0, None]
    read = Reader(line_chart([Line("a", list(range(7)), y)], title="t"))
    assert [len(part) for part in path(read, "line")] == [1, 2, 1]
    assert len([c for c in read.named("circle") if "dot" in (c["class"] or "")]) == 2, "single points can be seen"
    assert line_chart([Line("a", [1.0], [None])], title="t") == "" == line_chart([], title="t")
    negative = Reader(line_chart([Line("a", [1.0, 2.0, 3.0], [1.0, -1.0, 10.0])], title="t", log_y=True))
    assert [len(part) for part in path(negative, "line")] == [1, 1]


def test_a_band_lies_around_its_line() -> None:
    read = Reader(line_chart([Line("a", [0.0, 1.0], [5.0, 6.0], low=[4.0, 5.5], high=[8.0, 6.5])], title="t"))
    (line,), (band,) = path(read, "line"), path(read, "band")
    assert [p[0] for p in band] == [line[0][0], line[1][0], line[1][0], line[0][0]]
    assert band[0][1] < line[0][1] < band[3][1] and band[1][1] < line[1][1] < band[2][1]
    # Upper end 3 above, lower end 1 below.
    assert line[0][1] - band[0][1] == pytest.approx(3 * (band[3][1] - line[0][1]), abs=0.2)


def test_lines_are_told_apart_without_colour_and_read_without_eyes() -> None:
    lines = [Line(f"l{i}", [1.0, 2.0], [float(i), 2.0 * i]) for i in range(COLOURS)]
    read = Reader(line_chart(lines, title="speed", marks=[Mark(1.5, "7", "something broke")]))
    drawn = [a for a in read.named("path") if (a["class"] or "").startswith("line")]
    assert len({(a["class"], a.get("stroke-dasharray")) for a in drawn}) == COLOURS
    assert len({a.get("stroke-dasharray") for a in drawn}) == COLOURS
    root = ElementTree.fromstring(f"<div>{line_chart(lines, title='speed')}</div>")
    svg = root.find(".//svg[@role='img']")
    assert (
        svg is not None
        and svg.findtext("title") == "speed"
        and "l3: 3 at step 1, 6 at step 2" in str(svg.findtext("desc"))
    )
    assert "At step 1.5: something broke" in "".join(read.text) and "7" in read.text
    assert {"l0", "l7"} <= set(read.text), "the legend names them"


def test_the_table_below_has_the_same_numbers_and_is_bounded() -> None:
    x = [float(i) for i in range(1000)]
    root = ElementTree.fromstring(line_chart([Line("a", x, [2 * v for v in x]), Line("b", [999.0], [1.0])], title="t"))
    rows = [[cell.text for cell in row] for row in root.findall("details//tbody/tr")]
    assert len(rows) == 24 and rows[0] == ["0", "0", "-"] and rows[-1] == ["999", "1,998", "1"]
    assert all(float((b or "").replace(",", "")) == 2 * float(a or "") for a, b, _ in rows)
    assert "24 of 1,000" in "".join(root.itertext())


def test_marks_do_not_cover_each_other() -> None:
    marks = [Mark(50.0 + i / 10, str(i), "x") for i in range(4)] + [Mark(99.0, "far", "x"), Mark(200.0, "out", "x")]
    read = Reader(line_chart([Line("a", [0.0, 100.0], [0.0, 1.0])], title="t", marks=marks))
    flags = [(float(c["cx"] or 0), float(c["cy"] or 0)) for c in read.named("circle") if c["class"] == "flag"]
    assert len(flags) == 5 and "out" not in read.text
    assert all(math.dist(a, b) >= 14 for i, a in enumerate(flags) for b in flags[:i])


def test_a_drawing_of_its_own_names_lines_where_they_end() -> None:
    ends = {"a": 1.0, "b": 1.01, "c": 1.0}
    lines = [Line(name, [512.0, 1024.0, 2048.0], [0.01, 0.1, end]) for name, end in ends.items()]
    drawing = ElementTree.fromstring(line_drawing(lines, title="t < u", x="N", y="s", base_x=2))
    texts = list(drawing.iter("{http://www.w3.org/2000/svg}text"))
    assert {"512", "1,024", "2,048", "t < u"} <= {t.text for t in texts}
    heights = sorted(float(t.attrib["y"]) for t in texts if t.text in ("a", "b", "c"))
    assert len(heights) == 3 and min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 16


def test_a_cloud_keeps_distances() -> None:
    left = [Point(0.0, 0.0, "origin"), Point(3.0, 0.0, "right")]
    right = [Point(0.0, 4.0, "up")]
    read = Reader(cloud({"image": left, "text": right}, title="t", about="", ties=[(1, 0)]))
    found = told(read)["points"]
    assert isinstance(found, list)
    at = {p["said"]: (p["x"], p["y"]) for p in found}
    unit = math.dist(at["origin"], at["right"]) / 3
    assert math.dist(at["origin"], at["up"]) == pytest.approx(4 * unit, rel=1e-2)
    assert math.dist(at["right"], at["up"]) == pytest.approx(5 * unit, rel=1e-2)
    assert at["up"][1] < at["origin"][1], "upwards is up"
    (tie,) = read.named("line")
    assert (float(tie["x1"] or 0), float(tie["y2"] or 0)) == (at["right"][0], at["up"][1])
    assert cloud({"a": [Point(math.nan, 0.0, "")]}, title="t", about="") == ""


def test_colours_of_a_table_are_shares_of_rows() -> None:
    root = ElementTree.fromstring(heat([[3, 1], [0, 10]], ["cat", "dog"], title="t", about=""))
    cells = {c.findtext("title"): c.attrib for c in root.iter("rect") if "cell" in c.attrib["class"]}
    assert cells.keys() == {"cat called cat: 3 of 4", "cat called dog: 1 of 4", "dog called dog: 10 of 10"}
    depth = {said: float(c["fill-opacity"]) for said, c in cells.items()}
    assert depth["dog called dog: 10 of 10"] > depth["cat called cat: 3 of 4"] > depth["cat called dog: 1 of 4"] > 0
    assert cells["cat called dog: 1 of 4"]["class"] == "cell wrong"


def test_bars_are_as_long_as_their_scores() -> None:
    root = ElementTree.fromstring(bars([Bar("a", 0.25, 0.2, 0.4, chance=0.1), Bar("b", 0.5), Bar("c", None)]))
    styles = {i.attrib["class"]: i.attrib["style"] for i in root.findall(".//tr[1]//i")}
    assert styles == {"bar": "width:25.00%", "range": "left:20.00%;width:20.00%", "chance": "left:10.00%"}
    assert len(root.findall(".//tr[2]//i")) == 1 and not root.findall(".//tr[3]//i")
    assert "0.25 [0.2, 0.4]" in "".join(root.itertext())


def test_whatever_is_said_stays_text() -> None:
    said = (
        line_chart([Line(HOSTILE, [1.0], [1.0])], title=HOSTILE, x=HOSTILE, y=HOSTILE, about=HOSTILE,
                   levels={HOSTILE: 1.0}, marks=[Mark(1.0, HOSTILE, HOSTILE)])
        + cloud({HOSTILE: [Point(0.0, 0.0, HOSTILE)]}, title=HOSTILE, about=HOSTILE)
        + heat([[1]], [HOSTILE], title=HOSTILE, about=HOSTILE)
        + bars([Bar(HOSTILE, 0.5, note=HOSTILE)])
    )  # fmt: skip
    read = Reader(said)
    assert not read.named("script") and not read.named("img")
    assert not [a for _, a in read.elements if any(name.startswith("on") for name in a)]
    assert HOSTILE in read.text
