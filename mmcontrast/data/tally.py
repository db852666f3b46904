"""What a run has seen so far: examples of each source and modality, and the damage that was replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError


class Tally:
    """Counts of one rank; `merged` makes those of all.

    Attributes:
        held: (source, modality) -> examples that had it.
        cut: (source, modality) -> examples of which a part was left out, for its length.
        damage: (shard, reason) -> samples that were replaced; of several sources, SOURCE/shard.
    """

    def __init__(self) -> None:
        self.held: Counter[tuple[str, str]] = Counter()
        self.cut: Counter[tuple[str, str]] = Counter()
        self.damage: Counter[tuple[str, str]] = Counter()

    def add(self, batch: Batch) -> None:
        """Count a batch of this rank."""
        for counts, found in ((self.held, batch.rows), (self.cut, batch.cut)):
            for modality, rows in found.items():
                having: list[int] = rows.tolist()  # at once: a tensor is slow to step through
                for row in having:
                    counts[batch.sources[row], modality] += 1
        self.damage.update((shard, reason) for shard, _, reason in batch.skipped)

    @staticmethod
    def merged(tallies: Iterable[Tally]) -> Tally:
        """Several as one."""
        found = Tally()
        for tally in tallies:
            found.held.update(tally.held)
            found.cut.update(tally.cut)
            found.damage.update(tally.damage)
        return found

    def values(self, seen: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, float]:
        """Numbers by name, of several sources by `data/SOURCE/name`.

        Args:
            seen: source -> examples so far.
            sizes: source -> samples of an epoch of it.
        """
        found: dict[str, float] = {}
        for source, count in seen.items():
            at = f"data/{source}/" if source else "data/"
            found |= {f"{at}seen": count, f"{at}repeated": max(0, count - sizes[source])}
            found |= {f"{at}{m}": n for (of, m), n in sorted(self.held.items()) if of == source}
            found |= {f"{at}{m}_cut": n for (of, m), n in sorted(self.cut.items()) if of == source}
            found[f"{at}skipped"] = sum(
                n for (shard, _), n in self.damage.items() if shard.rpartition("/")[0] == source
            )
        return found

    def check(self, seen: int, limit: float) -> None:
        """Stop where damage is too much; the first thousand samples may have as much as a thousand would.

        Raises:
            ConfigError: the share of damaged samples is above the limit.
        """
        total = self.damage.total()
        if total > limit * max(seen, 1000):
            (shard, reason), count = self.damage.most_common(1)[0]
            raise ConfigError(
                f"{total} of {seen} samples are damaged, more than max_bad_fraction {limit} allows; most often "
                f"{shard}: {reason} ({count} times)"
            )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "held": [[*key, count] for key, count in sorted(self.held.items())],
            "cut": [[*key, count] for key, count in sorted(self.cut.items())],
            "damage": [[*key, count] for key, count in sorted(self.damage.items())],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's counts."""
        self.held = Counter({(source, modality): count for source, modality, count in state["held"]})
        self.cut = Counter({(source, modality): count for source, modality, count in state["cut"]})
        self.damage = Counter({(shard, reason): count for shard, reason, count in state["damage"]})
