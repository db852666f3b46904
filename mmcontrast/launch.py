"""Whether the processes that were started know each other, and which device each has.

A launcher says in its environment how many it has started, Accelerate how many it has found; each of those that do not
know each other would train alone, and over the others' files.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mmcontrast.config import ConfigError

if TYPE_CHECKING:
    import torch


def check_launch(found: int, environment: Mapping[str, str], *, launcher: Sequence[str] = (), gpus: int = 0) -> None:
    """Compare the processes that share a batch with those that were started.

    Args:
        found: processes that know each other, this one among them.
        environment: of this process.
        launcher: command line of the process that has started this one.
        gpus: devices that this process sees; more than one process uses is worth a line.

    Raises:
        ConfigError: others were started; says how to start them together.
    """
    started = int(environment.get("WORLD_SIZE", "1"))
    if started != found:
        raise _apart(f"{started} processes were launched but this one sees {found}", f"--nproc_per_node {started}")
    tasks = _slurm_tasks(environment)
    # Under srun there is a torchrun in each task, or each task is a process of its own that was told of the others.
    agents = int(environment.get("GROUP_WORLD_SIZE", "0"))
    if tasks > 1 and tasks not in (found, agents):
        torchrun = (
            "--nproc_per_node GPUS_PER_NODE --nnodes $SLURM_NNODES --rdzv_backend c10d --rdzv_endpoint $HOST:29500"
        )
        raise _apart(
            f"srun started {tasks} tasks but this one sees {found} processes of its own",
            torchrun,
            before="srun --ntasks-per-node 1 ",
            after=" (docs/launch.md has a whole script)",
        )
    for name, of_mpi in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpiexec", "PMI_SIZE")):
        size = int(environment.get(of_mpi, "1"))
        if size not in (1, found):
            raise _apart(f"{name} started {size} processes but this one sees {found}", f"--nproc_per_node {size}")
    asked = _asked_of_accelerate(launcher)
    if asked > 1 and found == 1:
        raise _apart(
            f"accelerate launch was asked for {asked} processes and started one, as it does on a CPU",
            f"--nproc_per_node {asked}",
        )
    if gpus > 1 and found == 1:
        words = _command(f"--nproc_per_node {gpus}")
        print(f"mmcontrast: one process uses one of {gpus} GPUs; all of them: {words}", file=sys.stderr)


def device_of(process: int | None = None) -> torch.device:
    """The GPU of a process of this machine, by default of this one, or the CPU where there is none.

    Args:
        process: its number among those of this machine; several share a GPU where there are more of them.
    """
    import torch

    number = int(os.environ.get("LOCAL_RANK", "0")) if process is None else process
    gpus = torch.cuda.device_count()
    return torch.device("cuda", number % gpus) if gpus else torch.device("cpu")


def launcher() -> list[str]:
    """The command line of the process that has started this one; empty where that cannot be known."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    except psutil.Error:
        return []


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the srun that this process belongs to; 1 in a batch script itself, which is a single process."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 1
    return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))


def _asked_of_accelerate(launcher: Sequence[str]) -> int:
    words = [word for part in launcher for word in part.split("=")]
    if not any("accelerate" in word for word in words):
        return 1
    for name in ("--num_processes", "--num-processes"):
        if name in words[:-1] and words[words.index(name) + 1].isdecimal():
            return int(words[words.index(name) + 1])
    return 1


def _apart(what: str, flags: str, *, before: str = "", after: str = "") -> ConfigError:
    return ConfigError(f"{what}: they would train apart. Launch with `{before}{_command(flags)}`{after}")


def _command(flags: str) -> str:
    return f"torchrun {flags} -m mmcontrast {shlex.join(sys.argv[1:]) or 'train RECIPE'}"
