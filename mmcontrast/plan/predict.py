"""Memory, time and traffic of a step, from what the towers cost per row and what the trainer does with them.

Letters: W ranks, N rows of the global batch, n = N / W, D dimensions, P parameters, K micro-batches of a rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.plan.accelerators import Accelerator
from mmcontrast.plan.count import Cost, Model, Tower
from mmcontrast.trainer import Trainer

FLOAT = 4
"""Bytes of what is kept in float32: weights, gradients, moments, embeddings, scores."""
SPARE = 0.08
"""Share of what is used that allocators lose between blocks."""
_VECTORS = 3  # of N floats per pair, that are reduced: maxima, sums, scores of the positives


@dataclass(frozen=True)
class Prediction:
    """A step on one rank.

    Attributes:
        memory: what for -> bytes, at the moment when most is held.
        flops: of the towers and of the loss, by name.
        sent: what for -> bytes that a rank sends.
        compute: seconds of arithmetic.
        exchange: seconds of traffic, none of it hidden behind arithmetic.
        micro_batches: modality -> K.
        notes: what is odd about it.
    """

    memory: Mapping[str, float]
    flops: Mapping[str, float]
    sent: Mapping[str, float]
    compute: float
    exchange: float
    micro_batches: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes(self) -> float:
        """All of the memory."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """All of the time."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class Machine:
    """On what it runs.

    Attributes:
        gpus: W.
        device: each of them.
        per_node: how many are in one machine.
        network: bytes/s that each can send to other machines.
        mfu: share of the published arithmetic that is reached.
    """

    gpus: int
    device: Accelerator
    per_node: int = 8
    network: float = 50e9
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise ConfigError(f"gpus {self.gpus} and gpus_per_node {self.per_node} must be at least 1")
        if not 0 < self.mfu <= 1 or self.network <= 0:
            raise ConfigError(f"mfu {self.mfu} must be above 0 and 1 at most, network {self.network} above 0")


def predict(config: Trainer.Config, model: Model, machine: Machine, *, states: int = 2) -> Prediction:
    """What a step takes of one rank.

    Args:
        config: the recipe.
        model: what its towers cost.
        machine: where it runs.
        states: numbers that the optimizer keeps per parameter.

    Raises:
        ConfigError: the global batch cannot be shared by so many ranks.
    """
    if config.global_batch % machine.gpus:
        raise ConfigError(f"global_batch {config.global_batch} must be a multiple of gpus ({machine.gpus})")
    n = config.global_batch // machine.gpus
    sizes = {t.name: min(n, config.tower_micro_batch.get(t.name, config.micro_batch)) for t in model.towers}
    counts = {name: math.ceil(n / size) for name, size in sizes.items()}
    again = {t.name: _is_recomputed(config, t) for t in model.towers}
    graphs = _graphs(config, model, sizes, counts, again)
    kept_rows = {t.name: min(n, max(1, config.keep_graphs) * sizes[t.name]) for t in model.towers}
    notes: list[str] = []
    half = config.precision == "bf16"
    if half and not machine.device.bf16:
        notes.append(f"{machine.device.name} has no bfloat16: the rate is that of float32")
    flops = _flops(config, model, n, kept_rows, again)
    rate = machine.mfu * (machine.device.bf16 if half and machine.device.bf16 else machine.device.fp32)
    # The loss runs in float32 whatever the towers do.
    compute = sum(v for k, v in flops.items() if k != "loss") / rate
    compute += flops["loss"] / (machine.mfu * machine.device.fp32)
    sent = _sent(config, model, machine.gpus, n, counts)
    link = machine.device.link if machine.gpus <= machine.per_node else min(machine.network, machine.device.link)
    memory = _weights(config, model, machine.gpus, states)
    memory |= {
        "graphs": graphs,
        "inputs": float(n * sum(t.input_bytes for t in model.towers)),
        "embeddings": _embeddings(config, model, n),
        "scores": _scores(config, n),
    }
    memory["allocator"] = SPARE * sum(memory.values())
    memory["driver"] = machine.device.context
    return Prediction(memory, flops, sent, compute, sum(sent.values()) / link, counts, tuple(notes))


def _is_recomputed(config: Trainer.Config, tower: Tower) -> bool:
    asked = {"all", tower.name} & set(config.checkpoint_activations)
    return bool(asked) and tower.recomputed is not None


def _cost(tower: Tower, again: bool) -> Cost:
    return tower.recomputed if again and tower.recomputed is not None else tower.plain


def _graphs(
    config: Trainer.Config,
    model: Model,
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    again: Mapping[str, bool],
) -> float:
    """Bytes of the graphs that are held at a time, and of the backward through one block."""
    graph = sum(sizes[t.name] * _cost(t, again[t.name]).kept + t.fixed for t in model.towers)
    held = min(max(1, config.keep_graphs), max(counts.values())) * graph
    room = max(counts.values()) * graph - held
    at_work = max((sizes[t.name] * t.block * (2 if again[t.name] else 1) for t in model.towers), default=0.0)
    return held + min(float(config.keep_graph_bytes), max(0.0, room)) + at_work


def _flops(
    config: Trainer.Config, model: Model, n: int, kept_rows: Mapping[str, int], again: Mapping[str, bool]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for t in model.towers:
        cost = _cost(t, again[t.name])
        twice = 0 if t.frozen else n - kept_rows[t.name]  # in the second pass
        found[t.name] = (n + twice) * cost.forward + n * cost.backward
    products = 6 if n * config.global_batch * FLOAT <= config.keep_bytes else 8
    found["loss"] = float(products * n * config.global_batch * config.model.dim * _pairs(config))
    return found


def _pairs(config: Trainer.Config) -> int:
    """Score matrices; of an objective that does not name pairs, one for every two of its modalities."""
    found = 0
    for objective in config.objectives.values():
        pairs: Any = getattr(objective, "pairs", None)
        found += len(pairs) if pairs is not None else max(1, len(getattr(objective, "modalities", (0, 0))) - 1)
    return found


def _travelling(config: Trainer.Config) -> int:
    """Modalities whose embeddings every rank needs of every other."""
    built = [o.build() for o in config.objectives.values()]
    return len({m for o in built for m in (o.modalities if o.whole else o.candidates)})


def _sent(config: Trainer.Config, model: Model, ranks: int, n: int, counts: Mapping[str, int]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by rings (what gloo and NCCL move at least)."""
    others, share = ranks - 1, (ranks - 1) / ranks
    towers = _travelling(config) * n * config.model.dim * FLOAT * others
    labels = n * 8 * (1 + len(config.data.groups) + len(model.towers)) * others
    vectors = 2 * share * _VECTORS * _pairs(config) * config.global_batch * FLOAT
    found = {"embeddings": float(2 * towers), "labels and statistics": float(labels + vectors)}
    trained = float(model.trained * FLOAT)
    if config.parallel == "ddp" or ranks == 1:
        return found | {"gradients": 2 * share * trained}
    kept = min(max(1, config.keep_graphs), max(counts.values()))
    rounds = 3 * max(counts.values()) - kept if config.reshard else 1
    return found | {"gradients": share * trained, "weights": share * _gathered(config, model) * rounds}


def _gathered(config: Trainer.Config, model: Model) -> float:
    """Bytes of all weights that are spread, as they are gathered."""
    half = config.precision == "bf16"
    spread = [t for t in model.towers if not t.frozen]
    in_blocks = sum(t.in_blocks for t in spread)
    return (2 if half else FLOAT) * in_blocks + FLOAT * (sum(t.parameters - t.in_blocks for t in spread) + model.heads)


def _weights(config: Trainer.Config, model: Model, ranks: int, states: int) -> dict[str, float]:
    whole, trained = float(FLOAT * model.parameters), float(FLOAT * model.trained)
    averages = 0 if config.ema.decay is None else 1
    if config.parallel == "ddp" or ranks == 1:
        buckets = trained if ranks > 1 else 0.0
        return {
            "weights": whole,
            "gradients": trained + buckets,
            "optimizer": states * trained,
            **({"average": whole} if averages else {}),
        }
    frozen = float(FLOAT * sum(t.parameters for t in model.towers if t.frozen))
    part = frozen + (whole - frozen) / ranks
    gathered = _gathered(config, model)
    if config.reshard:  # of the blocks two at a time: one at work and the next
        size = 2 if config.precision == "bf16" else FLOAT
        spread = [t for t in model.towers if t.blocks and not t.frozen]
        gathered -= size * sum(t.in_blocks for t in spread)
        gathered += 2 * size * max((t.in_blocks / t.blocks for t in spread), default=0.0)
    return {
        "weights": part + gathered,
        "gradients": trained + trained / ranks,
        "optimizer": states * trained / ranks,
        **({"average": part} if averages else {}),
    }


def _embeddings(config: Trainer.Config, model: Model, n: int) -> float:
    """Own and gathered ones, and their gradients."""
    rows = len(model.towers) * n + _travelling(config) * config.global_batch
    return float(2 * rows * config.model.dim * FLOAT)


def _scores(config: Trainer.Config, n: int) -> float:
    block = min(n, config.block or n)
    kept = n * config.global_batch * FLOAT
    return float(2 * block * config.global_batch * FLOAT + (kept if kept <= config.keep_bytes else 0))


# --------------------------------------------------------------------------------------------------- remedies


def remedies(config: Trainer.Config, model: Model, machine: Machine, *, states: int = 2) -> list[tuple[str, float]]:
    """Flags that lower the memory, in the order in which they cost least, each with those before it, and the bytes.

    The list ends with the first that makes the run fit, if one does.
    """
    found: list[tuple[str, float]] = []
    flags: list[str] = []
    for flag, changed in _steps(config, machine.gpus):
        flags = [f for f in flags if f.split()[0] != flag.split()[0]] + [flag]
        config = replace(config, **changed)
        taken = predict(config, model, machine, states=states).bytes
        found.append((" ".join(flags), taken))
        if taken <= machine.device.memory:
            break
    return found


def _steps(config: Trainer.Config, ranks: int) -> list[tuple[str, dict[str, Any]]]:
    steps: list[tuple[str, dict[str, Any]]] = []
    if config.keep_graph_bytes:
        steps.append(("--keep-graph-bytes 0", {"keep_graph_bytes": 0}))
    if config.keep_graphs > 1:
        steps.append(("--keep-graphs 1", {"keep_graphs": 1}))
    size = min(config.micro_batch, config.global_batch // ranks)
    for _ in range(2):
        if size >= 32:
            size //= 2
            steps.append((f"--micro-batch {size}", {"micro_batch": size, "tower_micro_batch": {}}))
    if config.parallel == "ddp" and ranks > 1:
        steps.append(("--parallel fsdp", {"parallel": "fsdp"}))
    if "all" not in config.checkpoint_activations:
        steps.append(("--checkpoint-activations all", {"checkpoint_activations": ("all",)}))
    while size >= 16:
        size //= 2
        steps.append((f"--micro-batch {size}", {"micro_batch": size, "tower_micro_batch": {}}))
    if not config.reshard and ranks > 1:
        steps.append(("--reshard", {"reshard": True}))
    return steps
