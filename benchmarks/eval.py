"""What evaluation costs, beside what people use for it, and whether the answers are the same.

    python -m benchmarks.eval [--quick] [--only SECTION ...] [--json FILE]

Float32, two threads. Standard output has one JSON object per arm, standard error progress and at the end a Markdown
table; FILE has all of it. The arms are described in `eval_arms`. A section ends with an error where two arms that
should answer the same do not.

Ratios are ours / the peer's, medians of same-round ratios, where the name says time. N pairs of d = 512:

* `retrieval_time_vs_flat_N`: exact recall@1, 5, 10 and median rank in both directions / FAISS's flat index searched for
  ten, both ways (which finds no ranks). `retrieval_floor_N` is the matrix product alone / FAISS.
* `retrieval_time_vs_open_clip`, `_vs_clip_benchmark`: the same / `get_clip_metrics`, `zeroshot_retrieval.evaluate`.
* `retrieval_peak_mb` is ours in MB, above the process with libraries and inputs, for pieces of 512 queries;
  `retrieval_peak_share` is it / (2 * 512 * N * 4 bytes + 32 MB). `retrieval_peak_mb_faiss` is FAISS's.
* `head_time`: the embeddings of 1,000 classes by 80 prompts / CLIP_benchmark's `zero_shot_classifier`.
* `shards_classification_time`, `shards_retrieval_time`: from the same shards to the answer, with the same open_clip
  model / CLIP_benchmark; ours has intervals, too.
* `difference` is the largest between any two metrics that both report, `head_difference` the largest between numbers of
  both heads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import eval_arms as arms
from benchmarks.harness import Goal, Report, Work, alternate, command, measured, median_ratio, peak, require, say, tell
from mmcontrast.eval.counting import BLOCK
from mmcontrast.eval.models import load_asked


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one run.

    Attributes:
        flat: N beside FAISS.
        peers: N beside open_clip and CLIP_benchmark.
        memory: N of the peaks.
        d: dimensions.
        classes: of the head.
        templates: of the head, prompts per class.
        layers: of the towers.
        pictures: in shards.
        rounds: measured rounds; half as many of what is long.
        threads: of one process.
        peaks: whether peaks are measured.
    """

    flat: tuple[int, ...] = (10_000, 50_000)
    peers: int = 5_000
    memory: int = 10_000
    d: int = 512
    classes: int = 1_000
    templates: int = 80
    layers: int = 2
    pictures: int = 512
    rounds: int = 7
    threads: int = 2
    peaks: bool = True


QUICK = Plan(flat=(10_000,), classes=100, pictures=128, rounds=3)


def _same(found: Mapping[str, Mapping[str, float]], report: Report, *, tolerance: float) -> None:
    """Note how far metrics of two arms that both report are apart.

    Raises:
        AssertionError: further than the tolerance, or none is reported by both.
    """
    ours = found["ours"]
    for arm, theirs in found.items():
        common = ours.keys() & theirs.keys()
        assert common, f"{arm} reports nothing that ours does"
        difference = max(abs(ours[name] - theirs[name]) for name in common)
        assert difference <= tolerance, f"{arm} differs by {difference}: {ours} and {theirs}"
        report.ratios["difference"] = max(report.ratios.get("difference", 0.0), difference)


def flat(plan: Plan, report: Report) -> None:
    """Beside FAISS's flat index."""
    for n in plan.flat:
        say(f"retrieval, N = {n}")
        both = {"ours": arms.ours(n, plan.d), "FAISS": arms.faiss_flat(n, plan.d)}
        _same({name: work() for name, work in both.items()}, report, tolerance=0)
        rounds = plan.rounds if n <= 20_000 else max(1, plan.rounds // 2)
        seconds = alternate({**both, "product": arms.product(n, plan.d)}, rounds=rounds)
        report.timed(seconds, prefix="flat", n=n, d=plan.d, threads=plan.threads)
        report.ratios[f"retrieval_time_vs_flat_{n}"] = median_ratio(seconds, "ours", "FAISS")
        report.ratios[f"retrieval_floor_{n}"] = median_ratio(seconds, "product", "FAISS")


def peers(plan: Plan, report: Report) -> None:
    """Beside open_clip's metrics and CLIP_benchmark's retrieval."""
    n, d = plan.peers, plan.d
    say(f"retrieval beside open_clip and CLIP_benchmark, N = {n}")
    works = {
        "ours": arms.ours(n, d),
        "open_clip": arms.open_clip_metrics(n, d),
        "CLIP_benchmark": arms.clip_benchmark_retrieval(n, d),
    }
    _same({name: work() for name, work in works.items()}, report, tolerance=1e-6)  # theirs are means in float32
    seconds = alternate(works, rounds=plan.rounds)
    report.timed(seconds, prefix="peers", n=n, d=d, threads=plan.threads)
    report.ratios["retrieval_time_vs_open_clip"] = median_ratio(seconds, "ours", "open_clip")
    report.ratios["retrieval_time_vs_clip_benchmark"] = median_ratio(seconds, "ours", "CLIP_benchmark")


def memory(plan: Plan, report: Report) -> None:
    """Peaks of retrieval."""
    n, d = plan.memory, plan.d
    made: dict[str, Callable[[int], Work]] = {
        "ours": partial(arms.ours, d=d),
        "FAISS": partial(arms.faiss_flat, d=d),
    }
    peaks: dict[str, float] = {}
    for name, arm in made.items() if plan.peaks else ():
        say(f"peak of {name}, N = {n}")
        found = peak(arm, n, threads=plan.threads)
        peaks[name] = found.peak_mb
        report.arm(f"memory/{name}", seconds=found.seconds, peak_mb=found.peak_mb, n=n, d=d, threads=plan.threads)
    if peaks:
        report.ratios["retrieval_peak_mb"] = peaks["ours"]
        report.ratios["retrieval_peak_share"] = peaks["ours"] * 1e6 / (2 * BLOCK * n * 4 + 32e6)
        report.ratios["retrieval_peak_mb_faiss"] = peaks["FAISS"]


def head(plan: Plan, report: Report) -> None:
    """Embeddings of the classes."""
    say(f"head of {plan.classes} classes, {plan.templates} prompts each")
    with tempfile.TemporaryDirectory() as folder:
        given = arms.open_clip_model(Path(folder), layers=plan.layers)
        works = {
            "ours": arms.head_ours(given, plan.classes, plan.templates),
            "CLIP_benchmark": arms.head_clip_benchmark(given, plan.classes, plan.templates),
        }
        difference = float((works["ours"]() - works["CLIP_benchmark"]()).abs().max())
        assert difference < 1e-5, f"the heads differ by {difference}"
        seconds = alternate(works, rounds=max(1, plan.rounds // 3))
    report.timed(seconds, prefix="head", classes=plan.classes, templates=plan.templates, threads=plan.threads)
    report.ratios["head_time"] = median_ratio(seconds, "ours", "CLIP_benchmark")
    report.ratios["head_difference"] = difference


def shards(plan: Plan, report: Report) -> None:
    """From shards in CLIP_benchmark's layout to the answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = arms.open_clip_model(folder, layers=plan.layers)
        asked = load_asked(given)
        for kind in ("classification", "retrieval"):
            say(f"{kind} of {plan.pictures} pictures in shards")
            root = arms.write_shards(
                folder / kind, kind, pictures=plan.pictures, classes=min(plan.classes, 50), templates=plan.templates
            )
            works = {"ours": arms.shards_ours(asked, root), "CLIP_benchmark": arms.shards_clip_benchmark(given, root)}
            _same({arm: work() for arm, work in works.items()}, report, tolerance=1e-6)
            seconds = alternate(works, rounds=max(1, plan.rounds // 2))
            report.timed(seconds, prefix=f"shards/{kind}", pictures=plan.pictures, threads=plan.threads)
            report.ratios[f"shards_{kind}_time"] = median_ratio(seconds, "ours", "CLIP_benchmark")


SECTIONS: Mapping[str, Callable[[Plan, Report], None]] = {
    "flat": flat,
    "peers": peers,
    "memory": memory,
    "head": head,
    "shards": shards,
}

GOALS = (
    Goal("retrieval_time_vs_flat_10000", "retrieval N=10,000, time / FAISS flat", 0.65, "retrieval_floor_10000"),
    Goal("retrieval_time_vs_flat_50000", "retrieval N=50,000, time / FAISS flat", 0.65, "retrieval_floor_50000"),
    Goal("retrieval_time_vs_open_clip", "retrieval N=5,000, time / open_clip's metrics", 0.1),
    Goal("retrieval_time_vs_clip_benchmark", "retrieval N=5,000, time / CLIP_benchmark", 1 / 6),
    Goal("retrieval_peak_mb", "retrieval N=10,000, peak memory in MB"),
    Goal("retrieval_peak_share", "the same / (2 * 512 * N * 4 bytes + 32 MB)", 1.0),
    Goal("retrieval_peak_mb_faiss", "FAISS's"),
    Goal("head_time", "head of 1,000 classes x 80 prompts, time / CLIP_benchmark", 0.5),
    Goal("head_difference", "largest difference of a number of the head", 1e-5),
    Goal("shards_classification_time", "shards to classification, time / CLIP_benchmark"),
    Goal("shards_retrieval_time", "shards to retrieval, time / CLIP_benchmark"),
    Goal("difference", "largest difference of a metric", 1e-6),
)


def run(plan: Plan, sections: Mapping[str, Callable[[Plan, Report], None]] = SECTIONS) -> Report:
    """Measure the sections in order."""
    return measured(plan, sections.values())


def main() -> None:
    """The command."""
    parser = command("eval", __doc__, quick="under three minutes: N = 10,000, 100 classes", only=SECTIONS)
    asked = parser.parse_args()
    require("clip_benchmark")
    report = run(QUICK if asked.quick else Plan(), {name: SECTIONS[name] for name in asked.only or SECTIONS})
    tell(report, GOALS, asked.json, selection="sizes and sections")


if __name__ == "__main__":
    main()
