"""`check shards`: what is in some shards, what is wrong with them, and what a recipe would make of them.

One pass measures every member (`survey.py`); here its counts become a report, together with the copies within the
shards and those that the evaluation data share with them. `findings.py` says it in sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast import decode
from mmcontrast.check.demand import Demand, any_use, plan
from mmcontrast.check.findings import judge
from mmcontrast.check.likeness import Groups, Places, alike, groups, met, overlap
from mmcontrast.check.results import (
    Damaged,
    Evaluated,
    Labels,
    LookAlikes,
    Modality,
    Place,
    Repeat,
    Repeats,
    Report,
    Shared,
)
from mmcontrast.check.summary import summarise
from mmcontrast.check.survey import Found, Job, Survey, choose, extension_of, place_of, survey
from mmcontrast.config import ConfigError
from mmcontrast.shards import METADATA, BadSample, ShardSet, open_shards, read_manifest

_TOP = 5  # most frequent captions, largest groups
_SHOWN = 8  # examples of copies


@dataclass(frozen=True)
class Checked:
    """The report, and what is needed to show samples: how they and the evaluation data (by patterns) are read."""

    report: Report
    job: Job
    evaluations: Mapping[tuple[str, ...], Job]
    positions: Sequence[int]


def check_shards(
    patterns: Sequence[str],
    *,
    demand: Demand | None = None,
    recipe: str | None = None,
    against: Sequence[str] = (),
    sample: int = 100_000,
    seed: int = 0,
    ranks: Sequence[int] = (1, 8),
    workers: int = 2,
    progress: bool = False,
) -> Checked:
    """Survey shards.

    Args:
        patterns: folders, globs or ranges.
        demand: what a recipe asks; None reads every kind of modality that is there.
        recipe: its name, for the report.
        against: evaluation data beside those of the recipe.
        sample: samples that are examined at most, drawn at random; 0 examines all.
        seed: of the draw.
        ranks: numbers of processes for which the run is planned.
        workers: processes that examine; 0 does it in this one.
        progress: whether to draw a bar.

    Raises:
        ConfigError: shards that cannot be read, or settings that cannot be used.
    """
    for name, value in (("sample", sample), ("workers", workers), ("seed", seed)):
        if value < 0:
            raise ConfigError(f"{name} is {value}; it must be 0 or more")
    if any(size < 1 for size in ranks):
        raise ConfigError(f"ranks {tuple(ranks)}: a run needs at least 1 process")
    shards = open_shards(patterns)
    asked = demand or any_use(shards.counts)
    if not asked.sources:
        raise ConfigError(f"no member of {patterns[0]} is of a known format; there are: {', '.join(shards.counts)}")
    job = Job(shards, asked.sources, asked.groups, asked.counters)
    evaluated, others = _evaluations(asked, against)
    opened = [e for e in evaluated if e.problem is None]
    positions = [choose(len(one.shards), sample, seed) for one in (job, *others)]
    found, *asks = survey((job, *others), positions, workers=workers, progress=progress)
    planned, batches = (None, []) if asked.run is None else plan(asked.run, asked.source, ranks)
    known = batches if not asked.made and found.examined == len(shards) else []
    report = _report(tuple(patterns), recipe, job, asked, found, seed, known)
    report.plan, report.evaluations = planned, evaluated
    for said, other, theirs in zip(opened, others, asks, strict=True):
        said.samples, said.examined, said.bad = len(other.shards), theirs.examined, theirs.bad
        for modality in asked.sources:
            if modality in found.found and modality in theirs.found:
                said.shared += _shared(modality, job, found.found[modality], other, theirs.found[modality])
    report.findings = judge(report, asked)
    return Checked(report, job, {e.patterns: other for e, other in zip(opened, others, strict=True)}, positions[0])


def _evaluations(asked: Demand, against: Sequence[str]) -> tuple[list[Evaluated], list[Job]]:
    """Every set of evaluation data once, by the names of those that ask for it, and how the readable ones are read."""
    names: dict[tuple[str, ...], list[str]] = {}
    composed: set[tuple[str, ...]] = set()
    for evaluation in asked.evaluations:
        if evaluation.patterns:
            names.setdefault(evaluation.patterns, []).append(evaluation.name)
            composed |= {evaluation.patterns} if evaluation.composed else set()
    for pattern in against:
        names.setdefault((pattern,), []).append(pattern)
    evaluated: list[Evaluated] = []
    jobs: list[Job] = []
    for patterns, called in names.items():
        said = Evaluated(", ".join(called), patterns, patterns in composed)
        evaluated.append(said)
        try:
            jobs.append(Job(open_shards(patterns), asked.sources))
        except ConfigError as error:
            if patterns[0] in against:  # asked for here and now; a recipe's may be prepared later
                raise
            said.problem = str(error)
    return evaluated, jobs


def _report(
    patterns: tuple[str, ...],
    recipe: str | None,
    job: Job,
    asked: Demand,
    found: Survey,
    seed: int,
    batches: Sequence[Places],
) -> Report:
    shards = job.shards
    folders = dict.fromkeys(s.path.parent for s in shards.shards if isinstance(s.path, Path))
    sizes: dict[float, int] = {}
    for s in shards.shards:
        sizes[s.samples] = sizes.get(s.samples, 0) + 1
    report = Report(
        patterns=patterns,
        recipe=recipe,
        shards=len(shards.shards),
        samples=len(shards),
        bytes=sum(s.bytes for s in shards.shards),
        per_shard=summarise(sizes),
        examined=found.examined,
        seed=seed,
        bad=found.bad,
        left_out=sum(map(len, shards.damage.values())),
        damage=_damage(job, found),
        members=dict(sorted(shards.counts.items(), key=lambda item: (-item[1], item[0]))),
        fields=dict(found.fields.most_common()),
        present=[(list(names), count) for names, count in sorted(found.present.items(), key=lambda i: (-i[1], i[0]))],
        repeated_keys=groups(np.array(found.keys, dtype=np.uint64)).surplus,
        without_manifest=[str(folder) for folder in folders if read_manifest(folder) is None],
        made=asked.made,
        max_bad_fraction=asked.max_bad_fraction,
    )
    for modality in asked.sources:
        report.modalities[modality] = _modality(job, asked, modality, found, batches)
    for name in found.groups:
        report.groups[name] = _labels(job, name, found, batches)
    return report


def _damage(job: Job, found: Survey) -> list[Damaged]:
    """What cannot be used, and what a scan left out before; the most frequent first."""
    damage = [Damaged(shard, reason, d.count, d.keys, False) for (shard, reason), d in found.damage.items()]
    for shard, left_out in job.shards.damage.items():
        keys: dict[str, list[str]] = {}
        for key, reason in left_out:
            keys.setdefault(reason, []).append(key)
        damage += [Damaged(shard, reason, len(k), k[:3], True) for reason, k in keys.items()]
    return sorted(damage, key=lambda d: (-d.samples, d.shard, d.reason))


def _labels(job: Job, name: str, found: Survey, batches: Sequence[Places]) -> Labels:
    marks, positions = np.array(found.groups[name], dtype=np.uint64), np.array(found.positions, dtype=np.int64)
    having = np.flatnonzero(marks)
    same = groups(marks[having])
    n = len(marks)
    pairs = float((same.size * (same.size - 1)).sum())
    return Labels(
        len(having),
        len(same.size),
        pairs / (n * (n - 1)) if n > 1 else 0.0,  # among all samples: those without a label are alone
        met(batches, marks) if batches else None,
        _top(same, positions[having], job, partial(_label, job.shards, name), least=1),
    )


def _modality(job: Job, asked: Demand, modality: str, whole: Survey, batches: Sequence[Places]) -> Modality:
    kind, found = job.sources[modality].kind, whole.found.get(modality, Found())
    content, places = found.marked("content"), found.places()
    same = groups(content)
    said = partial(_caption, job, modality) if kind == "text" else None
    everywhere = np.zeros(len(job.shards) if batches else 0, dtype=np.uint64)
    if batches:
        everywhere[places] = content
    meets = met(batches, everywhere) if batches else None
    likeness = None
    if kind == "image":
        near = alike(found.marked("look"), content, examples=_SHOWN)
        ends = [[place(job.shards, int(places[i])) for i in pair] for pair in near.pairs]
        pairs = [(a, b, int(bits)) for (a, b), bits in zip(ends, near.bits, strict=True)]
        likeness = LookAlikes(near.samples, pairs)
    limits, short = _asked(asked, modality, found)
    return Modality(
        kind,
        found.samples,
        sum(count for names, count in whole.present.items() if modality not in names),
        {name: summarise(values) for name, values in found.values.items()},
        {name: dict(words.most_common()) for name, words in found.words.items()},
        dict(found.flags.most_common()),
        Repeats(same.surplus, same.chance, meets, _top(same, places, job, said, least=2)),
        likeness,
        limits,
        short,
    )


def _asked(asked: Demand, modality: str, found: Found) -> tuple[dict[str, float], dict[str, int]]:
    """What the recipe's tower takes, and how many samples have less of it, or more than it can take."""
    limits: dict[str, float] = {}
    short: dict[str, int] = {}
    if modality in asked.sides:
        limits["side"] = asked.sides[modality]
        short["side"] = sum(n for v, n in found.values.get("shorter side", {}).items() if v < asked.sides[modality])
    if modality in asked.hears:
        rate, seconds = asked.hears[modality]
        limits |= {"rate": rate, "seconds": seconds}
        short["rate"] = sum(n for word, n in found.words.get("rate", {}).items() if word.isdigit() and int(word) < rate)
        short["seconds"] = sum(n for value, n in found.values.get("seconds", {}).items() if value > seconds)
    if modality in asked.counters:
        limits["tokens"] = asked.counters[modality].limit
        short["tokens"] = found.flags.get("cut", 0)
    return limits, short


def _top(same: Groups, places: Any, job: Job, said: Callable[[int], str | None] | None, *, least: int) -> list[Repeat]:
    found: list[Repeat] = []
    for first, size in zip(same.first[:_TOP].tolist(), same.size[:_TOP].tolist(), strict=True):
        if size >= least:
            position = int(places[first])
            found.append(Repeat(size, place(job.shards, position), said(position) if said else None))
    return found


def place(shards: ShardSet, position: int) -> Place:
    """Where a sample lies."""
    return Place(*place_of(shards, position), position)


def _caption(job: Job, modality: str, position: int) -> str | None:
    extension = extension_of(job, position, modality)
    return None if extension is None else decode.text(job.shards.read(position, extension))


def _label(shards: ShardSet, name: str, position: int) -> str | None:
    try:
        return str(decode.metadata(shards.read(position, METADATA)).get(name))
    except (BadSample, KeyError):
        return None


def _shared(modality: str, job: Job, found: Found, other: Job, asks: Found) -> list[Shared]:
    """By content; for pictures also by look, without those of equal content."""
    mine, theirs = found.marked("content"), asks.marked("content")
    result: list[Shared] = []
    exact = overlap(mine, theirs)
    kinds = [("content", exact)]
    if job.sources[modality].kind == "image":
        rest = found.marked("look")
        rest[exact.first] = 0
        kinds.append(("look", overlap(rest, asks.marked("look"), near=True)))
    here, there = found.places(), asks.places()
    for by, same in kinds:
        if len(same.first):
            pairs = [
                (place(job.shards, int(here[i])), place(other.shards, int(there[k])))
                for i, k in zip(same.first[:_SHOWN], same.second[:_SHOWN], strict=True)
            ]
            result.append(Shared(modality, by, len(same.first), same.others, pairs))
    return result
