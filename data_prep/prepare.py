"""A source -> shards of its splits: rows are encoded in parallel, written in order, and the bad ones counted.

    OUT/train/00000.tar …       shards with a manifest, as `ShardWriter` makes them; so for each split
    OUT/prep.json               what was written, and every row that was refused, with the reason

The bytes do not depend on the number of processes, nor on whether the work was cut off and gone on with.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError, RunError
from mmcontrast.data_prep.journal import Journal, Outcome
from mmcontrast.data_prep.source import SPLITS, Item, Row, Source
from mmcontrast.processes import in_order
from mmcontrast.shard_writer import ShardWriter, clear_shards
from mmcontrast.shards import BadSample

SUMMARY = "prep.json"
_SHOWN = 10
_PIECE = 16  # rows that a process takes at once


@dataclass(frozen=True)
class Refused:
    """A row of the source that cannot become a sample: where it stands, and why."""

    where: str
    reason: str


@dataclass
class Summary:
    """What was written: samples per split, and the rows that were refused."""

    samples: dict[str, int] = field(default_factory=dict[str, int])
    refused: list[Refused] = field(default_factory=list[Refused])

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> rows that were refused for it, the most frequent first."""
        return dict(Counter(row.reason for row in self.refused).most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "samples": self.samples,
            "reasons": self.reasons,
            "refused": [[row.where, row.reason] for row in self.refused],
        }


def prepare(
    source: Source, out: Path, *, workers: int = 0, max_samples: int = 10_000, overwrite: bool = False
) -> Summary:
    """Write the shards of a source.

    A preparation that was cut off goes on at its last whole shards when it is called again with the same settings.

    Args:
        source: the corpus.
        out: folder that gets a folder per split.
        workers: processes that encode; 0 does it in this one.
        max_samples: samples per shard, at most.
        overwrite: replace shards that are there.

    Raises:
        ConfigError: the source is not there or has no good row, or there are shards already.
        RunError: a process was killed, or the source changed since the preparation was cut off.
    """
    from tqdm import tqdm

    splits, rows = source.splits, source.rows()
    given = {"source": type(source).__qualname__, **asdict(source), "max_samples": max_samples}
    settings = json.loads(json.dumps(given, default=str))
    journal = Journal(out, settings, overwrite=overwrite)
    replace = overwrite or journal.resumed
    # Those not asked for as well: an older test split would hold what is trained on now.
    for split in dict.fromkeys([*splits, *SPLITS, *_written(out)]):
        if split not in journal.shards:
            clear_shards(out / split, overwrite=replace)
    counts: Counter[str] = Counter()
    summary = Summary()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for split in splits:
            writer = ShardWriter(
                out / split,
                max_samples=max_samples,
                overwrite=replace,
                about=source.about(split),
                finished=journal.shards.get(split, ()),
            )
            writers[split] = stack.enter_context(writer)
        finished = {split: sum(entry["samples"] for entry in writer.shards) for split, writer in writers.items()}
        if journal.shards:
            print(f"{out}: goes on behind {sum(finished.values())} samples that were written", file=sys.stderr)
        journal.begin()
        (out / SUMMARY).unlink(missing_ok=True)
        total = len(rows) if isinstance(rows, Sized) else None
        watched = tqdm(rows, total=total, desc="prep", unit="row", disable=not sys.stderr.isatty())
        pieces = _pieces(_tasks(watched, journal.outcomes(), finished))
        for done in chain.from_iterable(in_order(_encode, source, pieces, workers=workers)):
            if isinstance(done.outcome, str):
                summary.refused.append(Refused(done.where, done.outcome))
            for split, item in zip_longest(done.splits, done.items):
                if item is not None and counts[split] >= finished[split]:
                    shards = len(writers[split].shards)
                    writers[split].write(item.sample)
                    if len(writers[split].shards) > shards:
                        journal.shard(split, writers[split].shards[-1])
                counts[split] += 1
            if not done.journaled:
                journal.row(done.where, done.outcome)
        if not counts:
            journal.close()
            first = "".join(f"; the first: {row.where}: {row.reason}" for row in summary.refused[:1])
            raise ConfigError(f"no usable sample was found ({len(summary.refused)} refused{first})")
    summary.samples = {split: counts[split] for split in splits}
    text = json.dumps({"settings": settings, **summary.to_json()}, indent=2, ensure_ascii=False)
    (out / SUMMARY).write_text(f"{text}\n", "utf-8", "backslashreplace")
    journal.close()
    report(summary, out)
    return summary


@dataclass(frozen=True)
class _Task:
    """A row to encode, or only what became of it, where its samples are in shards that are finished."""

    where: str
    row: Row | None
    known: list[str] | str | None = None


@dataclass(frozen=True)
class _Done:
    """What became of a row; no items where nothing of it is to be written."""

    where: str
    outcome: list[str] | str  # the splits of its samples, or why it was refused
    items: Sequence[Item]
    journaled: bool

    @property
    def splits(self) -> Sequence[str]:
        return () if isinstance(self.outcome, str) else self.outcome


def _tasks(rows: Iterable[Row], outcomes: Iterator[Outcome], finished: Mapping[str, int]) -> Iterator[_Task]:
    places: Counter[str] = Counter()
    for row in rows:
        where, known = next(outcomes, (row.where, None))
        if where != row.where:
            raise RunError(f"the source has {row.where} where it had {where} before; start anew with --overwrite")
        behind = False
        for split in known if isinstance(known, list) else ():
            behind |= places[split] >= finished[split]
            places[split] += 1
        yield _Task(where, row if known is None or behind else None, known)


def _pieces(tasks: Iterator[_Task]) -> Iterator[list[_Task]]:
    while piece := list(islice(tasks, _PIECE)):
        yield piece


def _encode(source: Source, tasks: Sequence[_Task]) -> list[_Done]:
    found: list[_Done] = []
    for task in tasks:
        items: Sequence[Item] = ()
        outcome = task.known
        if task.row is not None:
            try:
                items = source.encode(task.row)
                outcome = [item.split for item in items]
            except BadSample as error:
                outcome = str(error)
            except UnicodeDecodeError:
                outcome = "text is not UTF-8"
            except OSError as error:
                outcome = f"cannot be read: {error.strerror or error}"
        assert outcome is not None
        if task.known not in (None, outcome):
            raise RunError(f"{task.where} gives other samples than before; start anew with --overwrite")
        found.append(_Done(task.where, outcome, items, task.known is not None))
    return found


def _written(out: Path) -> list[str]:
    """The splits that an older preparation wrote."""
    try:
        return list(json.loads((out / SUMMARY).read_bytes())["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def report(summary: Summary, out: Path) -> None:
    """Tell a person what was written and what was refused."""
    for row in summary.refused[:_SHOWN]:
        print(f"refused {row.where}: {row.reason}", file=sys.stderr)
    if len(summary.refused) > _SHOWN:
        print(f"… and {len(summary.refused) - _SHOWN} more, all in {out / SUMMARY}:", file=sys.stderr)
        for reason, count in list(summary.reasons.items())[:_SHOWN]:
            print(f"  {count} × {reason}", file=sys.stderr)
    counts = ", ".join(f"{name} {n}" for name, n in summary.samples.items())
    print(f"{out}: {counts} samples; refused {len(summary.refused)}", file=sys.stderr)
    for name, n in summary.samples.items():
        if not n:
            print(f"warning: {name} is empty: too few groups for its share", file=sys.stderr)
