"""What a run says while it goes on: progress bar, metrics.jsonl, trackers, and the notices of its health."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast.batch import Batch
from mmcontrast.health.pulse import Pulse, RankTimes
from mmcontrast.health.rules import Health


class Progress:
    """Progress bar, metrics.jsonl and trackers of a run; rates are of the time since the last line.

    A line of metrics.jsonl holds `step` (steps done) and numbers by name; one of health.jsonl, beside it, a notice:
    `step`, `rule` and `notice`.
    """

    def __init__(
        self,
        path: Path,
        *,
        first: int,
        steps: int,
        log_every: int,
        global_batch: int,
        per_epoch: int,
        main: bool,
        data_values: Callable[[int], Mapping[str, float]],
        track: Callable[..., None] | None,
        health: Health,
        pulse: Pulse,
        gather: Callable[[RankTimes], Sequence[RankTimes]],
    ) -> None:
        """Start at a step.

        Args:
            path: metrics.jsonl; lines of an earlier run that lie behind `first` are dropped, of health.jsonl as well.
            first: the step that comes next.
            steps: the last step.
            log_every: steps between lines.
            global_batch: samples per step.
            per_epoch: samples per epoch.
            main: whether this process writes and shows anything.
            data_values: steps so far -> what was read, by name; called on every rank when a line is due.
            track: takes values and `step`, or None.
            health: judges the lines.
            pulse: is told where this rank is.
            gather: the value of every rank; called on every rank when a line is due.
        """
        from tqdm import tqdm

        self.path, self.main, self.first, self.steps, self.log_every = path, main, first, steps, log_every
        self.global_batch, self.per_epoch = global_batch, per_epoch
        self.data_values, self.track = data_values, track
        self.health, self.pulse, self.gather = health, pulse, gather
        self.waited, self.since, self.started = 0.0, time.perf_counter(), first
        self.notices = path.with_name("health.jsonl")
        for file in (path, self.notices):
            if main and file.exists():
                _drop_lines_after(file, first)  # they will be written again
        # Where nobody watches, a line now and then instead of a moving bar.
        pause = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=not main, mininterval=pause)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the wait for each counted."""
        step = self.first
        while True:
            self.pulse.enter("data", step)
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - started
            yield batch
            step += 1

    def after(self, step: int, values: Mapping[str, Tensor | float], measured: Mapping[str, float]) -> None:
        """Count a step; write a line when one is due, and one of what was measured of it, if anything was."""
        self.bar.update()
        due = (step + 1) % self.log_every == 0 or step + 1 == self.steps
        line = dict(measured)
        if due:
            line = self._line(step, values) | line
        if not line:
            return
        self.write(step + 1, line)
        times = self.gather(self.pulse.times()) if due else ()
        for notice in self.health.see(step + 1, line, times) if self.main else ():
            self.bar.write(f"step {step + 1}: {notice.text}", file=sys.stderr)
            self._append(self.notices, {"step": step + 1, "rule": notice.rule, "notice": notice.text})

    def _line(self, step: int, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        line = {name: float(value) for name, value in values.items()}
        line["epoch"] = (step + 1) * self.global_batch / self.per_epoch
        line["samples_per_second"] = (step + 1 - self.started) * self.global_batch / elapsed
        line["data_wait"] = self.waited / elapsed
        line["memory_gb"] = memory_gb()
        line |= self.data_values(step + 1)
        self.since, self.started, self.waited = time.perf_counter(), step + 1, 0.0
        # The inverse of a logit scale is the temperature, which papers speak of.
        scales = [v for k, v in line.items() if k.endswith("logit_scale") and v > 0]
        warmth = {"T": f"{1 / scales[0]:.3g}"} if scales else {}
        rate, wait = f"{line['samples_per_second']:.0f}/s", f"{line['data_wait']:.0%}"
        memory = f"{line['memory_gb']:.1f}G"
        self.bar.set_postfix(
            {"loss": f"{line['loss']:.3f}", **warmth, "samples": rate, "wait": wait, "mem": memory}, refresh=False
        )
        return line

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if not values:
            return
        # A step that was left out has a loss that JSON cannot hold.
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._append(self.path, {"step": step, **known})
        if self.track is not None:
            self.track({k: v for k, v in values.items() if v is not None}, step=step)

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        if self.main:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


def memory_gb() -> float:
    """The most that the accelerator held; without one, what this process holds now; in GB of 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to a step; a line that a crash cut short is dropped too."""
    kept: list[str] = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept), "utf-8")
    temporary.replace(path)
