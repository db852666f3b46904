"""How an example is made of samples: of one as it is, with one of its captions, or of several that are drawn for it.

A stream's order runs over anchors. What else belongs to an example is drawn by its seed alone, which is a function of
the run's seed and the anchor's turn; so composed examples are the same for every number of ranks and workers, too, and
a run resumes in their midst.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, Configurable, suggest
from mmcontrast.data.reader import Example, Reader
from mmcontrast.decode import text
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import METADATA


class Compose(Configurable):
    """An example is one sample. Subclasses override `Config.made`, `anchors` and `raw`.

    Attributes:
        anchors: positions of the samples that examples are made for, ascending; None for all.
        facts: numbers that an evaluator states beside its scores, such as what chance would reach.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """By default an example is one sample as it is."""

        drop: dict[str, float] = field(default_factory=dict[str, float])
        """Modality -> how often it is left out though it is there. An example keeps at least one modality."""

        def made(self) -> tuple[str, ...]:
            """Modalities that do not come from the anchors' shards."""
            return ()

    anchors: NDArray[np.int64] | None = None
    facts: Mapping[str, float] = {}

    def __init__(self, config: Config, reader: Reader) -> None:
        """`reader` reads the anchors and holds the transforms of all modalities.

        Raises:
            ConfigError: `drop` names no modality, or is no probability.
        """
        self.reader, self.drop = reader, config.drop
        for modality, share in config.drop.items():
            if modality not in reader.transforms:
                raise ConfigError(f"compose.drop names {modality!r}{suggest(modality, reader.transforms.keys())}")
            if not 0 <= share <= 1:
                raise ConfigError(f"compose.drop is {share} for {modality!r}; it must be in 0..1")

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
        return self.begin(position, seed, meta=meta)()

    def begin(self, position: int, seed: int, *, meta: bool = True) -> Callable[[], Example]:
        """The same in two parts: all that is read and drawn is so here, what is returned may run in another thread.

        Raises:
            BadSample: one of its samples is damaged, or it has none of the modalities; also from what is returned.
        """
        raw = self.raw(position, Random(fold_seed(seed, "compose")))
        if self.drop:
            raw = self._drop(raw, Random(fold_seed(seed, "drop")))
        return self.reader.begin(position, raw, self.meta(position) if meta else {})

    def _drop(self, raw: Mapping[str, Any], draw: Random) -> Mapping[str, Any]:
        """What is left; if nothing would be, one of the modalities, each as likely as another."""
        names = sorted(raw)
        kept = [m for m in names if draw.random() >= self.drop.get(m, 0.0)]
        if names and not kept:
            kept = [names[pick(draw, len(names))]]
        return {m: raw[m] for m in kept}

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
        return {"drop": self.drop} if self.drop else {}


class Captions(Compose):
    """One of several captions for each example, drawn anew each time.

    A choice is a member's extension (`txt`, `syn.txt`) or a field of the metadata (`json:caption`). One that a sample
    lacks leaves its share to the others; one that is a list of captions gives any of them, each as likely as another.
    """

    @dataclass(kw_only=True)
    class Config(Compose.Config):
        """Which captions, and how often each."""

        choices: dict[str, float]
        """Where a caption is -> its share of the draws, relative to the others."""
        text: str = "text"
        """The modality that gets them."""

        def made(self) -> tuple[str, ...]:
            """The text."""
            return (self.text,)

    def __init__(self, config: Config, reader: Reader) -> None:
        """Check the choices.

        Raises:
            ConfigError: no choice, shares that are not above 0, a modality that is no text, or a member that no sample
                has.
        """
        super().__init__(config, reader)
        kind = reader.transforms[config.text].kind if config.text in reader.transforms else None
        if kind != "text":
            raise ConfigError(f"Captions.text is {config.text!r}; name a modality of kind text")
        if not config.choices or not all(0 < share < float("inf") for share in config.choices.values()):
            raise ConfigError(f"Captions.choices {config.choices}: name at least one, with shares above 0")
        for choice in config.choices:
            member = choice.partition(":")[0]
            if (":" in choice) != (member == METADATA) or not reader.shards.counts.get(member):
                raise ConfigError(
                    f"Captions.choices names {choice!r}, which is no text member and no field json:NAME that the "
                    f"samples have{suggest(member, reader.shards.counts)}"
                )
        self.config = config

    def raw(self, position: int, draw: Random) -> Mapping[str, Any]:
        """The sample with one caption, or none where it has none of them."""
        found = dict(super().raw(position, draw))
        fields = self.reader.meta(position) if any(":" in choice for choice in self.config.choices) else {}
        there = {c: captions for c in self.config.choices if (captions := self._captions(position, c, fields))}
        if there:
            shares = [self.config.choices[c] for c in there]
            # The last one, should rounding leave the draw beyond all of them.
            at = bisect([*accumulate(shares)][:-1], draw.random() * sum(shares))
            captions = list(there.values())[at]
            found[self.config.text] = captions[pick(draw, len(captions))]
        return found

    def _captions(self, position: int, choice: str, fields: Mapping[str, Any]) -> list[str]:
        member, _, name = choice.partition(":")
        if name:
            value = fields.get(name)
            values = cast(list[Any], value) if isinstance(value, list) else [value]
            return [v.strip() for v in values if isinstance(v, str) and v.strip()]
        try:
            return [text(self.reader.shards.read(position, member))]
        except KeyError:
            return []

    def state(self) -> dict[str, Any]:
        """The choices too."""
        return super().state() | {"captions": self.config.choices}


def pick(draw: Random, count: int) -> int:
    """One of 0 .. count - 1, the same in every version of Python."""
    return int(draw.random() * count)
