"""InfoNCE over pairs of modalities: the loss of CLIP and ALIGN; and DCL, which takes the positive out of it.

Letters: N rows of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import log_odds_against
from mmcontrast.objectives.pairs import DirectedPairs, Direction
from mmcontrast.objectives.scores import Statistic


class InfoNCE(DirectedPairs):
    r"""Symmetric InfoNCE, the loss of CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3).

    For a pair of modalities (x, y) with scores s_ij = scale * <x_i, y_j>,

        L = 1/2 mean_i [log(e^{s_ii} + sum_j e^{s_ij}) - s_ii] + 1/2 the same over columns,

    where i runs over the rows that have both modalities and j over the rows that are allowed as negatives: they
    have the other modality, another id, and no equal label in `never_negative`. The loss is the weighted mean over
    the pairs. With `label_smoothing` e the target of a row is 1 - e on its positive plus e spread evenly over the
    positive and the negatives (ALIGN, Jia et al. 2021, arXiv:2102.05918).

    We write each row as log(1 + e^{off - s_ii}) with off the log-sum-exp of the negatives alone: its gradient is
    off / (off + diagonal) itself and stays right when the softmax saturates, where 1 - softmax_ii cancels to zero.

    Only the second modality of a pair travels between ranks, as the column normalisers merge as totals; with a
    temperature for each direction both do.
    """

    @dataclass(kw_only=True)
    class Config(DirectedPairs.Config):
        """Settings of InfoNCE."""

        label_smoothing: float = 0.0
        """Share of the target that is spread over all candidates; ALIGN uses 0.1."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= config.label_smoothing < 1:
            raise ConfigError(f"InfoNCE label_smoothing is {config.label_smoothing}; it must be in 0..1, below 1")
        self.config = config

    def wants(self) -> frozenset[Statistic]:
        """Normalisers, and for the smoothing plain sums and numbers."""
        wants = super().wants()
        if self.config.label_smoothing:
            wants |= frozenset[Statistic]({"row_sums", "row_counts"})
            if self.both:
                wants |= frozenset[Statistic]({"column_sums", "column_counts"})
        return wants

    def chance(self, counts: Mapping[str, int]) -> float:
        """The logarithm of the candidates of a row: the other modality's rows."""
        backward = 0.5 if self.both else 0.0
        shares = [(v.share, math.log(max(1, counts[v.y])), math.log(max(1, counts[v.x]))) for v in self.views.values()]
        return sum(share * ((1 - backward) * there + backward * back) for share, there, back in shares)

    def row_loss(self, rows: Direction) -> Tensor:
        """log(1 + e^{off - positive}), and the smoothing."""
        losses = log_odds_against(rows.off, rows.positive)
        if rows.sums is not None and rows.counts is not None:
            mean = (rows.positive + rows.sums) / (1 + rows.counts)
            losses = losses + self.config.label_smoothing * (rows.positive - mean)
        return losses


class DCL(DirectedPairs):
    r"""Decoupled contrastive loss (Yeh et al. 2022, arXiv:2110.06848, eq. 6), in both directions of a pair.

        L_i = -w_i s_ii + log sum_j e^{s_ij}

    over the negatives j alone: the positive is not in the denominator, so small batches learn as fast as large ones.
    With `sigma`, w_i = 2 - N softmax_i(cos_ii / sigma) over the N pairs of the global batch (DCLW, their eq. 7),
    without gradient. Our denominator has the other modality only, not further views of the same one. The loss can be
    negative and bounds no mutual information. A row without negatives has no loss.
    """

    @dataclass(kw_only=True)
    class Config(DirectedPairs.Config):
        """Settings of DCL."""

        scale: float = 10.0
        """Start of the logit scale; the paper's temperature is 0.1."""
        sigma: float | None = None
        """Of the weights of DCLW, which make easy pairs count less (the paper: 0.5); None weighs all alike."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.sigma is not None and config.sigma <= 0:
            raise ConfigError(f"DCL sigma is {config.sigma}; it must be above 0, or None")
        self.config = config
        self.separable = self.separable and config.sigma is None

    def row_loss(self, rows: Direction) -> Tensor:
        """The negatives against the weighted positive."""
        weights: Tensor | float = 1.0
        if self.config.sigma is not None:
            cosines = (rows.positive / rows.scale).detach()
            shares = torch.softmax((cosines / self.config.sigma).masked_fill(~rows.paired, -torch.inf), 0)
            # Of no pairs at all the shares are NaN, whose gradient no later mask would stop.
            weights = 2 - rows.paired.sum() * torch.where(rows.paired, shares, 0)
        return torch.where(rows.off.isneginf(), 0, rows.off - weights * rows.positive)
