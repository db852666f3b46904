"""Augmentations that bend time: where each of a signal's samples is taken from.

All are one map of places, so several of them cost one interpolation. As in Um et al. 2017 (arXiv:1706.00527; time warp)
and Le Guennec et al. 2016 (window slice and warp). Letters: C channels, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, Configurable

_KNOTS = 4  # between which the speed of a time warp changes


class Warp(Configurable):
    """Draws places in 0..1, one for each of S samples, ascending."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """How much; 0 leaves time as it is."""

        time: float = 0.0
        """Deviation of the logarithm of the speed, which wanders between five random ones."""
        slice: float = 0.0
        """Largest share that is cut away at the ends before the rest is stretched to the whole."""
        window: float = 0.0
        """How often a random tenth is played at half or twice its speed."""

    def __init__(self, config: Config) -> None:
        if config.time < 0 or not 0 <= config.slice < 1 or not 0 <= config.window <= 1:
            raise ConfigError(
                f"warp: time {config.time} must not be below 0, slice {config.slice} in 0..1 (without 1), window "
                f"{config.window} a probability"
            )
        self.config = config

    def draw(self, samples: int) -> Tensor | None:
        """[S] places, or None if time stays as it is."""
        c = self.config
        if not (c.time or c.slice or c.window):
            return None
        speed = torch.ones(samples)
        if c.time:
            knots = torch.randn(1, 1, _KNOTS + 1) * c.time
            speed = torch.nn.functional.interpolate(knots, samples, mode="linear", align_corners=True)[0, 0].exp()
        if c.window and float(torch.rand(())) < c.window:
            length = max(1, samples // 10)
            start = int(torch.randint(samples - length + 1, ()))
            speed[start : start + length] *= 2.0 if float(torch.rand(())) < 0.5 else 0.5
        places = speed.cumsum(0) - speed[0]
        places = places / places[-1].clamp(min=1e-6)
        if c.slice:
            kept = 1 - float(torch.rand(())) * c.slice
            places = float(torch.rand(())) * (1 - kept) + places * kept
        return places


def take(x: Tensor, places: Tensor) -> Tensor:
    """[C, S] at places [S'] in 0..1, linearly between samples: [C, S']."""
    at = places * (x.shape[1] - 1)
    low = at.floor().long().clamp(max=x.shape[1] - 1)
    high = (low + 1).clamp(max=x.shape[1] - 1)
    return torch.lerp(x[:, low], x[:, high], (at - low).to(x.dtype))
