"""Exact loss and gradients of any objective over all ranks. It and `parallel` alone use torch.distributed.

Every collective is explicit; none is recorded by autograd. Per step: one gather of ids, labels and presence, one
gather per candidate modality, a few of statistics of N numbers, one reduce-scatter per candidate modality and one
reduction of the objectives' own parameter gradients.

Letters: W ranks, n rows per rank, N = W * n rows of the global batch, B rows of a block, D dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmcontrast.batch import Embeddings
from mmcontrast.config import ConfigError
from mmcontrast.evaluate import Accumulator, GlobalBatch, Settings, evaluate
from mmcontrast.objectives.base import Objective


class World:
    """The ranks that share a batch: all of the process group, a given group, or this process alone."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if active else 0
        self.size = dist.get_world_size(group) if active else 1

    @staticmethod
    def alone() -> World:
        """This process, whatever group it is in."""
        world = World.__new__(World)
        world.group, world.rank, world.size = None, 0, 1
        return world

    def broadcast(self, t: Tensor, rank: int) -> None:
        """Fill a contiguous tensor, wherever it lies, with that of one rank."""
        if self.size > 1:
            sent = t.to(self.device)
            dist.broadcast(sent, group=self.group, group_src=rank)
            if sent is not t:
                t.copy_(sent)

    @property
    def device(self) -> torch.device:
        """Where what these ranks exchange must lie."""
        nccl = self.size > 1 and "nccl" in str(dist.get_backend(self.group)) and torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

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
        if whole.is_cuda:
            out = whole.new_empty(whole.shape[0] // self.size, *whole.shape[1:])
            dist.reduce_scatter_tensor(out, whole.contiguous(), group=self.group)  # pyright: ignore[reportDeprecated]
            return out
        # gloo's own moves twice as many bytes.
        parts = torch.empty_like(whole)
        dist.all_to_all_single(parts, whole.contiguous(), group=self.group)
        return parts.view(self.size, -1, *whole.shape[1:]).sum(0)

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

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """One small picklable value of every rank, for reports between the run's own processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def meet() -> World:
    """The processes that torchrun or `accelerate launch` started, which exchange what lies on the CPU; or this one.

    Raises:
        ConfigError: they cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        try:
            # Of those that share long work one may have nothing left to do, and wait for hours.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        except (RuntimeError, ValueError) as error:
            said = f"the processes cannot find each other: {str(error)[:200]}; launch with torchrun"
            raise ConfigError(said) from None
    return World()


@contextmanager
def launched() -> Generator[World]:
    """`meet`, and part at the end.

    Raises:
        ConfigError: they cannot find each other.
    """
    before = dist.is_available() and dist.is_initialized()
    ranks = meet()
    try:
        yield ranks
    finally:
        if ranks.size > 1 and not before:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Result:
    """What one step's objectives say.

    Attributes:
        loss: scalar, the weighted sum of the terms.
        terms: name -> scalar, each term without its weight; without those whose `start_step` is still to come.
        observed: "NAME.WHAT" -> scalar, what the objectives observe of this batch.
        gradients: modality -> [n, D], d loss / d z of this rank's rows, exact for the global batch.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    observed: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def value_and_grad(
    objectives: Mapping[str, Objective],
    z: Embeddings,
    present: Mapping[str, Tensor],
    ids: Tensor,
    *,
    groups: Mapping[str, Tensor] | None = None,
    block: int | None = None,
    keep_bytes: int = 0,
    gradient_dtype: torch.dtype | None = None,
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
        keep_bytes: score tiles that fit into so many bytes are kept between the two passes, which saves a quarter of
            the products.
        gradient_dtype: of the two matrix products that make the gradients from score tiles. torch.bfloat16 is faster
            where the hardware has it, at a relative error of about 3e-3 of the embeddings' gradients; None is exact.
        step: the optimizer step, seed of whatever an objective draws.
        world: the ranks that share the batch; by default all.

    Raises:
        ValueError: an objective reads a modality that `z` lacks or has in half precision, no rows, or `block` is not
            positive.
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
            if z[modality].dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"z[{modality!r}] is {z[modality].dtype}; objectives take float32 or float64: give them z.float()"
                )
    dtype = next(iter(z.values())).dtype
    # Under the caller's no_grad every gradient would be 0, without a word.
    with torch.autocast(ids.device.type, enabled=False), torch.enable_grad():
        batch = _gather(objectives, z, present, ids, groups or {}, step, world)
        loss = torch.zeros((), dtype=dtype, device=ids.device)
        terms: dict[str, Tensor] = {}
        observed: dict[str, Tensor] = {}
        into = Accumulator(batch)
        settings = Settings(block, keep_bytes, gradient_dtype)
        for name, objective in objectives.items():
            if step < objective.start_step:
                continue
            with torch.no_grad():
                aux = objective.prepare(batch.candidates_of(objective), batch.present, batch.ids, step)
            terms[name], seen = evaluate(objective, batch, aux, settings, into)
            observed |= {f"{name}.{key}": value for key, value in seen.items()}
            loss = loss + objective.weight_at(step) * terms[name]
        gradients = into.reduce()
        with torch.no_grad():
            for objective in objectives.values():
                objective.update(batch.candidates_of(objective), batch.ids)
    return Result(loss, terms, gradients, observed)


def _gather(
    objectives: Mapping[str, Objective],
    z: Embeddings,
    present: Mapping[str, Tensor],
    ids: Tensor,
    groups: Mapping[str, Tensor],
    step: int,
    world: World,
) -> GlobalBatch:
    # Sorted: every rank must stack and gather in the same order.
    names, group_names = sorted(z), sorted(groups)
    # A copy only where rows are absent: at large batches it would be as large as all the rest.
    local = {
        m: z[m].detach() if present[m].all() else torch.where(present[m][:, None], z[m], 0).detach() for m in names
    }
    columns = [ids, *(groups[g] for g in group_names), *(present[m].long() for m in names)]
    table = world.gather(torch.stack(columns, dim=1))
    group_columns = table[:, 1 : 1 + len(group_names)].unbind(1)
    present_columns = table[:, 1 + len(group_names) :].unbind(1)
    travelling = {m for o in objectives.values() for m in (o.modalities if o.whole else o.candidates)}
    return GlobalBatch(
        world=world,
        local=local,
        z={m: world.gather(local[m]) for m in names if m in travelling},
        present={m: column.bool() for m, column in zip(names, present_columns, strict=True)},
        ids=table[:, 0].contiguous(),
        groups=dict(zip(group_names, group_columns, strict=True)),
        step=step,
    )
