"""What a run tells a person: progress bar, metrics.jsonl, trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcontrast.batch import Batch


class Report:
    """Progress bar, metrics.jsonl and trackers of a run; rates are of the time since the last line."""

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
    ) -> None:
        """Start at a step.

        Args:
            path: metrics.jsonl; lines of an earlier run that lie behind `first` are dropped.
            first: the step that comes next.
            steps: the last step.
            log_every: steps between lines.
            global_batch: samples per step.
            per_epoch: samples per epoch.
            main: whether this process writes and shows anything.
            data_values: steps so far -> what was read, by name; called on every rank when a line is due.
            track: takes values and `step`, or None.
        """
        from tqdm import tqdm

        self.path, self.main, self.first, self.steps, self.log_every = path, main, first, steps, log_every
        self.global_batch, self.per_epoch = global_batch, per_epoch
        self.data_values, self.track = data_values, track
        self.waited, self.since, self.started = 0.0, time.perf_counter(), first
        if main and path.exists():
            _drop_lines_after(path, first)  # they will be written again
        # Where nobody watches, a line now and then instead of a moving bar.
        pause = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=steps, initial=first, desc="train", unit="step", disable=not main, mininterval=pause)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the wait for each counted."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - started
            yield batch

    def after(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Count a step; write a line when one is due."""
        self.bar.update()
        if (step + 1) % self.log_every and step + 1 != self.steps:
            return
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        line: dict[str, Any] = {name: float(value) for name, value in values.items()}
        line["epoch"] = (step + 1) * self.global_batch / self.per_epoch
        line["samples_per_second"] = (step + 1 - self.started) * self.global_batch / elapsed
        line["data_wait"] = self.waited / elapsed
        line |= self.data_values(step + 1)
        self.since, self.started, self.waited = time.perf_counter(), step + 1, 0.0
        scales = {k.rpartition(".")[2]: f"{v:.1f}" for k, v in line.items() if k.endswith("scale")}
        rate, wait = f"{line['samples_per_second']:.0f}/s", f"{line['data_wait']:.0%}"
        self.bar.set_postfix({"loss": f"{line['loss']:.3f}", **scales, "samples": rate, "wait": wait})
        self.write(step + 1, line)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the trackers."""
        if not values:
            return
        if self.main:
            with open(self.path, "a") as file:
                # A step that was left out has a loss that JSON cannot hold.
                known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
                file.write(json.dumps({"step": step, **known}) + "\n")
        if self.track is not None:
            self.track({k: v for k, v in values.items() if v is not None}, step=step)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()


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
