"""What a training step with a gradient cache costs: time, memory and gradient error, beside other packages.

    python -m benchmarks.step [--quick] [--only SECTION ...] [--json FILE]

Forward and backward of two towers and CLIP's loss, float32, two threads, d = 512, micro-batches of 64. Standard output
has one JSON object per arm, standard error progress and at the end a Markdown table; FILE has all of it. The arms are
described in `step_arms`: open_clip's own accumulating loop, GradCache as its authors ship it, plain autograd of the
full batch, and floors: what a gradient cache that keeps as many graphs does without any loss.

Ratios are ours / the peer's, medians of same-round ratios, or of peaks. K = N / 64 micro-batches; ours keeps one graph,
that of one micro-batch in one tower, as the trainer does, where nothing else is said:

* `time_vs_gradcache` keeps the graphs that fit into GradCache's peak (`equal memory`), `equal_memory` is ours / its
  peak there, `time_vs_gradcache_1` keeps one.
* `time_vs_floor` and `time_vs_floor_4` keep 2 and 8 graphs of one tower, as many as k = 1 and 4 micro-batches have in
  both, at N = 1024 with the larger towers: the floor is (3 + (K - k) / K) / 4 of four forwards. With the smaller towers
  (`_tiny`, one graph) the loss, which grows with N², is no longer small beside them. `floor3` keeps all graphs.
* `memory_vs_naive`, `memory_vs_gradcache` are peaks at N = 512 with larger towers.
* `grad_error`: relative L2 of all tower gradients from plain autograd with the same masks, dropout and patch dropout
  of 0.5 on. `scale_grad_ratio` is the temperature's gradient / the true one. With `_open_clip` and `_gradcache` they
  are the peers', without dropout, since their masks are not ours.
* `flat_M_N` is the time per sample of N rows / that of M, with the larger towers; `flat_tiny_M_N` with the smaller
  ones, beside which the loss, whose products per sample grow with N, is not small.

Memory is resident, from the kernel, in fresh processes, above the process with libraries loaded and inputs made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import step_arms as arms
from benchmarks.harness import (
    Goal,
    Peak,
    Report,
    Work,
    alternate,
    command,
    measured,
    median_ratio,
    peak,
    require,
    say,
    tell,
)
from benchmarks.step_arms import SMALL, TINY, Towers
from mmcontrast.cached import Keep


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one run.

    Attributes:
        n: N of the comparison of times, with the smaller towers.
        memory: N of the comparison of peaks, with the larger ones.
        floors: N of the comparison with the floor, with the larger ones.
        error: N of the gradients' errors.
        growth: N of the cost per sample.
        micro_batch: rows.
        rounds: measured rounds; half as many of what is long.
        small: towers of the times.
        large: towers of peaks and errors.
        threads: of one process.
        peaks: whether peaks are measured; without, `equal memory` is 16 graphs.
    """

    n: int = 2048
    memory: int = 512
    floors: int = 1024
    error: int = 512
    growth: tuple[int, ...] = (256, 1024, 4096, 8192)
    micro_batch: int = 64
    rounds: int = 9
    small: Towers = TINY
    large: Towers = SMALL
    threads: int = 2
    peaks: bool = True


_SAVED_SHARE = 0.85  # of a graph's resident memory: what autograd says that it saves

QUICK = Plan(growth=(256, 1024), rounds=3)


def _peaks(named: Mapping[str, Callable[[int], Work]], n: int, plan: Plan) -> dict[str, Peak]:
    found: dict[str, Peak] = {}
    for name, arm in named.items():
        say(f"peak of {name}, N = {n}")
        found[name] = peak(arm, n, threads=plan.threads)
    return found


def times(plan: Plan, report: Report) -> None:
    """Ours with one kept graph, and with those that fit into GradCache's memory; peers and floors."""
    towers, size, n = plan.small, plan.micro_batch, plan.n
    made: dict[str, Callable[[int], Work]] = {
        "ours": partial(arms.ours, towers=towers, micro_batch=size),
        "open_clip": partial(arms.open_clip, towers=towers, micro_batch=size),
        "GradCache": partial(arms.grad_cache, towers=towers, micro_batch=size),
        "floor": partial(arms.floor, towers=towers, micro_batch=size, kept=1),
        "floor3": partial(arms.floor, towers=towers, micro_batch=size, kept=2 * n),
    }
    peaks = _peaks({name: made[name] for name in ("ours", "open_clip", "GradCache")}, n, plan) if plan.peaks else {}
    equal = Keep(graphs=16)
    if peaks:  # the budget is for the graphs beside the one that ours has here, and for what malloc wastes on them
        spare_mb = peaks["GradCache"].peak_mb - peaks["ours"].peak_mb
        equal = Keep(bytes=max(0, int(_SAVED_SHARE * spare_mb * 1e6)))
    made["ours equal memory"] = partial(arms.ours, towers=towers, micro_batch=size, keep=equal)
    if peaks:
        peaks |= _peaks({"ours equal memory": made["ours equal memory"]}, n, plan)
        report.ratios["equal_memory"] = peaks["ours equal memory"].peak_mb / peaks["GradCache"].peak_mb
    say(f"time, N = {n}")
    seconds = alternate({name: arm(n) for name, arm in made.items()}, rounds=plan.rounds)
    report.timed(seconds, prefix="step", peaks=peaks, n=n, micro_batch=size, threads=plan.threads, budget=equal.bytes)
    report.ratios["time_vs_openclip"] = median_ratio(seconds, "ours", "open_clip")
    report.ratios["time_vs_gradcache"] = median_ratio(seconds, "ours equal memory", "GradCache")
    report.ratios["time_vs_gradcache_1"] = median_ratio(seconds, "ours", "GradCache")
    report.ratios["time_vs_floor3"] = median_ratio(seconds, "ours", "floor3")
    report.ratios["time_vs_floor_tiny"] = median_ratio(seconds, "ours", "floor")


def floors(plan: Plan, report: Report) -> None:
    """Ours with as many graphs as one and four micro-batches have, each beside its floor, with the larger towers."""
    towers, size, n = plan.large, plan.micro_batch, plan.floors
    say(f"time beside the floor, N = {n}")
    works: dict[str, Work] = {}
    for k in (1, 4):
        works[f"ours k={k}"] = arms.ours(n, towers, size, keep=Keep(graphs=2 * k))
        works[f"floor k={k}"] = arms.floor(n, towers, size, kept=2 * k)
    seconds = alternate(works, rounds=max(1, plan.rounds // 2))
    report.timed(seconds, prefix="floors", n=n, micro_batch=size, threads=plan.threads)
    for name, k in (("time_vs_floor", 1), ("time_vs_floor_4", 4)):
        report.ratios[name] = median_ratio(seconds, f"ours k={k}", f"floor k={k}")


def memory(plan: Plan, report: Report) -> None:
    """Peaks and times of larger towers at N = 512."""
    towers, size, n = plan.large, plan.micro_batch, plan.memory
    made: dict[str, Callable[[int], Work]] = {
        "ours": partial(arms.ours, towers=towers, micro_batch=size),
        "GradCache": partial(arms.grad_cache, towers=towers, micro_batch=size),
        "open_clip": partial(arms.open_clip, towers=towers, micro_batch=size),
        "naive": partial(arms.naive, towers=towers),
    }
    peaks = _peaks(made, n, plan)
    for peer in ("naive", "GradCache", "open_clip"):
        name = f"memory_vs_{peer.lower().replace('_', '')}"
        report.ratios[name] = peaks["ours"].peak_mb / peaks[peer].peak_mb
    say(f"time, N = {n}")
    seconds = alternate({name: arm(n) for name, arm in made.items()}, rounds=max(1, plan.rounds // 2))
    report.timed(seconds, prefix="memory", peaks=peaks, n=n, micro_batch=size, threads=plan.threads)


def error(plan: Plan, report: Report) -> None:
    """Distance from plain autograd of the full batch."""
    n, size = plan.error, plan.micro_batch
    say(f"error, N = {n}")
    for suffix, dropout, arm in (
        ("", 0.5, arms.ours),
        ("_open_clip", 0.0, arms.open_clip),
        ("_gradcache", 0.0, arms.grad_cache),
    ):
        towers = replace(plan.large, dropout=dropout)
        want = {name: g.clone() for name, g in arms.full_batch(n, towers, size)().items()}
        got = arm(n, towers, size)()
        report.ratios[f"grad_error{suffix}"] = arms.relative_error(got, want)
        report.ratios[f"scale_grad_ratio{suffix}"] = float(got["logit_scale"] / want["logit_scale"])
        report.arm(
            f"error{suffix or '/ours'}",
            n=n,
            dropout=dropout,
            grad_error=report.ratios[f"grad_error{suffix}"],
            scale_grad_ratio=report.ratios[f"scale_grad_ratio{suffix}"],
        )
    report.ratios["scale_grad_error"] = abs(report.ratios["scale_grad_ratio"] - 1)


def growth(plan: Plan, report: Report) -> None:
    """Time per sample as N grows, micro-batches as they are."""
    first = plan.growth[0]
    for name, towers in (("flat", plan.large), ("flat_tiny", plan.small)):
        say(f"growth, N = {plan.growth}, towers of width {towers.width}")
        made = {str(n): arms.ours(n, towers, plan.micro_batch) for n in plan.growth}
        seconds = alternate(made, rounds=max(1, plan.rounds // 4))
        report.timed(seconds, prefix=name, micro_batch=plan.micro_batch)
        for n in plan.growth[1:]:
            report.ratios[f"{name}_{first}_{n}"] = median_ratio(seconds, str(n), str(first)) * first / n


Section = Callable[[Plan, Report], None]
SECTIONS: Mapping[str, Section] = {"times": times, "floors": floors, "memory": memory, "error": error, "growth": growth}

GOALS = (
    Goal("time_vs_openclip", "time / open_clip's --accum-freq", 0.30),
    Goal("time_vs_gradcache", "at GradCache's memory, time / GradCache", 0.95),
    Goal("equal_memory", "the peak of that / GradCache's", 1.10),
    Goal("time_vs_gradcache_1", "time / GradCache"),
    Goal("time_vs_floor", "k = 1, time / what a cache without any loss takes", 1.03, 1.0),
    Goal("time_vs_floor_4", "k = 4, the same", 1.03, 1.0),
    Goal("time_vs_floor_tiny", "the smaller towers, the same"),
    Goal("time_vs_floor3", "the smaller towers, time / forward and backward alone"),
    Goal("memory_vs_gradcache", "N = 512, peak / GradCache's", 1.10),
    Goal("memory_vs_naive", "N = 512, peak / the full batch's", 0.18),
    Goal("memory_vs_openclip", "N = 512, peak / open_clip's"),
    Goal("grad_error", "gradient error, dropout on", 1e-5),
    Goal("grad_error_gradcache", "GradCache's, dropout off"),
    Goal("grad_error_open_clip", "open_clip's, dropout off"),
    Goal("scale_grad_error", "temperature's gradient / the true one, distance from 1", 1e-5),
    Goal("scale_grad_ratio_open_clip", "open_clip's temperature gradient / the true one"),
    Goal("flat_256_8192", "time per sample, N = 8192 / 256", 1.10),
    Goal("flat_tiny_256_8192", "the smaller towers, the same"),
)


def run(plan: Plan, sections: Mapping[str, Section] = SECTIONS) -> Report:
    """Measure the sections in order."""
    return measured(plan, sections.values())


def main() -> None:
    """The command."""
    parser = command("step", __doc__, quick="under five minutes: fewer rounds and sizes", only=SECTIONS)
    asked = parser.parse_args()
    require("gradcache")
    report = run(QUICK if asked.quick else Plan(), {name: SECTIONS[name] for name in asked.only or SECTIONS})
    tell(report, GOALS, asked.json)


if __name__ == "__main__":
    main()
