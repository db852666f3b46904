"""The stream: shards -> the batches of one rank, in an order that depends on seed and step alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, Configurable, RunError, suggest
from mmcontrast.data.order import Order
from mmcontrast.decode import DECODERS, metadata
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import FORMATS, METADATA, BadSample, ShardSet, open_shards

_MAX_REPLACEMENTS = 100


class Transform(Protocol):
    """Decoded sample -> model input, and a list of those -> one batch; runs in loader workers."""

    kind: str

    def __call__(self, value: Any) -> Any:
        """One decoded sample -> one model input."""
        ...

    def collate(self, values: Sequence[Any]) -> Any:
        """Model inputs of several samples -> one batch of them."""
        ...


@dataclass(frozen=True)
class Example:
    """One decoded and transformed sample. `inputs` has the modalities that the sample has."""

    position: int
    key: str
    inputs: Mapping[str, Any]
    meta: Mapping[str, Any]


class Reader:
    """Samples of some shards as model inputs; what training, evaluation and the index read alike."""

    def __init__(
        self,
        shards: ShardSet,
        transforms: Mapping[str, Transform],
        members: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Read the modalities that have a transform.

        Args:
            shards: the samples.
            transforms: modality -> transform; its `kind` says which decoder and which members.
            members: modality -> extensions that hold it, in order of preference; by default those of the
            kind.

        Raises:
            ConfigError: a modality that no sample has, or a kind that nothing decodes.
        """
        self.shards, self.transforms = shards, transforms
        for modality, transform in transforms.items():
            if transform.kind not in DECODERS:
                raise ConfigError(f"{modality!r} is of kind {transform.kind!r}{suggest(transform.kind, DECODERS)}")
        self.members = {m: (members or {}).get(m, FORMATS[t.kind]) for m, t in transforms.items()}
        for modality, extensions in self.members.items():
            if not any(shards.counts.get(e) for e in extensions):
                # Few, by frequency: dots in the keys make every member an extension of its own.
                have = sorted(shards.counts, key=lambda e: (-shards.counts[e], e))
                more = f" and {len(have) - 8} more" if len(have) > 8 else ""
                raise ConfigError(
                    f"no sample has the modality {modality!r} (members {', '.join(extensions)}); "
                    f"the shards have: {', '.join(have[:8]) or 'nothing'}{more}"
                )

    def raw(self, position: int, modality: str) -> Any:
        """The decoded value of one modality, or None where the sample lacks it.

        Raises:
            BadSample: it is there and damaged.
        """
        for extension in self.members[modality]:
            try:
                data = self.shards.read(position, extension)
            except KeyError:
                continue
            return DECODERS[self.transforms[modality].kind](data)
        return None

    def meta(self, position: int) -> Mapping[str, Any]:
        """The sample's labels and groups; empty where it has none.

        Raises:
            BadSample: they are damaged.
        """
        try:
            return metadata(self.shards.read(position, METADATA))
        except KeyError:
            return {}

    def example(self, position: int, *, meta: bool = True) -> Example:
        """One sample, transformed.

        Raises:
            BadSample: a member is damaged, or the sample has none of the modalities.
        """
        raw = {m: value for m in self.transforms if (value := self.raw(position, m)) is not None}
        if not raw:
            raise BadSample(f"has none of {', '.join(self.transforms)}")
        inputs = {m: self.transforms[m](value) for m, value in raw.items()}
        key = self.shards.name(position)[1]
        return Example(position, key, inputs, self.meta(position) if meta else {})

    def collate(
        self,
        examples: Sequence[Example],
        groups: Sequence[str] = (),
        skipped: Sequence[tuple[str, str, str]] = (),
    ) -> Batch:
        """Examples -> Batch; `groups` names the metadata fields that become group labels.

        A sample without the field is a group of its own.
        """
        inputs: dict[str, Any] = {}
        rows: dict[str, torch.Tensor] = {}
        for modality, transform in self.transforms.items():
            having = [i for i, e in enumerate(examples) if modality in e.inputs]
            rows[modality] = torch.tensor(having, dtype=torch.int64)
            if having:
                inputs[modality] = transform.collate([examples[i].inputs[modality] for i in having])
        labels = {name: torch.tensor([_label(name, e) for e in examples], dtype=torch.int64) for name in groups}
        ids = torch.tensor([e.position for e in examples], dtype=torch.int64)
        return Batch(inputs, rows, ids, labels, [e.key for e in examples], skipped)


def _label(name: str, example: Example) -> int:
    value = example.meta.get(name)
    return fold_seed("sample", example.position) if value is None else fold_seed("group", str(value))


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
        self.reader = Reader(self.shards, transforms, config.members)
        self.order = Order(
            [s.samples for s in self.shards.shards],
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
        }

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
            position = self.order.at(lane, turn + away)
            try:
                torch.default_generator.manual_seed(seed)
                return self.reader.example(position, meta=bool(self.config.groups))
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
