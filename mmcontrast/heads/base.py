"""What a head is: a term of the loss that needs tokens and no other sample.

An objective compares pooled embeddings of the whole batch. A head reads the tokens of one sample at a time, so its
gradient needs nothing of the others: it runs in the second pass of the gradient cache, on a micro-batch, and nothing
of it is kept. Its term is sum / count, where the count is of the global batch and known before any forward. A mean of
the micro-batches' means would weigh a token by how few others its micro-batch has.

Letters: B rows, n_m rows that have modality m, T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch
from mmcontrast.config import Configurable
from mmcontrast.schedules import Points, check_points, interpolate


class Tower(Protocol):
    """What a head must know of an encoder to be built for it."""

    def example(self) -> Any:
        """One valid input row."""
        ...

    def __call__(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs -> pooled [B, C], and tokens [B, T, C] where the tower has them."""
        ...


class Head(nn.Module, Configurable):
    """Base of all heads. Its parameters are part of the model, which builds it from its towers by name."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every head has."""

        weight: float = 1.0
        """Factor of this term in the loss."""
        weight_schedule: Points = ()
        """(optimizer step, factor) …: the weight is multiplied by the factor, linear in between; () is 1 throughout."""

    modalities: Sequence[str]
    """Whose inputs and tokens it reads; rows that lack one of them contribute nothing and are not counted."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_points(config.weight_schedule)
        self.weight, self.weight_schedule = config.weight, config.weight_schedule

    def weight_at(self, step: int) -> float:
        """Factor of this term in the loss of a step."""
        return self.weight * interpolate(self.weight_schedule, step)

    def count(self, batch: Batch) -> Tensor:
        """How many terms the sum over a batch has, scalar; read off the inputs, before any forward."""
        raise NotImplementedError

    def forward(self, inputs: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> Tensor:
        """The sum over rows, scalar; modality -> inputs and tokens [B, T, C] of rows that have all modalities."""
        raise NotImplementedError


def in_common(rows: Mapping[str, Tensor], modalities: Sequence[str]) -> dict[str, Tensor]:
    """Modality -> the places, among its own n_m rows, of the rows that have all of the modalities."""
    both = rows[modalities[0]]
    for modality in modalities[1:]:
        both = both[torch.isin(both, rows[modality])]
    return {m: torch.searchsorted(rows[m], both) for m in modalities}
