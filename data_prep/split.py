"""Samples of any source -> shards of training, validation and test, divided by a hash of their group."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.shard_writer import Sample, ShardWriter, clear_shards

SPLITS = ("train", "val", "test")
_SHOWN = 10


@dataclass(frozen=True)
class Item:
    """A sample and the group that must stay on one side of the split (a caption, a concept, a patient)."""

    sample: Sample
    group: str


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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"samples": self.samples, "refused": [[r.where, r.reason] for r in self.refused]}


def split_of(group: str, fractions: Mapping[str, float]) -> str:
    """The split of a group: a pure function of its name, so it never moves when others come or go."""
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for name in ("test", "val"):
        if place < fractions[name]:
            return name
        place -= fractions[name]
    return "train"


def shares(val: float, test: float) -> dict[str, float]:
    """The shares of validation and test.

    Raises:
        ConfigError: they leave nothing to train on.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ConfigError(f"val {val} and test {test} must be 0 or more and leave a share for training")
    return {"val": val, "test": test}


def write_splits(
    items: Iterable[Item | Refused],
    out: Path,
    *,
    val: float,
    test: float,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    total: int | None = None,
) -> Summary:
    """Write OUT/train, OUT/val and OUT/test (those that are asked for); refused rows are counted and shown.

    Raises:
        ConfigError: fractions that leave nothing to train on, shards that are there already, or no good row.
    """
    from tqdm import tqdm

    fractions = shares(val, test)
    wanted = [name for name in SPLITS if name == "train" or fractions[name] > 0]
    counts: Counter[str] = Counter()
    summary = Summary()
    for name in SPLITS:  # those not asked for as well: an older test split would hold what is trained on now
        clear_shards(out / name, overwrite=overwrite)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(out / name, overwrite=overwrite, about=about)) for name in wanted
        }
        for item in tqdm(items, total=total, desc="prep", unit="sample", disable=not sys.stderr.isatty()):
            if isinstance(item, Refused):
                summary.refused.append(item)
                continue
            name = split_of(item.group, fractions)
            writers[name].write(item.sample)
            counts[name] += 1
        if not counts:
            first = "".join(f"; the first: {row.where}: {row.reason}" for row in summary.refused[:1])
            raise ConfigError(f"no usable sample was found ({len(summary.refused)} refused{first})")
    summary.samples = {name: counts[name] for name in wanted}
    report(summary, out)
    return summary


def report(summary: Summary, out: Path) -> None:
    """Tell a person what was written and what was refused."""
    for row in summary.refused[:_SHOWN]:
        print(f"refused {row.where}: {row.reason}", file=sys.stderr)
    if len(summary.refused) > _SHOWN:
        print(f"… and {len(summary.refused) - _SHOWN} more", file=sys.stderr)
    counts = ", ".join(f"{name} {n}" for name, n in summary.samples.items())
    print(f"{out}: {counts} samples; refused {len(summary.refused)}", file=sys.stderr)
    for name, n in summary.samples.items():
        if not n:
            print(f"warning: {name} is empty: too few groups for its share", file=sys.stderr)
