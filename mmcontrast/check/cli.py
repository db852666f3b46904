"""`mmcontrast check`: grads, shards. Imported by the command at its start, so nothing heavy is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcontrast.arguments import take_trust, write_json, write_text
from mmcontrast.config import ConfigError

Positional = tyro.conf.Positional


def check_grads(arguments: Sequence[str]) -> None:
    """`check grads RECIPE [--overrides]`: the recipe's own settings are flags beside the check's."""
    from mmcontrast.recipe import load_recipe

    trust, words = take_trust(arguments)
    asked, rest = tyro.cli(grads_usage, prog="mmcontrast check grads", args=words, return_unknown_args=True)
    recipe = load_recipe(asked["recipe"], trust)
    prog = f"mmcontrast check grads {asked['recipe']}"
    config = tyro.cli(type(recipe), default=recipe, prog=prog, args=rest, description="")

    from mmcontrast.check.grads import check_grads as check

    proof = check(
        config,
        rows=asked["rows"],
        ranks=asked["ranks"],
        tolerance=asked["tolerance"],
        timeout=asked["timeout"],
        say=lambda text: print(f"check grads: {text}", file=sys.stderr, flush=True),
    )
    print(f"{asked['recipe']}: {proof.as_text()}")
    write_json(asked["json_file"], {"recipe": asked["recipe"], **proof.as_json()})
    if not proof.passed:
        raise SystemExit(1)


def grads_usage(
    recipe: Positional[str],
    rows: int = 32,
    ranks: tuple[int, ...] = (2, 4),
    tolerance: float = 1e-9,
    timeout: float = 600.0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> dict[str, Any]:
    """Prove that a recipe's gradient is the same whatever the micro-batch, the block and the number of processes.

    On real samples of the recipe, in float64, on the CPU: the trainer's own step in one process and on several is
    compared with plain autograd of the full batch, as the samples are and with modalities dropped at random. Layers
    that mix samples, randomness that cannot be replayed and objectives that do not add up are named. Exit code 0 if it
    is proved, 1 if not.

    The recipe's settings are flags as well, as in `train`: mmcontrast check grads emoji --data.shards FOLDER

    Args:
        recipe: name of a shipped recipe, a .py file with `recipe()`, or a run's config.json; `--trust` as in `train`.
        rows: samples to draw, a multiple of 8.
        ranks: numbers of processes to try beside one; none leaves them out.
        tolerance: largest relative error that passes.
        timeout: seconds that several processes may take.
        json_file: also write what was found here.
    """
    return {
        "recipe": recipe,
        "rows": rows,
        "ranks": ranks,
        "tolerance": tolerance,
        "timeout": timeout,
        "json_file": json_file,
    }


def check_shards(arguments: Sequence[str]) -> None:
    """`check shards PATTERN… [--recipe RECIPE] [-- overrides]`: what stands behind `--` are the recipe's settings."""
    words = list(arguments)
    at = words.index("--") if "--" in words else len(words)
    asked = tyro.cli(shards_usage, prog="mmcontrast check shards", args=words[:at])
    overrides, patterns, recipe = words[at + 1 :], asked["patterns"], asked["recipe"]
    if overrides and recipe is None:
        raise ConfigError("settings behind -- are a recipe's: name it with --recipe")

    if asked["cards"] < 0:
        raise ConfigError(f"cards is {asked['cards']}; it must be 0 or more")
    for file in (asked["html"], asked["json_file"]):
        if file is not None:  # now, not after an hour
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise ConfigError(f"{file} is a folder; name a file in it")

    demand = None
    if recipe is not None:
        from mmcontrast.check.demand import demand_of
        from mmcontrast.recipe import load_recipe

        found = load_recipe(recipe, asked["trust"])
        prog = f"mmcontrast check shards --recipe {recipe} --"
        config = tyro.cli(type(found), default=found, prog=prog, args=overrides, description="")
        demand = demand_of(config, patterns=patterns, source=asked["source"])
        patterns = demand.patterns
    if not patterns:
        raise ConfigError("check shards needs shards or a recipe: mmcontrast check shards FOLDER… --recipe RECIPE")

    from mmcontrast.check.shards import check_shards as check
    from mmcontrast.check.table import as_text

    checked = check(
        patterns,
        demand=demand,
        recipe=recipe,
        against=asked["against"],
        sample=asked["sample"],
        seed=asked["seed"],
        ranks=asked["ranks"],
        workers=min(16, os.cpu_count() or 1) if asked["workers"] is None else asked["workers"],
        progress=sys.stderr.isatty(),
    )
    print(as_text(checked.report))
    write_json(asked["json_file"], checked.report.as_json())
    if asked["html"] is not None:
        from mmcontrast.check.shards_page import shards_page

        write_text(asked["html"], shards_page(checked, samples=asked["cards"]))
        print(f"wrote {asked['html']}", file=sys.stderr)
    if not checked.report.passed:
        raise SystemExit(1)


def shards_usage(
    patterns: Positional[tuple[str, ...]] = (),
    recipe: str | None = None,
    source: str | None = None,
    against: tuple[str, ...] = (),
    sample: int = 100_000,
    seed: int = 0,
    ranks: tuple[int, ...] = (1, 8),
    workers: int | None = None,
    html: Path | None = None,
    cards: int = 24,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    trust: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Look through shards before training on them: counts, damage, sizes, copies, and what the evaluation data share.

    Every member of the samples is decoded, once, by several processes. With a recipe, the shards are judged by what it
    asks of them: its modalities, picture size, sampling rate and tokenizer, its groups, evaluators, lanes and steps.
    Exit code 1 if something is found that stops a run or makes its results untrue (damage above max_bad_fraction, a
    modality that no sample has, evaluation data among the training data, …), else 0.

    The recipe's settings follow behind --, as in `train`: mmcontrast check shards FOLDER --recipe emoji -- --steps 500

    Copies are found by the hash of a member's bytes (captions: without regard to case and space), and pictures that
    look alike by a perceptual hash of 64 bits (pHash, in shades of grey) of which at most 3 differ.

    Args:
        patterns: folders with shards, globs or ranges such as data/{00000..00099}.tar; by default those of the recipe.
        recipe: name of a shipped recipe, a .py file with `recipe()`, or a run's config.json.
        source: which source of the recipe's data the shards are, if it mixes several.
        against: evaluation data that must not be among the shards, beside those of the recipe.
        sample: samples to examine at most, drawn at random; 0 examines all. Each takes some 60 bytes of memory.
        seed: of that draw, and of the samples on the page.
        ranks: numbers of training processes (GPUs) to plan the run for.
        workers: processes that examine; by default one for each core, at most 16. 0 does it in this one.
        html: also write a page with histograms, samples, and copies side by side.
        cards: samples on that page.
        json_file: also write all numbers here.
        trust: modules or .py files whose classes a config.json may name.
    """
    return {
        "patterns": patterns,
        "recipe": recipe,
        "source": source,
        "against": against,
        "sample": sample,
        "seed": seed,
        "ranks": ranks,
        "workers": workers,
        "html": html,
        "cards": cards,
        "json_file": json_file,
        "trust": trust,
    }
