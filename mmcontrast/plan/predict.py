"""Memory, time and traffic of a step, from what the towers cost per row and what the trainer does with them.

Letters: W ranks, N rows of the global batch, n = N / W, D dimensions, P parameters, K micro-batches of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmcontrast.batch import Batch
from mmcontrast.cached import least_kept, pieces_of
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
    pieces = _pieces(config, model, n)
    kept = pieces[: _kept(config, pieces)]
    again = {t.name: _is_recomputed(config, t) for t in model.towers}
    notes: list[str] = []
    half = config.precision == "bf16"
    if half and not machine.device.bf16:
        notes.append(f"{machine.device.name} has no bfloat16: the rate is that of float32")
    flops = _flops(config, model, n, kept, again)
    rate = machine.mfu * (machine.device.bf16 if half and machine.device.bf16 else machine.device.fp32)
    # The loss runs in float32 whatever the towers do.
    compute = sum(v for k, v in flops.items() if k != "loss") / rate
    compute += flops["loss"] / (machine.mfu * machine.device.fp32)
    sent = _sent(config, model, machine.gpus, n, pieces)
    link = machine.device.link if machine.gpus <= machine.per_node else min(machine.network, machine.device.link)
    memory = _weights(config, model, machine.gpus, states)
    memory |= {
        "graphs": _graphs(config, model, machine.gpus, pieces, len(kept), again),
        "inputs": float(n * sum(t.input_bytes for t in model.towers)),
        "embeddings": _embeddings(config, model, n),
        "scores": _scores(config, n),
    }
    memory["allocator"] = SPARE * sum(memory.values())
    memory["driver"] = machine.device.context
    counts = {t.name: sum(t in piece.towers for piece in pieces) for t in model.towers}
    return Prediction(memory, flops, sent, compute, sum(sent.values()) / link, counts, tuple(notes))


def _is_recomputed(config: Trainer.Config, tower: Tower) -> bool:
    asked = {"all", tower.name} & set(config.checkpoint_activations)
    return bool(asked) and tower.recomputed is not None


def _cost(tower: Tower, again: bool) -> Cost:
    return tower.recomputed if again and tower.recomputed is not None else tower.plain


@dataclass(frozen=True)
class _Piece:
    """A micro-batch of one tower, or of towers that a head reads together."""

    towers: tuple[Tower, ...]
    start: int
    rows: int


def _pieces(config: Trainer.Config, model: Model, n: int) -> list[_Piece]:
    """The micro-batches of a rank, in the order in which the gradient cache encodes them."""
    batch = Batch({}, {t.name: torch.arange(n) for t in model.towers}, torch.arange(n))
    sizes = {t.name: config.tower_micro_batch.get(t.name, config.micro_batch) for t in model.towers}
    found: list[_Piece] = []
    for piece in pieces_of(replace(batch, inputs=batch.rows), sizes, model.joined):
        own = [t for t in model.towers if t.name in piece.rows]
        found.append(_Piece(tuple(own), piece.start, max(len(rows) for rows in piece.rows.values())))
    return found


def _kept(config: Trainer.Config, pieces: Sequence[_Piece]) -> int:
    """Graphs that need no second forward, whatever the budget."""
    return least_kept([piece.start for piece in pieces], config.keep_graphs)


def _graphs(
    config: Trainer.Config, model: Model, ranks: int, pieces: Sequence[_Piece], count: int, again: Mapping[str, bool]
) -> float:
    """Bytes of the graphs that are held at a time, and of the backward through one block.

    Towers come one after the other: while one works, the gradients of those behind it do not stand yet.
    """
    sizes = [sum(p.rows * _cost(t, again[t.name]).kept + t.fixed for t in p.towers) for p in pieces]
    further = min(float(config.keep_graph_bytes), sum(sizes[count:]))
    parts = ranks if config.parallel == "fsdp" else 1
    behind = {t.name: FLOAT * t.trained / parts for t in model.towers}
    found = 0.0
    for i, piece in enumerate(pieces):
        for t in piece.towers:
            behind.pop(t.name, None)
        held = sum(sizes[i:count]) + further if i < count else sizes[i]
        block = max(piece.rows * t.block * (2 if again[t.name] else 1) for t in piece.towers)
        found = max(found, held + block - sum(behind.values()))
    return found


def _flops(
    config: Trainer.Config, model: Model, n: int, kept: Sequence[_Piece], again: Mapping[str, bool]
) -> dict[str, float]:
    found: dict[str, float] = {}
    for t in model.towers:
        cost = _cost(t, again[t.name])
        twice = 0 if t.frozen else n - sum(p.rows for p in kept if t in p.towers)  # in the second pass
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


def _sent(config: Trainer.Config, model: Model, ranks: int, n: int, pieces: Sequence[_Piece]) -> dict[str, float]:
    """Bytes that a rank sends in a step, by rings (what gloo and NCCL move at least)."""
    others, share = ranks - 1, (ranks - 1) / ranks
    towers = _travelling(config) * n * config.model.dim * FLOAT * others
    labels = n * 8 * (1 + len(config.data.groups) + len(model.towers)) * others
    vectors = 2 * share * _VECTORS * _pairs(config) * config.global_batch * FLOAT
    found = {"embeddings": float(2 * towers), "labels and statistics": float(labels + vectors)}
    trained = float(model.trained * FLOAT)
    if config.parallel == "ddp" or ranks == 1:
        return found | {"gradients": 2 * share * trained}
    weights = 0.0
    for t in model.towers:
        if not t.frozen:
            count = sum(t in p.towers for p in pieces)
            kept = sum(t in p.towers for p in pieces[: _kept(config, pieces)])
            # Two forwards, one of a kept graph, and a backward; and those of the dummy row in the step's last backward.
            rounds = 3 * count - kept + (0 if t in pieces[-1].towers else 2)
            weights += _gathered(config, t) * (rounds if config.reshard else 1)
    return found | {"gradients": share * trained, "weights": share * (weights + FLOAT * model.heads)}


def _gathered(config: Trainer.Config, tower: Tower) -> float:
    """Bytes of a tower's weights as they are gathered."""
    return _block_type(config) * tower.in_blocks + FLOAT * float(tower.parameters - tower.in_blocks)


def _block_type(config: Trainer.Config) -> int:
    return 2 if config.precision == "bf16" else FLOAT


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
    spread = [t for t in model.towers if not t.frozen]
    gathered = sum(_gathered(config, t) for t in spread) + FLOAT * model.heads
    if config.reshard:  # of the blocks two at a time: one at work and the next
        stacks = [t for t in spread if t.blocks]
        gathered -= _block_type(config) * sum(t.in_blocks for t in stacks)
        gathered += 2 * _block_type(config) * max((t.in_blocks / t.blocks for t in stacks), default=0.0)
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
