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
from mmcontrast.shards import open_shards


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
        """Modality -> member extensions that hold it, where they are not the usual ones; with none, a source of several
        leaves the modality out, though its samples have it."""
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

    def begin(self, lane: int, turn: int, attempt: int, *, meta: bool) -> Callable[[], Example]:
        """Read and draw the example at a lane's turn; what is returned makes it, in any thread.

        Args:
            lane: 0 .. lanes - 1.
            turn: counts the lane's examples of this source since the run began.
            attempt: 0, and more by one for each sample in its place that was damaged.
            meta: read labels and groups too.

        Raises:
            BadSample: it is damaged; also from what is returned.
        """
        position = self.position(lane, turn, attempt)
        seed = fold_seed(self.seed, "augment", lane, turn)
        torch.default_generator.manual_seed(seed)
        # Another draw each time: the same one would meet the same damaged companion.
        finish = self.compose.begin(position, fold_seed(seed, attempt), meta=meta)
        return lambda: replace(finish(), position=self.first_id + position, source=self.name)

    def name_of(self, lane: int, turn: int, attempt: int) -> tuple[str, str]:
        """Shard, beside the source's name where there are several, and key of the sample at a lane's turn."""
        shard, key = self.shards.name(self.position(lane, turn, attempt))
        return f"{self.name}/{shard}" if self.name else shard, key
