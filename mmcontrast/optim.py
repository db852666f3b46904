"""Optimizer, parameter groups, and the schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError, Configurable


class AdamW(Configurable):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with CLIP's settings as defaults."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings of the optimizer."""

        lr: float = 5e-4
        """Learning rate at the top of the schedule."""
        betas: tuple[float, float] = (0.9, 0.98)
        """Decay of the running mean and of the running square."""
        eps: float = 1e-6
        """Added to the root of the running square."""
        weight_decay: float = 0.2
        """On matrices and kernels of the towers; vectors (biases, gains) and objectives have none."""

    def __init__(self, config: Config) -> None:
        if config.lr <= 0:
            raise ConfigError(f"lr is {config.lr}; it must be above 0")
        if not all(0 <= beta < 1 for beta in config.betas):
            raise ConfigError(f"betas are {config.betas}; both must be in 0..1, without 1")
        if config.eps <= 0 or config.weight_decay < 0:
            raise ConfigError(f"eps {config.eps} must be above 0, weight_decay {config.weight_decay} not below 0")
        self.config = config

    def groups(self, model: nn.Module, objectives: nn.Module) -> list[dict[str, object]]:
        """Trained parameters with and without weight decay, in a fixed order."""
        trained = [p for p in model.parameters() if p.requires_grad]
        own = [p for p in objectives.parameters() if p.requires_grad]
        decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        found: list[dict[str, object]] = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": plain + own, "weight_decay": 0.0},
        ]
        return [group for group in found if group["params"]]

    def optimizer(self, model: nn.Module, objectives: nn.Module) -> torch.optim.AdamW:
        """The optimizer over everything that trains.

        Raises:
            ConfigError: nothing trains.
        """
        groups = self.groups(model, objectives)
        if not groups:
            raise ConfigError("no parameter trains: every tower is frozen and no objective learns")
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps)


class Cosine(Configurable):
    """Linear warm-up, then half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings of the schedule."""

        warmup: float = 0.1
        """Share of the steps over which the rate rises linearly."""
        final: float = 0.0
        """Rate that the cosine falls to, relative to the top; the last step is one short of it."""

    def __init__(self, config: Config) -> None:
        if not 0 <= config.warmup < 1 or not 0 <= config.final <= 1:
            raise ConfigError(
                f"schedule: warmup {config.warmup} must be in 0..1 (without 1), final {config.final} in 0..1"
            )
        self.config = config

    def factor(self, step: int, steps: int) -> float:
        """The rate at a step, relative to the top; step 0 is the first of `steps`."""
        rise = max(1, round(self.config.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, steps - rise)
        return self.config.final + (1 - self.config.final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients down to a global 2-norm of at most `limit`; returns the norm before."""
    with_grad = [p for p in parameters if p.grad is not None]
    return nn.utils.clip_grad_norm_(with_grad, math.inf if limit is None else limit)
