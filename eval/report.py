"""Answers for people: results as a table or CLIP_benchmark's JSON, search results as a page with pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from mmcontrast.eval.answer import Answer
from mmcontrast.eval.index import Hit, Index


def as_table(answers: Sequence[Answer]) -> str:
    """Results in columns, one metric a line, with its interval and, against another model, its difference."""
    lines: list[str] = []
    for answer in answers:
        lines.append(f"{answer.dataset}  {answer.task}  {answer.model.name}")
        other, differences = answer.against or ("", {})
        for name, metric in answer.result.metrics.items():
            interval = "" if metric.low is None else f"  [{_number(metric.low)}, {_number(metric.high)}]"
            line = f"  {name:32s} {_number(metric.value)}{interval}"
            if name in differences:
                d = differences[name]
                line += f"   {d.value:+.3f}  [{d.low:+.3f}, {d.high:+.3f}] against {other}"
            lines.append(line)
        numbers = [*answer.result.chance.items(), *answer.result.counts.items()]
        lines += [f"  {name:32s} {_number(value)}" for name, value in numbers]
        lines += [f"  note: {warning}" for warning in answer.result.warnings]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 2 and value == int(value) else f"{value:.3f}"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.facts { color: GrayText; font-size: .9rem; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; padding: 0; }
.hits li { list-style: none; border: 1px solid #8884; border-radius: .5rem; padding: .6rem; }
.hits img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: .3rem; }
.none { display: grid; place-items: center; aspect-ratio: 1; color: GrayText; }
.score { font-variant-numeric: tabular-nums; color: GrayText; font-size: .85rem; }
.bar { height: .3rem; border-radius: .2rem; background: #3b7dd8; margin: .3rem 0; }
"""


def search_page(index: Index, queries: Sequence[str], answers: Sequence[Sequence[Hit]]) -> str:
    """One self-contained HTML page: each query with its answers as pictures, scores and texts."""
    m = index.manifest
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>mmcontrast: {len(queries)} queries</title><style>{_STYLE}</style>",
        f"<h1>{len(queries)} queries, {m['count']} candidates</h1>",
        f"<p class='facts'>Model {escape(str(m['model_hash']))} · {escape(str(m['modality']))} · {m['dim']} "
        f"dimensions · {escape(str(m['type']))} index · recall@10 against exact search "
        f"{m['quality']['recall_at_10']:.3f}</p>",
    ]
    for query, hits in zip(queries, answers, strict=True):
        parts.append(f"<section><h2>“{escape(query)}”</h2><ol class='hits'>")
        parts += [_card(index, hit, place) for place, hit in enumerate(hits, 1)]
        parts.append("</ol></section>")
    return "\n".join([*parts, "</html>\n"])


def _card(index: Index, hit: Hit, place: int) -> str:
    data = index.picture(hit)
    text = escape(hit.text or hit.key)
    if data is None:
        picture = "<div class='none'>no picture</div>"
    else:
        kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
        picture = f"<img alt='{text}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
    width = max(0.0, min(1.0, hit.score)) * 100
    return (
        f"<li>{picture}<div class='bar' style='width:{width:.0f}%'></div>"
        f"<div>{text}</div><div class='score'>{place}. cosine {hit.score:.3f}</div></li>"
    )
