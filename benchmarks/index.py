"""How fast an index is built and searched, how much memory that takes, and what is found: recall against queries/s.

    python -m benchmarks.index [--quick] [--only PEER ...] [--json FILE] [--chart FILE.svg]

Standard output has one JSON object per arm, standard error progress and at the end a Markdown table; FILE has all.

1 000 000 vectors of 512 dimensions (`--quick`: 100 000), in clusters with few directions that matter, described in
`index_data`; queries are drawn anew and are of the vectors' modality ("within") or of another ("across", as texts that
look for pictures). Ours is all that `mmcontrast index build` does after embedding, from partitions on the disk to an
index that is chosen, tuned on other queries and measured; its memory includes file pages that are mapped. `flat` is
plain FAISS with all vectors in memory, which is exact. The peers are the structures that autofaiss picks by its rules,
`index_arms.autofaiss_key`, built by plain FAISS: `graph` with 1.5 times the vectors' bytes, which is what building ours
may take at most, and `codes` with half of them, which is what ours is given for its structure. `codes` trains for hours
at a million vectors and for many minutes at 100 000, so it is only measured where it is named by `--only`.

A rate is queries per second with all queries of a kind at once, on two threads. Rates are compared within rounds, each
at the least setting that finds 95 % of the 10 nearest on the queries measured. `single` has one query at a time.
`few_searches` is 1000 exact searches / building lists and searching them: below 1, flat is right, and `index build
--searches 1000` must choose it. `break_even` is the number of searches from which the choice builds lists / the number
measured here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import index_arms as arms
from benchmarks.harness import Goal, Report, Work, alternate, command, in_processes, median_ratio, say, tell
from benchmarks.index_arms import Building, Data
from mmcontrast.charts import Line, line_drawing
from mmcontrast.eval.index.build import Asked
from mmcontrast.eval.index.choice import building_cost, lists_of
from mmcontrast.eval.index.vectors import Floats

RECALL = 0.95
KINDS = ("across", "within")
PEERS: Mapping[str, float] = {"graph": 1.5, "codes": 0.5}
"""Memory of each structure of autofaiss / that of the vectors."""
_FEW = 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one run.

    Attributes:
        n: vectors.
        dim: of them.
        queries: of each kind.
        peers: that are measured.
        rounds: measured rounds.
        singles: queries that are asked one at a time.
        threads: of FAISS.
        timeout: seconds that one build may take.
    """

    n: int = 1_000_000
    dim: int = 512
    queries: int = 1000
    peers: Sequence[str] = ("graph",)
    rounds: int = 3
    singles: int = 50
    threads: int = 2
    timeout: float = 4 * 3600


QUICK = Plan(n=100_000)


def build(plan: Plan, folder: Path, report: Report) -> dict[str, Building]:
    """Draw the data, and build with every arm in a process of its own."""
    say(f"{plan.n} vectors of {plan.dim} dimensions are drawn")
    data = Data.draw(folder, plan.n, plan.dim, plan.queries)
    vectors = 4 * plan.n * plan.dim
    works: dict[str, Any] = {
        "ours": (arms.build_ours, folder / "ours", Asked(memory=vectors // 2, recall=RECALL)),
        "ours_few": (arms.build_ours, folder / "few", Asked(memory=vectors // 2, recall=RECALL, searches=_FEW)),
    }
    for peer in plan.peers:
        key = arms.autofaiss_key(plan.n, plan.dim, round(PEERS[peer] * vectors))
        works[peer] = (arms.build_plain, folder / f"{peer}.faiss", key)
    found: dict[str, Building] = {}
    for name, (function, out, what) in works.items():
        say(f"{name} is built" + (f": {what}" if isinstance(what, str) else ""))
        (found[name],) = in_processes(function, data, out, what, plan.threads, timeout=plan.timeout)
        report.arm(f"build/{name}", **asdict(found[name]))
        if name != "ours_few":
            report.ratios[f"build_memory_{name}"] = found[name].peak_mb * 1e6 / vectors
    for peer in plan.peers:
        report.ratios[f"build_time_{peer}"] = found["ours"].seconds / found[peer].seconds
    return found


@dataclass(frozen=True)
class Searched:
    """What the searching process found.

    Attributes:
        points: kind of queries -> arm -> (setting, recall, queries per second), from the least setting on.
        seconds: kind -> arm -> seconds of each round, at the settings that are compared.
        single: arm -> seconds of each round of single queries, across.
    """

    points: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]]
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    single: Mapping[str, Sequence[float]]


def search_all(plan: Plan, folder: Path) -> Searched:
    """Every arm on the same queries in turn; everything that is searched is in memory at once."""
    arms.faiss.omp_set_num_threads(plan.threads)
    data = Data(folder)
    flat = arms.flat(data)
    found = {"ours": arms.ours(folder / "ours")} | {p: arms.plain(folder / f"{p}.faiss") for p in plan.peers}
    points: dict[str, dict[str, list[tuple[str, float, float]]]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    single: dict[str, list[float]] = {}
    for kind in KINDS:
        z = data.queries("measure", kind)
        exact = flat(z)
        points[kind] = {name: _points(searches, z, exact) for name, searches in found.items()}
        compared = {"flat": flat}
        for name, tried in points[kind].items():
            enough = [setting for setting, recall, _ in tried if recall >= RECALL and setting != "chosen"]
            if enough:
                compared[name] = found[name][enough[0]]
        works: dict[str, Work] = {name: partial(search, z) for name, search in compared.items()}
        seconds[kind] = alternate(works, rounds=plan.rounds)
        if kind == "across":
            some = [z[i : i + 1] for i in range(min(plan.singles, len(z)))]
            works = {name: partial(_each, search, some) for name, search in compared.items()}
            single = alternate(works, rounds=plan.rounds)
    return Searched(points, seconds, single)


def _points(searches: Mapping[str, arms.Search], z: Floats, exact: Any) -> list[tuple[str, float, float]]:
    found: list[tuple[str, float, float]] = []
    for setting, search in searches.items():
        search(z[:8])
        start = time.perf_counter()
        answers = search(z)
        seconds = time.perf_counter() - start
        found.append((setting, arms.recall(answers, exact), len(z) / seconds))
        if setting != "chosen" and found[-1][1] > 0.998:
            break
    return found


def _each(search: arms.Search, queries: Sequence[Floats]) -> None:
    for z in queries:
        search(z)


def run(plan: Plan) -> Report:
    """Build, then search."""
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = build(plan, folder, report)
        say("all are searched")
        (found,) = in_processes(search_all, plan, folder, timeout=plan.timeout)
    for kind, tried in found.points.items():
        for arm, points in tried.items():
            for setting, recall, rate in points:
                report.arm(f"{kind}/{arm}", setting=setting, recall_at_10=recall, queries_per_second=rate)
    for kind, seconds in found.seconds.items():
        _compare(kind, seconds, plan, report)
        chosen = next(recall for setting, recall, _ in found.points[kind]["ours"] if setting == "chosen")
        report.ratios[f"recall_chosen_{kind}"] = chosen
    report.timed(found.single, prefix="single", queries=plan.singles)
    if "ours" in found.single:
        report.ratios["single"] = median_ratio(found.single, "flat", "ours")
    _few(built, found.seconds["across"], plan, report)
    return report


def _compare(kind: str, seconds: Mapping[str, Sequence[float]], plan: Plan, report: Report) -> None:
    report.timed(seconds, prefix=f"at_{RECALL:g}/{kind}", queries=plan.queries)
    for peer in ("flat", *plan.peers):
        name = f"rate_{kind}" if peer == "flat" else f"rate_{kind}_{peer}"
        if {peer, "ours"} <= seconds.keys():
            report.ratios[name] = median_ratio(seconds, peer, "ours")
        else:
            missing = peer if peer not in seconds else "ours"
            report.left_out[name] = f"no setting of {missing} finds {RECALL:.0%}"


def _few(built: Mapping[str, Building], seconds: Mapping[str, Sequence[float]], plan: Plan, report: Report) -> None:
    """Whether an exact search is the right choice where few queries will come."""
    if built["ours_few"].key != "Flat" or "ours" not in seconds:
        report.left_out["few_searches"] = f"{built['ours_few'].key} was chosen for {_FEW} searches"
        return
    flat, ours = (statistics.median(seconds[name]) / plan.queries for name in ("flat", "ours"))
    lists = built["ours"].seconds - built["ours_few"].seconds
    if lists <= 0:
        report.left_out["few_searches"] = "building lists took no longer than building none"
        return
    report.ratios["few_searches"] = _FEW * flat / (lists + _FEW * ours)
    report.ratios["break_even"] = building_cost(plan.n, lists_of(plan.n)) / (lists / (flat - ours))


GOALS = (
    Goal("rate_across", "queries of another modality at recall@10 ≥ .95, rate / flat", at_least=10),
    Goal("rate_within", "queries of the same modality at recall@10 ≥ .95, rate / flat", at_least=10),
    Goal("single", "one query at a time, time of flat / ours"),
    Goal("recall_chosen_across", "recall@10 at the setting that the build chose", at_least=0.94),
    Goal("recall_chosen_within", "the same, queries of the same modality"),
    Goal("build_memory_ours", "peak memory of the build / the vectors", 1.5),
    Goal("few_searches", "1000 searches, time of flat, which is chosen / of lists", 1),
    Goal("break_even", "searches from which lists are chosen / from which they pay"),
    *(
        goal
        for peer, memory in PEERS.items()
        for goal in (
            Goal(f"rate_across_{peer}", f"rate / autofaiss's {peer}, given {memory:g} times the vectors"),
            Goal(f"rate_within_{peer}", "the same, queries of the same modality"),
            Goal(f"build_time_{peer}", "time to build / its own"),
            Goal(f"build_memory_{peer}", "its peak memory / the vectors"),
        )
    ),
)


def chart(report: Report, plan: Plan) -> str:
    """Queries per second against the share of the 10 nearest that is missed, as SVG."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in report.arms:
        kind, _, name = arm["arm"].partition("/")
        if kind == "across" and arm["setting"] != "chosen":
            missed = max(1 - arm["recall_at_10"], 1 / (arms.TOP * plan.queries))
            lines.setdefault("mmcontrast" if name == "ours" else name, []).append((missed, arm["queries_per_second"]))
    return line_drawing(
        [Line(name, [m for m, _ in points], [r for _, r in points], dots=True) for name, points in lines.items()],
        title=f"{plan.n} vectors of {plan.dim} dimensions, queries of another modality",
        x="share of the 10 nearest that is missed",
        y="queries/s",
    )


def main() -> None:
    """The command."""
    parser = command("index", __doc__, quick="100 000 vectors", only=PEERS, none=True)
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw rates against what is missed here")
    asked = parser.parse_args()
    plan = QUICK if asked.quick else Plan()
    plan = plan if asked.only is None else replace(plan, peers=tuple(asked.only))
    report = run(plan)
    if asked.chart:
        asked.chart.write_text(chart(report, plan))
    tell(report, GOALS, asked.json, selection="peers")


if __name__ == "__main__":
    main()
