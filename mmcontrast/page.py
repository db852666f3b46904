"""Pieces of a page that stands alone: one HTML file with everything in it, light and dark, on screen and on paper.

Escaping is by construction. Whatever is not `Html` is text and is escaped where it enters; only the functions below
make `Html`. No page loads anything, and each forbids its browser to do so, or to run any script but the one that it
was made with, which the browser knows by its hash.

Letters: H, W height and width of a picture, C channels of a signal, T its samples.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EMPTY_TAGS = ("img", "meta", "path", "rect", "line", "circle", "wbr")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
_WIDTH = 320  # of a drawing

THEME = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --quiet: #5d6872; --line: #d9dee3; --soft: #f4f6f8;
  --bar: #3b78b8; --mark: #b8442e; --error: #b3261e; --warning: #94600a; --note: #45647d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181c; --ink: #e4e8ec; --quiet: #9aa5af; --line: #343b42;
  --soft: #1d2328; --bar: #6aa5de; --mark: #ef8a74; --error: #ff8a80; --warning: #f0b95a; --note: #8fb4d1; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --quiet: #444; --line: #bbb; --soft: #fff;
  --bar: #3b78b8; --mark: #b8442e; --error: #b3261e; --warning: #94600a; --note: #45647d; } }
"""
"""Colours, as CSS: by light and by night, and on paper."""
_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto 4rem; padding: 0 1.2rem;
  background: var(--paper); color: var(--ink); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 62rem; } .quiet { color: var(--quiet); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0; }
.wide { overflow-x: auto; }
th { font-weight: 600; text-align: left; color: var(--quiet); font-size: .85rem; }
th, td { padding: .2rem 1.1rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
.names td:first-child { overflow-wrap: normal; }
th.number, td.number { text-align: right; white-space: nowrap; }
.finding { display: grid; grid-template-columns: 5.2rem 1fr; gap: .2rem .8rem; padding: .45rem .7rem; margin: .35rem 0;
  background: var(--soft); border-left: 4px solid var(--note); overflow-wrap: anywhere; }
.finding b { color: var(--note); }
.finding.error { border-color: var(--error); } .finding.error b { color: var(--error); }
.finding.warning { border-color: var(--warning); } .finding.warning b { color: var(--warning); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1px; margin: 1.2rem 0;
  background: var(--line); border: 1px solid var(--line); border-radius: .4rem; overflow: hidden; }
.tiles div { background: var(--paper); padding: .7rem .9rem; } .tiles dt { color: var(--quiet); font-size: .82rem; }
.tiles dd { margin: 0; } .tiles b { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; } .tiles small { color: var(--quiet); font-size: .8rem; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; align-items: flex-start; }
figure { margin: 0; width: 20rem; max-width: 100%; } figcaption { font-size: .85rem; color: var(--quiet); }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; } svg text { font: 11px system-ui, sans-serif;
  fill: var(--quiet); }
svg .trace { fill: none; stroke: var(--bar); stroke-width: 1.2; } svg .wave { fill: var(--bar); }
.share { display: grid; grid-template-columns: fit-content(11rem) 4.5rem max-content; gap: .15rem .8rem;
  font-size: .9rem; align-items: center; overflow-wrap: anywhere; }
.share i { display: block; height: .6rem; background: var(--bar); border-radius: 2px; min-width: 1px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .9rem;
  align-items: start; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; font-size: .85rem; overflow-wrap: anywhere;
  display: flex; flex-direction: column; gap: .4rem; background: var(--soft); }
.card img { width: 100%; height: 10rem; object-fit: contain; border-radius: .2rem;
  background: var(--paper); }
.card audio { width: 100%; height: 2.2rem; } .card .said { font-size: .95rem; max-height: 7.5rem; overflow: auto; }
.card .facts { color: var(--quiet); font-size: .78rem; white-space: pre-wrap; max-height: 9rem; overflow: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; } .pair img { height: 6rem; }
.bad { color: var(--error); }
@media print { audio { display: none; } .card .said, .card .facts { max-height: none; }
  figure, .card, tr, .finding, .tiles div { break-inside: avoid; } h2, h3, h2 + p { break-after: avoid; } }
@media (max-width: 30rem) { .cards { grid-template-columns: 1fr 1fr; gap: .5rem; } .card img { height: 7rem; } }
"""


class Html(str):
    """Markup. Any other str is text."""


Node = Html | str | int | float | Iterable[Any] | None
"""What may stand on a page: markup, text, numbers, and lists of them; None is nothing."""


def tag(name: str, /, *children: Node, **attributes: str | float | None) -> Html:
    """An element. `class_` and `view_box` write class and viewBox; an attribute that is None is left out."""
    given = {("viewBox" if k == "view_box" else k.rstrip("_").replace("_", "-")): v for k, v in attributes.items()}
    head = "".join(f' {k}="{html.escape(str(v))}"' for k, v in given.items() if v is not None)
    if name in _EMPTY_TAGS and not children:
        return Html(f"<{name}{head}>" if name in ("img", "meta") else f"<{name}{head}/>")
    return Html(f"<{name}{head}>{join(children)}</{name}>")


def join(children: Node) -> Html:
    """Nodes one after the other."""
    if children is None:
        return Html()
    if isinstance(children, Html):
        return children
    if isinstance(children, (str, int, float)):
        return Html(html.escape(children if isinstance(children, str) else number(children)))
    return Html("".join(join(child) for child in children))


def page(title: str, *body: Node, style: str = "", script: str = "") -> str:
    """A whole document.

    Args:
        title: of the window.
        body: what stands on it.
        style: CSS of its pieces beyond the common one, such as `mmcontrast.charts.STYLE`.
        script: JavaScript that adds to what can be read without it; never text that comes from data.
    """
    run = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{_POLICY}; script-src 'sha256-{run}'" if script else _POLICY
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(THEME + _STYLE + style)),
    ]
    last = tag("script", Html(script)) if script else None
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body, last), lang="en") + "\n"


def number(value: float | None) -> str:
    """As a person writes it: thousands parted, four digits at least where there are that many, no trailing zeros."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    places = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 12)}f}".rstrip("0").rstrip(".")


def section(title: str, *body: Node) -> Html:
    """A heading and what belongs to it."""
    return tag("section", tag("h2", title), body)


def table(head: Sequence[str], rows: Iterable[Sequence[Node]]) -> Html:
    """Columns; those that begin with a number are set to the right. A head of empty words is left out."""
    filled = [list(row) for row in rows]
    right = [i for i, cell in enumerate(filled[0]) if isinstance(cell, (int, float))] if filled else []

    def line(name: str, cells: Sequence[Node]) -> Html:
        return tag("tr", [tag(name, cell, class_="number" if i in right else None) for i, cell in enumerate(cells)])

    top = tag("thead", line("th", head)) if any(head) else None
    return tag("div", tag("table", top, tag("tbody", [line("td", row) for row in filled])), class_="wide")


def tiles(facts: Iterable[tuple[str, Node, Node]]) -> Html:
    """What matters most, large: what it is, its value, and a word on it."""
    shown = [tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", note))) for name, value, note in facts]
    return tag("dl", shown, class_="tiles")


def finding(level: str, text: Node) -> Html:
    """One sentence with its weight: error, warning or note."""
    return tag("div", tag("b", level), tag("span", text), class_=f"finding {level}")


def shares(counts: Mapping[str, int], total: int) -> Html:
    """Words with their counts, shares and bars."""
    rows: list[Node] = []
    for word, count in counts.items():
        share = count / total if total else 0.0
        bar = tag("i", style=f"width:{100 * min(share, 1):.2f}%")
        rows += [tag("span", word), tag("span", bar), tag("span", f"{number(count)} ({percent(share)})")]
    return tag("div", rows, class_="share")


def percent(share: float) -> str:
    """A share for people; never 0 % or 100 % where some or one of many is missing."""
    if 0 < share < 0.0001:
        return "under 0.01 %"
    if 0.9995 <= share < 1:
        return "over 99.9 %"
    return f"{100 * share:.3g} %"


def card(*parts: Node) -> Html:
    """A framed sample: media, then what is said of it."""
    return tag("div", parts, class_="card")


def cards(found: Iterable[Html]) -> Html:
    """Cards beside each other, as many as fit."""
    return tag("div", list(found), class_="cards")


def pair(left: Node, right: Node) -> Html:
    """Two things side by side within a card."""
    return tag("div", tag("div", left), tag("div", right), class_="pair")


def picture(pixels: NDArray[np.uint8], *, alt: str, side: int = 240) -> Html:
    """[H, W, 3] as a thumbnail of at most `side` pixels; what is shown is drawn anew, never the file itself."""
    from PIL import Image

    drawn = Image.fromarray(pixels)
    drawn.thumbnail((side, side))
    file = io.BytesIO()
    drawn.save(file, "WEBP", quality=80)
    return tag("img", src=_uri("image/webp", file.getvalue()), alt=alt, decoding="async")


def sound(samples: NDArray[np.float32], rate: int) -> Html:
    """Mono [T] as its waveform and a player."""
    return Html(
        waveform(samples) + tag("audio", controls="", preload="none", src=_uri("audio/wav", wav(samples, rate)))
    )


def waveform(samples: NDArray[np.float32], *, columns: int = 160) -> Html:
    """[T] as the least and greatest value of each column, scaled to the loudest."""
    if not len(samples):
        return Html()
    parts = np.array_split(samples, min(columns, len(samples)))
    low, high = np.array([[p.min(), p.max()] for p in parts]).T / max(float(np.abs(samples).max()), 1e-9)
    top = [f"{i:.1f} {30 - 28 * v:.1f}" for i, v in enumerate(high)]
    bottom = [f"{i:.1f} {30.6 - 28 * v:.1f}" for i, v in enumerate(low)]
    shape = tag("path", class_="wave", d="M" + "L".join([*top, *reversed(bottom)]) + "Z")
    return tag(
        "svg", shape, view_box=f"0 0 {len(parts)} 60", role="img", aria_label="waveform", preserveAspectRatio="none"
    )


def traces(values: NDArray[np.float32], *, names: Sequence[str] = (), most: int = 12, points: int = 400) -> Html:
    """[C, T] as lines above each other, each scaled to itself; the first `most` channels.

    Of more than `points` samples the least and the greatest of each column are drawn, so that no peak is lost.
    """
    height, lines = 26, list[Node]()
    for i, line in enumerate(values[:most]):
        finite = np.nan_to_num(line.astype(np.float64))
        x = np.linspace(0, _WIDTH, len(finite)) if len(finite) > 1 else np.zeros(len(finite))
        if len(finite) > points:
            starts = np.linspace(0, len(finite), points // 2 + 1).astype(np.int64)[:-1]
            ends = [f.reduceat(finite, starts) for f in (np.minimum, np.maximum)]
            finite, x = np.stack(ends, 1).ravel(), np.repeat(x[starts], 2)
        low, high = float(finite.min(initial=np.inf)), float(finite.max(initial=-np.inf))
        y = height * (i + 0.9 - 0.8 * (finite - low) / max(high - low, 1e-12))
        drawn = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(tag("path", class_="trace", d=drawn))
        lines.append(tag("text", names[i][:8], x=1, y=height * i + 9) if i < len(names) else None)
    height *= min(len(values), most)
    said = f"signal of {len(values)} channels"
    return tag("svg", lines, view_box=f"0 0 {_WIDTH} {height}", role="img", aria_label=said, class_="traces")


def wav(samples: NDArray[np.float32], rate: int) -> bytes:
    """Mono [T] in -1..1 as a WAV file of 16 bits."""
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((np.nan_to_num(samples).clip(-1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
