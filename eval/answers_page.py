"""Answers as a page: scores with intervals and chance, what is confused, what was asked and found, where things lie.

Everything is drawn of a result's plain values (`Result.to_json`), in the process that asked or later, from a run's
`evaluation.json`; samples are read again by their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from mmcontrast.charts import SCRIPT, STYLE, Bar, Bin, Line, Point, bars, cloud, histogram, line_chart
from mmcontrast.config import ConfigError
from mmcontrast.eval.answer import Answer
from mmcontrast.eval.confusion import confusion
from mmcontrast.eval.layouts import open_data
from mmcontrast.eval.media import Media
from mmcontrast.eval.result import Difference, chance_of
from mmcontrast.eval.sources import Source
from mmcontrast.page import Html, Node, card, cards, finding, number, page, pair, percent, section, table, tag
from mmcontrast.remote import is_remote

_MISTAKES = 12
_WRITTEN = 6  # at random, and as many of the lowest scores
_SAID = 5  # captions of a sample
_SETS = 8
_CLASSES = 25  # of the lowest scores
_WORDS = {
    "zeroshot_classification": "zero-shot classification",
    "zeroshot_retrieval": "retrieval",
    "linear_probe": "linear probe",
    "knn": "nearest neighbours",
    "joint_retrieval": "joint retrieval",
    "few_shot": "few shots",
    "captioning": "captions",
    "image_caption_selection": "choice among hard negatives",
    "compositional": "choice among hard negatives",
}

EXTRA = """
.strip { display: grid; grid-template-columns: 9.5rem 9.5rem minmax(0, 1fr); gap: .6rem; align-items: start;
  padding: .7rem 0; border-bottom: 1px solid var(--line); font-size: .82rem; }
.strip > div > b { display: block; font-size: .75rem; color: var(--quiet); font-weight: 600; margin-bottom: .25rem; }
.strip img { width: 100%; height: 6.2rem; object-fit: contain; background: #fff; border-radius: .2rem; }
.found img { height: 4.6rem; }
.answers { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: .5rem; }
.found { border: 1px solid var(--line); border-radius: .3rem; padding: .35rem; min-width: 0; overflow-wrap: anywhere; }
.found.hit { border-color: var(--c2); box-shadow: inset 0 0 0 1px var(--c2); } .found small { color: var(--quiet); }
.found.hit small b { color: var(--c2); } .strip audio { width: 100%; height: 2rem; } .strip > div { min-width: 0; }
.plane { max-width: 46rem; margin-top: 1.4rem; }
.absent { color: var(--quiet); } .strip .said, .found .said { overflow-wrap: anywhere; }
@media (max-width: 46rem) { .strip { grid-template-columns: 1fr 1fr; } .strip > div:last-child { grid-column: 1 / -1;
  overflow-x: auto; } .answers { grid-template-columns: repeat(5, minmax(7rem, 1fr)); } }
@media print { .strip { break-inside: avoid; } .strip audio { display: none; } }
"""
"""CSS of the galleries, beside `mmcontrast.charts.STYLE`."""


@dataclass(frozen=True)
class Shown:
    """One answer, as it is drawn.

    Attributes:
        title: of whom what was asked.
        result: `Result.to_json` of it.
        source: where the samples are; None where they cannot be read any more.
        lost: why not.
        skipped: damaged samples that were left out.
        against: another model, and metric -> this one's score less the other's.
    """

    title: str
    result: Mapping[str, Any]
    source: Source | None = None
    lost: str = ""
    skipped: int = 0
    against: tuple[str, Mapping[str, Difference]] | None = None


def answers_page(answers: Sequence[Answer], problems: Sequence[str] = ()) -> str:
    """The page of some answers; `problems` are questions that were left out, and why."""
    models = list(dict.fromkeys(f"{a.model.name} ({a.model.pretrained})" for a in answers))
    several = len(models) > 1
    body = [
        tag("h1", "Evaluation of ", ", ".join(models[:1])),
        tag("p", f"Compared with {', '.join(models[1:])}.", class_="quiet") if several else None,
        [finding("note", problem) for problem in problems],
        [draw(s) for s in _once(shown_of(a, named=several) for a in answers)],
    ]
    return page(f"Evaluation: {models[0]}", body, style=STYLE + EXTRA, script=SCRIPT)


def _once(answers: Iterable[Shown]) -> Iterator[Shown]:
    """Those of one model on one data set have the same plane; it is drawn with the first."""
    drawn: list[Any] = []
    for shown in answers:
        details = _mapping(shown.result.get("details"))
        plane = details.get("plane")
        if plane is not None and plane in drawn:
            shown = replace(shown, result={**shown.result, "details": {**details, "plane": None}})
        drawn.append(plane)
        yield shown


def shown_of(answer: Answer, *, named: bool = False) -> Shown:
    """An answer of this process; `named` puts the model into its title."""
    result = answer.result.to_json()
    source, lost = (answer.source, "") if answer.source is not None else _reopened(result)
    of = f"{answer.model.name}: " if named else ""
    language = f" ({answer.language})" if answer.language else ""
    title = f"{of}{answer.dataset}: {_WORDS.get(answer.task, answer.task)}{language}"
    return Shown(title, result, source, lost, len(answer.skipped), answer.against)


def shown_again(name: str, result: Mapping[str, Any]) -> Shown:
    """An answer that was kept: its samples are shown if the data are still there and the same."""
    source, lost = _reopened(result)
    task = str(result.get("task", ""))
    return Shown(f"{name}: {_WORDS.get(task, task)}", result, source, lost)


def _reopened(result: Mapping[str, Any]) -> tuple[Source | None, str]:
    about = _mapping(_mapping(result.get("details")).get("data"))
    names = [str(name) for name in _list(about.get("names"))]
    if not names:
        return None, ""
    if far := [name for name in names if is_remote(name)]:
        return (
            None,
            f"The samples are not shown: a report asks no network for {far[0]}.",
        )  # a file of strangers may say so
    try:
        source = open_data(names)
        if source.fingerprint == about.get("fingerprint"):
            return source, ""
    except (ConfigError, OSError) as error:
        return None, f"The samples cannot be shown: {error}."
    return None, f"The samples cannot be shown: {', '.join(names)} holds others than those that were asked about."


def draw(shown: Shown) -> Html:
    """The section of one answer; a part that a result does not have, or that cannot be drawn, is left out."""
    details = _mapping(shown.result.get("details"))
    about = _mapping(details.get("data"))
    media = Media(shown.source, {str(m): str(kind) for m, kind in _mapping(about.get("kinds")).items()})
    asked = [str(m) for m in _list(about.get("modalities"))]
    parts: list[Node] = []
    for make in _PARTS:
        try:
            parts.append(make(shown, details, media, asked))
        except (
            LookupError,
            ValueError,
            TypeError,
            ArithmeticError,
            AttributeError,
        ) as error:  # of a file that was changed
            parts.append(finding("warning", f"a part cannot be drawn: {make.__name__[1:]} ({error})"))
    return section(shown.title, parts)


def _mapping(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else []


def _facts(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    counts = ", ".join(f"{number(n)} {name.replace('_', ' ')}" for name, n in _mapping(shown.result["counts"]).items())
    left_out = f", {number(shown.skipped)} damaged ones left out" if shown.skipped else ""
    warnings = [finding("warning", str(text)) for text in _list(shown.result.get("warnings"))]
    lost = tag("p", shown.lost, class_="quiet") if shown.lost else None
    return [tag("p", f"{counts}{left_out}.", class_="quiet"), lost, warnings]


def _scores(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Shares as bars with interval and chance, other numbers as a table."""
    chance = {str(k): float(v) for k, v in _mapping(shown.result.get("chance")).items()}
    drawn: list[Bar] = []
    others: list[list[Node]] = []
    for name, metric in _mapping(shown.result.get("metrics")).items():
        value, low, high = cast(tuple[Any, Any, Any], (*_list(metric), None, None, None)[:3])
        if value is None:
            continue
        told = str(name).replace("_", " ")
        level = chance_of(str(name), chance)
        if low is not None and 0 <= value <= 1 and high <= 1 and not _lower_is_better(name) and "cosine" not in name:
            note = "" if level is None else f"chance {number(round(level, 4))}"
            drawn.append(Bar(told, value, low, high, level, note))
        else:
            ends = "" if low is None else f"{number(round(low, 3))} to {number(round(high, 3))}"
            others.append([told, number(round(value, 3)), ends])
    more = [[name.replace("_", " "), number(round(value, 4)), "chance"] for name, value in chance.items()
            if not any(level == value for level in (bar.chance for bar in drawn))]  # fmt: skip
    said = tag("p", "Lines over the bars are 95 % intervals, upright marks what chance reaches.", class_="quiet")
    return [[said, bars(drawn)] if drawn else None, table(("", "", ""), [*others, *more]) if others or more else None]


def _lower_is_better(metric: str) -> bool:
    return "rank" in metric or metric == "ece" or metric.startswith("alignment")


def _against(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """What two models differ by, on the same items."""
    if shown.against is None:
        return None
    other, differences = shown.against
    rows: list[list[Node]] = []
    for name, d in differences.items():
        better = (d.value > 0) != _lower_is_better(name)
        said = "not told apart" if d.low <= 0 <= d.high else "better" if better else "worse"
        rows.append([name.replace("_", " "), f"{d.value:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}", said])
    note = "Differences of the scores on the same items, and their 95 % intervals over the same resamples."
    head = ["", "difference", "interval", ""]
    return [tag("h3", f"Compared with {other}"), tag("p", note, class_="quiet"), table(head, rows)]


def _calibration(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Reliability: how often it is right where it is how sure (Guo et al. 2017, arXiv:1706.04599)."""
    bins = [_mapping(b) for b in _list(details.get("reliability"))]
    if not bins:
        return None
    x, y = [float(b["confidence"]) for b in bins], [float(b["accuracy"]) for b in bins]
    ideal = Line("as sure as right", [0.0, 1.0], [0.0, 1.0], colour=5, dash=2)
    chart = line_chart(
        [Line("this model", x, y, dots=True), ideal],
        title="Reliability",
        x="confidence",
        y="right",
        about="How often what is named is right, by how sure the model is. Below the dotted line it is too sure.",
    )
    counted = histogram(
        [Bin(float(b["low"]), float(b["high"]), int(b["count"])) for b in _all_bins(bins)],
        title="Samples",
        below="by confidence",
    )
    return [tag("h3", "Calibration"), tag("div", chart, counted, class_="row")]


def _all_bins(bins: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """With those that are empty, which a result leaves out."""
    width = float(bins[0]["high"]) - float(bins[0]["low"])
    known = {round(float(b["low"]) / width): b for b in bins}
    number_of = min(1000, round(1 / width))
    return [known.get(i, {"low": i * width, "high": (i + 1) * width, "count": 0}) for i in range(number_of)]


def _confusion(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    if "confusion" not in details:
        return None
    found = confusion(
        [str(c) for c in details["classes"]], [(int(a), int(b), int(n)) for a, b, n in details["confusion"]]
    )
    pairs = [[p.right, p.called, p.samples, round(100 * p.samples / p.of)] for p in found.pairs]
    beside = tag("div", table(["is", "called", "samples", "% of it"], pairs)) if pairs else None
    parts: list[Node] = [tag("h3", "What is taken for what"), tag("div", found.drawn, beside, class_="row")]
    recalls = sorted(found.recalls, key=lambda r: (r.recall, r.name))
    if any(r.samples > 1 for r in recalls):
        listed = [Bar(r.name, r.recall, note=f"of {number(r.samples)}") for r in recalls[:_CLASSES]]
        which = f" The lowest {_CLASSES} of {number(len(recalls))}." if len(recalls) > _CLASSES else ""
        said = tag("p", f"The share of each class's samples that is named right.{which}", class_="quiet")
        parts += [tag("h3", "By class"), said, bars(listed)]
    return parts


def _per_class(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Scores of each class, of several labels."""
    found = [_mapping(entry) for entry in _list(details.get("per_class"))]
    if not found:
        return None
    found.sort(key=lambda entry: (entry["average_precision"] or 0.0, str(entry["class"])))
    names = [name for name in found[0] if name not in ("class", "samples")]
    rows = [
        [str(entry["class"]), number(entry["samples"]),
         *("-" if entry[name] is None else number(round(entry[name], 3)) for name in names)]
        for entry in found[:200]
    ]  # fmt: skip
    return [tag("h3", "By class"), table(["class", "samples", *(name.replace("_", " ") for name in names)], rows)]


def _shots(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Accuracy by the number of examples of a class."""
    metrics = _mapping(shown.result.get("metrics"))
    found: dict[str, list[tuple[int, Sequence[float]]]] = {}
    for name, metric in metrics.items():
        match = re.fullmatch(r"(acc1|blend_acc1)@(\d+)shot", str(name))
        if match and None not in _list(metric)[:3]:
            found.setdefault(match[1], []).append((int(match[2]), _list(metric)))
    if len(found.get("acc1", ())) < 2:
        return None
    lines: list[Line] = []
    for name, points in found.items():
        points.sort(key=lambda point: point[0])
        value, low, high = ([m[i] for _, m in points] for i in range(3))
        said = "examples" if name == "acc1" else "examples and prompts"
        lines.append(Line(said, [k for k, _ in points], value, low, high, dots=True))
    prompts = (_list(metrics.get("zero_shot_acc1")) or [None])[0]
    chance = _mapping(shown.result.get("chance")).get("chance")
    levels = {name: float(v) for name, v in (("prompts alone", prompts), ("chance", chance)) if v is not None}
    chart = line_chart(lines, title="Accuracy by examples of a class", x="examples", log_x=True, levels=levels)
    return tag("div", chart, class_="charts")


def _failed(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Sets of hard negatives that were not told apart."""
    sets = [_mapping(entry) for entry in _list(details.get("failed"))][:_SETS]
    if not sets or not asked:
        return None
    drawn = [
        card([pair(*(media.draw(m, [int(p), 0]) for m in asked[:2])) for p in _list(entry["positions"])[:4]])
        for entry in sets
    ]
    note = tag("p", "A line is a right pair; some pair of the set scored no higher than a wrong one.", class_="quiet")
    return [tag("h3", "Sets that were not told apart"), note, cards(drawn)]


def _mistakes(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """Where it was most sure of a wrong class."""
    found = [_mapping(entry) for entry in _list(details.get("mistakes"))][:_MISTAKES]
    if not found or not asked:
        return None
    drawn: list[Html] = []
    for m in found:
        item = [int(m["position"]), 0]
        said = [tag("b", str(m["label"])), f" called {m['predicted']}"]
        scores = f"{m['score']:.3f} against {m['right_score']:.3f}, rank {m['rank']}"
        drawn.append(
            card(media.draw(asked[0], item), tag("div", said), tag("div", scores, class_="quiet"),
                 tag("div", media.key(item), class_="quiet"))
        )  # fmt: skip
    note = tag("p", "Those by which a wrong class stood farthest before the right one.", class_="quiet")
    return [tag("h3", "Hardest mistakes"), note, cards(drawn)]


def _written(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    """What a captioning head wrote, beside what people wrote."""
    parts: list[Node] = []
    for name, title in (("captions", "Captions, of samples at random"), ("worst", "Captions that are least like")):
        drawn: list[Html] = []
        for entry in [_mapping(e) for e in _list(details.get(name))][:_WRITTEN]:
            item = [int(entry["position"]), 0]
            captions = [tag("div", str(text), class_="quiet") for text in _list(entry["captions"])[:_SAID]]
            score = tag("div", f"CIDEr {entry['cider']:.2f}", class_="quiet")
            drawn.append(card(media.draw(asked[0], item), tag("b", str(entry["written"])), captions, score))
        parts.append([tag("h3", title), cards(drawn)] if drawn else None)
    return parts


def _galleries(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    return [_gallery(_mapping(g), media) for g in _list(details.get("galleries"))]


def _gallery(g: Mapping[str, Any], media: Media) -> Node:
    known, y = [str(m) for m in _list(g["from"]) or [g["from"]]], str(g["to"])
    total = sum(n for *_, n in g["ranks"]) or 1
    ranks = [
        Bar(
            number(a) if a == b else f"{number(a)} to {number(b)}",
            n / total,
            said=f"{percent(n / total)} ({number(n)})",
        )
        for a, b, n in g["ranks"]
    ]
    note = tag("p", "Rank of the best right answer, share of the queries.", class_="quiet")
    parts: list[Node] = [tag("h3", f"{y} by {' and '.join(known)}"), note, bars(ranks)]
    for name, title in (("random", "Queries at random"), ("worst", "Worst ranks")):
        strips = [_strip(_mapping(q), known, y, media) for q in _list(g.get(name))]
        parts.append([tag("h4", title), strips] if strips else None)
    return parts


def _strip(q: Mapping[str, Any], known: Sequence[str], y: str, media: Media) -> Html:
    """A query, its right answer, and the first answers."""
    best = _mapping(q.get("answer"))
    right = (
        [media.draw(y, best["item"]), tag("small", f"score {best['score']:.3f}", class_="quiet")] if best else "none"
    )
    first: list[Html] = []
    for place, found in enumerate(map(_mapping, _list(q.get("first"))), 1):
        mark = tag("b", "right") if found["right"] else None
        note = tag("small", f"{place}. {found['score']:.3f} ", mark)
        first.append(tag("div", media.draw(y, found["item"]), note, class_="found hit" if found["right"] else "found"))
    return tag(
        "div",
        tag("div", tag("b", "query"), [media.draw(m, q["item"]) for m in known]),
        tag("div", tag("b", f"right: rank {number(q['rank'])}"), right),
        tag("div", tag("b", "first answers"), tag("div", first, class_="answers")),
        class_="strip",
    )


def _plane(shown: Shown, details: Mapping[str, Any], media: Media, asked: Sequence[str]) -> Node:
    found = _mapping(details.get("plane"))
    if not found:
        return None
    x, y = (str(m) for m in details["pair"])
    groups: dict[str, list[Point]] = {x: [], y: []}
    for items, places in zip(found["items"], found["at"], strict=True):
        said = " · ".join(dict.fromkeys(media.said(m, item) for m, item in zip((x, y), items, strict=True)))
        for m, (a, b) in zip((x, y), places, strict=True):
            groups[m].append(Point(float(a), float(b), said))
    shares = " and ".join(f"{100 * float(s):.0f} %" for s in found["shares"])
    about = (
        f"Embeddings of both modalities on the two axes along which they vary most together ({shares} of the "
        "variance); lines join some of the pairs. Clouds apart are a modality gap."
    )
    ties = [(i, i) for i in range(min(60, len(groups[x])))]
    return tag("div", cloud(groups, title=f"{x} and {y} in one plane", about=about, ties=ties), class_="plane")


_PARTS = (
    *(_facts, _scores, _against, _shots, _calibration, _confusion),
    *(_per_class, _mistakes, _failed, _written, _galleries, _plane),
)
