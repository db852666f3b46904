"""Answers for people: results as a table or CLIP_benchmark's JSON, search results as a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence

from mmcontrast.decode import DECODERS
from mmcontrast.eval.answer import Answer
from mmcontrast.eval.index import Hit, Index
from mmcontrast.eval.media import drawn
from mmcontrast.page import Html, Node, page, section, tag
from mmcontrast.shards import BadSample
from mmcontrast.signals import signal


def as_table(answers: Sequence[Answer]) -> str:
    """Results in columns, one metric a line, with its interval and, against another model, its difference."""
    lines: list[str] = []
    for answer in answers:
        language = f"  [{answer.language}]" if answer.language else ""
        lines.append(f"{answer.dataset}  {answer.task}{language}  {answer.model.name}")
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
.hits { padding: 0; margin: 0; list-style: none; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.hits .card img { background: #fff; } .hits .absent { display: grid; place-items: center; height: 10rem;
  color: var(--quiet); } .hits i { display: block; height: .3rem; border-radius: .2rem; background: var(--bar);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
"""


def search_page(index: Index, queries: Sequence[str], answers: Sequence[Sequence[Hit]]) -> str:
    """A page that stands alone: each query with its answers as pictures, sounds and signals, scores and texts."""
    m = index.manifest
    facts = (
        f"Model {m['model_hash']} · {m['modality']} · {m['dim']} dimensions · {m['type']} index · recall@10 against "
        f"exact search {m['quality']['recall_at_10']:.3f}"
    )
    found: list[Node] = []
    for query, hits in zip(queries, answers, strict=True):
        listed = [_hit(index, hit, place) for place, hit in enumerate(hits, 1)]
        found.append(section(f"“{query}”", tag("ol", listed, class_="cards hits")))
    title = f"{len(queries)} queries, {m['count']} candidates"
    return page(f"mmcontrast: {title}", tag("h1", title), tag("p", facts, class_="quiet"), found, style=_STYLE)


def _hit(index: Index, hit: Hit, place: int) -> Html:
    text = hit.text or hit.key
    bar = tag("i", style=f"width:{100 * max(0.0, min(1.0, hit.score)):.0f}%")
    score = tag("div", f"{place}. score {hit.score:.3f}", class_="quiet")
    return tag("li", _medium(index, hit, text), bar, tag("div", text, class_="said"), score, class_="card")


def _medium(index: Index, hit: Hit, name: str) -> Html:
    """What can be seen or heard of an answer, drawn anew: no stored byte is handed on."""
    for kind in ("image", "audio", "timeseries"):
        member = index.member(hit, kind)
        if member is not None:
            try:
                data = member[0]
                return drawn(DECODERS[kind](data) if kind in DECODERS else signal(data, lambda: hit.metadata), name)
            except BadSample:
                return tag("div", f"no {kind} that can be read", class_="absent")
    return tag("div", "no picture", class_="absent")
