"""The survey: every member of the asked samples is read, decoded and measured, in several processes.

The samples are walked once, shard by shard, in pieces. A piece gives counts, which add up, and 64-bit marks. So memory
is bounded by the counts (numbers are rounded) and some 8 bytes per mark of a sample, and the result does not depend
on the number of processes. Nothing of a sample itself is kept: whoever wants to show one reads it again.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmcontrast import decode
from mmcontrast.check.likeness import Marks, Places
from mmcontrast.check.measure import MEASURES, Measured, mark
from mmcontrast.check.tokens import TokenCounter
from mmcontrast.config import ConfigError
from mmcontrast.processes import in_order
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import METADATA, BadSample, ShardSet

_PIECE = 256  # samples that a process takes at once
_EXAMPLES = 3  # keys that stand for a reason of damage in a shard
_MOST_WORDS = 1000  # distinct words that are counted apart; the content decides how many there are
_REST = "(others)"
_RATES = ("sampling_rate", "sample_rate", "fs")  # metadata fields that tell a signal's samples per second


@dataclass(frozen=True)
class Source:
    """Where the members of a modality are found: its kind, and extensions in order of preference."""

    kind: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """What is surveyed: which samples of which shards, and how their modalities are read."""

    shards: ShardSet
    sources: Mapping[str, Source]
    groups: tuple[str, ...] = ()
    counters: Mapping[str, TokenCounter] = field(default_factory=dict[str, TokenCounter])


@dataclass
class Found:
    """What is known of one modality. Positions and marks have one entry per sample that has it undamaged."""

    samples: int = 0
    values: dict[str, Counter[float]] = field(default_factory=dict[str, Counter[float]])
    words: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    flags: Counter[str] = field(default_factory=Counter[str])
    positions: array[int] = field(default_factory=lambda: array("q"))
    marks: dict[str, array[int]] = field(default_factory=dict[str, "array[int]"])

    def note(self, position: int, measured: Measured) -> None:
        """Add one sample."""
        self.samples += 1
        for name, value in measured.values.items():
            self.values.setdefault(name, Counter())[value] += 1
        for name, word in measured.words.items():
            self.words.setdefault(name, Counter())[word] += 1
        self.flags.update(measured.flags)
        self.positions.append(position)
        for name in {**self.marks, **measured.marks}:
            column = self.marks.setdefault(name, array("Q", [0]) * (self.samples - 1))
            column.append(measured.marks.get(name, 0))

    def add(self, other: Found) -> None:
        """Add what was found in a later piece."""
        for name in {**self.marks, **other.marks}:
            column = self.marks.setdefault(name, array("Q", [0]) * self.samples)
            column.extend(other.marks.get(name, array("Q", [0]) * other.samples))
        self.samples += other.samples
        for name, values in other.values.items():
            self.values.setdefault(name, Counter()).update(values)
        for name, words in other.words.items():
            _add_words(self.words.setdefault(name, Counter()), words)
        self.flags.update(other.flags)
        self.positions.extend(other.positions)

    def places(self) -> Places:
        """[samples] positions in the shards."""
        return np.array(self.positions, dtype=np.int64)

    def marked(self, name: str) -> Marks:
        """[samples] marks; 0 where there is none."""
        return np.array(self.marks.get(name, array("Q", [0]) * self.samples), dtype=np.uint64)


@dataclass
class Damage:
    """One reason in one shard: how many samples, and keys of a few."""

    count: int = 0
    keys: list[str] = field(default_factory=list[str])


@dataclass
class Survey:
    """All that was found.

    Attributes:
        examined: samples that were read.
        bad: of those, how many cannot be used.
        damage: (shard, reason) -> damage; of members that no reader takes, too.
        present: modalities that a sample has -> samples; a damaged member counts as present.
        extensions: member extension -> samples.
        fields: metadata field -> samples.
        found: modality -> what is known of it.
        positions: [examined] of the samples.
        keys: [examined] marks of their keys.
        groups: group -> [examined] marks of their labels; 0 where a sample has none.
    """

    examined: int = 0
    bad: int = 0
    damage: dict[tuple[str, str], Damage] = field(default_factory=dict[tuple[str, str], Damage])
    present: Counter[tuple[str, ...]] = field(default_factory=Counter[tuple[str, ...]])
    extensions: Counter[str] = field(default_factory=Counter[str])
    fields: Counter[str] = field(default_factory=Counter[str])
    found: dict[str, Found] = field(default_factory=dict[str, Found])
    positions: array[int] = field(default_factory=lambda: array("q"))
    keys: array[int] = field(default_factory=lambda: array("Q"))
    groups: dict[str, array[int]] = field(default_factory=dict[str, "array[int]"])

    def add(self, other: Survey) -> None:
        """Add a later piece."""
        self.examined += other.examined
        self.bad += other.bad
        for place, damage in other.damage.items():
            mine = self.damage.setdefault(place, Damage())
            mine.count += damage.count
            mine.keys = (mine.keys + damage.keys)[:_EXAMPLES]
        self.present.update(other.present)
        _add_words(self.extensions, other.extensions)
        _add_words(self.fields, other.fields)
        for modality, found in other.found.items():
            self.found.setdefault(modality, Found()).add(found)
        self.positions.extend(other.positions)
        self.keys.extend(other.keys)
        for name, labels in other.groups.items():
            self.groups.setdefault(name, array("Q")).extend(labels)


def _add_words(mine: Counter[str], others: Mapping[str, int]) -> None:
    for word, count in others.items():
        mine[word if word in mine or len(mine) < _MOST_WORDS else _REST] += count


def place_of(shards: ShardSet, position: int) -> tuple[str, str]:
    """Sample -> (shard with its folder, key)."""
    return str(shards.shards[shards.locate(position)[0]].path), shards.name(position)[1]


def extension_of(job: Job, position: int, modality: str) -> str | None:
    """The member that a reader takes for a modality; None where the sample has none."""
    there = job.shards.extensions(position)
    return next((e for e in job.sources[modality].members if e in there), None)


def choose(total: int, most: int, seed: int) -> Sequence[int]:
    """All of 0 .. total - 1, or `most` of them at random, ascending; `most` 0 takes all."""
    if not most or total <= most:
        return range(total)
    return sorted(random.Random(fold_seed(seed, "survey")).sample(range(total), most))


def survey(
    jobs: Sequence[Job], positions: Sequence[Sequence[int]], *, workers: int = 0, progress: bool = False
) -> list[Survey]:
    """Examine samples of each job, those at its ascending positions; `workers` 0 does it in this process.

    Raises:
        RunError: a process ended before its time.
    """
    from tqdm import tqdm

    pieces = [(k, piece) for k, job in enumerate(jobs) for piece in _pieces(job.shards, positions[k])]
    found = [Survey(groups={name: array("Q") for name in job.groups}) for job in jobs]
    with tqdm(total=sum(map(len, positions)), desc="examines", unit=" samples", disable=not progress) as bar:
        workers = min(workers, len(pieces)) if len(pieces) > 1 else 0
        for (k, piece), part in zip(pieces, in_order(_examine_one, jobs, pieces, workers=workers), strict=True):
            found[k].add(part)
            bar.update(len(piece))
    return found


def _pieces(shards: ShardSet, positions: Sequence[int]) -> Iterator[Sequence[int]]:
    """Runs of positions within one shard each."""
    start = 0
    while start < len(positions):
        shard, place = shards.locate(positions[start])
        behind = positions[start] - place + shards.shards[shard].samples  # the first position of the next shard
        stop = start + 1
        while stop < len(positions) and stop < start + _PIECE and positions[stop] < behind:
            stop += 1
        yield positions[start:stop]
        start = stop


def _examine_one(jobs: Sequence[Job], piece: tuple[int, Sequence[int]]) -> Survey:
    return _examine(jobs[piece[0]], piece[1])


def _examine(job: Job, piece: Sequence[int]) -> Survey:
    found = Survey(groups={name: array("Q") for name in job.groups})
    for position in piece:
        reasons, spare = _sample(job, position, found)
        found.examined += 1
        found.positions.append(position)
        shard, key = place_of(job.shards, position)
        found.keys.append(mark(key.encode("utf-8", "surrogatepass")))
        found.bad += bool(reasons)
        for reason in dict.fromkeys([*reasons, *spare]):
            damage = found.damage.setdefault((shard, reason), Damage())
            damage.count += 1
            damage.keys = [*damage.keys, key][:_EXAMPLES]
    return found


def _sample(job: Job, position: int, found: Survey) -> tuple[list[str], list[str]]:
    """Note one sample; give the reasons why it cannot be used, and what is wrong with members that no reader takes."""
    extensions = job.shards.extensions(position)
    found.extensions.update(extensions)
    reasons: list[str] = []
    meta: Mapping[str, Any] = {}
    if METADATA in extensions:
        try:
            meta = decode.metadata(job.shards.read(position, METADATA))
        except BadSample as error:
            reasons.append(str(error))
    found.fields.update(name[:100] for name in meta)
    for name in job.groups:
        value = meta.get(name)
        found.groups[name].append(0 if value is None else mark(str(value).encode("utf-8", "surrogatepass")))
    present: list[str] = []
    read = {METADATA}
    for modality, source in job.sources.items():
        extension = next((e for e in source.members if e in extensions), None)  # the one that a reader takes
        if extension is None:
            continue
        present.append(modality)
        read.add(extension)
        try:
            data = job.shards.read(position, extension)
            measured = MEASURES[source.kind](data)
        except BadSample as error:
            reasons.append(str(error))
            continue
        except ConfigError:
            raise
        except Exception as error:  # such as a library's on crafted bytes; no single sample may end a survey
            reasons.append(f"{source.kind} cannot be measured ({type(error).__name__})")
            continue
        if (counter := job.counters.get(modality)) is not None:
            tokens = counter(decode.text(data))
            measured.values["tokens"] = tokens
            measured.flags += ["cut"] if tokens > counter.limit else []
        if source.kind == "timeseries" and (rate := next((meta[r] for r in _RATES if r in meta), None)) is not None:
            measured.words["rate in the metadata"] = str(rate)[:40]
        found.found.setdefault(modality, Found()).note(position, measured)
    found.present[tuple(present)] += 1
    if not present:
        reasons.append(f"has none of {', '.join(job.sources)}")
    spare: list[str] = []
    for extension in extensions:
        if extension not in read:
            try:
                job.shards.read(position, extension)
            except BadSample as error:
                spare.append(f"{error}, which is not read")
    return reasons, spare
