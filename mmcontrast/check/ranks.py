"""Runs an arm on several real processes of this machine, on the CPU, and ends them all whatever happens."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mmcontrast.check.arms import Comparison, Job, run_trainer
from mmcontrast.config import RunError

_LAST_LINES = 12


_HEAVY = ("accelerate", "open_clip", "safetensors.torch", "timm", "torchvision", "transformers")


def make_ready() -> None:
    """Let a server import what this process has imported, while it does other work: ranks are forked off that one.

    It has computed nothing, so no thread of torch's has started in it: a fork of this process would hang.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        loaded = [name for name in _HEAVY if name in sys.modules or name == "accelerate"]
        forkserver.set_forkserver_preload([__name__, *loaded])
        forkserver.ensure_running()


def run_ranks(job: Job, size: int, timeout: float) -> dict[str, Comparison]:
    """Batch -> the comparison of the rank that is farthest from the reference.

    Raises:
        RunError: a rank failed or gave no answer in time; says which, and its last lines.
    """
    fresh = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(fresh)
    folder = job.folder / f"ranks-{size}"
    folder.mkdir()
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(job, rank, size, port, folder), daemon=True) for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        waiting: dict[Any, int] = {process.sentinel: rank for rank, process in enumerate(processes)}
        while waiting:
            ended = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ended:
                late = ", ".join(str(rank) for rank in waiting.values())
                raise RunError(
                    f"no answer from rank {late} of {size} within {timeout:g} seconds (--timeout)\n"
                    + _last_lines(folder, next(iter(waiting.values())))
                )
            # All that ended are looked at: the first to fail mostly makes the others fail, a moment later.
            failed = [r for r in (waiting.pop(e) for e in ended) if processes[r].exitcode]
            if failed:
                rank = _cause(folder, failed)
                raise RunError(f"rank {rank} of {size} failed:\n" + _last_lines(folder, rank))
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return {
        name: max((Comparison(**answers[name]) for answers in found), key=lambda c: c.largest) for name in job.batches
    }


@contextmanager
def rank_environment(rank: int, size: int, port: int | None) -> Generator[None]:
    """The variables by which Accelerate makes this process one of `size`, on the CPU; put back afterwards."""
    wanted = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(size)}
    if port is not None:
        wanted |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        wanted |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size))}
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:  # or else gloo looks up this machine's name, which need not resolve
            wanted["GLOO_SOCKET_IFNAME"] = loopback[0]
    before: Mapping[str, str | None] = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _rank(job: Job, rank: int, size: int, port: int, folder: Path) -> None:
    """One process: everything that it says goes to a file, its comparison to another."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        import torch

        with rank_environment(rank, size, port):
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
            found = run_trainer(job)
        answer = {name: asdict(comparison) for name, comparison in found.items()}
        (folder / f"{rank}.json").write_text(json.dumps(answer))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly end could wait for a rank that has failed


def _cause(folder: Path, failed: list[int]) -> int:
    """Of several ranks that failed at once, one that does not merely say that another went away."""
    secondary = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue failed")
    own = [r for r in failed if not any(s in _last_lines(folder, r) for s in secondary)]
    return (own or failed)[0]


def _last_lines(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.log"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    it said nothing"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
