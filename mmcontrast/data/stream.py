"""The stream: shards -> the batches of one rank, in an order that depends on seed and step alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, Configurable, RunError, suggest
from mmcontrast.data.compose import Compose
from mmcontrast.data.order import Order
from mmcontrast.data.reader import Example, Reader, Transform
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import BadSample, open_shards

_MAX_REPLACEMENTS = 100


class Stream(Configurable):
    """The endless stream of training batches of one rank.

    `batches(first_step, last_step)` may start anywhere: nothing before it is read. The samples of a step are
    the same for every number of ranks and workers, and so is each sample's augmentation.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Which shards to read, and how."""

        shards: tuple[str, ...]
        """Folders, globs or ranges such as data/{00000..00099}.tar."""
        members: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
        """Modality -> member extensions that hold it, where they are not the usual ones."""
        groups: tuple[str, ...] = ()
        """Metadata fields that become group labels, for objectives that know several positives."""
        compose: Compose.Config = field(default_factory=Compose.Config)
        """How an example is made of samples; by default it is one sample as it is."""
        window: int = 16384
        """Samples among which the shuffle draws; also its memory, 8 bytes each."""
        lanes: int = 1
        """Places of the data read at once; a multiple of the number of ranks reads each shard on one rank."""
        workers: int = 2
        """Processes that read and decode; 0 does it in the training process."""
        timeout: float = 300.0
        """Seconds to wait for a worker before the run stops."""
        max_bad_fraction: float = 0.01
        """Damaged samples are replaced up to this share of all; beyond, the run stops."""

    def __init__(
        self,
        config: Config,
        transforms: Mapping[str, Transform],
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Open the shards.

        Raises:
            ConfigError: shards, modalities, lanes or batch that do not fit together.
        """
        if config.workers < 0 or config.timeout < 0:
            raise ConfigError(f"data: workers {config.workers} and timeout {config.timeout} must be 0 or more")
        if global_batch % world:
            raise ConfigError(f"the global batch ({global_batch}) must be a multiple of the ranks ({world})")
        for modality in config.members:
            if modality not in transforms:
                raise ConfigError(f"data.members names {modality!r}{suggest(modality, transforms.keys())}")
        self.config, self.seed = config, seed
        self.shards = open_shards(config.shards)
        if rank == 0:
            for shard, left_out in self.shards.damage.items():
                key, reason = left_out[0]
                print(f"{shard}: left out {len(left_out)} samples, the first {key!r}: {reason}", file=sys.stderr)
        self.reader = Reader(self.shards, transforms, config.members, config.compose.made())
        self.compose: Compose = config.compose.build(self.reader)
        self.order = Order(
            self.compose.counts(),
            seed=seed,
            global_batch=global_batch,
            window=config.window,
            lanes=config.lanes,
        )
        n = global_batch // world
        self._slots = range(rank * n, (rank + 1) * n)

    def state(self) -> dict[str, Any]:
        """What must not change between the runs that share a checkpoint; the position is the step itself."""
        return {
            "data": self.shards.fingerprint,
            "seed": self.seed,
            "global_batch": self.order.lane_batch * self.order.lanes,
            "window": self.order.window,
            "lanes": self.order.lanes,
        } | self.compose.state()

    def batches(self, first_step: int, last_step: int, *, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches of steps first_step .. last_step - 1 for this rank."""
        workers = self.config.workers
        loader: DataLoader[Batch | ConfigError] = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(first_step, last_step),
            num_workers=workers,
            timeout=self.config.timeout if workers else 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or else it would draw from the global one
        )
        return _raising(iter(loader), first_step)

    def batch(self, step: int) -> Batch:
        """This rank's batch of one step."""
        examples: list[Example] = []
        skipped: list[tuple[str, str, str]] = []
        before = torch.get_rng_state()
        try:
            for slot in self._slots:
                lane, turn = self.order.place(step, slot)
                examples.append(self._example(lane, turn, skipped))
        finally:
            torch.set_rng_state(before)
        return self.reader.collate(examples, self.config.groups, skipped)

    def _example(self, lane: int, turn: int, skipped: list[tuple[str, str, str]]) -> Example:
        """The sample at a turn, or the next good one from half an epoch away (which is not in this batch)."""
        seed = fold_seed(self.seed, "augment", lane, turn)
        for attempt in range(_MAX_REPLACEMENTS):
            away = self.order.lane_length // 2 + attempt if attempt else 0
            position = self.compose.anchor(self.order.at(lane, turn + away))
            try:
                torch.default_generator.manual_seed(seed)
                # Another draw each time: the same one would meet the same damaged companion.
                return self.compose.example(position, fold_seed(seed, attempt), meta=bool(self.config.groups))
            except BadSample as error:
                skipped.append((*self.shards.name(position), str(error)))
        shard, key, reason = skipped[-1]
        raise ConfigError(
            f"{_MAX_REPLACEMENTS} damaged samples in a row, the last {key!r} in {shard}: {reason}; "
            "check the shards before training on them"
        )


class _Steps(Dataset["Batch | ConfigError"]):
    """Step -> batch, for DataLoader: workers take whole steps in turn, and the loader keeps their order."""

    def __init__(self, stream: Stream) -> None:
        self._batch: Callable[[int], Batch] = stream.batch

    def __getitem__(self, step: int) -> Batch | ConfigError:
        try:
            return self._batch(step)
        except ConfigError as error:
            return error  # raised in a worker, it would reach the user inside that worker's traceback


def _raising(found: Iterator[Batch | ConfigError], step: int) -> Iterator[Batch]:
    try:
        while True:
            try:
                batch = next(found)
            except StopIteration:
                return
            except RuntimeError as error:
                batch = RunError(
                    f"reading step {step} failed: {error}; a worker that was killed mostly had no memory left: "
                    "lower data.workers. One that hung: raise data.timeout, or see that the shards' disk answers"
                )
            if isinstance(batch, Exception):  # raised here, where the loader is not in the error's context
                raise batch
            yield batch
            step += 1
    finally:
        # Now, so that the loader stops its workers in order. Left to the garbage collector together with the
        # exception, it can no longer reach them and waits five seconds for each.
        del found
