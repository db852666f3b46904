"""Where each rank is, and since when: to name the one that the others wait for.

The loop says what it begins (`enter`), which costs a look at the clock. A thread of rank 0 notices when nothing moves
any more. With several ranks each has a thread that leaves a small file in the run folder, so that a rank which hangs
can still be read about: its own collectives would wait for ever.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Phase = Literal["data", "encode", "exchange", "evaluate", "save"]
"""Waiting for the batch; encoding it, up to the first collective; the rest of the step; and what comes after it."""

_WORDS: dict[Phase, str] = {
    "data": "waits for data",
    "encode": "encodes its batch",
    "exchange": "is in the exchange of embeddings and gradients",
    "evaluate": "evaluates",
    "save": "saves a checkpoint",
}


@dataclass(frozen=True)
class RankTimes:
    """Seconds per step of one rank, since the line before."""

    rank: int
    host: str
    data: float
    encode: float

    @property
    def busy(self) -> float:
        """What passes before others can go on: what comes later is spent together."""
        return self.data + self.encode


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    host: str
    step: int
    phase: Phase
    seconds: float


class Pulse:
    """The phases of one rank.

    On an accelerator work is only queued: durations are taken from events in its stream, which are read when a line is
    due and the device has been waited for anyway.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        size: int,
        stalled_after: float,
        device: torch.device,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Begin to watch.

        Args:
            folder: the run folder.
            rank: this process.
            size: number of processes.
            stalled_after: seconds in one phase and step after which rank 0 says whom the others wait for.
            device: where the work is done.
            say: takes what it says; by default a line on standard error.
        """
        self.folder, self.rank, self.size, self.stalled_after = folder / "pulse", rank, size, stalled_after
        self.host, self.say, self.queued = socket.gethostname(), say or _print, device.type == "cuda"
        self.step, self.since = 0, time.monotonic()
        self.phase: Phase = "data"
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, Any]] = []
        self._steps = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Pulse:
        if self.size > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.since = time.monotonic()
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # the last one does

    def enter(self, phase: Phase, step: int) -> None:
        """From now on this rank is in a phase of a step."""
        now = time.monotonic()
        if self.queued:
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))
        if self.phase == "data" or not self.queued:
            self._spent[self.phase] = self._spent.get(self.phase, 0.0) + now - self.since
        self._steps += phase == "encode"
        self.step, self.phase, self.since = step, phase, now

    def times(self) -> RankTimes:
        """Seconds per step since the last call."""
        for (phase, start), (_, stop) in zip(self._events, self._events[1:], strict=False):
            if phase == "encode":
                self._spent[phase] = self._spent.get(phase, 0.0) + start.elapsed_time(stop) / 1000
        steps = max(1, self._steps)
        found = RankTimes(
            self.rank, self.host, self._spent.get("data", 0.0) / steps, self._spent.get("encode", 0.0) / steps
        )
        self._spent, self._events, self._steps = {}, [], 0
        return found

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _beat(self) -> Beat:
        return Beat(self.rank, self.host, self.step, self.phase, time.monotonic() - self.since)

    def _watch(self) -> None:
        said: tuple[int, str] | None = None
        while not self._stop.wait(min(10.0, self.stalled_after / 4)):
            beat = self._beat()
            if self.size > 1:
                with suppress(OSError):  # a full disk is not the watcher's to tell
                    temporary = self._file(self.rank).with_suffix(".tmp")
                    temporary.write_text(json.dumps(asdict(beat)), "utf-8")
                    temporary.replace(self._file(self.rank))
            still = beat.phase != "evaluate" and beat.seconds > self.stalled_after  # a long question is no fault
            if self.rank == 0 and still and said != (beat.step, beat.phase):
                said = (beat.step, beat.phase)
                self.say(describe_stall([beat, *self._others()], self.size))

    def _others(self) -> list[Beat]:
        found: list[Beat] = []
        for rank in range(1, self.size):
            with suppress(OSError, ValueError, TypeError):
                found.append(Beat(**json.loads(self._file(rank).read_text("utf-8"))))
        return found


_ORDER: tuple[Phase, ...] = ("data", "encode", "exchange", "save", "evaluate")


def describe_stall(beats: list[Beat], size: int) -> str:
    """Who is behind, in one sentence: those that have not come as far as the furthest."""
    first = max((b.step, _ORDER.index(b.phase)) for b in beats)
    behind = [b for b in beats if (b.step, _ORDER.index(b.phase)) < first] or beats
    names = "; ".join(f"rank {b.rank} ({b.host}) {_WORDS[b.phase]}" for b in behind[:4])
    more = f" and {len(behind) - 4} more" if len(behind) > 4 else ""
    unseen = f"; no sign of {size - len(beats)} of {size} ranks (another disk?)" if len(beats) < size else ""
    others = "" if size == 1 else "; no rank is behind" if behind is beats else "; the others wait for it"
    seconds = max(b.seconds for b in behind)
    return f"no progress for {seconds:.0f} s at step {behind[0].step}: {names}{more}{others}{unseen}"


def _print(text: str) -> None:
    print(f"mmcontrast: {text}", file=sys.stderr, flush=True)
