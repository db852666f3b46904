"""A report of shards as one page: findings, samples to look at and to hear, copies side by side, histograms.

Pictures, sounds and signals are decoded and drawn anew; captions, keys and metadata are text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

import numpy as np

from mmcontrast import decode
from mmcontrast.charts import STYLE, histogram
from mmcontrast.check.findings import cut, share_of, three
from mmcontrast.check.measure import UNITS, series
from mmcontrast.check.results import Evaluated, Modality, Place, Report
from mmcontrast.check.shards import Checked
from mmcontrast.check.survey import Job, extension_of
from mmcontrast.check.table import headline
from mmcontrast.page import (
    Html,
    Node,
    card,
    cards,
    finding,
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
)
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import METADATA, BadSample

_HEARD = 3.0  # seconds of a sound on the page
_RATE = 16_000  # samples per second above which it is thinned
_SAID = 300  # characters of a caption; half as many of a metadata field
_FIELDS = 20  # of the metadata
_LISTED = 50  # lines of a list without end


def shards_page(checked: Checked, *, samples: int) -> str:
    """The page; `samples` of those that were examined are shown, drawn by the report's seed."""
    r = checked.report
    return page(
        f"Shards: {' '.join(r.patterns)}",
        tag("h1", "Shards: ", " ".join(r.patterns)),
        tag("p", headline(r), class_="quiet"),
        tag("p", f"Recipe: {r.recipe}", class_="quiet") if r.recipe else None,
        section("Findings", [finding(f.level, f.text) for f in r.findings] or tag("p", "Nothing to find fault with.")),
        section("Counts", _counts(r)),
        _samples(checked, samples),
        [section(f"{name}: {number(m.samples)} samples", _modality(checked, m)) for name, m in r.modalities.items()],
        [_evaluation(checked, e) for e in r.evaluations if e.shared],
        _plan(r),
        _damage(r),
        style=STYLE,
    )


def _counts(r: Report) -> Node:
    n = r.per_shard
    facts = [
        ("samples", number(r.samples)),
        ("shards", number(r.shards)),
        ("bytes", number(r.bytes)),
        ("samples per shard", f"{number(n.least)} to {number(n.most)}, median {number(n.median)}"),
    ]
    present = {" + ".join(names) or "none": count for names, count in r.present}
    return tag(
        "div",
        tag("div", tag("h3", "Shards"), table(("", ""), facts)),
        tag("div", tag("h3", "Modalities of a sample"), shares(present, r.examined)),
        tag("div", tag("h3", "Members"), shares(_some(r.members), r.samples)),
        tag("div", tag("h3", "Metadata fields"), shares(_some(r.fields), r.examined)) if r.fields else None,
        class_="row",
    )


def _some(counts: dict[str, int], most: int = 12) -> dict[str, int]:
    return dict(list(counts.items())[:most])


def _samples(checked: Checked, most: int) -> Node:
    positions = checked.positions
    chosen = range(len(positions))
    if len(positions) > most:
        chosen = sorted(random.Random(fold_seed(checked.report.seed, "shown")).sample(chosen, most))
    if not chosen:
        return None
    shown = [_card(checked.job, positions[i]) for i in chosen]
    return section(
        "Samples",
        tag("p", f"{number(len(shown))} at random (seed {checked.report.seed}).", class_="quiet"),
        cards(shown),
    )


def _card(job: Job, position: int, note: Node = None) -> Html:
    shards = job.shards
    name, key = shards.name(position)
    lacks = [modality for modality in job.sources if extension_of(job, position, modality) is None]
    return card(
        _media(job, position, key),
        tag("div", f"no {', no '.join(lacks)}", class_="quiet") if lacks else None,
        tag("div", tag("b", key), f" in {name}", class_="quiet"),
        note,
        _metadata(job, position),
    )


def _media(job: Job, position: int, key: str) -> list[Node]:
    """What a sample has, texts after what they speak of."""
    found: list[Node] = []
    for modality, source in sorted(job.sources.items(), key=lambda item: item[1].kind == "text"):
        extension = extension_of(job, position, modality)
        if extension is not None:
            try:
                found.append(_drawn(source.kind, job.shards.read(position, extension), key))
            except BadSample as error:
                found.append(tag("div", str(error), class_="bad"))
            except Exception as error:  # as in the survey: no single sample may cost the page
                found.append(tag("div", f"{modality} cannot be shown ({type(error).__name__})", class_="bad"))
    return found


def _drawn(kind: str, data: bytes, key: str) -> Node:
    if kind == "text":
        text = decode.text(data)
        return tag("div", text if len(text) <= _SAID else text[:_SAID] + "…", class_="said")
    if kind == "image":
        return picture(decode.image(data).permute(1, 2, 0).numpy(), alt=key)
    if kind == "audio":
        heard = decode.audio(data)
        samples = heard.read(0, min(heard.frames, round(_HEARD * heard.rate))).numpy()
        thin = -(-heard.rate // _RATE)
        samples = samples[: len(samples) // thin * thin].reshape(-1, thin).mean(1)
        told = tag("div", f"{three(heard.frames / heard.rate)} s at {number(heard.rate)} Hz", class_="quiet")
        return [sound(samples.astype(np.float32), heard.rate // thin), told]
    values = series(data)
    told = tag("div", " × ".join(map(number, values.shape)), class_="quiet")
    values = values if values.shape[0] <= values.shape[1] else values.T
    return [traces(values.astype(np.float32)), told]


def _metadata(job: Job, position: int) -> Node:
    if METADATA not in job.shards.extensions(position):
        return None
    try:
        meta = decode.metadata(job.shards.read(position, METADATA))
    except BadSample as error:
        return tag("div", str(error), class_="bad")
    fields = [
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in list(meta.items())[:_FIELDS]
    ]
    return tag("div", "\n".join(cut(field, _SAID // 2) for field in fields), class_="facts") if fields else None


def _modality(checked: Checked, m: Modality) -> Node:
    marks = {"width": "side", "height": "side", "shorter side": "side", "seconds": "seconds", "tokens": "tokens"}
    drawn: list[Node] = []
    for name, n in m.numbers.items():
        limit, unit = m.asked.get(marks.get(name, "")), UNITS.get(name, "")
        asked = {} if limit is None else {f"tower: {number(limit)}": limit}
        if n.least == n.most:
            drawn.append(_titled(name, tag("p", f"{number(n.least)} {unit} in all")))
        else:
            below = f"{number(n.least)} to {number(n.most)}, median {number(n.median)} {unit}".rstrip()
            first, last = n.bins[0], n.bins[-1]
            below += ", log scale" if last.high - last.low > 2 * (first.high - first.low) else ""
            drawn.append(histogram(n.bins, title=name, below=below, marks=asked))
    for name, words in m.words.items():
        drawn.append(_titled(name, shares(_some(words), m.samples)))
    flags = {name: count for name, count in m.flags.items() if name != "cut"}
    if m.missing:
        flags = {"missing": m.missing} | flags
    if flags:
        drawn.append(_titled("remarkable", shares(flags, m.samples + m.missing)))
    return [tag("div", drawn, class_="row"), _repeats(checked, m), _alike(checked, m)]


def _titled(title: str, *body: Node) -> Html:
    return tag("figure", tag("figcaption", tag("b", title)), body)


def _repeats(checked: Checked, m: Modality) -> Node:
    if not m.repeats.surplus:
        return None
    head = tag("h3", f"{share_of(m.repeats.surplus, m.samples)} repeat an earlier one")
    if m.kind == "text":
        rows = [(top.count, cut(top.text or "", 200)) for top in m.repeats.top]
        return [head, table(("times", "caption"), rows)]
    return [
        head,
        cards(
            _card(checked.job, top.place.position, tag("div", f"{number(top.count)} times")) for top in m.repeats.top
        ),
    ]


def _alike(checked: Checked, m: Modality) -> Node:
    if m.alike is None or not m.alike.samples:
        return None
    shown = [_beside(checked.job, a, checked.job, b, f"{bits} of 64 bits differ") for a, b, bits in m.alike.pairs]
    head = tag(
        "h3", f"{share_of(m.alike.samples, m.samples)} look like another one that is another file, in shades of grey"
    )
    return [head, cards(shown)]


def _beside(a_job: Job, a: Place, b_job: Job, b: Place, note: str) -> Html:
    sides: list[Node] = []
    for job, at in ((a_job, a), (b_job, b)):
        sides.append([_media(job, at.position, at.key), tag("div", at.key, class_="quiet")])
    return card(pair(*sides), tag("div", note, class_="quiet"))


def _evaluation(checked: Checked, e: Evaluated) -> Html:
    other = checked.evaluations[e.patterns]
    parts: list[Node] = []
    for s in e.shared:
        same = "look like" if s.by == "look" else "are equal to"
        parts.append(
            tag("h3", f"{s.modality}: {share_of(s.evaluation_samples, e.examined)} {same} {number(s.samples)} here")
        )
        parts.append(cards(_beside(checked.job, a, other, b, f"left: here; right: {e.name}") for a, b in s.pairs))
    return section(f"Overlap with {e.name}", parts)


def _plan(r: Report) -> Node:
    p = r.plan
    if p is None or p.problem:
        return None
    rows = [
        (
            x.ranks,
            x.readers,
            x.per_rank,
            x.problem or (f"{p.lanes // x.ranks} each" if x.own_lanes else "shared by all"),
        )
        for x in p.ranks
    ]
    told = (
        f"{number(p.steps)} steps of {number(p.global_batch)}: {three(p.epochs)} times through the data, "
        f"{three(p.steps_per_epoch)} steps each time. The shuffles of a reading process hold {number(p.window_bytes)} "
        "bytes."
    )
    return section("The run", tag("p", told), table(("ranks", "reading processes", "samples per rank", "lanes"), rows))


def _damage(r: Report) -> Node:
    if not r.damage:
        return None
    rows: Sequence[Sequence[Node]] = [
        (d.samples, d.reason + (" (left out)" if d.left_out else ""), d.shard, ", ".join(d.examples))
        for d in r.damage[:_LISTED]
    ]
    more = f" The first {_LISTED} of {number(len(r.damage))} lines." if len(r.damage) > _LISTED else ""
    told = tag("p", f"{percent(r.bad_share)} of the samples.{more}", class_="quiet")
    return section("Damage", told, table(("samples", "reason", "shard", "such as"), rows))
