"""`mmcontrast plan`. Imported by the command at its start, so nothing heavy is imported here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcontrast.arguments import take_trust, write_json
from mmcontrast.config import ConfigError

Positional = tyro.conf.Positional


def plan(arguments: Sequence[str]) -> None:
    """`plan RECIPE [--overrides]`: the recipe's own settings are flags beside the plan's."""
    trust, words = take_trust(arguments)
    asked, rest = tyro.cli(plan_usage, prog="mmcontrast plan", args=words, return_unknown_args=True)

    from mmcontrast.plan.accelerators import accelerator
    from mmcontrast.plan.count import count
    from mmcontrast.plan.predict import Machine, predict, remedies
    from mmcontrast.plan.report import Plan
    from mmcontrast.recipe import load_recipe

    recipe = load_recipe(asked["recipe"], trust)
    config = tyro.cli(
        type(recipe), default=recipe, prog=f"mmcontrast plan {asked['recipe']}", args=rest, description=""
    )
    machine = Machine(
        asked["gpus"], accelerator(asked["gpu"]), asked["gpus_per_node"], asked["network"] * 1e9, asked["mfu"]
    )
    print("plan: counts what the towers cost", file=sys.stderr, flush=True)
    model = count(config)
    states = _states(config)
    step = predict(config, model, machine, states=states)
    lowered = remedies(config, model, machine, states=states) if step.bytes > machine.device.memory else []
    found = Plan(
        asked["recipe"],
        config.steps,
        config.global_batch,
        config.precision,
        config.parallel,
        model,
        machine,
        step,
        lowered,
        _sample_bytes(config),
    )
    print(found.as_text())
    write_json(asked["json_file"], found.as_json())


def plan_usage(
    recipe: Positional[str],
    gpus: int = 8,
    gpu: str = "h100",
    mfu: float = 0.4,
    gpus_per_node: int = 8,
    network: float = 50.0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> dict[str, Any]:
    """Predict memory, time, traffic and data rate of a run before it is paid for.

    The towers' FLOPs and graphs are counted, not guessed; what is assumed beside them is printed. If the run does not
    fit into the memory, the flags that make it fit are named.

    The recipe's settings are flags as well, as in `train`: mmcontrast plan clip_vit_b16 --parallel fsdp

    Args:
        recipe: name of a shipped recipe, a .py file with `recipe()`, or a run's config.json; `--trust` as in `train`.
        gpus: ranks, on all machines.
        gpu: b200, h200, h100, a100, l40s, l4 or v100; cpu is this machine.
        mfu: share of the published arithmetic that is reached.
        gpus_per_node: ranks in one machine.
        network: GB/s that each can send to other machines.
        json_file: also write everything here.
    """
    return {
        "recipe": recipe,
        "gpus": gpus,
        "gpu": gpu,
        "mfu": mfu,
        "gpus_per_node": gpus_per_node,
        "network": network,
        "json_file": json_file,
    }


def _states(config: Any) -> int:
    """Numbers that the optimizer keeps per parameter, of a step on a small one."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    rule = config.optimizer.build().make([{"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0}])
    parameter.grad = torch.ones(64, 64)
    rule.step()
    kept = [t for t in rule.state[parameter].values() if isinstance(t, torch.Tensor)]
    return round(sum(t.numel() for t in kept) / parameter.numel())


def _sample_bytes(config: Any) -> float | None:
    """Mean size of a sample in the shards, of all sources; None where they are not there, or have no manifest."""
    from mmcontrast.manifest import Finder

    sources = getattr(config.data, "sources", None)
    patterns = [p for source in (sources.values() if sources else [config.data]) for p in source.shards]
    finder, size, samples = Finder(), 0, 0
    try:
        for pattern in patterns:
            for place in finder.find(pattern):
                _, entry = finder.describe(place)
                if entry is None:
                    return None
                size, samples = size + int(entry["bytes"]), samples + int(entry["samples"])
    except (ConfigError, OSError):
        return None
    return size / samples if samples else None
