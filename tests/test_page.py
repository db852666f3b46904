"""Pieces of a page: whatever is said on it stays text, and what is drawn is what was given."""

from __future__ import annotations

import base64
import io
import re
import wave
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmcontrast.charts import Bin, histogram
from mmcontrast.page import (
    Html,
    card,
    cards,
    finding,
    join,
    number,
    page,
    pair,
    percent,
    picture,
    section,
    shares,
    sound,
    table,
    tag,
    traces,
    waveform,
)

HOSTILE = """<script>alert("1")</script><img src=x onerror='alert(2)'>&amp;"""


class Reader(HTMLParser):
    """Elements, attributes and text of a page; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_whatever_is_said_stays_text() -> None:
    bins = [Bin(0, 1, 2), Bin(1, 2, 1)]
    said = page(
        HOSTILE,
        section(HOSTILE, HOSTILE, [HOSTILE, None, [HOSTILE]]),
        table([HOSTILE], [[HOSTILE]]),
        finding("error", HOSTILE),
        shares({HOSTILE: 1}, 1),
        cards([card(HOSTILE, pair(HOSTILE, HOSTILE))]),
        histogram(bins, title=HOSTILE, below=HOSTILE, marks={HOSTILE: 0.5}),
        picture(np.zeros((2, 2, 3), np.uint8), alt=HOSTILE),
        tag("p", title=HOSTILE, class_=HOSTILE),
    )
    read = Reader(said)
    assert not read.named("script") and len(read.named("img")) == 1
    assert not [a for _, a in read.elements if any(name.startswith("on") for name in a)]
    assert read.named("p")[-1] == {"title": HOSTILE, "class": HOSTILE}
    assert read.named("img")[0]["alt"] == HOSTILE
    assert "".join(read.text).count(HOSTILE) == 15


def test_a_page_stands_alone_and_may_do_nothing() -> None:
    samples = np.sin(np.arange(800, dtype=np.float32))
    read = Reader(page("t", sound(samples, 8000), picture(np.zeros((4, 4, 3), np.uint8), alt="a")))
    policy = next(a["content"] for a in read.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';") and "script" not in policy
    for _, attributes in read.elements:
        assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes
    assert not re.search("https?:|@import|url\\(", "".join(read.text))


def test_markup_is_not_escaped_twice() -> None:
    assert tag("b", "a < b") == "<b>a &lt; b</b>"
    assert tag("p", tag("b", "&")) == "<p><b>&amp;</b></p>"
    assert join(["<", Html("<br>"), None, 12.5, [2]]) == "&lt;<br>12.52"
    assert (
        tag("svg", view_box="0 0 1 1", text_anchor=None, aria_label="x")
        == '<svg viewBox="0 0 1 1" aria-label="x"></svg>'
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (1234567, "1,234,567"), (0.5, "0.5"), (12.3456, "12.35"), (1234.56, "1,235"), 
        (0.000125, "0.000125"),
        (-2.5, "-2.5"), (3.0, "3"), (float("nan"), "-"), (None, "-"), (float("inf"), "-"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.12345, "12.3 %"), (0.99999, "over 99.9 %"), (1e-9, "under 0.01 %")],
)
def test_shares_never_round_to_none_or_all(share: float, said: str) -> None:
    assert percent(share) == said


def test_a_histogram_draws_its_counts() -> None:
    bins = [Bin(0, 10, 4), Bin(10, 20, 0), Bin(20, 30, 1), Bin(30, 40, 2)]
    read = Reader(histogram(bins, title="t", marks={"limit": 15, "outside": 99}))
    bars = read.named("rect")
    heights = [float(b["height"] or 0) for b in bars]
    assert heights[0] == pytest.approx(4 * heights[1], abs=0.02) and heights[2] == pytest.approx(
        2 * heights[1], abs=0.02
    )
    assert [float(b["x"] or 0) for b in bars] == [0, 160, 240]
    marks = [line for line in read.named("line") if line["class"] == "mark"]
    assert [float(m["x1"] or 0) for m in marks] == [120]  # half through the second bar of four
    assert "limit" in read.text and "outside" not in read.text
    assert "20 to 30: 1" in read.text
    assert histogram([], title="t") == ""


def test_a_picture_is_drawn_anew_and_small() -> None:
    pixels = np.zeros((300, 600, 3), np.uint8)
    pixels[:, 300:] = 255
    source = Reader(picture(pixels, alt="a", side=60)).named("img")[0]["src"]
    assert source is not None and source.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as shown:
        assert shown.size == (60, 30)
        left, right = (shown.convert("L").getpixel((x, 15)) for x in (5, 55))
    assert isinstance(left, int) and isinstance(right, int) and left < 10 and right > 245


def test_a_sound_plays_what_was_given() -> None:
    samples = np.array([0, 0.5, -1, 2, float("nan")], np.float32)
    source = Reader(sound(samples, 8000)).named("audio")[0]["src"]
    assert source is not None
    with wave.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as heard:
        assert (heard.getframerate(), heard.getnchannels(), heard.getsampwidth()) == (8000, 1, 2)
        assert np.frombuffer(heard.readframes(9), "<i2").tolist() == [0, 16383, -32767, 32767, 0]


def test_waveforms_and_traces_follow_their_signal() -> None:
    loud = np.zeros(1600, np.float32)
    loud[800:810] = (1, -1) * 5
    path = Reader(waveform(loud)).named("path")[0]["d"]
    assert path is not None
    points = [tuple(map(float, p.split())) for p in path[1:-1].split("L")]
    assert min(points, key=lambda p: p[1])[0] == 80 and max(points, key=lambda p: p[1])[0] == 80
    assert waveform(np.zeros(0, np.float32)) == ""
    lines = Reader(traces(np.stack([np.arange(10.0), np.arange(10.0)[::-1]]).astype(np.float32))).named("path")
    ends = [[float(p.split()[1]) for p in (line["d"] or "")[1:].split("L")] for line in lines]
    assert len(ends) == 2 and ends[0][0] > ends[0][-1] and ends[1][0] < ends[1][-1]
    assert len(Reader(traces(np.full((40, 3), np.nan, np.float32))).named("path")) == 12
