"""What changes over a run as a pure function of the step: learning rates, and the weights of losses.

A resumed run, on any number of ranks, therefore needs no state of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmcontrast.config import ConfigError, Configurable


class Schedule(Configurable):
    """Base of all learning rate schedules: a linear rise to 1, then `after`."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every schedule has."""

        warmup: float = 0.1
        """Share of the steps over which the rate rises linearly."""

    def __init__(self, config: Config) -> None:
        if not 0 <= config.warmup < 1:
            raise ConfigError(f"schedule: warmup {config.warmup} must be in 0..1 (without 1)")
        self.warmup = config.warmup

    def factor(self, step: int, steps: int) -> float:
        """The rate at a step, relative to the top; step 0 is the first of `steps`."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return (step + 1) / rise
        return self.after(step - rise, max(1, steps - rise))

    def after(self, step: int, steps: int) -> float:
        """The same without the rise: `step` counts from its end, and `steps` are left there."""
        raise NotImplementedError


class Constant(Schedule):
    """The same rate all along, after the rise."""

    def after(self, step: int, steps: int) -> float:
        """1."""
        return 1.0


class Cosine(Schedule):
    """Half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts)."""

    @dataclass(kw_only=True)
    class Config(Schedule.Config):
        """Settings of the schedule."""

        final: float = 0.0
        """Rate that the cosine falls to, relative to the top; the last step is one short of it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.final = _share("final", config.final)

    def after(self, step: int, steps: int) -> float:
        """From 1 down to `final`."""
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * (step / steps)))


class WSD(Schedule):
    """Warm-up, stable, decay: constant, and a fall at the end alone.

    Hu et al. 2024 (MiniCPM, arXiv:2404.06395); the fall 1 - sqrt(x), better than a linear one, is of Hägele et al. 2024
    (arXiv:2405.18392, section 3).
    """

    @dataclass(kw_only=True)
    class Config(Schedule.Config):
        """Settings of the schedule."""

        decay: float = 0.2
        """Share of the steps, at the end, over which the rate falls."""
        shape: Literal["sqrt", "linear"] = "sqrt"
        """The fall, of x from 0 to 1: 1 - sqrt(x), or 1 - x."""
        final: float = 0.0
        """Rate that it falls to, relative to the top; the last step is one short of it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.decay, self.final = _share("decay", config.decay), _share("final", config.final)
        if config.warmup + config.decay > 1:
            raise ConfigError(f"schedule: warmup {config.warmup} and decay {config.decay} are more than the whole run")
        self.power = 0.5 if config.shape == "sqrt" else 1.0

    def after(self, step: int, steps: int) -> float:
        """1, and over the last `decay` of the run down to `final`."""
        # `steps` are those without the rise: the share is of the whole run.
        fall = round(self.decay * steps / (1 - self.warmup))
        left = steps - step
        if left > fall:
            return 1.0
        return self.final + (1 - self.final) * (1 - ((fall - left) / fall) ** self.power)


class RSqrt(Schedule):
    """One over the root of the step, and a linear end (Zhai et al. 2022, arXiv:2106.04560, section 3.5).

    As in big_vision, the curve is shifted to be 1 where the rise ends. The rate at a step does not depend on the length
    of the run until the end falls.
    """

    @dataclass(kw_only=True)
    class Config(Schedule.Config):
        """Settings of the schedule."""

        timescale: int = 10_000
        """Steps after the rise at which the rate is 1 / sqrt(2)."""
        cooldown: float = 0.1
        """Share of the steps, at the end, over which the rate also falls linearly to 0."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.timescale < 1:
            raise ConfigError(f"schedule: timescale is {config.timescale}; it must be at least 1 step")
        self.timescale, self.cooldown = config.timescale, _share("cooldown", config.cooldown)
        if config.warmup + config.cooldown > 1:
            raise ConfigError(
                f"schedule: warmup {config.warmup} and cooldown {config.cooldown} are more than the whole run"
            )

    def after(self, step: int, steps: int) -> float:
        """sqrt(timescale / (timescale + step)), times what is left of the cool-down."""
        end = max(1, round(self.cooldown * steps / (1 - self.warmup)))
        return math.sqrt(self.timescale / (self.timescale + step)) * min(1.0, (steps - step) / end)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"schedule: {name} {value} must be in 0..1")
    return value


Points = tuple[tuple[int, float], ...]
"""(step, factor), the steps rising."""


def check_points(points: Points) -> None:
    """Refuse points that make no function.

    Raises:
        ConfigError: steps that do not rise from 0 on, or a factor below 0.
    """
    steps = [step for step, _ in points]
    if any(step < 0 for step in steps) or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ConfigError(f"weight_schedule {points}: the steps must rise, from 0 or more")
    if any(not 0 <= factor < math.inf for _, factor in points):
        raise ConfigError(f"weight_schedule {points}: a factor must be 0 or more")


def interpolate(points: Sequence[tuple[int, float]], step: int) -> float:
    """The factor at a step: linear between the points, constant before and after them; 1 without any."""
    if not points:
        return 1.0
    if step <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if step <= b:
            return low + (high - low) * (step - a) / (b - a)
    return points[-1][1]
