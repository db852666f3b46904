"""What the contrastive losses cost: time, memory, bytes between ranks and rounding error, beside other packages.

    python -m benchmarks.loss [--quick] [--only SECTION ...] [--json FILE] [--chart FILE.svg]

Forward and backward, float32, d = 512, blocks of 1024 anchors as in the trainer, two threads unless an arm says
otherwise. Standard output has one JSON object per arm, standard error progress and at the end a Markdown table; FILE
has all of it.

Ratios are ours / the peer's, medians of same-round ratios, where the name says time, memory or bytes. Exceptions:

* `clip_floor_N` is ours / the matrix products alone; a name that ends in `_floor` is the products alone / the peer.
* `clip_grad_error`, `clip_grad_error_saturated`, `clip_bf16_grad_error` are errors of ours, not ratios: relative L2
  against float64, the larger of image and text, the largest of the settings. With `_open_clip` they are the peer's.
* `clip_peak_mb_N` is ours in MB; `dist_difference` is how far the two arms' gradients differ, a check.

Memory is resident, from the kernel, in fresh processes, above the process with libraries loaded and inputs made; with
`_allocator` it is the peak of live tensor bytes instead. MB are 10^6 bytes. A tower is one rank's rows of one modality,
n x d numbers. The peers are open_clip's ClipLoss and SigLipLoss and the `symile` package; between two gloo ranks,
ClipLoss with `local_loss` and `gather_with_grad`.

Letters: N rows of the global batch, n rows per rank, d dimensions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import loss_arms as arms
from benchmarks.counters import available_mb, peak_tensors_mb, tcp_bytes_sent
from benchmarks.harness import (
    Goal,
    Peak,
    Report,
    Work,
    alternate,
    command,
    in_processes,
    measured,
    median_ratio,
    peak,
    peak_here,
    require,
    say,
    tell,
)
from mmcontrast.charts import Line, line_drawing

RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one run.

    Attributes:
        growth: N of ours and the floor.
        compared: the largest N of open_clip's ClipLoss, which holds four N x N matrices.
        variants: N at which ours with kept tiles and with bfloat16 products run too.
        memory: N of the peak memory of CLIP, ours and the peer's; None leaves it out.
        alone: N of the peak memory of ours where the peer would not fit; None leaves it out.
        error: N of the gradients' errors.
        siglip: N.
        symile: N.
        ranks: n of time and bytes between ranks.
        ranks_memory: n of the peak memory per rank.
        rounds: measured rounds at N = 4096; more below, fewer above.
        least_rounds: at large N.
        most_rounds: at small N.
        d: dimensions.
        threads: of one process.
    """

    growth: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    compared: int = 8192
    variants: tuple[int, ...] = (1024, 2048, 4096, 8192)
    memory: int | None = 16384
    alone: int | None = 65536
    error: int = 2048
    siglip: int = 4096
    symile: int = 4096
    ranks: int = 2048
    ranks_memory: int = 4096
    rounds: int = 15
    least_rounds: int = 5
    most_rounds: int = 25
    d: int = 512
    threads: int = 2

    def rounds_at(self, n: int) -> int:
        """Rounds for N rows: of about equal total duration."""
        return int(min(self.most_rounds, max(self.least_rounds, self.rounds * (4096 / n) ** 2)))


QUICK = Plan(
    growth=(1024, 2048, 4096),
    compared=4096,
    variants=(4096,),
    memory=None,
    alone=None,
    rounds=3,
    least_rounds=3,
    most_rounds=9,
)


def clip(plan: Plan, report: Report) -> None:
    """Time of CLIP as N grows, then its peak memory."""
    d = plan.d
    peaks = {} if plan.memory is None else _clip_peaks(plan, plan.memory, report)
    for n in plan.growth:
        say(f"CLIP, N = {n}")
        works: dict[str, Work] = {"ours": arms.clip_ours(n, d), "floor8": arms.matmuls(n, d, scores=2)}
        if n <= plan.compared:
            works["open_clip"] = arms.clip_peer(n, d)
        if n in plan.variants:
            works["ours kept"] = arms.clip_ours(n, d, kept=True)
            works["ours bf16"] = arms.clip_ours(n, d, gradient_dtype=torch.bfloat16)
            works["floor6"] = arms.matmuls(n, d, scores=1)
        seconds = alternate(works, rounds=plan.rounds_at(n))
        at_n = peaks if n == plan.memory else {}
        report.timed(seconds, prefix="clip", peaks=at_n, n=n, d=d, threads=plan.threads)
        report.ratios[f"clip_floor_{n}"] = median_ratio(seconds, "ours", "floor8")
        for name, ours, theirs in (
            (f"clip_time_{n}", "ours", "open_clip"),
            (f"clip_time_{n}_floor", "floor8", "open_clip"),
            (f"clip_kept_time_{n}", "ours kept", "open_clip"),
            (f"clip_kept_time_{n}_floor", "floor6", "open_clip"),
            (f"clip_bf16_time_{n}", "ours bf16", "open_clip"),
        ):
            if ours in seconds and theirs in seconds:
                report.ratios[name] = median_ratio(seconds, ours, theirs)
    if plan.alone is not None:
        say(f"CLIP, N = {plan.alone}, ours alone (minutes)")
        found = peak(partial(arms.clip_ours, d=d), plan.alone, threads=plan.threads)
        _cold("clip/ours", found, report, n=plan.alone, d=d, threads=plan.threads)
        report.ratios[f"clip_peak_mb_{plan.alone}"] = found.peak_mb


def _clip_peaks(plan: Plan, n: int, report: Report) -> dict[str, Peak]:
    say(f"CLIP, N = {n}, peak memory")
    peaks = {"ours": peak(partial(arms.clip_ours, d=plan.d), n, threads=plan.threads)}
    needed = 4.2 * 4 * n * n / 1e6
    if available_mb() < 1.1 * needed:
        report.left_out[f"clip_memory_{n}"] = f"open_clip needs {needed:.0f} MB, {available_mb():.0f} are free"
        return peaks
    theirs = peak(partial(arms.clip_peer, d=plan.d), n, threads=plan.threads)
    _cold("clip/open_clip", theirs, report, n=n, d=plan.d, threads=plan.threads)
    report.ratios[f"clip_memory_{n}"] = peaks["ours"].peak_mb / theirs.peak_mb
    return peaks


def _cold(name: str, found: Peak, report: Report, **more: Any) -> None:
    """An arm that ran once, in a fresh process."""
    report.arm(name, seconds=found.seconds, peak_mb=found.peak_mb, cold=True, **more)


def errors(plan: Plan, report: Report) -> None:
    """Errors of CLIP's gradients against float64."""
    say(f"CLIP, N = {plan.error}, errors of the gradients")
    n, d = plan.error, plan.d
    worst: dict[str, float] = {}
    for scale, cosine, kind in ((arms.SCALE, 0.5, ""), (100.0, 0.2, ""), (100.0, 0.5, "_saturated")):
        want = arms.clip_exact(n, d, scale=scale, cosine=cosine)
        for name, label, work in (
            ("clip_grad_error{}", "ours", arms.clip_ours(n, d, scale=scale, cosine=cosine)),
            ("clip_grad_error{}_open_clip", "open_clip", arms.clip_peer(n, d, scale=scale, cosine=cosine)),
            (
                "clip_bf16_grad_error{}",
                "ours bf16",
                arms.clip_ours(n, d, scale=scale, cosine=cosine, gradient_dtype=torch.bfloat16),
            ),
        ):
            error = arms.relative_error(work(), want)
            report.arm(f"clip error/{label}", n=n, d=d, scale=scale, cosine=cosine, error=error)
            worst[name.format(kind)] = max(worst.get(name.format(kind), 0.0), error)
    report.ratios |= worst


def siglip(plan: Plan, report: Report) -> None:
    """SigLIP against open_clip's."""
    _compare("siglip", plan.siglip, {"ours": arms.siglip_ours, "open_clip": arms.siglip_peer}, 1, plan, report)


def symile(plan: Plan, report: Report) -> None:
    """Symile with three modalities, one shuffled negative per other row, against its authors' package."""
    _compare("symile", plan.symile, {"ours": arms.symile_ours, "symile": arms.symile_peer}, 3, plan, report)


def _compare(
    section: str,
    n: int,
    both: Mapping[str, arms.Arm],
    products: int,
    plan: Plan,
    report: Report,
) -> None:
    """Time, resident peak and allocator's peak of ours and one peer; `products`: score matrices of the loss."""
    say(f"{section}, N = {n}")
    d, (ours, peer) = plan.d, both
    peaks = {name: peak(partial(arm, d=d), n, threads=plan.threads) for name, arm in both.items()}
    works: dict[str, Work] = {name: arm(n, d) for name, arm in both.items()}
    seconds = alternate(
        {**works, "floor6": arms.matmuls(n, d, scores=1, times=products)}, rounds=min(9, plan.rounds_at(n))
    )
    report.timed(seconds, prefix=section, peaks=peaks, n=n, d=d, threads=plan.threads)
    tensors: dict[str, float] = {}
    for name, work in works.items():
        tensors[name] = peak_tensors_mb(work)
        report.arm(f"{section} allocator/{name}", n=n, d=d, peak_mb=tensors[name])
    report.ratios |= {
        f"{section}_time_{n}": median_ratio(seconds, ours, peer),
        f"{section}_time_{n}_floor": median_ratio(seconds, "floor6", peer),
        f"{section}_memory_{n}": peaks[ours].peak_mb / peaks[peer].peak_mb,
        f"{section}_memory_{n}_allocator": tensors[ours] / tensors[peer],
    }


def ranks(plan: Plan, report: Report) -> None:
    """CLIP over two gloo ranks of one thread each."""
    n, n_memory, d = plan.ranks, plan.ranks_memory, plan.d
    say(f"two ranks, n = {n}")
    found: list[_OnRank] = in_processes(_on_a_rank, n, d, plan.rounds_at(RANKS * n), ranks=RANKS)
    # A step is over when its slowest rank is.
    seconds = {
        name: [max(rounds) for rounds in zip(*(rank.seconds[name] for rank in found), strict=True)]
        for name in _ON_RANKS
    }
    sent = {name: statistics.mean(rank.sent[name] for rank in found) for name in _ON_RANKS}
    say(f"two ranks, n = {n_memory}, peak memory")
    peaks = {
        name: max(p.peak_mb for p in in_processes(peak_here, partial(arm, d=d), n_memory, 1, ranks=RANKS))
        for name, arm in _ON_RANKS.items()
    }
    sizes: dict[str, Any] = {"ranks": RANKS, "d": d, "threads": 1}
    for name, values in seconds.items():
        traffic = {"bytes_sent_per_rank": round(sent[name]), "towers": sent[name] / (4 * n * d)}
        report.arm(f"ranks/{name}", seconds=statistics.median(values), rounds=len(values), n=n, **sizes, **traffic)
        report.arm(f"ranks/{name}", peak_mb=peaks[name], n=n_memory, **sizes)
    report.ratios |= {
        "dist_time": median_ratio(seconds, "ours", "open_clip"),
        "dist_bytes": sent["ours"] / sent["open_clip"],
        "dist_memory": peaks["ours"] / peaks["open_clip"],
        "dist_difference": max(rank.difference for rank in found),
    }


_ON_RANKS: dict[str, arms.Arm] = {"ours": arms.dist_ours, "open_clip": arms.dist_peer}


@dataclass(frozen=True)
class _OnRank:
    """What one rank measured of each arm: seconds of the rounds and bytes sent in a step; how far gradients differ."""

    seconds: Mapping[str, list[float]]
    sent: Mapping[str, int]
    difference: float


def _on_a_rank(n: int, d: int, rounds: int) -> _OnRank:
    torch.set_num_threads(1)
    works = {name: arm(n, d) for name, arm in _ON_RANKS.items()}
    seconds = alternate(works, rounds=rounds, before=dist.barrier)
    sent: dict[str, int] = {}
    gradients: dict[str, Mapping[str, torch.Tensor]] = {}
    for name, work in works.items():
        dist.barrier()
        before = tcp_bytes_sent()
        gradients[name] = work()
        dist.barrier()  # the other rank has what we sent, nothing waits in a buffer; the barrier sends 300 bytes
        sent[name] = tcp_bytes_sent() - before
    theirs = {m: gradient / RANKS for m, gradient in gradients["open_clip"].items()}  # DDP's mean would divide
    return _OnRank(seconds, sent, arms.relative_error(gradients["ours"], theirs))


SECTIONS: Mapping[str, Callable[[Plan, Report], None]] = {
    "clip": clip,
    "errors": errors,
    "siglip": siglip,
    "symile": symile,
    "ranks": ranks,
}

GOALS = (
    Goal("clip_time_4096", "CLIP N=4096, time / open_clip", 0.65, "clip_time_4096_floor"),
    Goal("clip_time_8192", "CLIP N=8192, time / open_clip", 0.55, "clip_time_8192_floor"),
    Goal("clip_floor_4096", "CLIP N=4096, time / the matrix products alone", 1.15, 1.0),
    Goal("clip_floor_8192", "CLIP N=8192, time / the matrix products alone", 1.15, 1.0),
    Goal("clip_kept_time_4096", "the same with kept tiles, N=4096", 0.48, "clip_kept_time_4096_floor"),
    Goal("clip_kept_time_8192", "the same with kept tiles, N=8192", 0.42, "clip_kept_time_8192_floor"),
    Goal("clip_bf16_time_4096", "the same with bfloat16 gradient products, N=4096", 0.50),
    Goal("clip_memory_16384", "CLIP N=16384, peak memory / open_clip", 0.05),
    Goal("clip_peak_mb_65536", "CLIP N=65536, peak memory in MB", 1000),
    Goal("clip_grad_error", "CLIP gradient, relative error", 1e-6),
    Goal("clip_grad_error_open_clip", "open_clip's"),
    Goal("clip_grad_error_saturated", "CLIP gradient at scale 100, cosine 0.5, relative error", 1e-4),
    Goal("clip_grad_error_saturated_open_clip", "open_clip's"),
    Goal("clip_bf16_grad_error", "with bfloat16 gradient products, relative error", 4e-3),
    Goal("siglip_time_4096", "SigLIP N=4096, time / open_clip", 0.65, "siglip_time_4096_floor"),
    Goal("siglip_memory_4096", "SigLIP N=4096, peak memory / open_clip", 0.125),
    Goal("siglip_memory_4096_allocator", "SigLIP N=4096, peak of live tensors / open_clip", 0.125),
    Goal("symile_time_4096", "Symile N=4096, time / symile", 0.62, "symile_time_4096_floor"),
    Goal("symile_memory_4096", "Symile N=4096, peak memory / symile", 0.33),
    Goal("symile_memory_4096_allocator", "Symile N=4096, peak of live tensors / symile", 0.25),
    Goal("dist_time", "CLIP on 2 ranks, n=2048, time / open_clip", 0.68),
    Goal("dist_bytes", "CLIP on 2 ranks, bytes sent / open_clip", 0.51, 0.5),
    Goal("dist_memory", "CLIP on 2 ranks, n=4096, peak memory / open_clip", 0.25),
)

_LINES = {"clip/open_clip": "open_clip", "clip/ours": "mmcontrast", "clip/floor8": "products alone"}


def chart(report: Report, plan: Plan) -> str:
    """Seconds against N for ours, the peer and the floor, as SVG."""
    lines = {
        label: [(a["n"], a["seconds"]) for a in report.arms if a["arm"] == arm and "rounds" in a]
        for arm, label in _LINES.items()
    }
    return line_drawing(
        [
            Line(name, [n for n, _ in points], [s for _, s in points], dots=True)
            for name, points in lines.items()
            if points
        ],
        title=f"CLIP loss and gradients, d = {plan.d}, {plan.threads} threads",
        x="global batch N",
        y="seconds",
        base_x=2,
    )


def run(plan: Plan, sections: Mapping[str, Callable[[Plan, Report], None]] = SECTIONS) -> Report:
    """Measure the sections in order."""
    return measured(plan, sections.values())


def main() -> None:
    """The command."""
    parser = command("loss", __doc__, quick="under two minutes: N up to 4096", only=SECTIONS)
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw seconds against N here")
    asked = parser.parse_args()
    require("symile")
    plan = QUICK if asked.quick else Plan()
    report = run(plan, {name: SECTIONS[name] for name in asked.only or SECTIONS})
    if asked.chart:
        asked.chart.write_text(chart(report, plan))
    tell(report, GOALS, asked.json, selection="sizes and sections")


if __name__ == "__main__":
    main()
