"""Whose turn it is: sources share the turns of a run in proportion to their weights, as a pure function of the turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError

_PERIOD = 10_000  # turns after which the pattern repeats: weights count in steps of 1/10000


@dataclass(frozen=True)
class _Phase:
    """Turns from `first` on, until a source is used up."""

    first: int
    before: NDArray[np.int64]  # [K] turns that each source has had before
    whose: NDArray[np.int64]  # [P] the source of each turn of a period
    dealt: NDArray[np.int64]  # [P + 1, K] turns of each source before a turn of the period

    def counts(self, turn: int) -> NDArray[np.int64]:
        """[K] turns that each source has had before this one."""
        periods, place = divmod(turn - self.first, len(self.whose))
        return self.before + periods * self.dealt[-1] + self.dealt[place]


class Schedule:
    """`schedule.at(turn)` is the source whose turn it is, and how many turns it has had before.

    Turns are spread as evenly as can be, so after any number of them each source has had its share to within a turn or
    two per source. A source that has had all its turns leaves its share to the others.

    Attributes:
        turns: how many there are, or None where they never end.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        """K sources with weights above 0, of which each has at most so many turns; None has no limit."""
        self._phases: list[_Phase] = []
        self.turns: int | None = None
        first, before = 0, np.zeros(len(weights), dtype=np.int64)
        active = [k for k, limit in enumerate(limits) if limit is None or limit > 0]
        while active:
            phase = _Phase(first, before, *_deal(weights, active))
            self._phases.append(phase)
            ends = {k: _turn_of(phase, k, limit) for k in active if (limit := limits[k]) is not None}
            if not ends:
                return
            first = min(ends.values()) + 1
            before = phase.counts(first)
            active = [k for k in active if (limit := limits[k]) is None or before[k] < limit]
        self.turns = first

    def at(self, turn: int) -> tuple[int, int]:
        """Turn -> (source, how many turns it has had before)."""
        phase = self._phase(turn)
        source = int(phase.whose[(turn - phase.first) % len(phase.whose)])
        return source, int(phase.counts(turn)[source])

    def counts(self, turn: int) -> list[int]:
        """[K] turns that each source has had before this one."""
        return self._phase(turn).counts(turn).tolist()

    def _phase(self, turn: int) -> _Phase:
        if self.turns is not None and turn > self.turns:
            raise ConfigError(f"turn {turn} of {self.turns}: all sources are used up")
        return next(p for p in reversed(self._phases) if turn >= p.first)


def _deal(weights: Sequence[float], active: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whose turns a period has, and how many of each source before each turn."""
    quotas = _quotas([weights[k] for k in active])
    # A source with q turns has them at the middles of q equal parts of the period.
    times = np.concatenate([(np.arange(q) + 0.5) / q for q in quotas])
    whose = np.repeat(np.asarray(active), quotas)[np.argsort(times, kind="stable")]
    dealt = np.zeros((len(whose) + 1, len(weights)), dtype=np.int64)
    dealt[np.arange(1, len(whose) + 1), whose] = 1
    return whose, dealt.cumsum(0)


def _quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Turns of a period for each source: in proportion, at least one, and no period longer than need be."""
    shares = np.asarray(weights) / sum(weights) * _PERIOD
    quotas = np.maximum(np.round(shares).astype(np.int64), 1)
    return quotas // np.gcd.reduce(quotas)


def _turn_of(phase: _Phase, source: int, limit: int) -> int:
    """The turn at which a source has its last one."""
    left = limit - int(phase.before[source]) - 1
    periods, place = divmod(left, int(phase.dealt[-1, source]))
    return phase.first + periods * len(phase.whose) + int(np.flatnonzero(phase.whose == source)[place])
