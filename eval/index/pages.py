"""What was found in an index as pages that stand alone: answers, groups of near-duplicates, links with a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmcontrast.charts import SCRIPT, STYLE, Line, Mark, line_chart
from mmcontrast.decode import DECODERS
from mmcontrast.eval.index.duplicates import Duplicates
from mmcontrast.eval.index.link import Calibration, Linked, Point
from mmcontrast.eval.index.stored import Hit, Stored
from mmcontrast.eval.media import Room, drawn
from mmcontrast.page import Html, Node, card, cards, finding, number, page, pair, percent, section, table, tag
from mmcontrast.signals import signal

GROUPS, MEMBERS, LINKS = 200, 12, 12
"""Shown of each page."""
_HITS = """
.hits { padding: 0; margin: 0; list-style: none; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.hits .card img { background: #fff; } .hits .absent { display: grid; place-items: center; height: 10rem;
  color: var(--quiet); } .hits i { display: block; height: .3rem; border-radius: .2rem; background: var(--bar);
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
"""


def search_page(index: Stored, queries: Sequence[str], answers: Sequence[Sequence[Hit]]) -> str:
    """A page that stands alone: each query with its answers as pictures, sounds and signals, scores and texts."""
    m = index.manifest
    facts = (
        f"Model {m['model_hash']} · {m['modality']} · {m['dim']} dimensions · {m['type']} index · recall@10 against "
        f"exact search {m['quality']['recall_at_10']:.3f}"
    )
    found, room = list[Node](), Room()
    for query, hits in zip(queries, answers, strict=True):
        listed = [_hit(index, hit, place, room) for place, hit in enumerate(hits, 1)]
        found.append(section(f"“{query}”", tag("ol", listed, class_="cards hits")))
    title = f"{len(queries)} queries, {m['count']} candidates"
    return page(f"mmcontrast: {title}", tag("h1", title), tag("p", facts, class_="quiet"), found, style=_HITS)


def _hit(index: Stored, hit: Hit, place: int, room: Room) -> Html:
    text = hit.text or hit.key
    bar = tag("i", style=f"width:{100 * max(0.0, min(1.0, hit.score)):.0f}%")
    score = tag("div", f"{place}. score {hit.score:.3f}", class_="quiet")
    seen = _medium(index, hit, room) or tag("div", "no picture", class_="absent")
    return tag("li", seen, bar, tag("div", text, class_="said"), score, class_="card")


def duplicates_page(index: Stored, found: Duplicates) -> str:
    """Groups as rows of cards, the largest first."""
    shown, room = found.groups[:GROUPS], Room()
    notes = [finding("note", f"{len(found.groups) - len(shown)} smaller groups are not shown.")]
    how = "all pairs" if found.neighbours is None else f"each sample's {found.neighbours} nearest"
    warned = (
        f"{found.truncated} samples have {found.neighbours} close neighbours and may have more: groups may be larger."
    )
    return page(
        "Near-duplicates",
        tag("h1", f"{number(len(found.groups))} groups of near-duplicates"),
        _about(index),
        tag(
            "p",
            f"{number(found.looked_at)} samples, {how}; a pair has a cosine of {found.threshold:g} or more. "
            f"Without all but one of each group, {number(found.redundant)} "
            f"({percent(found.redundant / max(1, found.looked_at))}) would go.",
        ),
        finding("warning", warned) if found.truncated else None,
        [_group(index, g.members, i, room) for i, g in enumerate(shown, 1)],
        notes if len(found.groups) > len(shown) else None,
    )


def _group(index: Stored, members: Sequence[Hit], place: int, room: Room) -> Html:
    more = len(members) - MEMBERS
    return section(
        f"{place}. {len(members)} samples",
        cards(_card(index, m, room, f"cosine with its nearest {m.score:.4f}") for m in members[:MEMBERS]),
        tag("p", f"and {more} more", class_="quiet") if more > 0 else None,
    )


def links_page(linked: Linked, threshold: float, calibration: Calibration | None) -> str:
    """The threshold and how it was chosen, and the links next to it on both sides, which tell most of it."""
    accepted = int((linked.scores >= threshold).sum())
    said = f"{number(accepted)} of {number(len(linked))} records are linked, at a score of {threshold:.4f} or more."
    near = sorted(range(len(linked)), key=lambda i: abs(float(linked.scores[i]) - threshold))
    near, room = [i for i in near if linked.nearest[i] >= 0], Room()
    above = [i for i in near if linked.scores[i] >= threshold][:LINKS]
    below = [i for i in near if linked.scores[i] < threshold][:LINKS]
    return page(
        "Record linkage",
        tag("h1", "Record linkage"),
        tag("p", f"{linked.left.folder.name} to {linked.right.folder.name}", class_="quiet"),
        tag("p", said),
        None if calibration is None else _calibration(calibration),
        section("Just linked", cards(_pair(linked, i, room) for i in above)) if above else None,
        section("Just not linked", cards(_pair(linked, i, room) for i in below)) if below else None,
        style=STYLE,
        script=SCRIPT,
    )


def _calibration(found: Calibration) -> Html:
    rows: list[Sequence[Any]] = []
    if found.held_out is not None:
        rows = [
            [f"precision on {found.held_out_on} other records", found.held_out.precision],
            ["recall", found.held_out.recall],
            ["F1", found.held_out.f1],
        ]
    else:
        rows = [["held-out records", "none: fewer than 20 are labelled, so nothing says what the threshold is worth"]]
    return section(
        "Threshold",
        tag("p", f"{found.threshold:.4f}, by {found.by} on {found.chosen_on} labelled records."),
        table(["", ""], rows),
        _curve(found.curve, found.threshold),
    )


def _curve(points: Sequence[Point], threshold: float) -> Html:
    chosen = min(points, key=lambda point: abs(point.threshold - threshold))
    said = f"precision {chosen.precision:.3f} at recall {chosen.recall:.3f}"
    rising = sorted(points, key=lambda point: (point.recall, -point.precision))
    return line_chart(
        [Line("", [p.recall for p in rising], [p.precision for p in rising])],
        title="Precision against recall",
        x="recall",
        y="precision",
        about=f"Of all labelled records; the threshold has {said}.",
        zero=True,
        marks=[Mark(chosen.recall, "threshold", said)],
    )


def _pair(linked: Linked, place: int, room: Room) -> Html:
    """A record and its nearest, side by side."""
    score = float(linked.scores[place])
    left = linked.left.hit(score, int(linked.rows[place]))
    right = linked.right.hit(score, int(linked.nearest[place]))
    sides = [
        [_medium(index, hit, room), hit.text or hit.key] for index, hit in ((linked.left, left), (linked.right, right))
    ]
    return card(pair(*sides), f"score {score:.4f}", tag("div", f"{left.key}\n{right.key}", class_="facts"))


def _card(index: Stored, hit: Hit, room: Room, said: str) -> Html:
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(hit).items())
    return card(
        _medium(index, hit, room),
        tag("div", hit.text or hit.key, class_="said"),
        tag("div", said),
        tag("div", facts, class_="facts"),
    )


def _facts(hit: Hit) -> Mapping[str, Any]:
    return {"key": hit.key, "shard": hit.shard} | {k: str(v)[:100] for k, v in [*hit.metadata.items()][:6]}


def _medium(index: Stored, hit: Hit, room: Room) -> Html | None:
    """What can be seen or heard of a sample; None where there is nothing, or the shards are others now."""
    for kind in ("image", "audio", "timeseries"):
        member = index.member(hit, kind)
        if member is not None:
            return drawn(partial(_decoded, index, kind, member[0], hit), hit.text or hit.key, room)
    return None


def _decoded(index: Stored, kind: str, data: bytes, hit: Hit) -> Any:
    # Not the metadata of the row: a table holds no lists, such as names of channels.
    return DECODERS[kind](data) if kind in DECODERS else signal(data, partial(index.meta, hit))


def _about(index: Stored) -> Html:
    m = index.manifest
    facts = f"{index.folder.name}: {number(m['count'])} of {m['modality']}, made by the model {m['model_hash']}"
    return tag("p", facts, class_="quiet")
