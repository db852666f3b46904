"""Questions to a model: those of the command on data sets, or those that its recipe asks while it trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint, read_config
from mmcontrast.config import ConfigError, from_dict
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import embed, has
from mmcontrast.eval.geometry import Geometry
from mmcontrast.eval.result import Difference, Result, compare
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.task import EmbeddedTask, Task
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.shards import open_shards

TASKS: Mapping[str, type[EmbeddedTask]] = {"zero_shot": ZeroShot, "retrieval": Retrieval, "geometry": Geometry}
"""The questions that the command can ask of any data set, by name."""


@dataclass(frozen=True)
class Asked:
    """A model that is asked, and what results call it."""

    model: MultiEncoder
    name: str
    pretrained: str


@dataclass(frozen=True)
class Answer:
    """A result, and what was asked of whom.

    Attributes:
        dataset: its name.
        model: who answered.
        result: the answer.
        task: what results call the question.
        skipped: damaged samples that were left out: (shard, key, reason).
        against: another model, and metric -> this one's score less the other's.
    """

    dataset: str
    model: Asked
    result: Result
    task: str
    skipped: Sequence[tuple[str, str, str]] = ()
    against: tuple[str, Mapping[str, Difference]] | None = None

    def to_json(self) -> dict[str, Any]:
        """An object with CLIP_benchmark's keys, and more."""
        metrics = self.result.flat()
        found: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model.name,
            "pretrained": self.model.pretrained,
            "task": self.task,
            "metrics": metrics | {theirs: metrics[ours] for theirs, ours in self.result.renamed.items()},
            "language": None,
            "skipped": [list(s) for s in self.skipped],
            "warnings": list(self.result.warnings),
        }
        if self.against is not None:
            other, differences = self.against
            flat = {name: d.value for name, d in differences.items()}
            flat |= {f"{name}_low": d.low for name, d in differences.items()}
            flat |= {f"{name}_high": d.high for name, d in differences.items()}
            found["against"] = {"model": other, "metrics": flat}
        return found


@dataclass(frozen=True)
class Questions:
    """What the command asks of every data set.

    Attributes:
        tasks: names in `TASKS`.
        settings: task -> settings of it.
    """

    tasks: Sequence[str]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])

    def of(self, dataset: str) -> dict[str, EmbeddedTask]:
        """Task name -> the question, about one data set."""
        return {name: TASKS[name].Config(data=(dataset,), **self.settings.get(name, {})).build() for name in self.tasks}


def load_asked(path: str | Path, *, trust: Collection[str] = ()) -> Asked:
    """A run folder, or one of its step-N folders.

    Raises:
        ConfigError: a model that cannot be read.
    """
    checkpoint = find_checkpoint(path)
    return Asked(load_checkpoint(checkpoint, trust=trust), str(path), checkpoint.name)


def answer(models: Sequence[Asked], datasets: Sequence[str], questions: Questions) -> tuple[list[Answer], list[str]]:
    """Every task on every data set, each embedded once per model; the second model is who the first is compared with.

    A task that a data set cannot answer (no labels, say) is left out if another one can; if none can, that is an
    error.

    Returns:
        The answers, those of the first model first for each data set, and what was left out and why.

    Raises:
        ConfigError: data that cannot be read, or a data set that answers no task.
    """
    answers: list[Answer] = []
    problems: list[str] = []
    for dataset in datasets:
        of_models = [_ask(model, dataset, questions, problems) for model in models]
        for task, found in of_models[0].items():
            against = None
            if len(models) > 1 and task in of_models[1]:
                against = (models[1].name, compare(found.result, of_models[1][task].result))
            answers.append(Answer(dataset, models[0], found.result, found.task, found.skipped, against))
        answers += [a for others in of_models[1:] for a in others.values()]
    return answers, problems


def _ask(asked: Asked, dataset: str, questions: Questions, problems: list[str]) -> dict[str, Answer]:
    tasks = questions.of(dataset)
    model = asked.model
    wanted = list(dict.fromkeys(m for task in tasks.values() for m in task.modalities()))
    # Without those that no sample has: pictures with labels alone can still be classified.
    opened = open_shards([dataset])
    data = embed(model, opened, modalities=[m for m in wanted if has(opened, model, m)] or wanted)
    found: dict[str, Answer] = {}
    failed: list[str] = []
    for name, task in tasks.items():
        try:
            result = task.score(model, data)
        except ConfigError as error:
            failed.append(f"{dataset}: {name} left out: {error}")
            continue
        found[name] = Answer(dataset, asked, result, result.task, data.skipped)
    if not found:
        raise ConfigError("; ".join(failed))
    problems += failed
    return found


def answer_again(path: Path, *, trust: Collection[str] = ()) -> list[Answer]:
    """Every evaluator of a run's recipe, asked again of its weights; the evaluator's name is the task.

    Raises:
        ConfigError: a run that cannot be read, or one that has no evaluators.
    """
    named: dict[str, Any] = read_config(find_checkpoint(path).parent).get("evaluators") or {}
    if not named:
        raise ConfigError(f"the recipe of {path} asks no questions; name shards: mmcontrast eval MODEL DATA…")
    settings = {n: from_dict(value, trust=trust, where=f"evaluators.{n}") for n, value in named.items()}
    asked = load_asked(path, trust=trust)
    found: list[Answer] = []
    for name, config in settings.items():
        task = config.build()
        if not isinstance(task, Task):
            raise ConfigError(f"evaluators.{name} is a {type(task).__name__}, which is no question of mmcontrast.eval")
        found.append(Answer(" ".join(config.data), asked, task.answer(asked.model), name))
    return found
