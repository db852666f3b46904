"""The protocol of every objective: `loss = finalize(merge over blocks of partial(block))`.

A rank is only a large block. An objective sees tensors, never ranks: `partial` looks at some anchor rows against
all candidates and returns totals that merge by sum or by log-sum-exp, `finalize` makes the loss of merged totals.
The engine (`mmcontrast.sharding.value_and_grad`) does the rest, so blocks, micro-batches and ranks give one gradient.

Letters: B anchors of a block, N rows of the global batch, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmcontrast.batch import Embeddings
from mmcontrast.config import ConfigError, Configurable
from mmcontrast.schedules import Points, check_points, interpolate


@dataclass(frozen=True)
class Block:
    """Some anchors of the global batch against candidates of the whole of it.

    Attributes:
        anchors: modality -> [B, D], this block's rows of every modality; zeros where the row lacks it.
        z: modality -> [N, D] of the modalities that the objective names in `candidates`.
        present: modality -> [N] bool.
        rows: [B] int64, positions of the anchors in 0..N-1; the positive of row i is candidate i.
        ids: [N] int64; equal ids are never negatives of each other.
        groups: name -> [N] int64.
        aux: whatever `prepare` returned.
    """

    anchors: Embeddings
    z: Embeddings
    present: Mapping[str, Tensor]
    rows: Tensor
    ids: Tensor
    groups: Mapping[str, Tensor]
    aux: Mapping[str, Tensor]


@dataclass(frozen=True)
class Totals:
    """What merges over blocks and ranks: `sums` by addition, `logsumexps` by log-sum-exp, elementwise."""

    sums: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    logsumexps: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Objective(nn.Module, Configurable):
    """Base of all objectives. Parameters (temperature, bias, prototypes) belong to the objective, not to the model.

    `partial` must be pure (it reads state and never writes it: it may run twice) and free of randomness: what is
    random is drawn once in `prepare`, from `step`, so that every rank draws the same.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every objective has."""

        weight: float = 1.0
        """Factor of this term in the loss."""
        weight_schedule: Points = ()
        """(optimizer step, factor) …: the weight is multiplied by the factor, linear in between; () is 1 throughout."""
        start_step: int = 0
        """Optimizer step from which on this term counts."""

    whole: ClassVar[bool] = False
    """True for a formula of the whole batch only: evaluated on all rows on every rank; right, not memory-scalable."""

    linear: ClassVar[bool] = False
    """True if `finalize` is linear in sums and takes no log-sum-exps: then one pass over the blocks suffices."""

    candidates: Sequence[str]
    """Modalities whose rows every block must see; only these travel between ranks."""
    modalities: Sequence[str]
    """All modalities that the objective reads, candidates among them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.start_step < 0:
            raise ConfigError(f"start_step is {config.start_step}; it must be 0 or more")
        check_points(config.weight_schedule)
        self.weight, self.weight_schedule, self.start_step = config.weight, config.weight_schedule, config.start_step

    def weight_at(self, step: int) -> float:
        """Factor of this term in the loss of a step."""
        return self.weight * interpolate(self.weight_schedule, step)

    def prepare(self, z: Embeddings, present: Mapping[str, Tensor], ids: Tensor, step: int) -> Mapping[str, Tensor]:
        """Once per step, without gradient, on the whole batch, with the same result on every rank.

        `z` holds the candidates, [N, D] each.
        """
        return {}

    def partial(self, block: Block) -> Totals:
        """Totals of one block."""
        raise NotImplementedError

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        """Merged totals -> the scalar loss. `present` (modality -> [N] bool) gives each term its count."""
        raise NotImplementedError

    def update(self, z: Embeddings, ids: Tensor) -> None:
        """After the gradient, without gradient, on the whole batch: queues, running averages, state per id."""

    def clamp(self) -> None:
        """After the optimizer's step: bring the parameters back into their range."""

    def observe(self, totals: Totals, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What a person wants to know of this step, without gradient, from the merged totals."""
        return {}

    def metrics(self) -> Mapping[str, float]:
        """What a person wants to watch of the parameters, such as the temperature."""
        return {}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Metric -> the range that `clamp` keeps it in, of those that learn."""
        return {}

    def chance(self, counts: Mapping[str, int]) -> float | None:
        """About the loss, without its weight, of embeddings that tell nothing apart; None where nothing is known.

        `counts` is modality -> rows of the global batch that have it.
        """
        return None


def masked_logsumexp(scores: Tensor, masked: Tensor, dim: int) -> Tensor:
    """log-sum-exp over the entries that are not masked; -inf, with zero gradient, where none is left."""
    empty = masked.all(dim)
    # Of nothing but -inf torch's second derivative is NaN, so where none is left the scores stay, to be covered after.
    found = torch.logsumexp(scores.masked_fill(masked & ~empty.unsqueeze(dim), -torch.inf), dim)
    return found.masked_fill(empty, -torch.inf)


def log_odds_against(off: Tensor, positive: Tensor) -> Tensor:
    """log(1 + e^{off - positive}): 0 where off is -inf, and finite derivatives of any order wherever it is finite.

    Torch's softplus with a threshold that float64 does not see; its logaddexp has NaN for a second derivative there.
    """
    return nn.functional.softplus(off - positive, threshold=50.0)


def plain_loss(
    objectives: Mapping[str, Objective],
    z: Embeddings,
    present: Mapping[str, Tensor],
    ids: Tensor,
    *,
    groups: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> Tensor:
    """The weighted loss of a whole batch in one differentiable piece: no blocks, no ranks, O(N²) memory.

    What the engine computes, by autograd alone: for checks, and for whoever wants second derivatives. The rows of
    `z` that lack a modality must be zero.
    """
    rows = torch.arange(len(ids), device=ids.device)
    loss = next(iter(z.values())).new_zeros(())
    for objective in objectives.values():
        if step < objective.start_step:
            continue
        seen = {m: z[m] for m in (objective.modalities if objective.whole else objective.candidates)}
        with torch.no_grad():
            aux = objective.prepare(seen, present, ids, step)
        anchors = {m: z[m] for m in objective.modalities}
        totals = objective.partial(Block(anchors, seen, present, rows, ids, groups or {}, aux))
        loss = loss + objective.weight_at(step) * objective.finalize(totals, present)
    return loss
