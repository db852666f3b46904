"""A moving average of the weights, which often evaluates better than the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.encoders.multi import MultiEncoder


class EMA(Configurable):
    """Exponential moving average of the model (Polyak and Juditsky 1992), by timm's `ModelEmaV3`."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Whether, and how slow."""

        decay: float | None = None
        """Share of the average that a step keeps, such as 0.9999; None keeps no average."""
        warmup: bool = True
        """Rise to it as 1 - (1 + step)^(-2/3), so that the first weights are soon forgotten."""

    def __init__(self, config: Config, model: MultiEncoder) -> None:
        """Copy the model; before a wrapper has put hooks into it."""
        if config.decay is None or not 0 < config.decay < 1:
            raise ConfigError(f"ema.decay is {config.decay}; it must be above 0 and below 1, or None")
        from timm.utils.model_ema import ModelEmaV3

        self._average: Any = ModelEmaV3(model, decay=config.decay, use_warmup=config.warmup)
        self.model.requires_grad_(False)

    @property
    def model(self) -> MultiEncoder:
        """The model with averaged weights, in evaluation mode."""
        return cast(MultiEncoder, self._average.module)

    @torch.no_grad()
    def update(self, model: MultiEncoder, step: int) -> None:
        """Take in the weights after a step; 0 is the first, whose weights are the first average.

        Weights may be spread over ranks: each averages its own parts, for which timm's update has no way.
        """
        decay = self._average.get_decay(step + 1)
        for average, weights in zip(_here(self.model), _here(model), strict=True):
            if average.is_floating_point():
                average.lerp_(weights, 1 - decay)
            else:
                average.copy_(weights)


def _here(model: MultiEncoder) -> list[Tensor]:
    """What of each parameter and buffer lies on this rank."""
    tensors: list[Any] = list(model.state_dict().values())
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
