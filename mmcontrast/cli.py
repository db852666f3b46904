"""The command. Heavy libraries are imported by the commands that need them, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro

from mmcontrast.arguments import take_trust, write_json, write_text
from mmcontrast.check.cli import check_grads, check_shards, grads_usage, shards_usage
from mmcontrast.config import ConfigError, RunError
from mmcontrast.data_prep.cli import prep, prep_usage
from mmcontrast.eval.index.cli import INDEX
from mmcontrast.interrupts import Interrupted
from mmcontrast.plan.cli import plan, plan_usage

Positional = tyro.conf.Positional


def quickstart(
    out: Path = Path("runs/quickstart"), json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None
) -> None:
    """Run the main job on real data that the install brings: prep, train, eval, index, search.

    Args:
        out: folder for shards, run, index and page; made anew.
        json_file: also write the scores here.
    """
    from mmcontrast.quickstart import run

    run(out, json_file, main)


def train(arguments: Sequence[str]) -> None:
    """`train RECIPE [--overrides]`: the recipe's own settings are the flags."""
    from mmcontrast.recipe import load_recipe

    if arguments[0] in ("-h", "--help"):
        tyro.cli(_train_usage, prog="mmcontrast train", args=["--help"])
    if arguments[0].startswith("-"):
        raise ConfigError(f"the recipe comes first: mmcontrast train RECIPE {arguments[0]} …")
    name, trust, rest = arguments[0], *take_trust(arguments[1:])
    recipe = load_recipe(name, trust)
    config = tyro.cli(type(recipe), default=recipe, prog=f"mmcontrast train {name}", args=rest, description="")
    trainer = config.build()
    try:
        trainer.fit()
    except FloatingPointError:
        if trainer.is_main:
            _draw(config.out, trust)  # what led there can be looked at
        raise
    if trainer.is_main:
        print(f"{config.out}: trained to step {config.steps}", file=sys.stderr)
        _draw(config.out, trust)


def _train_usage(recipe: Positional[str]) -> None:
    """Train by a recipe. `mmcontrast train RECIPE --help` lists its settings, each of them a flag.

    On several processes: torchrun --nproc_per_node N -m mmcontrast train RECIPE …

    A run folder that is there already goes on from its newest checkpoint.

    Args:
        recipe: name of a shipped recipe, a .py file with `recipe()`, or a run's config.json. With `--trust MODULE`
            (or a .py file) a config.json may name classes of that module.
    """


def _draw(run: Path, trust: Sequence[str]) -> None:
    """Write `RUN/report.html`; what was trained is not spoilt by a page that cannot be written."""
    try:
        report((run,), trust=tuple(trust))
    except (ConfigError, OSError) as error:
        print(f"{run}: no report: {error}", file=sys.stderr)


def report(runs: Positional[tuple[Path, ...]], out: Path | None = None, trust: tuple[str, ...] = ()) -> None:
    """Draw what a run has written: curves, scores, what its health said, settings. Of several, beside each other.

    A page that stands alone, at any time: also of a run that goes on, or was killed.

    Args:
        runs: run folders.
        out: the page; by default report.html in the run folder, of several runs in this folder.
        trust: modules or .py files whose classes a run's config may name, to know their defaults.
    """
    from mmcontrast.report.page import run_page

    if not runs:
        raise ConfigError("report needs at least one run folder: mmcontrast report RUN…")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_text(path, run_page(runs, trust=trust))
    print(f"look at {path}", file=sys.stderr)


def evaluate(
    model: Positional[str],
    data: Positional[tuple[str, ...]] = (),
    tasks: tuple[
        Literal[
            "zero_shot",
            "retrieval",
            "geometry",
            "linear_probe",
            "knn",
            "few_shot",
            "joint",
            "compositional",
            "captions",
        ],
        ...,
    ] = (),
    train: tuple[str, ...] = (),
    label: str | None = None,
    templates: tuple[str, ...] = (),
    pair: tuple[str, str] | None = None,
    group: str | None = None,
    bootstrap_by: str | None = None,
    against: str | None = None,
    out: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    report: Path | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    batch_size: int = 128,
    trust: tuple[str, ...] = (),
) -> None:
    """Ask a model questions about data; without data, the questions that its recipe asks.

    On several processes, which share the work: torchrun --nproc_per_node N -m mmcontrast eval …

    Args:
        model: run folder, or one of its step-N folders; ARCHITECTURE,WEIGHTS of open_clip; a folder of transformers.
        data: spec files; NAME:PATH of well-known data sets (imagenet, cifar10, cifar100, esc50, clotho, audiocaps,
            flickr30k, coco, ptbxl_super, ptbxl_sub, ptbxl_form, ptbxl_rhythm); or data as they lie: shards,
            CLIP_benchmark's folders, a folder per class, a table. None: the evaluators of the recipe.
        tasks: questions to ask; by default what the data are made for.
        train: labelled data that linear_probe, knn and few_shot learn from; by default the split train of the data.
        label: metadata field, or column of a table, with the class.
        templates: prompts with {c} for the class name.
        pair: the modalities that are compared; the first one is what zero_shot classifies.
        group: metadata field whose equal values are right answers to each other in retrieval and joint.
        bootstrap_by: metadata field, such as patient: intervals are over its values instead of single samples.
        against: another model, asked the same and compared item by item.
        out: also write one JSON file per result into this folder, as `clip_benchmark build` takes them.
        json_file: also write all results here, one object per data set and task.
        report: also write a page with charts, and samples to look at and to hear.
        cache: keep embeddings of data in this folder; they are read when the same weights meet the same data again,
            and embedding that was ended goes on.
        workers: processes that read and decode, of each that encodes; by default 8 beside a GPU if there are as many
            processors, and none on a CPU.
        batch_size: samples encoded at once.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.eval.answer import Embedding, answer, answer_again, write_answers
    from mmcontrast.eval.models import load_asked
    from mmcontrast.eval.report import as_table
    from mmcontrast.eval.spec import override, read_spec
    from mmcontrast.eval.together import Elsewhere, sharing
    from mmcontrast.launch import device_of
    from mmcontrast.sharding import launched

    problems: list[str] = []
    with launched() as ranks, sharing(ranks):
        try:
            if not data:
                if against is not None:
                    raise ConfigError("--against needs data: mmcontrast eval MODEL DATA… --against OTHER")
                answers = answer_again(Path(model), trust=trust)
            else:
                said: dict[str, Any] = {"label": label, "pair": pair, "group": group, "bootstrap_by": bootstrap_by}
                specs = [
                    override(read_spec(name), tasks=tasks, templates=templates, train=train, **said) for name in data
                ]
                names = [name for name in (model, against) if name is not None]
                models = [load_asked(name, trust=trust, device=device_of()) for name in names]
                embedding = Embedding(batch_size, workers, cache)
                answers, problems = answer(models, specs, embedding=embedding)
        except Elsewhere:
            raise SystemExit(2) from None
    if ranks.rank:
        return
    for problem in problems:
        print(problem, file=sys.stderr)
    print(as_table(answers))
    write_json(json_file, [a.to_json() for a in answers])
    if out is not None:
        write_answers(out, answers)
    if report is not None:
        from mmcontrast.eval.answers_page import answers_page

        write_text(report, answers_page(answers, problems))
        print(f"look at {report}", file=sys.stderr)


def caption(
    model: Positional[Path],
    files: Positional[tuple[str, ...]],
    method: Literal["greedy", "beam", "top_p"] = "greedy",
    beams: int = 4,
    top_p: float = 0.9,
    temperature: float = 1.0,
    seed: int = 0,
    max_tokens: int | None = None,
    repetition_penalty: float = 1.0,
    head: str | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Describe pictures in words, with a model that has a captioning head.

    Args:
        model: run folder, or one of its step-N folders.
        files: pictures, or whatever the head describes.
        method: the likeliest word each time, beam search, or a draw from the likeliest words.
        beams: beginnings that beam search keeps.
        top_p: probability of the words that are drawn from.
        temperature: above 1 draws more boldly, below 1 less.
        seed: of the draws.
        max_tokens: tokens after which a text is cut.
        repetition_penalty: above 1, makes tokens less likely that the text has.
        head: name of the captioning head, if the model has several.
        json_file: also write the captions here.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.checkpoint import load
    from mmcontrast.launch import device_of
    from mmcontrast.shards import BadSample

    if not files:
        raise ConfigError("caption needs at least one file: mmcontrast caption MODEL PICTURE…")
    captioner = load(model, trust=trust).to(device_of())
    try:
        texts = captioner.caption(
            files,
            head=head,
            method=method,
            beams=beams,
            top_p=top_p,
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            repetition_penalty=repetition_penalty,
        )
    except BadSample as error:
        raise ConfigError(str(error)) from None
    for file, text in zip(files, texts, strict=True):
        print(f"{file}\t{text}")
    write_json(json_file, [{"file": file, "caption": text} for file, text in zip(files, texts, strict=True)])


def _index() -> None:
    """An index that knows its model: build, add, delete, merge, compact, search, duplicates, link, serve, show."""


def _check() -> None:
    """Look before a run is paid for: grads proves a recipe, shards looks through its data."""


GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "check": {
        "grads": cast(Callable[..., None], grads_usage),
        "shards": cast(Callable[..., None], shards_usage),
    },
    "index": INDEX,
}
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "prep": prep_usage,
    "check": _check,
    "plan": cast(Callable[..., None], plan_usage),
    "train": _train_usage,
    "report": report,
    "eval": evaluate,
    "caption": caption,
    "index": _index,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Bad input ends with one line on standard error and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["train"] and words[1:]:
            train(words[1:])
        elif words[:1] == ["plan"] and words[1:]:
            plan(words[1:])
        elif words[:2] == ["check", "grads"] and words[2:]:
            check_grads(words[2:])
        elif words[:2] == ["check", "shards"]:
            check_shards(words[2:])
        elif words[:1] == ["prep"]:
            prep(words[1:])
        elif words and words[0] in GROUPS:
            commands = GROUPS[words[0]]
            tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog=f"mmcontrast {words[0]}",
                description=COMMANDS[words[0]].__doc__,
                args=words[1:] or ["--help"],
            )
        elif words == ["--version"]:
            from mmcontrast import __version__

            print(__version__)
        else:
            description = "Multimodal contrastive pretraining, zero-shot evaluation and retrieval."
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="mmcontrast", description=description, args=words or ["--help"]
            )
    except ConfigError as error:
        fail(str(error))
    except BrokenPipeError:
        os._exit(141)  # the reader of our output went away: nothing is wrong, and nothing can be said
    except Interrupted as error:
        fail(str(error), Interrupted.code)
    except (RunError, FloatingPointError, OSError) as error:  # a dead worker, a run that diverged, a full disk
        fail(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def fail(text: str, code: int = 2) -> None:
    """One line on standard error, and out."""
    print(f"mmcontrast: error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(code)
