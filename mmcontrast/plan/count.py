"""What a tower costs per row, counted without computing: FLOPs, bytes that autograd keeps, parameters.

The towers are built and run forward and backward on fake tensors, which have shapes and types and no memory. One that
cannot be built or run so is built for real, and run on two rows.

Letters: B rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import map_tensors, tensors_in
from mmcontrast.encoders.base import Encoder
from mmcontrast.encoders.depth import blocks
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.execution import recompute
from mmcontrast.trainer import Trainer

_TEXT = "two dogs and a red ball " * 500
_ROWS = (2, 4)  # what a row takes is the difference, what does not grow with them the rest


@dataclass(frozen=True)
class Cost:
    """What a number of rows takes.

    Attributes:
        forward: FLOPs of a forward pass (a multiplication and an addition are two).
        backward: FLOPs of the backward pass, what it recomputes among them.
        kept: bytes that autograd keeps from forward to backward, without weights and inputs.
    """

    forward: float
    backward: float
    kept: float


@dataclass(frozen=True)
class Tower:
    """A modality's tower and projection.

    Attributes:
        name: modality.
        parameters: P.
        trained: of these, those that train.
        in_blocks: of these, those of its blocks.
        blocks: how many it is a stack of.
        frozen: whether it is asked once per row, without a graph.
        plain: costs of a row.
        recomputed: costs of a row where only inputs of blocks are kept; None where it has no blocks.
        block: bytes that autograd keeps within one block, per row.
        fixed: bytes that a graph keeps whatever its rows (weights in another type).
        input_bytes: of a row, as it comes to the device.
        tokens: of a row of text; 0 of other kinds.
    """

    name: str
    parameters: int
    trained: int
    in_blocks: int
    blocks: int
    frozen: bool
    plain: Cost
    recomputed: Cost | None
    block: float
    fixed: float
    input_bytes: int
    tokens: int


@dataclass(frozen=True)
class Model:
    """All that the towers cost, and what stands beside them.

    Attributes:
        towers: by modality.
        heads: parameters of the heads; what they compute is not counted.
        joined: the modalities that each head reads together.
        real: whether it had to be built with memory.
    """

    towers: tuple[Tower, ...]
    heads: int
    joined: tuple[tuple[str, ...], ...]
    real: bool

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return sum(t.parameters for t in self.towers) + self.heads

    @property
    def trained(self) -> int:
        """Those that train."""
        return sum(t.trained for t in self.towers) + self.heads


def count(config: Trainer.Config) -> Model:
    """Count a recipe's model, in the precision in which it trains.

    Raises:
        ConfigError: a tower that cannot be built or run.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    half = config.precision == "bf16"
    try:
        with mode:
            model: MultiEncoder = config.model.build()
            return _count(model, half, fake=None)
    except Exception:  # of whatever kind, also in a ConfigError: towers do all sorts of things while they are built
        model = config.model.build()
        return _count(model, half, fake=mode)


def _count(model: MultiEncoder, half: bool, fake: Any) -> Model:
    towers = tuple(_tower(model, m, half, fake) for m in model.modalities)
    joined = tuple(tuple(head.modalities) for head in model.terms.values())
    return Model(towers, sum(p.numel() for p in model.heads.parameters()), joined, fake is not None)


def _tower(model: MultiEncoder, modality: str, half: bool, fake: Any) -> Tower:
    encoder, projection = model.encoder(modality), model.projections[modality]
    encoder.train()
    parameters = [*encoder.parameters(), *projection.parameters()]
    stack = blocks(encoder)

    def run(x: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.set_grad_enabled(not encoder.frozen):
            pooled = encoder(x)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return projection(pooled)

    example = _longest(encoder)
    plain, fixed = _per_row(run, example, parameters, fake)
    recomputed, block = None, 0.0
    if stack and not encoder.frozen:
        before = [(b, b.forward) for b in stack]
        recompute({modality: encoder}, (modality,))
        recomputed, _ = _per_row(run, example, parameters, fake)
        for b, forward in before:
            b.forward = forward
        block = max(0.0, plain.kept - recomputed.kept) / len(stack)
    return Tower(
        name=modality,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        in_blocks=sum(p.numel() for b in stack for p in b.parameters()),
        blocks=len(stack),
        frozen=encoder.frozen,
        plain=plain,
        recomputed=recomputed,
        block=block,
        fixed=fixed,
        input_bytes=sum(t.numel() * t.element_size() for t in tensors_in(example)),
        tokens=max((t.shape[1] for t in tensors_in(example) if t.ndim == 2 and encoder.kind == "text"), default=0),
    )


def _longest(encoder: Encoder) -> Any:
    """One row, [1, ...]; of text as much as the tower takes, where its example is short."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if encoder.kind != "text":
        return encoder.example()
    with unset_fake_temporarily():  # tokenizers make numbers, not shapes
        transform = encoder.transform(train=False)
        return transform.collate([transform(_TEXT)])


def _per_row(run: Callable[[Any], Tensor], example: Any, weights: list[nn.Parameter], fake: Any) -> tuple[Cost, float]:
    """Costs of a row, and bytes of a graph that do not grow with them."""
    with fake or nullcontext():
        low, high = (_bytes(run, _repeat(example, rows), weights, fake) for rows in _ROWS)
        forward, backward = _flops(run, _repeat(example, _ROWS[0]), weights)
    per_row = (high - low) / (_ROWS[1] - _ROWS[0])
    return Cost(forward / _ROWS[0], backward / _ROWS[0], per_row), max(0.0, low - _ROWS[0] * per_row)


def _bytes(run: Callable[[Any], Tensor], x: Any, weights: list[nn.Parameter], fake: Any) -> float:
    there = [*weights, *tensors_in(x)]
    there += [cast(Tensor, fake.from_tensor(t)) for t in there] if fake is not None else []
    with _kept(there) as kept:
        run(x)
    return float(sum(kept.values()))


def _flops(run: Callable[[Any], Tensor], x: Any, weights: list[nn.Parameter]) -> tuple[float, float]:
    """Forward, and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention by its matrix products: not every fused kernel is known to the counter.
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
        with FlopCounterMode(display=False) as forward:
            z = run(x)
        backward = FlopCounterMode(display=False)
        if z.requires_grad:
            with backward:
                z.sum().backward()
    for weight in weights:
        weight.grad = None
    return float(forward.get_total_flops()), float(backward.get_total_flops())


@contextmanager
def _kept(there: Iterable[Tensor]) -> Generator[dict[Any, int]]:
    """Storage -> bytes of what autograd saves within the context, without that of `there`."""
    known, found = {_storage(t) for t in there}, dict[Any, int]()
    alive: list[Tensor] = []  # or else a storage's place could be taken by the next one

    def note(t: Tensor) -> Tensor:
        if _storage(t) not in known and not isinstance(t, nn.Parameter):
            found[_storage(t)] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield found


def _storage(t: Tensor) -> int:
    return int(cast(Any, t.untyped_storage())._cdata)


def _repeat(x: Any, rows: int) -> Any:
    return map_tensors(x, lambda t: t.repeat(rows, *(1,) * (t.ndim - 1)))
