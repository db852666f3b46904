"""How an example is made of samples: of one as it is, or of several that are drawn for it.

A stream's order runs over anchors. What else belongs to an example is drawn by its seed alone, which is a function of
the run's seed and the anchor's turn; so composed examples are the same for every number of ranks and workers, too, and
a run resumes in their midst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import Configurable
from mmcontrast.data.reader import Example, Reader
from mmcontrast.randomness import fold_seed


class Compose(Configurable):
    """An example is one sample. Subclasses override `Config.made`, `anchors` and `raw`.

    Attributes:
        anchors: positions of the samples that examples are made for, ascending; None for all.
        facts: numbers that an evaluator states beside its scores, such as what chance would reach.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Nothing to set: an example is one sample as it is."""

        def made(self) -> tuple[str, ...]:
            """Modalities that do not come from the anchors' shards."""
            return ()

    anchors: NDArray[np.int64] | None = None
    facts: Mapping[str, float] = {}

    def __init__(self, config: Config, reader: Reader) -> None:
        """`reader` reads the anchors and holds the transforms of all modalities."""
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader.shards) if self.anchors is None else len(self.anchors)

    def raw(self, position: int, draw: Random) -> Mapping[str, Any]:
        """Modality -> decoded value, of the example whose anchor is at `position`.

        `draw` is all the randomness there is. Of its methods only `random()` is promised to stay the same in later
        versions of Python.

        Raises:
            BadSample: one of the samples is damaged.
        """
        return {m: v for m in self.reader.members if (v := self.reader.raw(position, m)) is not None}

    def meta(self, position: int) -> Mapping[str, Any]:
        """Labels and groups of the example.

        Raises:
            BadSample: they are damaged.
        """
        return self.reader.meta(position)

    def example(self, position: int, seed: int, *, meta: bool = True) -> Example:
        """The example that belongs to an anchor and a seed, transformed.

        Raises:
            BadSample: one of its samples is damaged, or it has none of the modalities.
        """
        raw = self.raw(position, Random(fold_seed(seed, "compose")))
        return self.reader.prepare(position, raw, self.meta(position) if meta else {})

    def anchor(self, number: int) -> int:
        """The position of an anchor by its number in 0 .. len(self) - 1."""
        return number if self.anchors is None else int(self.anchors[number])

    def counts(self) -> Sequence[int]:
        """Anchors per shard."""
        shards = self.reader.shards
        if self.anchors is None:
            return [s.samples for s in shards.shards]
        return np.bincount([shards.locate(p)[0] for p in self.anchors.tolist()], minlength=len(shards.shards)).tolist()

    def state(self) -> dict[str, Any]:
        """What must not change between the runs that share a checkpoint."""
        return {}


def pick(draw: Random, count: int) -> int:
    """One of 0 .. count - 1, the same in every version of Python."""
    return int(draw.random() * count)
