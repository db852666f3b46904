"""The engine: exact loss and gradients of any objective over all ranks, in blocks. The only user of torch.distributed.

Every collective is explicit; none is recorded by autograd. Per step: one gather of ids, labels and presence, one
gather per candidate modality, one reduction of the totals, one reduce-scatter per candidate modality and one
reduction of the objectives' own parameter gradients.

Letters: W ranks, n rows per rank, N = W * n rows of the global batch, B rows of a block, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.batch import Embeddings
from mmcontrast.objectives.base import Block, Objective, Totals


class World:
    """The ranks that share a batch: all of the process group, a given group, or this process alone."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if active else 0
        self.size = dist.get_world_size(group) if active else 1

    def gather(self, local: Tensor) -> Tensor:
        """[n, ...] of every rank, in rank order -> [N, ...]."""
        if self.size == 1:
            return local
        out = local.new_empty(self.size * local.shape[0], *local.shape[1:])
        # The new name, all_gather_single, is not in the oldest torch that we take.
        dist.all_gather_into_tensor(out, local.contiguous(), group=self.group)  # pyright: ignore[reportDeprecated]
        return out

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """[N, ...] of every rank -> the sum's rows [n, ...] that belong to this rank."""
        if self.size == 1:
            return whole
        out = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
        dist.reduce_scatter_tensor(out, whole.contiguous(), group=self.group)  # pyright: ignore[reportDeprecated]
        return out

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks, in one collective."""
        return self._reduce(tensors, dist.ReduceOp.SUM)

    def max(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Elementwise maxima over ranks, in one collective."""
        return self._reduce(tensors, dist.ReduceOp.MAX)

    def _reduce(self, tensors: Sequence[Tensor], op: Any) -> list[Tensor]:
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat, op=op, group=self.group)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def logsumexp(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Elementwise log-sum-exp over ranks; the true maximum is subtracted, -inf everywhere stays -inf."""
        if self.size == 1:
            return list(tensors)
        peaks = [torch.where(t.isneginf(), torch.zeros_like(t), t) for t in self.max(tensors)]
        sums = self.sum([(t - p).exp() for t, p in zip(tensors, peaks, strict=True)])
        return [s.log() + p for s, p in zip(sums, peaks, strict=True)]

    def gather_objects(self, value: Any) -> list[Any]:
        """One small picklable value of every rank, for reports between the run's own processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


@dataclass(frozen=True)
class Result:
    """What one step's objectives say.

    Attributes:
        loss: scalar, the weighted sum of the terms.
        terms: name -> scalar, each term without its weight.
        gradients: modality -> [n, D], d loss / d z of this rank's rows, exact for the global batch.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def value_and_grad(
    objectives: Mapping[str, Objective],
    z: Embeddings,
    present: Mapping[str, Tensor],
    ids: Tensor,
    *,
    groups: Mapping[str, Tensor] | None = None,
    block: int | None = None,
    step: int = 0,
    world: World | None = None,
) -> Result:
    """Loss and gradients of weighted objectives on the global batch, from this rank's rows.

    The gradients of the objectives' own parameters are added to their `.grad`, already summed over ranks: they must
    not be averaged again (do not wrap objectives in DDP or FSDP).

    Args:
        objectives: name -> objective; the loss is the sum of weight * objective.
        z: modality -> [n, D] of this rank, float32 or float64; the rows that lack the modality are not looked at.
        present: modality -> [n] bool.
        ids: [n] int64 sample ids; n must be the same on every rank.
        groups: name -> [n] int64 labels.
        block: anchors looked at in one go, which bounds the score tile to [block, N]; None takes all of the rank.
        step: the optimizer step, seed of whatever an objective draws.
        world: the ranks that share the batch; by default all.

    Raises:
        ValueError: an objective reads a modality that `z` lacks, no rows, or `block` is not positive.
    """
    world = world or World()
    if block is not None and block < 1:
        raise ValueError(f"block is {block}; it must be at least 1, or None for one block per rank")
    if not len(ids):
        raise ValueError("this rank has no rows; every rank needs the same number, at least 1")
    for name, objective in objectives.items():
        for modality in objective.modalities:
            if modality not in z:
                raise ValueError(
                    f"objective {name!r} reads the modality {modality!r}, which the model does not encode; "
                    f"encoded: {', '.join(z)}"
                )
    dtype = next(iter(z.values())).dtype
    with torch.autocast(ids.device.type, enabled=False):
        batch = _gather(objectives, z, present, ids, groups or {}, world)
        loss = torch.zeros((), dtype=dtype, device=ids.device)
        terms: dict[str, Tensor] = {}
        accumulator = _Accumulator(batch)
        for name, objective in objectives.items():
            with torch.no_grad():
                aux = objective.prepare(batch.candidates_of(objective), batch.present, batch.ids, step)
            evaluate = _evaluate_whole if objective.whole else _evaluate_blocks
            terms[name] = evaluate(objective, batch, aux, block, accumulator)
            loss = loss + objective.weight * terms[name]
        gradients = accumulator.reduce()
        with torch.no_grad():
            for objective in objectives.values():
                objective.update(batch.candidates_of(objective), batch.ids)
    return Result(loss, terms, gradients)


@dataclass(frozen=True)
class _GlobalBatch:
    """The global batch as one rank holds it: its own rows of every modality, all rows of the candidates."""

    world: World
    local: Embeddings  # [n, D], zeros where absent
    z: Embeddings  # [N, D] of the candidates
    present: Mapping[str, Tensor]  # [N] bool
    ids: Tensor  # [N]
    groups: Mapping[str, Tensor]  # [N]

    @property
    def first_row(self) -> int:
        return self.world.rank * (len(self.ids) // self.world.size)

    def candidates_of(self, objective: Objective) -> Embeddings:
        names = objective.modalities if objective.whole else objective.candidates
        return {m: self.z[m] for m in names}


def _gather(
    objectives: Mapping[str, Objective],
    z: Embeddings,
    present: Mapping[str, Tensor],
    ids: Tensor,
    groups: Mapping[str, Tensor],
    world: World,
) -> _GlobalBatch:
    # Sorted: every rank must stack and gather in the same order.
    names, group_names = sorted(z), sorted(groups)
    local = {m: torch.where(present[m][:, None], z[m].detach(), 0) for m in names}
    columns = [ids, *(groups[g] for g in group_names), *(present[m].long() for m in names)]
    table = world.gather(torch.stack(columns, dim=1))
    group_columns = table[:, 1 : 1 + len(group_names)].unbind(1)
    present_columns = table[:, 1 + len(group_names) :].unbind(1)
    travelling = {m for o in objectives.values() for m in (o.modalities if o.whole else o.candidates)}
    return _GlobalBatch(
        world=world,
        local=local,
        z={m: world.gather(local[m]) for m in names if m in travelling},
        present={m: column.bool() for m, column in zip(names, present_columns, strict=True)},
        ids=table[:, 0].contiguous(),
        groups=dict(zip(group_names, group_columns, strict=True)),
    )


class _Accumulator:
    """Sums gradients of anchors (this rank's rows), candidates (all rows) and parameters, then reduces them once."""

    def __init__(self, batch: _GlobalBatch) -> None:
        self.batch = batch
        self.anchors = {m: torch.zeros_like(t) for m, t in batch.local.items()}
        self.candidates = {m: torch.zeros_like(t) for m, t in batch.z.items()}
        self.parameters: dict[Tensor, Tensor] = {}

    def add_parameters(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter not in self.parameters:
                self.parameters[parameter] = torch.zeros_like(parameter)
            if gradient is not None:
                self.parameters[parameter] += gradient

    def reduce(self) -> dict[str, Tensor]:
        world = self.batch.world
        for modality in sorted(self.candidates):
            self.anchors[modality] += world.reduce_scatter(self.candidates[modality])
        for parameter, gradient in zip(self.parameters, world.sum(list(self.parameters.values())), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return self.anchors


def _evaluate_blocks(
    objective: Objective,
    batch: _GlobalBatch,
    aux: Mapping[str, Tensor],
    block: int | None,
    accumulator: _Accumulator,
) -> Tensor:
    """Two passes over this rank's blocks: totals, then gradients. A single block keeps its graph: one pass."""
    n = len(batch.ids) // batch.world.size
    starts = range(0, n, block or n)
    parameters = [p for p in objective.parameters() if p.requires_grad]

    def run(start: int) -> tuple[Totals, dict[str, Tensor], dict[str, Tensor]]:
        """Totals of the block at a row, and the fresh leaves that they come from: its anchors and the candidates."""
        stop = min(start + starts.step, n)
        anchors = {m: batch.local[m][start:stop].detach().requires_grad_() for m in objective.modalities}
        z = {m: batch.z[m].detach().requires_grad_() for m in objective.candidates}
        rows = torch.arange(start, stop, device=batch.ids.device) + batch.first_row
        seen = Block(anchors, z, batch.present, rows, batch.ids, batch.groups, aux)
        return objective.partial(seen), anchors, z

    kept = run(0) if len(starts) == 1 else None
    if kept is not None:
        local = _detach(kept[0])
    else:
        with torch.no_grad():
            local = reduce(_merge, (run(start)[0] for start in starts))
    totals = Totals(
        dict(zip(local.sums, batch.world.sum(list(local.sums.values())), strict=True)),
        dict(zip(local.logsumexps, batch.world.logsumexp(list(local.logsumexps.values())), strict=True)),
    )

    loss, cotangents, own = _finalize(objective, totals, batch, parameters)
    # Every rank finalizes the same totals: only one may count the parameters that finalize itself reads.
    accumulator.add_parameters(parameters, own if batch.world.rank == 0 else [None] * len(own))

    for start in starts:
        partial, anchors, z = kept or run(start)
        outputs, weights = _cotangents_of_block(partial, totals, cotangents, objective.weight)
        gradients = _grad(outputs, [*anchors.values(), *z.values(), *parameters], weights)
        of_anchors, of_candidates = gradients[: len(anchors)], gradients[len(anchors) : len(anchors) + len(z)]
        for modality, gradient in zip(anchors, of_anchors, strict=True):
            if gradient is not None:
                accumulator.anchors[modality][start : start + len(gradient)] += gradient
        for modality, gradient in zip(z, of_candidates, strict=True):
            if gradient is not None:
                accumulator.candidates[modality] += gradient
        accumulator.add_parameters(parameters, gradients[len(anchors) + len(z) :])
    return loss


def _evaluate_whole(
    objective: Objective,
    batch: _GlobalBatch,
    aux: Mapping[str, Tensor],
    block: int | None,
    accumulator: _Accumulator,
) -> Tensor:
    """The escape hatch: the formula of the whole batch on every rank, of which each keeps its own rows' gradient."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    z = {m: batch.z[m].detach().requires_grad_() for m in objective.modalities}
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    totals = objective.partial(Block(z, z, batch.present, rows, batch.ids, batch.groups, aux))
    loss = objective.finalize(totals, batch.present)
    gradients = _grad([objective.weight * loss], [*z.values(), *parameters])
    first, n = batch.first_row, len(batch.ids) // batch.world.size
    for modality, gradient in zip(z, gradients, strict=False):
        if gradient is not None:
            accumulator.anchors[modality] += gradient[first : first + n]
    own = gradients[len(z) :]
    accumulator.add_parameters(parameters, own if batch.world.rank == 0 else [None] * len(own))
    return loss.detach()


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of the weighted sum of outputs; None for inputs that no output depends on."""
    if not any(output.requires_grad for output in outputs):  # a constant, such as a term without any valid row
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))


def _detach(totals: Totals) -> Totals:
    return Totals(
        {k: t.detach() for k, t in totals.sums.items()}, {k: t.detach() for k, t in totals.logsumexps.items()}
    )


def _merge(a: Totals, b: Totals) -> Totals:
    return Totals(
        {k: t + b.sums[k] for k, t in a.sums.items()},
        {k: torch.logaddexp(t, b.logsumexps[k]) for k, t in a.logsumexps.items()},
    )


def _finalize(
    objective: Objective, totals: Totals, batch: _GlobalBatch, parameters: Sequence[Tensor]
) -> tuple[Tensor, Totals, Sequence[Tensor | None]]:
    """The loss, its gradient with respect to every total, and with respect to what finalize itself reads."""

    def leaf(total: Tensor) -> Tensor:
        return total.detach().to(torch.promote_types(total.dtype, torch.float32)).requires_grad_()  # counts too

    leaves = Totals({k: leaf(t) for k, t in totals.sums.items()}, {k: leaf(t) for k, t in totals.logsumexps.items()})
    loss = objective.finalize(leaves, batch.present)
    inputs = [*leaves.sums.values(), *leaves.logsumexps.values()]
    gradients = _grad([loss], [*inputs, *parameters])
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=False)]
    cotangents = Totals(
        dict(zip(leaves.sums, filled, strict=False)),
        dict(zip(leaves.logsumexps, filled[len(leaves.sums) :], strict=True)),
    )
    own = [None if g is None else objective.weight * g for g in gradients[len(inputs) :]]
    return loss.detach(), cotangents, own


def _cotangents_of_block(
    partial: Totals, totals: Totals, cotangents: Totals, weight: float
) -> tuple[list[Tensor], list[Tensor]]:
    """A block's outputs and their cotangents: a sum passes its own on, a log-sum-exp times its block's share."""
    pairs = [(value, cotangents.sums[name]) for name, value in partial.sums.items()]
    for name, value in partial.logsumexps.items():
        total = totals.logsumexps[name]
        share = torch.where(total.isneginf(), 0, (value.detach() - total).exp())
        pairs.append((value, cotangents.logsumexps[name] * share))
    # A total that depends on no leaf (a count, say) cannot be differentiated.
    kept = [(value, weight * cotangent) for value, cotangent in pairs if value.requires_grad]
    return [value for value, _ in kept], [cotangent for _, cotangent in kept]
