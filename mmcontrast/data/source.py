"""A source of a stream: shards, how examples are made of them, and in which order they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmcontrast.config import ConfigError, Configurable, suggest
from mmcontrast.data.compose import Compose
from mmcontrast.data.order import Order
from mmcontrast.data.reader import Example, Reader, Transform
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import BadSample, open_shards

_MAX_REPLACEMENTS = 100


class Source(Configurable):
    """Examples in an order of their own, from one set of shards.

    Attributes:
        modalities: those that its samples can have.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Which shards to read, and how."""

        shards: tuple[str, ...]
        """Folders, globs, ranges such as data/{00000..00099}.tar, or addresses: https, s3, gs, hf."""
        members: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
        """Modality -> member extensions that hold it, where they are not the usual ones."""
        compose: Compose.Config = field(default_factory=Compose.Config)
        """How an example is made of samples; by default it is one sample as it is."""
        window: int = 16384
        """Samples among which the shuffle draws; also its memory, 8 bytes each."""

    def __init__(
        self,
        config: Config,
        transforms: Mapping[str, Transform],
        *,
        name: str = "",
        seed: int,
        lanes: int,
        global_batch: int,
        first_id: int = 0,
    ) -> None:
        """Open the shards.

        Args:
            config: settings.
            transforms: modality -> transform. A named source may lack some of them, the only one may not.
            name: of one of several sources; the only one has none.
            seed: of its order and augmentation.
            lanes: places that are read at once.
            global_batch: examples of a step, whichever source they are of.
            first_id: id of its first sample.

        Raises:
            ConfigError: shards, modalities or lanes that do not fit together.
        """
        for modality in config.members:
            if modality not in transforms:
                raise ConfigError(f"data.members names {modality!r}{suggest(modality, transforms.keys())}")
        self.name, self.seed, self.first_id = name, seed, first_id
        self.shards = open_shards(config.shards)
        made = config.compose.made()
        self.reader = Reader(self.shards, transforms, config.members, made, lacking=bool(name))
        self.modalities = tuple(m for m in transforms if m in self.reader.members or m in made)
        self.compose: Compose = config.compose.build(self.reader)
        self.order = Order(
            self.compose.counts(),
            seed=seed,
            global_batch=global_batch,
            window=config.window,
            lanes=lanes,
        )

    def __len__(self) -> int:
        return len(self.shards)

    def state(self) -> dict[str, Any]:
        """What must not change between the runs that share a checkpoint."""
        own = {"data": self.shards.fingerprint, "window": self.order.window} | self.compose.state()
        return {f"{self.name}.{key}" if self.name else key: value for key, value in own.items()}

    def position(self, lane: int, turn: int, attempt: int = 0) -> int:
        """The sample at a lane's turn; further attempts look half an epoch away, where this batch does not."""
        away = self.order.lane_length // 2 + attempt if attempt else 0
        return self.compose.anchor(self.order.at(lane, turn + away))

    def example(
        self,
        lane: int,
        turn: int,
        skipped: list[tuple[str, str, str]],
        *,
        meta: bool,
        watch: Callable[[int], None],
    ) -> Example:
        """The example at a lane's turn, or the next good one if its sample is damaged.

        Args:
            lane: 0 .. lanes - 1.
            turn: counts the lane's examples of this source since the run began.
            skipped: gets (shard, key, reason) of what is damaged.
            meta: read labels and groups too.
            watch: is told the id of each sample before it is read.

        Raises:
            ConfigError: a hundred damaged samples in a row.
        """
        seed = fold_seed(self.seed, "augment", lane, turn)
        for attempt in range(_MAX_REPLACEMENTS):
            position = self.position(lane, turn, attempt)
            watch(self.first_id + position)
            try:
                torch.default_generator.manual_seed(seed)
                # Another draw each time: the same one would meet the same damaged companion.
                found = self.compose.example(position, fold_seed(seed, attempt), meta=meta)
                return replace(found, position=self.first_id + position, source=self.name)
            except BadSample as error:
                shard, key = self.shards.name(position)
                skipped.append((f"{self.name}/{shard}" if self.name else shard, key, str(error)))
        shard, key, reason = skipped[-1]
        raise ConfigError(
            f"{_MAX_REPLACEMENTS} damaged samples in a row, the last {key!r} in {shard}: {reason}; "
            "look at the shards with `mmcontrast check shards`"
        )
