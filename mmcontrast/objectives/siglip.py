"""SigLIP: every pair of a row and a candidate is a question of its own.

Letters: N rows of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcontrast.objectives.pairs import PairObjective
from mmcontrast.objectives.scores import Statistic, Statistics


class SigLIP(PairObjective):
    r"""Pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343, eq. 1 and algorithm 1).

    With s_ij = scale * <x_i, y_j> + bias,

        L = 1/P [sum_i log(1 + e^{-s_ii}) + sum_{i != j} log(1 + e^{s_ij})],

    where P is the number of rows that have both modalities (1 if none has), and the second sum is over the rows that
    have x and the candidates that have y, without equal ids and equal labels in `never_negative`. The loss is the
    weighted mean over the pairs of modalities. Scale and bias are shared by all pairs.
    """

    separable = True

    @dataclass(kw_only=True)
    class Config(PairObjective.Config):
        """Settings of SigLIP."""

        scale: float = 10.0
        """Start of the logit scale."""
        bias: float = -10.0
        """Start of the learned bias; as low as this, all pairs start as negatives."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.logit_bias = nn.Parameter(torch.tensor([config.bias]))

    def wants(self) -> frozenset[Statistic]:
        """Each row's sum over its negatives."""
        return frozenset({"softplus"})

    def bias(self) -> Tensor:
        """[1]."""
        return self.logit_bias

    def term(self, name: str, statistics: Statistics, present: Mapping[str, Tensor]) -> Tensor:
        """Share of the pair times the sum over rows, divided by the number of rows that have both modalities."""
        view = self.views[name]
        positives, negatives = statistics.positives, statistics.softplus
        assert positives is not None and negatives is not None
        paired = present[view.x] & present[view.y]
        matched = torch.where(paired, torch.logaddexp(-positives, torch.zeros_like(positives)), 0)
        unmatched = torch.where(present[view.x], negatives, 0)
        return view.share * (matched.sum() + unmatched.sum()) / paired.sum().clamp(min=1)

    def metrics(self) -> Mapping[str, float]:
        """Scale and bias."""
        return {**super().metrics(), "logit_bias": float(self.logit_bias.detach())}
