"""InfoNCE over pairs of modalities: the loss of CLIP and ALIGN.

Letters: B anchors of a block, N rows of the global batch, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import Block, Objective, Totals, masked_logsumexp


class InfoNCE(Objective):
    r"""Symmetric InfoNCE, the loss of CLIP (Radford et al. 2021, arXiv:2103.00020, fig. 3).

    For a pair of modalities (x, y) with scores s_ij = scale * <x_i, y_j>,

        L = 1/2 mean_i [log(e^{s_ii} + sum_j e^{s_ij}) - s_ii] + 1/2 the same over columns,

    where i runs over the P rows that have both modalities and j over the rows that are allowed as negatives: they
    have the other modality, another id, and no equal label in `never_negative`. So a row without text is still a
    negative image for the texts of others. The loss is the mean over the pairs of modalities.

    We write each row as log(1 + e^{off - s_ii}) with off the log-sum-exp of the negatives alone: its gradient is
    off / (off + diagonal) itself and stays right when the softmax saturates, where 1 - softmax_ii cancels to zero.

    Only the second modality of a pair travels between ranks: the column normalisers merge as totals.
    """

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        """Settings of InfoNCE."""

        pairs: tuple[tuple[str, str], ...] = (("image", "text"),)
        """Pairs of modalities to contrast; the second one of each pair is gathered over ranks."""
        scale: float = 1 / 0.07
        """Start of the logit scale, the inverse temperature."""
        max_scale: float = 100.0
        """The learned scale is kept within 1 and this."""
        learn_scale: bool = True
        """Learn the scale, or keep its start."""
        never_negative: tuple[str, ...] = ()
        """Groups (such as patient) whose equal labels are never negatives of each other."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not config.pairs:
            raise ConfigError("InfoNCE needs at least one pair of modalities; `pairs` is empty")
        for x, y in config.pairs:
            if x == y:
                raise ConfigError(f"InfoNCE contrasts two modalities, got the pair ({x!r}, {y!r})")
        if not 1 <= config.scale <= config.max_scale:
            raise ConfigError(f"InfoNCE scale {config.scale} is outside 1..max_scale ({config.max_scale})")
        self.config = config
        self.modalities = tuple(dict.fromkeys(m for pair in config.pairs for m in pair))
        self.candidates = tuple(dict.fromkeys(y for _, y in config.pairs))
        # [1], not a scalar: fully_shard refuses 0-d parameters.
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]), requires_grad=config.learn_scale)

    def partial(self, block: Block) -> Totals:
        """Per pair: the rows' loss (scalar), the diagonal [N] and the columns' negatives [N]."""
        scale = self.log_scale.exp()
        rows = block.rows
        same = block.ids[rows, None] == block.ids  # [B, N]
        for name in self.config.never_negative:
            if name not in block.groups:
                raise ConfigError(
                    f"InfoNCE never_negative names the group {name!r}, which the data do not carry; "
                    f"groups: {', '.join(block.groups) or 'none'}"
                )
            same = same | (block.groups[name][rows, None] == block.groups[name])
        sums: dict[str, Tensor] = {}
        logsumexps: dict[str, Tensor] = {}
        for x, y in self.config.pairs:
            scores = scale * block.anchors[x] @ block.z[y].T  # [B, N]
            has_x, has_y = block.present[x][rows], block.present[y]
            paired = has_x & has_y[rows]
            diagonal = scores[torch.arange(len(rows), device=rows.device), rows]
            masked = same | ~has_x[:, None] | ~has_y
            off = masked_logsumexp(scores, masked, dim=1)
            zero = torch.zeros_like(off)
            sums[f"{x},{y}.rows"] = torch.where(paired, torch.logaddexp(zero, off - diagonal), zero).sum()
            diagonals = scores.new_zeros(len(block.ids))
            sums[f"{x},{y}.diagonal"] = diagonals.index_put((rows,), torch.where(paired, diagonal, zero))
            logsumexps[f"{x},{y}.columns"] = masked_logsumexp(scores, masked, dim=0)
        return Totals(sums, logsumexps)

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        """Mean over pairs of the two directions, each divided by the number of rows that have both modalities."""
        loss = torch.zeros((), dtype=self.log_scale.dtype, device=self.log_scale.device)
        for x, y in self.config.pairs:
            paired = present[x] & present[y]
            count = paired.sum().clamp(min=1)
            off, diagonal = totals.logsumexps[f"{x},{y}.columns"], totals.sums[f"{x},{y}.diagonal"]
            zero = torch.zeros_like(off)
            columns = torch.where(paired, torch.logaddexp(zero, off - diagonal), zero).sum()
            loss = loss + (totals.sums[f"{x},{y}.rows"] + columns) / (2 * count)
        return loss / len(self.config.pairs)

    def clamp(self) -> None:
        """Keep the scale within 1..max_scale, as CLIP does."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(self.config.max_scale))

    def metrics(self) -> Mapping[str, float]:
        """The logit scale."""
        return {"logit_scale": float(self.log_scale.detach().exp())}
