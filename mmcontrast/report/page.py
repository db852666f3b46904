"""`RUN/report.html`: one run, or several beside each other, as a page that stands alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmcontrast.charts import SCRIPT, STYLE
from mmcontrast.config import ConfigError
from mmcontrast.eval.answers_page import EXTRA, draw, shown_again
from mmcontrast.eval.result import chance_of
from mmcontrast.page import Html, Node, finding, number, page, percent, section, table, tag, tiles
from mmcontrast.report.history import History, read_history
from mmcontrast.report.measures import GEOMETRY, LEARNING, SPEED, charts, other_charts
from mmcontrast.report.scores import questions, scores, words
from mmcontrast.report.settings import settings

_LOST = 10  # steps that are named
MOST_RUNS = 8
"""Runs beside each other: as many as there are colours."""


def run_page(folders: Sequence[Path], *, trust: Collection[str] = ()) -> str:
    """The page of a run, or of up to eight; one that is going on or was killed is shown as far as it came.

    Args:
        folders: of the runs.
        trust: modules or .py files whose classes a run's settings may name.

    Raises:
        ConfigError: no run folder, none that was logged, or more than eight.
        OSError: a file cannot be read.
    """
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs cannot be shown; name 1 to {MOST_RUNS} run folders")
    runs = dict(zip(_names(folders), map(read_history, folders), strict=True))
    title = f"Run: {next(iter(runs))}" if len(runs) == 1 else f"Runs: {', '.join(runs)}"
    others, beyond = other_charts(runs)
    more = tag("p", f"Not drawn: {', '.join(beyond[:100])}.", class_="quiet") if beyond else None
    body: list[Node] = [
        tag("h1", title),
        [tag("p", _state(name, run, len(runs)), class_="quiet") for name, run in runs.items()],
        _headline(next(iter(runs.values()))) if len(runs) == 1 else _beside(runs),
        _health(runs),
        scores(runs),
        _drawn("Learning", charts(runs, LEARNING)),
        _drawn("Embeddings", charts(runs, GEOMETRY), "Of up to 512 rows of a batch, now and then."),
        _drawn("Speed and memory", charts(runs, SPEED)),
        _drawn("Further numbers", others, more),
        _answers(next(iter(runs.values()))) if len(runs) == 1 else None,
        _data(runs),
        _settings(runs, trust),
        _checkpoints(runs),
        _starts(runs),
    ]
    return page(title, body, style=STYLE + EXTRA, script=SCRIPT)


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as tells them apart: of the folder, or the whole path."""
    short = [folder.resolve().name for folder in folders]
    found = [str(f) if short.count(name) > 1 else name for f, name in zip(folders, short, strict=True)]
    if len(set(found)) < len(found):
        raise ConfigError(f"{max(found, key=found.count)} is named twice; name different run folders")
    return found


def _state(name: str, run: History, runs: int) -> str:
    """How far it came."""
    steps = run.steps
    if steps is None:
        came = f"at step {number(run.step)}"
    elif run.step >= steps:
        came = f"all {number(steps)} steps are done"
    else:
        came = f"step {number(run.step)} of {number(steps)}: it goes on, or was stopped"
    said = [came]
    batch, epoch = run.config.get("global_batch"), run.last("epoch")
    if isinstance(batch, int):
        said.append(f"{number(run.step * batch)} samples in batches of {number(batch)}")
    if epoch is not None:
        said.append(f"{number(round(epoch, 2))} epochs")
    if run.starts and isinstance(since := run.starts[0].get("time"), str):
        said.append(f"begun {since[:16].replace('T', ' ')} UTC")
    whole = ", ".join(said)
    return f"{name}: {whole}." if runs > 1 else f"{whole[0].upper()}{whole[1:]}."


def _headline(run: History) -> Html:
    facts: list[tuple[str, Node, Node]] = []
    loss = run.curves.get("loss")
    if loss is not None:
        chance = [c.last for name, c in run.curves.items() if name.startswith("chance/")]
        guess = f", guessing gives {_figure(chance[0])}" if len(chance) == 1 else ""
        facts.append(("Loss", _figure(loss.last), f"from {_figure(loss.first)}{guess}"))
    facts += _best_scores(run)
    rate, wait, memory = (run.curves.get(name) for name in ("samples_per_second", "data_wait", "memory_gb"))
    if rate is not None:
        speeds = sorted(b.mean for b in rate.buckets)
        facts.append(("Samples per second", f"{speeds[len(speeds) // 2]:,.0f}", "median"))
    if wait is not None:
        share = sum(b.total for b in wait.buckets) / wait.count
        facts.append(("Waiting for data", percent(round(share, 3)), "of the time"))
    if memory is not None:
        facts.append(("Memory", f"{max(b.high for b in memory.buckets):.3g} GB", "at most"))
    return tiles(facts)


def _best_scores(run: History) -> list[tuple[str, Node, Node]]:
    """The first score of the first two evaluators."""
    found: list[tuple[str, Node, Node]] = []
    for q in questions({"": run})[:2]:
        for metric in q.metrics[:1]:
            at = f"{q.prefix}/{metric}"
            known = {n.removeprefix(f"{q.prefix}/"): c.last for n, c in run.curves.items()}
            chance = chance_of(metric, known)
            note = f"{_figure(run.last(f'{at}_low'))} to {_figure(run.last(f'{at}_high'))}"
            note += f", chance {_figure(chance)}" if chance is not None else ""
            found.append((f"{q.name}: {words(metric)}", _figure(run.last(at)), note))
    return found


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _beside(runs: Mapping[str, History]) -> Html:
    """What matters most, one run a line."""
    rows: list[list[Node]] = []
    for name, run in runs.items():
        best = _best_scores(run)[:1]
        rate = run.curves.get("samples_per_second")
        speeds = sorted(b.mean for b in rate.buckets) if rate is not None else []
        rows.append(
            [
                tag("span", tag("i", class_=f"swatch c{list(runs).index(name)}"), name),
                number(run.step),
                _figure(run.last("loss")),
                f"{best[0][0]} {best[0][1]} ({best[0][2]})" if best else "-",
                f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-",
            ]
        )
    return table(["run", "step", "loss", "first score", "samples per second"], rows)


def _drawn(title: str, found: list[Html], note: Node = None) -> Node:
    if not found:
        return None
    said = tag("p", note, class_="quiet") if isinstance(note, str) and not isinstance(note, Html) else note
    return section(title, said, tag("div", found, class_="charts"))


def _health(runs: Mapping[str, History]) -> Html:
    """What was said, numbered as on the charts, and what could not be read."""
    found: list[Node] = []
    for name, run in runs.items():
        of = f"{name}, " if len(runs) > 1 else ""
        for i, notice in enumerate(run.notices, 1):
            number_ = f"{i}. " if len(runs) == 1 else ""
            found.append(finding("warning", [number_, tag("b", f"{of}step {number(notice.step)}: "), notice.text]))
        for file, count in run.damaged.items():
            lines = "1 line" if count == 1 else f"{number(count)} lines"
            found.append(finding("warning", f"{of}{file}: {lines} that cannot be read, left out here"))
        if run.cut:
            found.append(finding("note", f"{of}the last line is not whole: it is being written, or the run was killed"))
        for line in run.lost[:_LOST]:
            step = tag("b", f"{of}step {number(line['step'])}: ")
            said = f"loss {line.get('loss')}, gradient norm {line.get('grad_norm')}{_culprits(line)}"
            found.append(finding("error", [step, said, ". The batch is in not_finite.jsonl"]))
        if len(run.lost) > _LOST:
            found.append(finding("error", f"{of}further such steps: {number(len(run.lost) - _LOST)} or more"))
        for metric, steps in list(run.not_finite.items())[:5]:
            listed = ", ".join(number(step) for step in steps)
            found.append(finding("error", f"{of}{metric} was not finite at step {listed}"))
        if run.left_out:
            count = number(len(run.left_out))
            found.append(finding("note", f"{of}at least {count} further numbers are left out: too many names"))
    quiet = tag("p", "Nothing to find fault with.")
    note = tag("p", "The numbers stand on the charts, where they were said.", class_="quiet")
    return section("Health", found or quiet, note if any(r.notices for r in runs.values()) and len(runs) == 1 else None)


def _answers(run: History) -> Node:
    """What the newest evaluation told beside its numbers."""
    answers = run.evaluation.get("answers")
    if not isinstance(answers, dict):
        return None
    step, averaged = run.evaluation.get("step"), run.evaluation.get("averaged")
    at = f"step {number(step)}{', averaged weights' if averaged else ''}" if isinstance(step, int) else "newest"
    listed = cast(dict[str, Any], answers).items()
    return [
        draw(shown_again(f"{name}, {at}", result)) for name, result in listed if isinstance(result, dict) and result
    ]


def _culprits(line: Mapping[str, Any]) -> str:
    """Samples that a tower made not finite."""
    ranks = line.get("ranks")
    told = (
        [r.get("not_finite") for r in cast(list[Any], ranks) if isinstance(r, dict)] if isinstance(ranks, list) else []
    )
    named = [pair for d in told if isinstance(d, dict) for pair in cast(dict[str, Any], d).items()]
    said = [f"{m} of {key}" for m, keys in named if isinstance(keys, list) for key in cast(list[Any], keys)]
    more = f" and {number(len(said) - 4)} more" if len(said) > 4 else ""
    return f"; not finite: {', '.join(said[:4])}{more}" if said else ""


def _data(runs: Mapping[str, History]) -> Node:
    """What was read, by source and modality; and what a batch held."""
    parts: list[Node] = []
    for name, run in runs.items():
        sources: dict[str, dict[str, float]] = {}
        for full, curve in run.curves.items():
            if full.startswith("data/"):
                source, _, what = full.removeprefix("data/").rpartition("/")
                sources.setdefault(source, {})[what] = curve.last
        columns = list(dict.fromkeys(what for found in sources.values() for what in found))
        rows = [
            [source or "all", *(number(found[c]) if c in found else "-" for c in columns)]
            for source, found in sources.items()
        ]
        held = [
            [re.sub(r"^batch/", "", full), f"{number(c.first)}, last {number(c.last)}" if c.first != c.last
             else number(c.last)]
            for full, c in run.curves.items() if full.startswith("batch/")
        ]  # fmt: skip
        parts.append(tag("h3", name) if len(runs) > 1 and (rows or held) else None)
        head = ["source", *(c.replace("_", " ") for c in columns)]
        read = [tag("h3", "Samples read"), table(head, rows)] if rows else None
        batch = [tag("h3", "In a batch"), table(("", ""), held)] if held else None
        parts.append(tag("div", tag("div", read), tag("div", batch), class_="row") if rows or held else None)
    return section("Data", parts) if any(parts) else None


def _settings(runs: Mapping[str, History], trust: Collection[str]) -> Node:
    found = {name: settings(run.config, trust=trust) for name, run in runs.items() if run.config}
    if not found:
        return None
    by_run = {name: {s.name: s for s in listed} for name, (listed, _) in found.items()}
    names = list(dict.fromkeys(s for listed in by_run.values() for s in listed))
    several = len(found) > 1
    rows: list[list[Node]] = []
    for setting in names:
        values = [listed[setting].value if setting in listed else None for listed in by_run.values()]
        default = next((d for listed in by_run.values() if setting in listed and (d := listed[setting].default)), None)
        differ = several and len(set(values)) > 1
        cells = [tag("b", v or default or "-") if differ else v or default or "-" for v in values]
        # Breaks at the dots.
        broken = [[part, tag("wbr")] for part in re.split(r"(?<=\.)", setting)]
        rows.append([broken, *cells, default or "must be given"])
    rows.sort(key=lambda row: several and not any(isinstance(cell, Html) for cell in row[1:]))
    unknown = [finding("note", f"the defaults of {name} are not known, and all its settings listed: {why}")
               for name, (_, why) in found.items() if why]  # fmt: skip
    said = "Those that differ from the defaults; in bold what differs between the runs." if several else (
        "Those that differ from the defaults.")  # fmt: skip
    head = ["setting", *(found if several else ["value"]), "default"]
    return section("Settings", unknown, tag("p", said, class_="quiet"), tag("div", table(head, rows), class_="names"))


def _checkpoints(runs: Mapping[str, History]) -> Node:
    rows: list[list[Node]] = []
    for name, run in runs.items():
        for step, size in run.checkpoints.items():
            best = run.best
            note = f"best {best.get('measure', '')}" if best is not None and best.get("step") == step else ""
            rows.append([*([name] if len(runs) > 1 else []), number(step), f"{size / 1e6:,.1f} MB", note])
    if not rows:
        return None
    return section("Checkpoints", table([*(["run"] if len(runs) > 1 else []), "step", "size", ""], rows))


def _starts(runs: Mapping[str, History]) -> Node:
    """Versions and machines."""
    rows: list[list[Node]] = []
    for name, run in runs.items():
        for start in run.starts:
            versions = start.get("versions")
            listed = versions.items() if isinstance(versions, dict) else ()
            packages = ", ".join(f"{package} {version}" for package, version in listed)
            machine = (
                f"{start.get('device', '-')}, {start.get('processors', '-')} processors, {start.get('system', '-')}"
            )
            time = str(start.get("time", "-")).replace("T", " ")[:16]
            first = [name] if len(runs) > 1 else []
            ranks = str(start.get("ranks", "-"))
            rows.append(
                [*first, number(start["step"]), time, ranks, machine, f"Python {start.get('python')}, {packages}"]
            )
    if not rows:
        return None
    head = [*(["run"] if len(runs) > 1 else []), "from step", "time (UTC)", "ranks", "machine", "versions"]
    return section("Machines and versions", table(head, rows))
