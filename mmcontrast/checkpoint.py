"""The run folder: written so that a crash at any moment leaves the newest whole checkpoint readable.

    RUN/config.json             the resolved settings; can be passed instead of a recipe
    RUN/assets/MODALITY/        what a tower needs beside its weights (a tokenizer, say)
    RUN/metrics.jsonl           one JSON object per line; health.jsonl, what it said; starts.jsonl, on what it ran
    RUN/evaluation.json         what the last evaluation told beside its numbers
    RUN/report.html             all of it as a page (`mmcontrast report RUN`)
    RUN/step-000200/            model, objectives and optimizer as safetensors, state.json, manifest.json
    RUN/best.json               which step measured best, if the run was asked to keep it

A checkpoint is written under a temporary name, its files are hashed and synced, and then it is renamed; older ones
are removed only after that. Loading takes the newest whose hashes agree and sets damaged ones aside. Everything is
safetensors and JSON: nothing that is loaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError, Configurable, from_dict, suggest
from mmcontrast.encoders.multi import MultiEncoder

_NAME = re.compile(r"step-(\d+)")


class Checkpoints(Configurable):
    """Saves and finds the checkpoints of a run. One process uses it."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """When to save, and what to keep."""

        every: int | None = None
        """Steps between checkpoints. One is written at the end, at SIGTERM and at SIGUSR1 in any case."""
        minutes: float | None = None
        """Minutes between checkpoints, by rank 0's clock."""
        keep: int = 2
        """Newest checkpoints that stay."""
        best: str | None = None
        """A measure, such as eval/test/acc1, whose best checkpoint stays too, and is found as RUN/best."""
        lowest: bool = False
        """The best is the lowest, as of a rank or a loss."""
        background: bool = True
        """Write while the run goes on, from a copy in memory; otherwise the run waits."""

    def __init__(self, config: Config, folder: Path) -> None:
        if config.every is not None and config.every < 1:
            raise ConfigError(f"checkpoint.every is {config.every}; it must be at least 1, or None")
        if config.minutes is not None and not 0 < config.minutes < math.inf:
            raise ConfigError(f"checkpoint.minutes is {config.minutes}; it must be above 0, or None")
        if config.keep < 1:
            raise ConfigError(f"checkpoint.keep is {config.keep}; at least 1 must stay")
        self.config, self.folder = config, folder
        self._saved_at = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def overdue(self) -> bool:
        """Whether the last save is as many minutes ago as was asked for."""
        minutes = self.config.minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write `step-N/`: a safetensors file per entry of `tensors`, and `state` as JSON.

        What is given may change when this returns; that it stands on the disk is known after `finish`. A step is saved
        once: what stands is never replaced.

        Raises:
            OSError: as `finish`, of the save before.
        """
        self.finish()
        if self._path(step).exists():
            raise FileExistsError(f"{self._path(step)} is there already")
        # Own memory for each tensor: the run goes on, and safetensors refuses views that share storage.
        copies = {
            name: {k: t.detach().to("cpu", copy=True).contiguous() for k, t in content.items()}
            for name, content in tensors.items()
        }
        words = json.dumps({"step": step, **state}, indent=2) + "\n"
        self._saved_at = time.monotonic()
        self._pending = self._pool.submit(self._write, step, copies, words)
        if not self.config.background:
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved stands.

        Raises:
            OSError: the disk is full or cannot be written; older checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        final = self._path(step)
        temporary = final.with_name(final.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            for name, content in tensors.items():
                save_file(dict(content), temporary / f"{name}.safetensors")
            (temporary / "state.json").write_text(state)
            files = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=2) + "\n")
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SafetensorError):
                raise OSError(f"{temporary} cannot be written: {error}") from None
            raise
        temporary.rename(final)
        sync(self.folder)
        best = read_best(self.folder)
        for number, old in list_checkpoints(self.folder)[: -self.config.keep]:
            if best is None or number != best["step"]:
                shutil.rmtree(old)

    def improves(self, values: Mapping[str, Any]) -> bool:
        """Whether what was measured is the best so far.

        Raises:
            ConfigError: the measure that decides is not among the values.
        """
        name = self.config.best
        if name is None or not values:
            return False
        if name not in values:
            raise ConfigError(f"checkpoint.best is {name!r}, which nothing measures{suggest(name, values)}")
        value, best = values[name], read_best(self.folder)
        if value is None or not math.isfinite(value):
            return False
        if best is None or best.get("measure") != name:
            return True
        return value < best["value"] if self.config.lowest else value > best["value"]

    def mark_best(self, step: int, values: Mapping[str, Any]) -> None:
        """Note that this step's checkpoint is the best; call `save` of the step before."""
        self.finish()  # or else RUN/best could name what a crash has left unwritten
        assert self.config.best is not None
        note = {"step": step, "measure": self.config.best, "value": values[self.config.best]}
        replace_text(self.folder / "best.json", json.dumps(note) + "\n")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are renamed to `.corrupt` on the way. One process calls it."""
        for _, path in reversed(list_checkpoints(self.folder)):
            reason = damage(path)
            if reason is None:
                return path
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path} is damaged ({reason}); set aside as {aside.name}", file=sys.stderr)
        return None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all finished checkpoints, oldest first."""
    found = [(m, p) for p in folder.glob("step-*") if p.is_dir() and (m := _NAME.fullmatch(p.name))]
    return sorted((int(m[1]), p) for m, p in found)


def read_best(folder: Path) -> dict[str, Any] | None:
    """Step, measure and value of a run's best checkpoint; None where none is noted."""
    try:
        found = json.loads((folder / "best.json").read_text("utf-8"))
        return found if isinstance(found, dict) and isinstance(found["step"], int) else None
    except (OSError, ValueError, KeyError):
        return None


def damage(path: Path) -> str | None:
    """Why a checkpoint is not what was saved; None if it is."""
    try:
        files = json.loads((path / "manifest.json").read_text())["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or _hash(file) != facts["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json cannot be read"
    return None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / f"{name}.safetensors")


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return cast(dict[str, Any], json.loads((path / "state.json").read_text()))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as `PARAMETER/KEY` -> tensor, and those of its groups as `NUMBER/KEY`."""
    owners = [(names[parameter], state) for parameter, state in optimizer.state.items()]
    owners += [(str(number), group) for number, group in enumerate(optimizer.param_groups)]
    return {f"{owner}/{key}": t for owner, state in owners for key, t in state.items() if isinstance(t, Tensor)}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
    part_like: Callable[[Tensor, Tensor], Tensor] = lambda value, parameter: value,
) -> None:
    """The reverse of `optimizer_tensors`; `part_like` takes this rank's part of what belongs to a parameter."""
    by_name = {name: parameter for parameter, name in names.items()}
    for full, value in tensors.items():
        name, _, key = full.rpartition("/")
        if name.isdecimal():
            optimizer.param_groups[int(name)][key] = value
            continue
        parameter = by_name[name]
        # Step counters stay where they were made; moments go to their parameter.
        place = parameter.device if value.ndim else value.device
        optimizer.state[parameter][key] = part_like(value.to(place), parameter)


def find_checkpoint(path: str | Path) -> Path:
    """A run folder's newest whole checkpoint, its best as RUN/best, or one that is named; nothing is changed on disk.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(path)
    if folder.name == "best" and (best := read_best(folder.parent)) is not None:
        folder = folder.parent / f"step-{best['step']:06d}"
    if not folder.is_dir():
        raise ConfigError(f"there is no run folder {str(path)!r}")
    if _NAME.fullmatch(folder.name):
        reason = damage(folder)
        if reason:
            raise ConfigError(f"the checkpoint {folder} is damaged: {reason}")
        return folder
    for _, checkpoint in reversed(list_checkpoints(folder)):
        if damage(checkpoint) is None:
            return checkpoint
    raise ConfigError(f"{folder} holds no whole checkpoint (step-N); train first, or name another folder")


def model_hash(checkpoint: Path) -> str:
    """Identity of a checkpoint's model: weights, settings, and assets (another tokenizer is another space)."""
    run = checkpoint.parent
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    digest = hashlib.sha256(json.dumps(read_config(run)["model"], sort_keys=True).encode())
    digest.update(files["model.safetensors"]["sha256"].encode())
    for asset in sorted(p for p in (run / "assets").rglob("*") if p.is_file()):
        digest.update(f"{asset.relative_to(run).as_posix()} {_hash(asset)} ".encode())
    return digest.hexdigest()[:16]


def read_config(run: Path) -> dict[str, Any]:
    """`config.json` of a run folder.

    Raises:
        ConfigError: not there, or no JSON object.
    """
    path = run / "config.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return cast(dict[str, Any], found)


def load(path: str | Path, *, trust: Collection[str] = ()) -> MultiEncoder:
    """The model of a run, in evaluation mode; `model.encode(modality, values)` embeds.

    Args:
        path: a run folder (its newest whole checkpoint is taken), its best as RUN/best, or one of its `step-N` folders.
        trust: modules beside mmcontrast whose classes the run's config may name; they are imported.

    Raises:
        ConfigError: no whole checkpoint, or a config that cannot be rebuilt.
    """
    return load_checkpoint(find_checkpoint(path), trust=trust)


def load_checkpoint(checkpoint: Path, *, trust: Collection[str] = ()) -> MultiEncoder:
    """`load` of what `find_checkpoint` has found and verified: to hash it again would read every byte twice.

    Raises:
        ConfigError: a config that cannot be rebuilt, or that does not fit the weights.
    """
    run = checkpoint.parent
    data = read_config(run)
    if "model" not in data:
        raise ConfigError(f"{run / 'config.json'} has no 'model'")
    config = cast(MultiEncoder.Config, from_dict(data["model"], trust=trust, where="model"))
    model: MultiEncoder = config.build(restore=run / "assets")
    try:
        model.load_state_dict(read_tensors(checkpoint, "model"))
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint} does not fit its config.json: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


def names_of(*modules: tuple[str, nn.Module]) -> dict[Tensor, str]:
    """Parameter -> a name that is the same in every process and run."""
    return {p: f"{prefix}.{name}" for prefix, module in modules for name, p in module.named_parameters()}


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
