"""The run folder as all ranks use it: rank 0 reads and writes, and every rank hears what came of it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from mmcontrast.checkpoint import Checkpoints, list_checkpoints, read_config, read_state, replace_text
from mmcontrast.config import ConfigError
from mmcontrast.lock import alone
from mmcontrast.sharding import World

T = TypeVar("T")

Content = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, Any]]
"""Tensors by file, and what is written beside them as JSON."""

PACKAGES = ("mmcontrast", "torch", "accelerate", "numpy", "timm", "transformers", "open_clip_torch", "torchaudio")
"""Whose versions are noted."""
FREE = (
    *("out", "evaluators", "eval_every", "log_every", "trackers", "checkpoint", "not_finite", "max_not_finite"),
    *("block", "keep_bytes", "micro_batch", "tower_micro_batch", "keep_graphs", "keep_graph_bytes", "health"),
    *("parallel", "reshard", "checkpoint_activations", "compile", "compile_mode"),
)
"""Settings that may be others when a run goes on."""
# Which data they are, the fingerprint says.
FREE_DATA = ("shards", "workers", "threads", "timeout", "max_bad_fraction")


class RunFolder:
    """A run's folder. Every method but `finish` is called on every rank, at the same step."""

    def __init__(self, path: Path, checkpoint: Checkpoints.Config, world: World) -> None:
        self.path, self.world = path, world
        self.checkpoints: Checkpoints = checkpoint.build(path)

    @contextmanager
    def alone(self) -> Generator[None]:
        """Keep others from training in the folder.

        Raises:
            ConfigError: another process does.
            OSError: it cannot be made.
        """
        held = ExitStack()
        self._first(lambda: held.enter_context(alone(self.path)))
        with held:
            yield

    def open(self, config: Mapping[str, Any], save_assets: Callable[[Path], None]) -> Path | None:
        """Write `config.json` and the towers' assets, or check that the run in the folder has these settings.

        A line of `starts.jsonl` notes the step, the time, and what the run goes on with.

        Returns:
            The newest whole checkpoint, or None.

        Raises:
            ConfigError: the folder holds another run.
            OSError: it cannot be written.
        """

        def work() -> Path | None:
            self._claim(config, save_assets)
            newest = self.checkpoints.newest()
            step = 0 if newest is None else int(read_state(newest)["step"])
            with open(self.path / "starts.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(start(step, self.world.size)) + "\n")
            return newest

        return self._first(work)

    def save(self, step: int, content: Callable[[], Content]) -> None:
        """Begin to write a checkpoint; `content` is asked on rank 0 alone.

        Raises:
            OSError: the checkpoint before it could not be written, or this one, if it is not written in the background.
        """
        self._first(lambda: self.checkpoints.save(step, *content()))

    def improved(self, values: Mapping[str, Any]) -> bool:
        """Whether rank 0 has measured better than ever, by the measure that decides.

        Raises:
            ConfigError: nothing measures it.
        """
        return self._first(lambda: self.checkpoints.improves(values))

    def mark_best(self, step: int, values: Mapping[str, Any]) -> None:
        """Note that a step that was saved is the best.

        Raises:
            OSError: it could not be written.
        """
        self._first(lambda: self.checkpoints.mark_best(step, values))

    def write_details(self, step: int, evaluators: Mapping[str, Any], *, averaged: bool) -> None:
        """Keep what evaluators tell beside their numbers, of those that have `details`, for a report.

        Args:
            step: how many steps are done.
            evaluators: name -> evaluator that has just answered.
            averaged: whether it answered last of the averaged weights.

        Raises:
            OSError: it cannot be written.
        """

        def work() -> None:
            told = {name: e.details() for name, e in evaluators.items() if hasattr(e, "details")}
            content = {"step": step, "averaged": averaged, "answers": told}
            replace_text(self.path / "evaluation.json", json.dumps(content) + "\n")

        self._first(work)

    def write_average(
        self, step: int, model: Mapping[str, Any], save_assets: Callable[[Path], None], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write `RUN/ema`, a run folder of the averaged weights for whatever takes one, over what an earlier run left.

        Raises:
            OSError: it cannot be written.
        """

        def work() -> None:
            folder = self.path / "ema"
            shutil.rmtree(folder, ignore_errors=True)
            save_assets(folder / "assets")
            (folder / "config.json").write_text(json.dumps({"model": model}, indent=2) + "\n", "utf-8")
            checkpoints: Checkpoints = Checkpoints.Config(background=False).build(folder)
            checkpoints.save(step, {"model": tensors}, {})

        self._first(work)

    def finish(self) -> None:
        """Wait until the last checkpoint stands; asks no other rank, since an error may be on its way there.

        Raises:
            OSError: it could not be written.
        """
        if self.world.rank == 0:
            self.checkpoints.finish()

    def _first(self, work: Callable[[], T]) -> T:
        """What rank 0's work returns, or raises, on every rank."""
        found: T | None = None
        problem: Exception | None = None
        if self.world.rank == 0:
            try:
                found = work()
            except (ConfigError, OSError) as error:
                problem = error
        found, problem = self.world.gather_objects((found, problem))[0]
        if problem is not None:
            raise problem
        return cast(T, found)

    def _claim(self, config: Mapping[str, Any], save_assets: Callable[[Path], None]) -> None:
        out = self.path
        if (out / "config.json").exists() and list_checkpoints(out):
            changed = differences(read_config(out), config)
            if changed:
                raise ConfigError(
                    f"{out} holds a run with other settings: {'; '.join(changed[:3])}. Use those, or another --out"
                )
            return
        out.mkdir(parents=True, exist_ok=True)
        save_assets(out / "assets")
        replace_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def start(step: int, ranks: int) -> dict[str, Any]:
    """When a run begins or goes on, and on what."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`field: old -> new` of every setting that differs, without those that change no result."""
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast(dict[str, Any], old), cast(dict[str, Any], new)
        free = FREE_DATA if where.partition(".")[0] == "data" else () if where else FREE
        found: list[str] = []
        for name in sorted(before.keys() | after.keys()):
            if name not in free:
                found += differences(before.get(name), after.get(name), f"{where}.{name}".lstrip("."))
        return found
    return [] if old == new else [f"{where}: {old!r} there, {new!r} now"]
