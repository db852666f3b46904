"""What a run has written, read back for a person: curves of bounded size, whatever the length of the run.

A run may be going on or have been killed: lines that cannot be read are skipped and counted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmcontrast.checkpoint import list_checkpoints, read_best
from mmcontrast.config import ConfigError
from mmcontrast.not_finite import FILE

BUCKETS = 400
"""Points of a curve, at most: of more, neighbours are merged into one with their mean, least and greatest."""
NAMES = 1000
"""Curves of a run, at most."""
_LINE = 1 << 20  # bytes of a line
_NOTICES = 500


@dataclass(slots=True)
class Bucket:
    """Some values at neighbouring steps."""

    count: int
    steps: float  # sum
    total: float
    low: float
    high: float

    @property
    def step(self) -> float:
        """Their mean step; of one value, its step."""
        return self.steps / self.count

    @property
    def mean(self) -> float:
        """Their mean."""
        return self.total / self.count

    def merge(self, other: Bucket) -> None:
        """Take another one in."""
        self.count += other.count
        self.steps += other.steps
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Curve:
    """One number over the steps, in at most `BUCKETS` buckets of equal width."""

    def __init__(self) -> None:
        self.width = 1
        self.first = self.last = math.nan
        self._buckets: dict[int, Bucket] = {}

    def add(self, step: int, value: float) -> None:
        """One value."""
        self.first = value if math.isnan(self.first) else self.first
        self.last = value
        bucket = self._buckets.get(step // self.width)
        if bucket is None:
            self._buckets[step // self.width] = Bucket(1, step, value, value, value)
        else:
            bucket.count += 1
            bucket.steps += step
            bucket.total += value
            bucket.low, bucket.high = min(bucket.low, value), max(bucket.high, value)
        while len(self._buckets) > BUCKETS:
            self.width *= 2
            old, self._buckets = self._buckets, {}
            for key, bucket in old.items():
                if key // 2 in self._buckets:
                    self._buckets[key // 2].merge(bucket)
                else:
                    self._buckets[key // 2] = bucket

    @property
    def buckets(self) -> list[Bucket]:
        """By step."""
        return [self._buckets[key] for key in sorted(self._buckets)]

    @property
    def count(self) -> int:
        """How many values."""
        return sum(bucket.count for bucket in self._buckets.values())


@dataclass(frozen=True)
class Notice:
    """What the health of the run said."""

    step: int
    rule: str
    text: str


@dataclass
class History:
    """A run as it stands in its folder.

    Attributes:
        folder: of the run.
        config: its settings as JSON; empty where they cannot be read.
        curves: name -> values over the steps.
        notices: what its health said.
        starts: what it ran on, at each start.
        checkpoints: step -> bytes.
        evaluation: what the newest evaluation told beside its numbers.
        best: which step measured best, if that was asked for.
        step: the newest that it has written of.
        lines: of metrics.jsonl that could be read.
        damaged: file -> lines of it that could not.
        cut: whether the last line is not whole: the run is writing it, or was killed meanwhile.
        lost: of steps whose loss or gradient was not finite, at most a hundred.
        not_finite: name -> first steps at which it was not finite.
        left_out: curves beyond `NAMES`.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    curves: dict[str, Curve] = field(default_factory=dict[str, Curve])
    notices: list[Notice] = field(default_factory=list[Notice])
    starts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    checkpoints: dict[int, int] = field(default_factory=dict[int, int])
    evaluation: Mapping[str, Any] = field(default_factory=dict[str, Any])
    best: Mapping[str, Any] | None = None
    step: int = 0
    lines: int = 0
    damaged: dict[str, int] = field(default_factory=dict[str, int])
    cut: bool = False
    lost: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    not_finite: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    left_out: set[str] = field(default_factory=set[str])

    @property
    def steps(self) -> int | None:
        """How many it was asked for."""
        found = self.config.get("steps")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    def last(self, name: str) -> float | None:
        """The newest value."""
        return self.curves[name].last if name in self.curves else None


def read_history(folder: Path) -> History:
    """Read a run folder, in memory that does not grow with the run.

    Raises:
        ConfigError: it is no run folder, or nothing was written yet.
        OSError: a file cannot be read.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"{folder} holds no metrics.jsonl: it is no run folder, or its run has not logged a step yet")
    found = History(folder, config=_object(folder / "config.json"), evaluation=_object(folder / "evaluation.json"))
    for line in _lines(metrics, found):
        _take(found, line)
    if not found.lines:
        raise ConfigError(f"{metrics} has no line that can be read; {found.damaged.get(metrics.name, 0)} are damaged")
    for line in _lines(folder / "health.jsonl", found):
        rule, text = line.get("rule"), line.get("notice")
        if isinstance(rule, str) and isinstance(text, str) and len(found.notices) < _NOTICES:
            found.notices.append(Notice(line["step"], rule, text))
    found.lost = [line for _, line in zip(range(100), _lines(folder / FILE, found), strict=False)]
    found.starts = list(_lines(folder / "starts.jsonl", found))[-100:]
    for step, path in list_checkpoints(folder):
        files = _object(path / "manifest.json").get("files")
        listed = cast(dict[str, Any], files) if isinstance(files, dict) else {}
        sizes = [f.get("bytes") for f in listed.values() if isinstance(f, dict)]
        found.checkpoints[step] = sum(size for size in sizes if isinstance(size, int))
    found.best = read_best(folder)
    return found


def _take(found: History, line: Mapping[str, Any]) -> None:
    step = cast(int, line["step"])
    found.lines += 1
    found.step = max(found.step, step)
    for name, value in line.items():
        if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            continue
        if value is None or not math.isfinite(value):
            steps = found.not_finite.setdefault(name, []) if len(found.not_finite) < NAMES else []
            if len(steps) < 5:
                steps.append(step)
        elif name in found.curves or len(found.curves) < NAMES:
            found.curves.setdefault(name, Curve()).add(step, float(value))
        elif len(found.left_out) < NAMES:
            found.left_out.add(name)


def _lines(path: Path, found: History) -> Iterator[dict[str, Any]]:
    """Objects with a step, one a line; what is none is counted."""
    if not path.is_file():
        return
    from tqdm import tqdm

    size = path.stat().st_size
    bar = tqdm(total=size, desc=f"read {path}", unit="B", unit_scale=True, delay=2, disable=not sys.stderr.isatty())
    with open(path, "rb") as file, bar:
        while raw := file.readline(_LINE):
            bar.update(len(raw))
            whole = raw.endswith(b"\n")
            while not whole and (more := file.readline(_LINE)):  # a line beyond all bounds is no line of ours
                raw, whole = b"", more.endswith(b"\n")
            try:
                line = json.loads(raw)
                usable = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] < 2**53
            except (ValueError, RecursionError):
                line, usable = {}, False
            if usable:
                yield line
            elif not whole and raw:
                found.cut = True
            else:
                found.damaged[path.name] = found.damaged.get(path.name, 0) + 1


def _object(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}
