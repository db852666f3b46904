"""Several and soft positives: each row has a target distribution over candidates.

Targets come from labels that samples share (`MultiPositive`) or from a frozen tower's similarities (`CWCL`). A tile of
scores is looked at by autograd, in blocks and in one pass; every direction is a matrix of its own.

Letters: B rows of a block, N rows of the global batch, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, suggest
from mmcontrast.objectives.base import Block, Totals, log_odds_against, masked_logsumexp
from mmcontrast.objectives.pairs import ScaledPairs

IDS = "id"


class RowTargets(ScaledPairs):
    """Base: cross-entropy of each row's softmax with a target distribution, over pairs of modalities.

    A row counts if it has both modalities of the pair; candidates are all rows that have the other one.
    """

    linear = True

    @dataclass(kw_only=True)
    class Config(ScaledPairs.Config):
        """Which pairs, and at which scale."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shares: dict[tuple[str, str], float] = {}
        for (x, y), share in self.pair_shares.items():
            self.shares |= {(x, y): share / 2, (y, x): share / 2}

    def targets(self, block: Block, x: str, y: str) -> tuple[Tensor, Tensor]:
        """Weights [B, N] >= 0 of what rows of x should match, and [B, N] bool of what is neither that nor a negative.

        A row's own candidate must have a weight. Weights need not add up to 1.
        """
        raise NotImplementedError

    def row_loss(self, scores: Tensor, target: Tensor, off: Tensor, positive: Tensor) -> Tensor:
        """[B] from scores and targets [B, N], and the log-sum-exps over negatives and positives [B]."""
        return _softmax_loss(scores, target, off, positive)

    def partial(self, block: Block) -> Totals:
        """Per direction, the sum of the rows' losses, and how many pairs were left out."""
        sums: dict[str, Tensor] = {}
        for x, y in self.shares:
            scores = self.log_scale.exp() * block.anchors[x] @ block.z[y].T
            has_x, has_y = block.present[x][block.rows], block.present[y]
            with torch.no_grad():
                weights, left_out = self.targets(block, x, y)
                weights = weights * has_y
                target = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
                matched = weights > 0
                left_out = left_out & ~matched & has_y & has_x[:, None]
                not_negative = matched | left_out | ~has_y
            off = masked_logsumexp(scores, not_negative, dim=1)
            positive = masked_logsumexp(scores, ~matched, dim=1)
            paired = has_x & has_y[block.rows]
            losses = self.row_loss(scores, target, off, positive)
            sums[f"{x},{y}"] = torch.where(paired, losses, 0).sum()
            sums[f"{x},{y}/masked"] = left_out.sum().to(scores.dtype)
        return Totals(sums)

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        """Weighted mean over pairs and directions of the mean over the rows that have both modalities."""
        means = [
            share * totals.sums[f"{x},{y}"] / (present[x] & present[y]).sum().clamp(min=1)
            for (x, y), share in self.shares.items()
        ]
        return torch.stack(means).sum()

    def observe(self, totals: Totals, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """How many pairs of rows were neither positives nor negatives, both directions counted."""
        return {"masked_negatives": torch.stack([totals.sums[f"{x},{y}/masked"] for x, y in self.shares]).sum()}


def _softmax_loss(scores: Tensor, target: Tensor, off: Tensor, positive: Tensor) -> Tensor:
    """-sum_j t_j log softmax_j, as log(1 + e^{off - positive}) + (positive - sum_j t_j s_j).

    The second part is 0 where there is one positive. Said so, its gradient is too, and a saturated row keeps the
    small gradient of the first.
    """
    several = (target > 0).sum(1) > 1
    spread = torch.where(several, positive - (target * scores).sum(1), 0)
    return log_odds_against(off, positive) + spread


class MultiPositive(RowTargets):
    r"""Contrast with several positives: rows that share a label, such as captions of one image or scans of one patient.

    Row i has itself at weight 1 and other rows at the weight of the label they share with it (the largest, if several);
    normalised, these are its targets t_ip. With N_i the negatives and s the scaled scores, the loss of a row is

    - "all": -sum_p t_ip log [e^{s_ip} / sum_{j in P_i or N_i} e^{s_ij}], the L_out of SupCon (Khosla et al. 2020,
      arXiv:2004.11362, eq. 2) between modalities.
    - "decoupled": -sum_p t_ip log [e^{s_ip} / (e^{s_ip} + sum_{n in N_i} e^{s_in})]: positives do not compete with
      each other (DEXML, Gupta et al. 2024, arXiv:2310.10636, eq. 4).
    - "negatives": -sum_p t_ip s_ip + log sum_{n in N_i} e^{s_in}, as in DCL (arXiv:2110.06848).

    Equal ids are positives at weight 1. Both directions of each pair count half.
    """

    @dataclass(kw_only=True)
    class Config(RowTargets.Config):
        """Settings of several positives."""

        positives: dict[str, float] = field(default_factory=dict[str, float])
        """Group (such as caption or patient) -> weight of rows with an equal label, beside 1 for the row itself."""
        never_negative: tuple[str, ...] = ()
        """Groups whose equal labels are no negatives, and no positives unless `positives` says so."""
        denominator: Literal["all", "decoupled", "negatives"] = "all"
        """What a positive competes with."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name, weight in config.positives.items():
            if weight <= 0:
                raise ConfigError(f"MultiPositive weight {weight} of {name!r} must be above 0; never_negative masks")
        self.config = config

    def targets(self, block: Block, x: str, y: str) -> tuple[Tensor, Tensor]:
        """1 for equal ids, else the largest weight of an equal label."""
        weights = self._equal(block, IDS).to(block.anchors[x].dtype)
        for name, weight in self.config.positives.items():
            weights = torch.maximum(weights, weight * self._equal(block, name).to(weights.dtype))
        left_out = torch.zeros_like(weights, dtype=torch.bool)
        for name in self.config.never_negative:
            left_out |= self._equal(block, name)
        return weights, left_out

    def row_loss(self, scores: Tensor, target: Tensor, off: Tensor, positive: Tensor) -> Tensor:
        """By the denominator."""
        if self.config.denominator == "all":
            return _softmax_loss(scores, target, off, positive)
        if self.config.denominator == "negatives":
            return torch.where(off.isneginf(), 0, off - (target * scores).sum(1))
        each = log_odds_against(off[:, None], scores)
        return torch.where(target > 0, target * each, 0).sum(1)

    def _equal(self, block: Block, name: str) -> Tensor:
        if name != IDS and name not in block.groups:
            raise ConfigError(
                f"MultiPositive names the group {name!r}, which the data do not carry{suggest(name, block.groups)}"
            )
        labels = block.ids if name == IDS else block.groups[name]
        return labels[block.rows, None] == labels


class CWCL(RowTargets):
    r"""Continuously weighted contrastive loss (Srinivasa et al. 2023, arXiv:2309.14580, eq. 4).

    For a pair (x, y) whose y comes from a pretrained, mostly frozen tower, candidates count as positives by how
    similar they are to the row's own candidate within y,

        w_ij = (<y_i, y_j> / 2 + 1/2)^power,    L_i = -sum_j (w_ij / sum_k w_ik) log softmax_j(scale <x_i, y_j>);

    the direction from y to x is plain cross-entropy. Weights carry no gradient. At power 1, the paper's, unrelated
    candidates (cosine 0) still weigh 1/2; larger powers sharpen. With `both_sides` the direction from y to x has soft
    targets too, by the similarities within y, normalised over its own rows.
    """

    @dataclass(kw_only=True)
    class Config(RowTargets.Config):
        """Settings of the weights."""

        power: float = 1.0
        """Exponent of the similarities."""
        both_sides: bool = False
        """Soft targets from y to x too."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.power <= 0:
            raise ConfigError(f"CWCL power is {config.power}; it must be above 0")
        self.config = config

    def targets(self, block: Block, x: str, y: str) -> tuple[Tensor, Tensor]:
        """Soft ones towards the pretrained side; towards the other, the row itself, equal ids left out."""
        same = block.ids[block.rows, None] == block.ids
        soft = (x, y) in self.config.pairs
        if not soft and not self.config.both_sides:
            own = block.rows[:, None] == torch.arange(len(block.ids), device=block.rows.device)
            return own.to(block.anchors[x].dtype), same
        frozen = y if soft else x
        weights = (block.anchors[frozen] @ block.z[frozen].T / 2 + 0.5).clamp(min=0) ** self.config.power
        # A candidate whose frozen side is absent has no similarity: it is a negative, unless it is the same sample.
        return weights * block.present[frozen], same
