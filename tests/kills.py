"""Saves that are killed, one after the other, each at its next touch of the disk: `python -m tests.kills FOLDER`.

It forks, so it runs in a process of its own that has no other threads: each save happens in a child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast import checkpoint
from mmcontrast.checkpoint import Checkpoints, damage, find_checkpoint, list_checkpoints, read_best, read_tensors


def build(folder: Path) -> Checkpoints:
    return Checkpoints.Config(keep=2, best="score").build(folder)


def content(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((3,), value)}, "optimizer": {"m": torch.full((3,), -value)}}


def in_a_child(work: Callable[[], None]) -> int:
    """Exit code of a fork that does the work; negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(count: int) -> None:
    """From now on this process dies at the `count`-th thing that it does to the disk."""
    left = count

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **options)

        return work

    import safetensors.torch

    safetensors.torch.save_file = counted(safetensors.torch.save_file)
    checkpoint.sync = counted(checkpoint.sync)
    checkpoint.shutil.rmtree = counted(checkpoint.shutil.rmtree)
    for name in ("mkdir", "write_text", "rename", "replace"):
        setattr(Path, name, counted(getattr(Path, name)))


def save(folder: Path, *steps: int, best: int | None = None, kill: int | None = None) -> None:
    checkpoints = build(folder)
    if kill is not None:
        kill_at(kill)
    for step in steps:
        checkpoints.save(step, content(float(step)), {})
    if best is not None:
        checkpoints.mark_best(best, {"score": float(best)})
    checkpoints.finish()


def main() -> None:
    found: list[dict[str, Any]] = []
    for at in range(100):
        folder = Path(sys.argv[1]) / str(at)
        folder.mkdir()
        assert in_a_child(lambda folder=folder: save(folder, 1, 2, best=1)) == 0
        code = in_a_child(lambda folder=folder, at=at: save(folder, 3, best=3, kill=at))
        newest = build(folder).newest()
        best = read_best(folder)
        assert newest is not None and best is not None
        whole = [damage(newest), damage(find_checkpoint(folder / "best"))] == [None, None]
        value = float(read_tensors(newest, "model")["w"][0])
        found.append({"code": code, "newest": value, "best": best["step"], "whole": whole})
        assert best["value"] == best["step"] and newest.name == f"step-{int(value):06d}"
        # What was left does not stand in the way.
        assert in_a_child(lambda folder=folder: save(folder, 4)) == 0
        assert list_checkpoints(folder)[-1][0] == 4 and not list(folder.glob("*.corrupt"))
        if code == 0:
            break
    print(json.dumps(found))


if __name__ == "__main__":
    main()
