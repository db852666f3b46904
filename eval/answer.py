"""Questions to a model: those of the command on data sets, or those that its recipe asks while it trains."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmcontrast.arguments import write_json
from mmcontrast.checkpoint import find_checkpoint, read_config
from mmcontrast.config import ConfigError, from_dict
from mmcontrast.eval.embed import EmbeddingCache, embed, has, remembering
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.models import Asked, load_asked
from mmcontrast.eval.result import Difference, Result, compare
from mmcontrast.eval.seen import seen, without
from mmcontrast.eval.sources import Source
from mmcontrast.eval.spec import PROMPTED, Spec
from mmcontrast.eval.task import Task
from mmcontrast.eval.trained import TrainedTask
from mmcontrast.launch import device_of


@dataclass(frozen=True)
class Answer:
    """A result, and what was asked of whom.

    Attributes:
        dataset: its name.
        model: who answered.
        result: the answer.
        task: what results call the question.
        language: of the prompts and captions.
        skipped: damaged samples that were left out: (shard, key, reason).
        against: another model, and metric -> this one's score less the other's.
        source: where the samples are, if they have been opened.
    """

    dataset: str
    model: Asked
    result: Result
    task: str
    language: str | None = None
    skipped: Sequence[tuple[str, str, str]] = ()
    against: tuple[str, Mapping[str, Difference]] | None = None
    source: Source | None = None

    def to_json(self) -> dict[str, Any]:
        """An object with CLIP_benchmark's keys, and more."""
        metrics = self.result.flat()
        found: dict[str, Any] = {
            "dataset": self.dataset,
            "model": self.model.name,
            "pretrained": self.model.pretrained,
            "task": self.task,
            "metrics": metrics | {theirs: metrics[ours] for theirs, ours in self.result.renamed.items()},
            "language": self.language,
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
class Embedding:
    """How data are embedded; it changes no answer but by rounding.

    Attributes:
        batch_size: samples encoded at once.
        workers: processes that read and decode, of each that encodes; by default as `embed` chooses.
        cache: folder where embeddings are kept, to be read by whoever asks the same model about the same data again.
    """

    batch_size: int = 128
    workers: int | None = None
    cache: Path | None = None


def answer(
    models: Sequence[Asked], specs: Sequence[Spec.Config], *, embedding: Embedding = Embedding()
) -> tuple[list[Answer], list[str]]:
    """Every question about every data set, each embedded once per model; the first is compared with the second.

    A question that a data set cannot answer (no labels, say) is left out if it answers another one; if none, that is
    an error.

    Args:
        models: who is asked.
        specs: the data sets and their questions.
        embedding: how they are embedded.

    Returns:
        The answers, those of the first model first for each data set; and what was left out, and why.

    Raises:
        ConfigError: data that cannot be read, or that answer no question.
    """
    answers: list[Answer] = []
    problems: list[str] = []
    for config in specs:
        spec: Spec = config.build()
        source = spec.open()
        of_models = [_ask(model, spec, source, problems, embedding) for model in models]
        for task, found in of_models[0].items():
            if len(models) > 1 and task in of_models[1]:
                differences = compare(found.result, of_models[1][task].result)
                found = replace(found, against=(models[1].name, differences))
            answers.append(found)
        answers += [found for others in of_models[1:] for found in others.values()]
    return answers, problems


def _ask(
    asked: Asked, spec: Spec, source: Source, problems: list[str], embedding: Embedding
) -> dict[tuple[str, str | None], Answer]:
    """(Task, language) -> its answer."""
    model, name, languages = asked.model, spec.config.name, spec.config.languages
    tasks = {
        (key, language or spec.config.language): task
        for language in (None, *languages)
        for key, task in spec.questions(model, source, asked.training, language).items()
        if not (languages and language is None and key in PROMPTED)
    }
    wanted = list(dict.fromkeys(m for task in tasks.values() for m in task.modalities()))
    # Without those that no sample has: pictures with labels alone can still be classified.
    there = [m for m in wanted if has(source, model, m)]
    embedded = partial(
        embed,
        model,
        batch_size=embedding.batch_size,
        workers=embedding.workers,
        progress=sys.stderr.isatty(),
        cache=None if embedding.cache is None else EmbeddingCache(embedding.cache, asked.identity),
    )
    data = embedded(source, modalities=there or wanted)
    learning = list(dict.fromkeys(m for t in tasks.values() if isinstance(t, TrainedTask) for m in t.modalities()))
    found: dict[tuple[str, str | None], Answer] = {}
    failed: list[str] = []
    train: Embedded | None = None
    for (key, language), task in tasks.items():
        try:
            if isinstance(task, TrainedTask):
                train = train or embedded(spec.open_train(), modalities=learning)
                result = task.score(model, data, train)
            else:
                result = task.score(model, data)
        except ConfigError as error:
            failed.append(f"{name}: {key} left out: {error}")
            continue
        result = task.located(result, data)
        found[key, language] = Answer(name, asked, result, result.task, language, data.skipped, source=source)
    if not found:
        raise ConfigError("; ".join(failed))
    problems += failed
    trained = seen(data, asked.training.shards)
    if trained:
        problems.append(
            f"{name}: {len(trained)} of {len(data.keys)} samples were trained on, as their files are among the run's "
            "training shards; results say what the scores are without them"
        )
        found = {key: replace(a, result=without(a.result, trained, len(data.keys))) for key, a in found.items()}
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
    asked = load_asked(path, trust=trust, device=device_of())
    found: list[Answer] = []
    known: dict[Any, Any] = {}
    for name, config in settings.items():
        task = config.build()
        if not isinstance(task, Task):
            raise ConfigError(f"evaluators.{name} is a {type(task).__name__}, which is no question of mmcontrast.eval")
        with remembering(known):
            found.append(Answer(" ".join(config.data), asked, task.answer(asked.model), name))
    return found


def write_answers(folder: Path, answers: Sequence[Answer]) -> None:
    """A JSON file per answer, named as CLIP_benchmark names them, for its `build`."""
    for found in answers:
        parts = (found.dataset, found.model.pretrained, found.model.name, found.language or "en", found.task)
        name = "_".join(re.sub(r"[^\w.@-]+", "-", part).strip("-") for part in parts)
        write_json(folder / f"{name}.json", found.to_json())
