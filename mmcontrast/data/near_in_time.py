"""Two parts of one recording as a pair: what lies near in time means nearly the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.compose import Compose, pick
from mmcontrast.data.reader import Reader

_KINDS = ("audio", "timeseries")


class NearInTime(Compose):
    """The temporal positives of CVRL (Qian et al. 2021, arXiv:2008.03800, sec. 3.2), for sounds and signals.

    The gap between the beginnings of the two parts is drawn with a density that falls linearly to 0 at the longest gap
    (CVRL's P(t) with a = 1); the earlier one's place uniformly where both fit; which modality gets it, by a fair coin.
    A recording that has no room for such a gap gives the longest one that it has room for, one that is no longer than
    a part gives itself twice.
    """

    @dataclass(kw_only=True)
    class Config(Compose.Config):
        """Which recordings, and how long and how far apart the parts are."""

        of: str
        """The modality that is read: recordings of sound or signals."""
        other: str
        """The modality that gets the other part. `MultiEncoder.Config.same` gives it the same tower."""
        seconds: float
        """Length of a part; towers may crop it further."""
        gap: float
        """Longest time from the beginning of one part to that of the other, in seconds."""

        def made(self) -> tuple[str, ...]:
            """The other part."""
            return (self.other,)

    def __init__(self, config: Config, reader: Reader) -> None:
        """Check the settings.

        Raises:
            ConfigError: no such modality, one without time, or times that are not above 0.
        """
        super().__init__(config, reader)
        if config.of not in reader.members or reader.transforms[config.of].kind not in _KINDS:
            timed = [m for m in reader.members if reader.transforms[m].kind in _KINDS]
            raise ConfigError(
                f"NearInTime.of is {config.of!r}, no recording of sound or signals{suggest(config.of, timed)}"
            )
        kind = reader.transforms[config.of].kind
        if config.other in reader.transforms and reader.transforms[config.other].kind != kind:
            other = reader.transforms[config.other].kind
            raise ConfigError(
                f"NearInTime.other is {config.other!r}, of kind {other!r}; parts of {config.of!r} are {kind!r}"
            )
        for name in ("seconds", "gap"):
            if not 0 < getattr(config, name) < float("inf"):
                raise ConfigError(f"NearInTime.{name} is {getattr(config, name)}; it must be above 0 seconds")
        self.config = config

    def raw(self, position: int, draw: Random) -> Mapping[str, Any]:
        """The sample with two parts of its recording; as it is where it has none."""
        found, c = dict(super().raw(position, draw)), self.config
        if c.of not in found:
            return found
        whole = found[c.of]
        frames = min(max(1, round(c.seconds * whole.rate)), whole.frames)
        spare = whole.frames - frames
        # The inverse of the distribution function 1 - (1 - t)^2 of the falling density 2 (1 - t).
        gap = min(spare, round((1 - (1 - draw.random()) ** 0.5) * c.gap * whole.rate))
        first = pick(draw, spare - gap + 1)
        places = (first, first + gap) if draw.random() < 0.5 else (first + gap, first)
        parts = {m: whole.part(start, frames) for m, start in zip((c.of, c.other), places, strict=True)}
        return found | {m: part for m, part in parts.items() if m in self.reader.transforms}

    def state(self) -> dict[str, Any]:
        """The settings too."""
        c = self.config
        return super().state() | {"near_in_time": [c.of, c.other, c.seconds, c.gap]}
