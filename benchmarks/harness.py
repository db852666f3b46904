"""How arms are compared: in turn within one run for time, in fresh processes for memory; results as JSON.

A machine's speed drifts by tens of percent within minutes, so seconds of two runs say little. Here the arms of a
comparison alternate after a warm-up, with the order reversed every other round, and what is reported is the median of
the ratios within rounds. An arm is a function that makes its inputs and returns the work to be measured.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.counters import peak_resident_mb

Work = Callable[[], Any]
"""One repetition of what is measured; its inputs are made."""

WARM_UP_ROWS = 64

Seconds = Mapping[str, Sequence[float]]
"""Arm -> seconds of each round; the same rounds for every arm."""


def say(text: str) -> None:
    """Progress, beside the results on standard output."""
    print(text, file=sys.stderr, flush=True)


def alternate(
    arms: Mapping[str, Work],
    *,
    rounds: int,
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after one unmeasured round; every other round runs backwards.

    Args:
        arms: name -> work.
        rounds: measured rounds, at least 1.
        before: called before each measurement and not measured, such as a barrier between ranks.
        clock: the time in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, rounds):
        names = list(arms)[:: 1 if turn % 2 == 0 else -1]
        for name in names:
            if before is not None:
                before()
            start = clock()
            arms[name]()
            elapsed = clock() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(seconds: Seconds, ours: str, theirs: str) -> float:
    """Median over rounds of ours / theirs within the round."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


@dataclass(frozen=True)
class Peak:
    """What one repetition took in a fresh process.

    Attributes:
        peak_mb: resident memory above that of the process with its libraries loaded and its inputs made.
        seconds: duration, cold: the first use of the memory is included.
    """

    peak_mb: float
    seconds: float


def peak(arm: Callable[[int], Work], rows: int, *, threads: int) -> Peak:
    """Measure an arm of so many rows in a process of its own; `arm` is a function of a module, or a partial of one."""
    (measured,) = in_processes(peak_here, arm, rows, threads)
    return measured


def peak_here(arm: Callable[[int], Work], rows: int, threads: int) -> Peak:
    """Measure an arm in this process, which has done nothing else."""
    import torch

    torch.set_num_threads(threads)
    # Some libraries are loaded at their first use: tens of MB of code that would count as the arm's memory.
    arm(WARM_UP_ROWS)()
    work = arm(rows)
    start = time.perf_counter()
    peak_mb = peak_resident_mb(work)
    return Peak(peak_mb, time.perf_counter() - start)


def in_processes(
    function: Callable[..., Any],
    *arguments: Any,
    ranks: int | None = None,
    timeout: float = 1800,
    daemon: bool = True,
) -> Any:
    """Results of `function(*arguments)` in fresh processes: in one, or on each of `ranks` of a gloo group.

    Daemons end with this process whatever happens to it, but may have no worker processes of their own.

    Raises:
        RuntimeError: a process raised, died or did not answer within `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory and threads
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes: list[Any] = []
        try:
            for rank in range(ranks or 1):
                ours, theirs = context.Pipe()
                group = None if ranks is None else (f"file://{folder}/store", rank, ranks)
                process = context.Process(target=_serve, args=(theirs, group, function, arguments), daemon=daemon)
                process.start()
                theirs.close()  # so that the death of the process ends our reading
                pipes.append(ours)
                processes.append(process)
            return [_receive(pipe, process, timeout) for pipe, process in zip(pipes, processes, strict=True)]
        finally:
            for process in processes:
                process.join(1)
                process.kill()
                process.join()


def _receive(pipe: Connection, process: Any, timeout: float) -> Any:
    if not pipe.poll(timeout):
        raise RuntimeError(f"a measuring process did not answer within {timeout:.0f} s")
    try:
        ok, value = pipe.recv()
    except EOFError:
        process.join(10)
        code = process.exitcode
        hint = "; it was killed, perhaps because memory ran out" if code == -9 else ""
        raise RuntimeError(f"a measuring process died with exit code {code}{hint}") from None
    if not ok:
        raise RuntimeError(f"a measuring process failed:\n{value}")
    return value


def _serve(
    pipe: Connection, group: tuple[str, int, int] | None, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    try:
        if group is not None:
            # Collectives that new torch renames would say so once per rank, among the results.
            warnings.filterwarnings("ignore", category=FutureWarning)
            import torch.distributed as dist

            store, rank, ranks = group
            # A file, not a TCP store: its traffic would be counted as ours.
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=10)
            )
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


@dataclass
class Report:
    """What a benchmark found: one JSON object per arm, printed as it comes, and the ratios.

    Attributes:
        arms: what was printed.
        ratios: name -> ours / the peer's, or what the benchmark says the name means.
        left_out: name -> why it was not measured.
    """

    arms: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    ratios: dict[str, float] = field(default_factory=dict[str, float])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def arm(self, name: str, *, seconds: float | None = None, peak_mb: float | None = None, **more: Any) -> None:
        """Print one arm; `seconds` and `peak_mb` are null where the benchmark does not measure them."""
        found = {"arm": name, **more, "seconds": seconds, "peak_mb": peak_mb}
        self.arms.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in found.items()})
        print(json.dumps(self.arms[-1]), flush=True)

    def timed(self, seconds: Seconds, *, prefix: str, peaks: Mapping[str, Peak] | None = None, **more: Any) -> None:
        """Print all arms of one comparison: medians, and the peaks of those that have one."""
        for name, values in seconds.items():
            top = (peaks or {}).get(name)
            self.arm(
                f"{prefix}/{name}",
                seconds=statistics.median(values),
                peak_mb=None if top is None else top.peak_mb,
                rounds=len(values),
                **more,
            )

    def write(self, path: Path) -> None:
        """Everything as one JSON object, with the machine that it was measured on."""
        found = {"arms": self.arms, "ratios": self.ratios, "left_out": self.left_out, "machine": machine()}
        path.write_text(json.dumps(found, indent=1) + "\n")


def command(name: str, about: str | None, *, quick: str, only: Iterable[str], none: bool = False) -> ArgumentParser:
    """The settings that every benchmark has: --quick, --only and --json.

    Args:
        name: of the module.
        about: its docstring.
        quick: what --quick means.
        only: what --only can name.
        none: whether it may name nothing.
    """
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=(about or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", nargs="*" if none else "+", choices=list(only), help="these alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write arms and ratios here")
    return parser


def require(*modules: str) -> None:
    """End the process where a peer is not installed."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        sys.exit(f"{', '.join(missing)} is not installed; run: pip install 'mmcontrast[benchmarks]'")


def measured(plan: Any, sections: Iterable[Callable[[Any, Report], None]]) -> Report:
    """What sections find, in order, with the plan's threads."""
    import torch

    torch.set_num_threads(plan.threads)
    report = Report()
    for section in sections:
        section(plan, report)
    return report


def tell(report: Report, goals: Sequence[Goal], file: Path | None, *, selection: str = "sections") -> None:
    """The end of a benchmark's command: write what was found, print the table, and name what was left out."""
    for goal in goals:
        if goal.ratio not in report.ratios:
            report.left_out.setdefault(goal.ratio, f"not in this selection of {selection}")
    if file:
        report.write(file)
    say("\n" + table(goals, report))
    for name, why in report.left_out.items():
        say(f"left out: {name} ({why})")


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    import os

    import torch

    cpus = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in cpus.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@dataclass(frozen=True)
class Goal:
    """A row of the final table.

    Attributes:
        ratio: the name in `Report.ratios`.
        what: in words, with the unit or the peer.
        at_most: the goal; None where the row only informs, or has the other one.
        floor: name of the ratio, or the number, below which nothing can go.
        at_least: the goal where more is better.
    """

    ratio: str
    what: str
    at_most: float | None = None
    floor: str | float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f"≥ {_number(self.at_least)}"
        return "" if self.at_most is None else f"≤ {_number(self.at_most)}"


def table(goals: Sequence[Goal], report: Report) -> str:
    """Markdown of the goals that were measured."""
    lines = ["| what | goal | measured | floor |", "|---|---|---|---|"]
    for goal in goals:
        if goal.ratio in report.ratios:
            floor = report.ratios.get(goal.floor) if isinstance(goal.floor, str) else goal.floor
            measured = _number(report.ratios[goal.ratio])
            lines.append(
                f"| {goal.what} (`{goal.ratio}`) | {goal} | {measured} | {'' if floor is None else _number(floor)} |"
            )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"
