"""What was found in an index as pages that stand alone: groups of near-duplicates, and links with their threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcontrast.decode import picture_from
from mmcontrast.eval.index.duplicates import Duplicates
from mmcontrast.eval.index.link import Calibration, Linked, Point
from mmcontrast.eval.index.stored import Hit, Stored
from mmcontrast.page import Html, card, cards, finding, number, page, pair, percent, picture, section, table, tag
from mmcontrast.shards import BadSample

GROUPS, MEMBERS, LINKS = 200, 12, 12
"""Shown of each page."""
_SIDE = 320


def duplicates_page(index: Stored, found: Duplicates) -> str:
    """Groups as rows of cards, the largest first."""
    shown = found.groups[:GROUPS]
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
        [_group(index, g.members, i) for i, g in enumerate(shown, 1)],
        notes if len(found.groups) > len(shown) else None,
    )


def _group(index: Stored, members: Sequence[Hit], place: int) -> Html:
    more = len(members) - MEMBERS
    return section(
        f"{place}. {len(members)} samples",
        cards(_card(index, m, f"cosine with its nearest {m.score:.4f}") for m in members[:MEMBERS]),
        tag("p", f"and {more} more", class_="quiet") if more > 0 else None,
    )


def links_page(linked: Linked, threshold: float, calibration: Calibration | None) -> str:
    """The threshold and how it was chosen, and the links next to it on both sides, which tell most of it."""
    accepted = int((linked.scores >= threshold).sum())
    said = f"{number(accepted)} of {number(len(linked))} records are linked, at a score of {threshold:.4f} or more."
    near = sorted(range(len(linked)), key=lambda i: abs(float(linked.scores[i]) - threshold))
    near = [i for i in near if linked.nearest[i] >= 0]
    above = [i for i in near if linked.scores[i] >= threshold][:LINKS]
    below = [i for i in near if linked.scores[i] < threshold][:LINKS]
    return page(
        "Record linkage",
        tag("h1", "Record linkage"),
        tag("p", f"{linked.left.folder.name} to {linked.right.folder.name}", class_="quiet"),
        tag("p", said),
        None if calibration is None else _calibration(calibration),
        section("Just linked", cards(_pair(linked, i) for i in above)) if above else None,
        section("Just not linked", cards(_pair(linked, i) for i in below)) if below else None,
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
    """Precision against recall of all labelled records; the dot is the threshold."""
    width, height, left, bottom = 320, 200, 34, 24

    def at(point: Point) -> str:
        x = left + (width - left) * point.recall
        return f"{x:.1f} {(height - bottom) * (1 - point.precision):.1f}"

    chosen = min(points, key=lambda point: abs(point.threshold - threshold))
    x, y = at(chosen).split()
    marks = [
        tag("line", class_="axis", x1=left, y1=height - bottom, x2=width, y2=height - bottom),
        tag("line", class_="axis", x1=left, y1=0, x2=left, y2=height - bottom),
        tag("text", "0", x=left, y=height - 8, text_anchor="middle"),
        tag("text", "recall", x=(left + width) / 2, y=height - 8, text_anchor="middle"),
        tag("text", "1", x=width, y=height - 8, text_anchor="end"),
        tag("text", "1", x=left - 6, y=10, text_anchor="end"),
        tag("text", "0", x=left - 6, y=height - bottom, text_anchor="end"),
        tag("path", class_="trace", d="M" + "L".join(map(at, points))),
        tag("line", class_="mark", x1=x, y1=y, x2=x, y2=height - bottom),
        tag("text", f"{chosen.precision:.3f} at {chosen.recall:.3f}", class_="mark", x=left + 8, y=height - bottom - 8),
    ]
    drawn = tag("svg", marks, view_box=f"0 0 {width} {height}", role="img", aria_label="precision against recall")
    return tag("figure", tag("figcaption", tag("b", "precision"), " against recall, all labelled records"), drawn)


def _pair(linked: Linked, place: int) -> Html:
    """A record and its nearest, side by side."""
    score = float(linked.scores[place])
    left = linked.left.hit(score, int(linked.rows[place]))
    right = linked.right.hit(score, int(linked.nearest[place]))
    sides = [[_drawn(index, hit), hit.text or hit.key] for index, hit in ((linked.left, left), (linked.right, right))]
    return card(pair(*sides), f"score {score:.4f}", tag("div", f"{left.key}\n{right.key}", class_="facts"))


def _card(index: Stored, hit: Hit, said: str) -> Html:
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(hit).items())
    return card(
        _drawn(index, hit),
        tag("div", hit.text or hit.key, class_="said"),
        tag("div", said),
        tag("div", facts, class_="facts"),
    )


def _facts(hit: Hit) -> Mapping[str, Any]:
    return {"key": hit.key, "shard": hit.shard} | {k: str(v)[:100] for k, v in [*hit.metadata.items()][:6]}


def _drawn(index: Stored, hit: Hit) -> Html | None:
    """The picture of a sample; None where it has none that can be read."""
    data = index.picture(hit)
    if data is None:
        return None
    try:
        return picture(picture_from(data).read().permute(1, 2, 0).numpy(), alt=hit.text or hit.key, side=_SIDE)
    except BadSample:
        return None


def _about(index: Stored) -> Html:
    m = index.manifest
    facts = f"{index.folder.name}: {number(m['count'])} of {m['modality']}, made by the model {m['model_hash']}"
    return tag("p", facts, class_="quiet")
