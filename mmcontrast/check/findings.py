"""Numbers -> sentences: what is wrong with the shards, by how much, and what to do.

An error is what makes a run stop or its results untrue; a warning is what costs quality or money; a note is good to
know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmcontrast.check.demand import Demand, Plan
from mmcontrast.check.likeness import NEAR
from mmcontrast.check.measure import rounded
from mmcontrast.check.results import Evaluated, Finding, Modality, Report, Shared
from mmcontrast.page import number, percent

LEVELS = ("error", "warning", "note")
_MUCH = 0.05  # share of the samples from which a loss of quality is a warning
_SOME = 0.01  # the same of what should hardly be there at all
_CROWD = 0.1  # false negatives of an anchor in a step from which they are a warning
_CLUSTERED = 2.0  # how many times more than by chance
_MANY_EPOCHS = 100
_FLAGS = {
    "one colour": "pictures show one colour alone",
    "silent": "recordings are silent",
    "clipped": "recordings are clipped (more than 1 in 1,000 samples at full scale)",
    "a channel without change": "signals have a channel that never changes",
    "several lines": "texts have several lines and are read as one caption",
}
_MIXED = {
    "rate": "samples per second",
    "channels": "channels",
    "layout": "layout",
    "rate in the metadata": "samples per second",
}


def judge(report: Report, demand: Demand) -> list[Finding]:
    """All findings, the gravest first."""
    found = [
        *_damage(report),
        *_modalities(report, demand),
        *(f for e in report.evaluations for f in _evaluation(report, e)),
        *(f for name, m in report.modalities.items() if m.samples for f in _modality(report, name, m)),
        *_groups(report),
        *_keys_and_files(report),
        *(_plan(report, report.plan) if report.plan else ()),
    ]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def share_of(count: int, total: int) -> str:
    """`12 of 480 (2.5 %)`."""
    return f"{number(count)} of {number(total)} ({percent(count / max(1, total))})"


def cut(text: str, most: int = 60) -> str:
    """A text in one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def three(value: float) -> str:
    """A number to three digits."""
    return number(rounded(value))


def _graded(count: int, total: int, topic: str, text: str, *, limit: float = _MUCH) -> Finding:
    """`count of total` and what is the matter with them: a warning from a share on."""
    return Finding("warning" if count > limit * total else "note", topic, f"{share_of(count, total)} {text}")


def _damage(r: Report) -> Iterator[Finding]:
    if not r.bad and not r.left_out:
        if r.damage:
            count = number(sum(d.samples for d in r.damage))
            text = f"{count} members that are not read are damaged, such as {r.damage[0].examples[0]!r} of"
            yield Finding("note", "damage", f"{text} {r.damage[0].shard}: {r.damage[0].reason}.")
        return
    told: list[str] = []
    if r.bad:
        told.append(f"{share_of(r.bad, r.examined)} examined samples cannot be used")
    if r.left_out:
        told.append(f"{share_of(r.left_out, r.left_out + r.samples)} written samples are lost to breaks of their tars")
    worst = r.damage[0]
    keys = ", ".join(repr(key) for key in worst.examples)
    text = f"{' and '.join(told)}; most often {worst.shard}: {worst.reason} ({number(worst.samples)} times, {keys})"
    limit = percent(r.max_bad_fraction)
    if r.bad_share > r.max_bad_fraction:
        remedy = f"That is above max_bad_fraction ({limit}), where training stops: write these shards again."
        yield Finding("error", "damage", f"{text}. {remedy}")
    else:
        yield Finding("warning", "damage", f"{text}. Training replaces them, up to max_bad_fraction ({limit}).")


def _modalities(r: Report, demand: Demand) -> Iterator[Finding]:
    level = "warning" if demand.run is None else "error"
    for name, source in demand.sources.items():
        missing = r.modalities[name].missing
        if not any(r.members.get(extension) for extension in source.members):
            there = ", ".join(list(r.members)[:8]) or "nothing"
            text = (
                f"no sample has the modality {name!r} (members {', '.join(source.members)}); the shards have {there}."
            )
            yield Finding(level, "modality", f"{text} Name its members with data.members, or leave its tower out.")
        elif missing:
            yield Finding("note", "modality", f"{share_of(missing, r.examined)} samples have no {name}.")
    if r.made or len(demand.sources) < 2:
        return
    alone = sum(n for names, n in r.present if len(names) == 1)
    if alone and not any(len(names) > 1 for names, _ in r.present):
        yield Finding(level, "modality", "no sample has two modalities: there is nothing to contrast.")
    elif alone:
        text = "samples have one modality alone: they are no positives and only serve as negatives."
        yield _graded(alone, r.examined, "modality", text)


def _evaluation(r: Report, e: Evaluated) -> Iterator[Finding]:
    if e.problem:
        yield Finding("warning", "overlap", f"the evaluation data {e.name!r} cannot be compared: {e.problem}.")
        return
    if e.bad:
        text = f"{share_of(e.bad, e.examined)} samples of the evaluation data {e.name!r} are damaged."
        yield Finding("warning", "evaluation", text)
    yield from (_shared(r, e, s) for s in e.shared)


def _shared(r: Report, e: Evaluated, s: Shared) -> Finding:
    kind = r.modalities[s.modality].kind
    a, b = s.pairs[0]
    theirs = share_of(s.evaluation_samples, e.examined)
    such = f"such as {b.key!r} of {b.shard}, which is {a.key!r} of {a.shard}"
    more = ""
    if r.examined < r.samples:
        more = f" In all shards there may be {three(r.samples / r.examined)} times as many."
    if kind == "text":
        level = "warning" if s.evaluation_samples > _SOME * e.examined else "note"
        text = f"{theirs} texts of {e.name!r} are captions of the training shards too, {such}."
        return Finding(level, "overlap", f"{text} Short names may be, sentences should not.{more}")
    if s.by == "look":
        text = (
            f"{theirs} pictures of {e.name!r} look like a training picture (in grey, at most {NEAR} of 64 bits differ)"
        )
        return Finding("warning", "overlap", f"{text}, {such}. Look at them: what was trained on cannot test.{more}")
    text = f"{theirs} {s.modality} members of {e.name!r} are in the training shards, byte for byte, {such}."
    if e.composed:
        return Finding("warning", "overlap", f"{text} Its examples are composed of several samples: this may be meant.")
    remedy = f"What was trained on cannot test: take these {number(s.samples)} samples out of the training shards."
    return Finding("error", "overlap", f"{text} {remedy}{more}")


def _modality(r: Report, name: str, m: Modality) -> Iterator[Finding]:
    asked, beyond, n = m.asked, m.short, m.samples
    if beyond.get("side"):
        text = (
            f"{name} members have a side below the {number(asked['side'])} pixels that the tower takes: enlarging them"
        )
        yield _graded(beyond["side"], n, "size", f"{text} adds nothing. A smaller image_size, or larger pictures.")
    if beyond.get("tokens"):
        text = f"captions are longer than the {number(asked['tokens'])} tokens that the tower reads (the longest has"
        longest = number(m.numbers["tokens"].most)
        yield _graded(beyond["tokens"], n, "truncation", f"{text} {longest}): their ends are never seen.")
    if beyond.get("rate"):
        text = f"recordings have fewer than the tower's {number(asked['rate'])} samples per second: the upper"
        yield _graded(beyond["rate"], n, "rate", f"{text} frequencies stay empty. A lower sample_rate.")
    if beyond.get("seconds"):
        text = (
            f"recordings are longer than the {number(asked['seconds'])} s that the tower hears: each step takes a part."
        )
        yield Finding("note", "length", f"{share_of(beyond['seconds'], n)} {text}")
    for flag, text in _FLAGS.items():
        if m.flags.get(flag):
            yield _graded(m.flags[flag], n, "content", f"{text}.", limit=_SOME)
    for property_, text in _MIXED.items():
        kinds = m.words.get(property_, {})
        if len(kinds) > 1 and (m.kind == "timeseries" or property_ == "rate"):
            said = ", ".join(f"{word} ({number(count)})" for word, count in list(kinds.items())[:4])
            level = "warning" if m.kind == "timeseries" else "note"
            yield Finding(level, "mixture", f"{name} members differ in {text}: {said}.")
    yield from _repeats(r, name, m)


def _repeats(r: Report, name: str, m: Modality) -> Iterator[Finding]:
    seen = " Of the drawn samples alone; in all shards there are more." if r.examined < r.samples else ""
    if m.repeats.surplus and m.kind == "text":
        yield _repeated_captions(r, m, seen)
    elif m.repeats.surplus:
        top = m.repeats.top[0]
        text = f"{name} members are copies of an earlier one, byte for byte, most often of {top.place.key!r}"
        yield _graded(
            m.repeats.surplus, m.samples, "repeats", f"{text} ({number(top.count)} in all).{seen}", limit=_SOME
        )
    if m.alike and m.alike.samples:
        a, b, _ = m.alike.pairs[0]
        text = f"pictures look like another one, of another file (in grey, at most {NEAR} of 64 bits differ), such as"
        yield _graded(m.alike.samples, m.samples, "repeats", f"{text} {a.key!r} and {b.key!r}.{seen}")


def _repeated_captions(r: Report, m: Modality, seen: str) -> Finding:
    top = m.repeats.top[0]
    text = f"captions repeat an earlier one, most often {cut(top.text or '')!r} ({number(top.count)} in all)."
    much = m.repeats.surplus > _MUCH * m.samples
    if r.plan is not None:
        others = r.plan.others * m.repeats.chance if m.repeats.met is None else m.repeats.met
        much = others > _CROWD
        text += f" In a batch of {number(r.plan.global_batch)} each meets {three(others)} false negatives by that."
    if much:
        text += " Keep the caption as a metadata field too, and name it in data.groups and in never_negative."
    return Finding("warning" if much else "note", "repeats", f"{share_of(m.repeats.surplus, m.samples)} {text}{seen}")


def _groups(r: Report) -> Iterator[Finding]:
    for name, g in r.groups.items():
        if not g.samples:
            made = " The recipe composes its examples and may make it." if r.made else ""
            fields = ", ".join(list(r.fields)[:8]) or "none"
            text = f"no sample has the metadata field {name!r}, which data.groups names; there are: {fields}.{made}"
            yield Finding("note" if r.made else "error", "groups", text)
            continue
        text = f"samples carry the group {name!r}: {number(g.distinct)} labels, most often {cut(g.top[0].text or '')!r}"
        text = f"{share_of(g.samples, r.examined)} {text} ({number(g.top[0].count)})"
        if r.plan is not None:
            even = r.plan.others * g.chance
            others = even if g.met is None else g.met
            text += f"; in a batch of {number(r.plan.global_batch)} each meets {three(others)} others of its group"
            if others > max(_CROWD, _CLUSTERED * even):
                text += (
                    f", {three(even)} if all were mixed: data.window ({number(r.plan.window)}) does not part what lies"
                )
                yield Finding(
                    "warning", "groups", f"{text} together. A larger window, or shards written in random order."
                )
                continue
        yield Finding("note", "groups", f"{text}.")


def _keys_and_files(r: Report) -> Iterator[Finding]:
    if r.repeated_keys:
        text = (
            f"{share_of(r.repeated_keys, r.examined)} keys were in an earlier shard already. Training tells them apart"
        )
        yield Finding("note", "keys", f"{text} by their shards; other readers may not.")
    if r.without_manifest:
        folder, *others = r.without_manifest
        more = f" and {number(len(others))} more folders have" if others else " has"
        text = f"{folder}{more} no manifest, so changed bytes may go unseen: `mmcontrast prep index {folder}`."
        yield Finding("note", "checksums", text)
    if r.per_shard.least == 0:
        yield Finding("note", "shards", "some shards hold no samples.")


def _plan(r: Report, p: Plan) -> Iterator[Finding]:
    if p.problem:
        yield Finding("error", "run", f"training refuses this recipe: {p.problem}.")
        return
    for ranks in p.ranks:
        if ranks.problem:
            yield Finding("warning", "run", f"{number(ranks.ranks)} ranks cannot run this recipe: {ranks.problem}.")
    part = "" if p.share == 1 else f", of which {percent(p.share)} come from this source,"
    text = f"{number(p.steps)} steps of {number(p.global_batch)}{part} go {three(p.epochs)} times through"
    text += f" {number(p.per_epoch)} examples, {three(p.steps_per_epoch)} steps each time"
    if r.made:
        yield Finding("note", "run", f"{text}; the recipe composes each anew.")
    elif p.epochs > _MANY_EPOCHS:
        yield Finding("warning", "run", f"{text}: so many repeats are mostly learned by heart. More data, fewer steps.")
    elif p.epochs < 1:
        yield Finding("warning", "run", f"{text}: {percent(1 - p.epochs)} of them are never seen. More steps.")
    else:
        yield Finding("note", "run", f"{text}.")
    crossing = [x.ranks for x in p.ranks if not x.own_lanes and not x.problem]
    if crossing:
        lanes = "1 lane is" if p.lanes == 1 else f"{number(p.lanes)} lanes are"
        text = f"with {_listed(crossing)} ranks, {lanes} shared: every rank reads from every shard."
        yield Finding("note", "run", f"{text} Where shards lie far away, make data.lanes a multiple of the ranks.")
    if p.lanes > r.shards:
        text = f"{number(p.lanes)} lanes read {number(r.shards)} shards: several of them read one shard at once."
        yield Finding("note", "run", f"{text} More, smaller shards let each rank read its own.")


def _listed(values: Sequence[int]) -> str:
    *most, last = [number(v) for v in values]
    return f"{', '.join(most)} and {last}" if most else last
