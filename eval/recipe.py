"""The questions that a run's recipe asks while it trains, asked again of its weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint, read_config
from mmcontrast.config import ConfigError, from_dict


def answer_again(model_path: Path, *, trust: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every evaluator of the run's config; objects with CLIP_benchmark's keys, the evaluator's name as their task.

    Raises:
        ConfigError: a run that cannot be read, or one that has no evaluators.
    """
    checkpoint = find_checkpoint(model_path)
    named: dict[str, Any] = read_config(checkpoint.parent).get("evaluators") or {}
    if not named:
        raise ConfigError(f"the recipe of {model_path} asks no questions; name shards: mmcontrast eval MODEL DATA…")
    settings = {n: from_dict(value, trust=trust, where=f"evaluators.{n}") for n, value in named.items()}
    model = load_checkpoint(checkpoint, trust=trust)
    return [
        {
            "dataset": " ".join(config.data),
            "model": str(model_path),
            "pretrained": checkpoint.name,
            "task": name,
            "metrics": config.build().run(model),
            "language": None,
            "skipped": [],
        }
        for name, config in settings.items()
    ]
