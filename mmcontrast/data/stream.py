"""The stream: shards -> the batches of one rank, in an order that depends on seed and step alone.

Letters: K sources, n rows per rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, Configurable, RunError, suggest
from mmcontrast.data.ahead import Ahead, check_room
from mmcontrast.data.reader import Example, Transform, collate
from mmcontrast.data.schedule import Schedule
from mmcontrast.data.source import Source
from mmcontrast.data.threads import in_threads, processors, ranks_here
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import BadSample

Made = TypeVar("Made")

_MAX_REPLACEMENTS = 100


class Batches(Configurable):
    """Base: the stream of training batches of one rank, from one or several sources.

    `batches(first_step, last_step)` may start anywhere: nothing before it is read. The samples of a step are
    the same for every number of ranks and workers, and so is each sample's augmentation.

    Attributes:
        sources: in the order of their names' settings.
        schedule: whose turn it is.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """How batches are read."""

        groups: tuple[str, ...] = ()
        """Metadata fields that become group labels, for objectives that know several positives."""
        lanes: int = 1
        """Places of the data read at once; a multiple of the number of ranks reads each shard on one rank."""
        workers: int = 2
        """Processes that read and decode; 0 does it in the training process."""
        threads: int | None = None
        """Threads that decode in each of them; by default the processors, shared among workers and ranks."""
        timeout: float = 300.0
        """Seconds to wait for a worker before the run stops."""
        max_bad_fraction: float = 0.01
        """Damaged samples are replaced up to this share of all; beyond, the run stops."""

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, Source.Config],
        weights: Mapping[str, float] | None,
        epochs: Mapping[str, float],
        transforms: Mapping[str, Transform],
        *,
        pure: bool = False,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
    ) -> None:
        if config.workers < 0 or config.timeout < 0:
            raise ConfigError(f"data: workers {config.workers} and timeout {config.timeout} must be 0 or more")
        if config.threads is not None and config.threads < 1:
            raise ConfigError(f"data.threads is {config.threads}; it must be at least 1")
        if global_batch % world:
            raise ConfigError(f"the global batch ({global_batch}) must be a multiple of the ranks ({world})")
        self.config, self.transforms = config, transforms
        self.seed, self.global_batch, self.rank = seed, global_batch, rank
        self.sources: list[Source] = []
        for name, settings in sources.items():
            self.sources.append(
                Source(  # not build(): the settings of the only source are a stream's
                    settings,
                    transforms,
                    name=name,
                    seed=fold_seed(seed, "source", name) if name else seed,
                    lanes=config.lanes,
                    global_batch=global_batch,
                    first_id=sum(len(s) for s in self.sources),
                )
            )
        if rank == 0:
            for shard, left_out in (item for source in self.sources for item in source.shards.damage.items()):
                key, reason = left_out[0]
                print(f"{shard}: left out {len(left_out)} samples, the first {key!r}: {reason}", file=sys.stderr)
        for modality in transforms:
            if not any(modality in source.modalities for source in self.sources):
                raise ConfigError(
                    f"no source has the modality {modality!r}; they have "
                    + "; ".join(f"{s.name}: {', '.join(s.modalities)}" for s in self.sources)
                )
        self.lane_batch = global_batch // config.lanes  # which every source's order has found to divide it
        # A turn is one example of each lane, or with pure batches a step.
        self._per_turn = self.lane_batch if pure else 1
        self.schedule = Schedule(
            [(weights or {}).get(s.name, s.order.per_epoch) for s in self.sources],
            [
                int(epochs[s.name] * s.order.lane_length) // self._per_turn if s.name in epochs else None
                for s in self.sources
            ],
        )
        # Each rank of this machine reads lanes of its own, or they share some.
        self._lanes_here = -(-config.lanes * ranks_here() // world)
        check_room(self.sources, self._lanes_here)
        self._ahead: Ahead | None = None
        n = global_batch // world
        self._slots = range(rank * n, (rank + 1) * n)
        readers = max(config.workers, 1)
        self._threads = config.threads or max(1, processors() // readers)
        # For each reader and row of the batch, the id of the sample that is being read or decoded, or -1.
        self._in_hand = torch.full([readers, n], -1, dtype=torch.int64)

    # ------------------------------------------------------------------------------------------ what a step sees

    def place(self, step: int, slot: int) -> tuple[int, int, int]:
        """(source, lane, turn) of a slot of the global batch; the turn counts the lane's examples of this source."""
        lane, place = divmod(slot, self.lane_batch)
        turn, example = divmod(step * self.lane_batch + place, self._per_turn)
        source, before = self.schedule.at(turn)
        return source, lane, before * self._per_turn + example

    def seen(self, step: int) -> dict[str, int]:
        """Source -> examples of it before a step, of all ranks."""
        turns = self.schedule.counts(step * self.lane_batch // self._per_turn)
        return {s.name: t * self._per_turn * self.config.lanes for s, t in zip(self.sources, turns, strict=True)}

    @property
    def steps(self) -> int | None:
        """Steps until all sources are used up; None where they may repeat without end."""
        return None if self.schedule.turns is None else self.schedule.turns * self._per_turn // self.lane_batch

    @property
    def per_epoch(self) -> int:
        """Samples of all sources."""
        return sum(s.order.per_epoch for s in self.sources)

    def describe(self, steps: int) -> list[str]:
        """One line for each source: its size, and what a run of so many steps sees of it."""
        seen = self.seen(steps)
        return [
            f"{s.name or 'data'}: {s.order.per_epoch} samples in {len(s.shards.shards)} shards "
            f"({', '.join(s.modalities)}); {steps} steps see it {seen[s.name] / s.order.per_epoch:.2f} times"
            for s in self.sources
        ]

    def state(self) -> dict[str, Any]:
        """What must not change between the runs that share a checkpoint; the position is the step itself."""
        own = {"seed": self.seed, "global_batch": self.global_batch, "lanes": self.config.lanes}
        return own | {key: value for source in self.sources for key, value in source.state().items()}

    # ------------------------------------------------------------------------------------------ reading

    def batches(self, first_step: int, last_step: int, *, pin_memory: bool = False) -> Iterator[Batch]:
        """The batches of steps first_step .. last_step - 1 for this rank.

        Raises:
            ConfigError: the sources are used up before, or hold nothing but damage.
            RunError: a worker died or hung.
        """
        if self.steps is not None and last_step > self.steps:
            raise ConfigError(
                f"the sources last for {self.steps} steps, the run has {last_step}; "
                "train for fewer, or let a source repeat more often (data.epochs)"
            )
        workers = self.config.workers
        self._stop_ahead()
        self._in_hand.fill_(-1).share_memory_()
        loader: DataLoader[Batch | ConfigError] = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=range(first_step, last_step),
            num_workers=workers,
            timeout=self.config.timeout if workers else 0,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or else it would draw from the global one
        )
        return self._raising(iter(loader), first_step)

    def batch(self, step: int) -> Batch:
        """This rank's batch of one step."""
        places = [self.place(step, slot) for slot in self._slots]
        if any(source.shards.cache for source in self.sources):
            self._look_ahead(places)
        before = torch.get_rng_state()
        try:
            examples, skipped = self._examples(places)
        finally:
            torch.set_rng_state(before)
        return collate(self.transforms, examples, self.config.groups, skipped)

    def _look_ahead(self, places: Sequence[tuple[int, int, int]]) -> None:
        if self._ahead is None:  # only now: a thread does not follow into a worker
            info = get_worker_info()
            reader, readers = (0, 1) if info is None else (info.id, info.num_workers)
            self._ahead = Ahead(self.sources, lanes=self._lanes_here, reader=reader, readers=readers)
        self._ahead.notice(places)

    def _stop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _examples(self, places: Sequence[tuple[int, int, int]]) -> tuple[list[Example], list[tuple[str, str, str]]]:
        """The examples at some places, or the next good ones, and (shard, key, reason) of what is damaged."""
        found: dict[int, Example] = {}
        damage: dict[int, list[tuple[str, str, str]]] = {}
        for attempt in range(_MAX_REPLACEMENTS):
            left = [row for row in range(len(places)) if row not in found]
            # The generator draws in this thread and in the order of the rows, however many threads decode.
            begun = (self._begin(row, places[row], attempt) for row in left)
            for row, outcome in zip(left, in_threads(begun, self._threads), strict=True):
                if isinstance(outcome, Example):
                    found[row] = outcome
                else:
                    source, lane, turn = places[row]
                    name = self.sources[source].name_of(lane, turn, attempt)
                    damage.setdefault(row, []).append((*name, str(outcome)))
            if len(found) == len(places):
                lines = [line for row in sorted(damage) for line in damage[row]]
                return [found[row] for row in range(len(places))], lines
        row = min(row for row in range(len(places)) if row not in found)
        shard, key, reason = damage[row][-1]
        raise ConfigError(
            f"{_MAX_REPLACEMENTS} damaged samples in a row, the last {key!r} in {shard}: {reason}; "
            "look at the shards with `mmcontrast check shards`"
        )

    def _begin(self, row: int, place: tuple[int, int, int], attempt: int) -> Callable[[], Example | BadSample]:
        """Read and draw a row's example here, and return what decodes it."""
        number, lane, turn = place
        source = self.sources[number]
        identity = source.first_id + source.position(lane, turn, attempt)
        info = get_worker_info()
        in_hand = self._in_hand[0 if info is None else info.id]

        def work(make: Callable[[], Made]) -> Made | BadSample:
            in_hand[row] = identity
            try:
                return make()
            except BadSample as error:
                return error
            finally:
                in_hand[row] = -1

        begun = work(partial(source.begin, lane, turn, attempt, meta=bool(self.config.groups)))
        return (lambda: begun) if isinstance(begun, BadSample) else partial(work, begun)

    def _raising(self, found: Iterator[Batch | ConfigError], first_step: int) -> Iterator[Batch]:
        step = first_step
        try:
            while True:
                try:
                    batch = next(found)
                except StopIteration:
                    return
                except RuntimeError as error:
                    batch = self._failure(error, step, (step - first_step) % max(self.config.workers, 1))
                if isinstance(batch, Exception):  # raised here, where the loader is not in the error's context
                    raise batch
                yield batch
                step += 1
        finally:
            # Now, so that the loader stops its workers in order. Left to the garbage collector together with the
            # exception, it can no longer reach them and waits five seconds for each.
            del found
            self._stop_ahead()

    def _failure(self, error: RuntimeError, step: int, worker: int) -> RunError:
        """A worker that died or hung, and what it had in hand."""
        found: list[str] = []
        for at in self._in_hand[worker][self._in_hand[worker] >= 0].tolist():
            source = next(s for s in reversed(self.sources) if s.first_id <= at)
            shard, place = source.shards.locate(at - source.first_id)
            found.append(f"sample {place} of {source.shards.shards[shard].path}")
        where = f", at {' or '.join(found)}" if found else ""
        return RunError(
            f"rank {self.rank}, worker {worker}: reading step {step} failed{where}: {error}; a worker that was killed "
            "mostly had no memory left: lower data.workers. One that hung: raise data.timeout, or see that the shards' "
            "disk answers"
        )


class Stream(Batches):
    """The endless stream of training batches of one rank, from one source."""

    @dataclass(kw_only=True)
    class Config(Source.Config, Batches.Config):
        """Which shards to read, and how."""

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
        super().__init__(
            config, {"": config}, None, {}, transforms, seed=seed, global_batch=global_batch, rank=rank, world=world
        )


class Mixture(Batches):
    """The stream of training batches of one rank, from several sources.

    Each lane takes its turns from the sources in proportion to their weights, spread as evenly as can be; so every
    rank and every batch has the same mixture, to within one example per lane and source. A source may lack
    modalities that others have.
    """

    @dataclass(kw_only=True)
    class Config(Batches.Config):
        """Which sources, and how much of each."""

        sources: dict[str, Source.Config]
        """Name -> source."""
        weights: dict[str, float] = field(default_factory=dict[str, float])
        """Source -> its share of the examples, relative to the others; by default its number of samples."""
        epochs: dict[str, float] = field(default_factory=dict[str, float])
        """Source -> how often it may be seen in all. Then the others share its turns; by default without end."""
        pure: bool = False
        """Take all of a batch from one source, so that no negative is told by where it comes from."""

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
        """Open the shards of all sources.

        Raises:
            ConfigError: shards, modalities, weights, lanes or batch that do not fit together.
        """
        names = config.sources
        if not names or any(not name.isidentifier() for name in names):
            raise ConfigError(f"data.sources {list(names)}: name at least one, by identifiers such as web")
        for field_name, given in (("weights", config.weights), ("epochs", config.epochs)):
            for name, value in given.items():
                if name not in names:
                    raise ConfigError(f"data.{field_name} names {name!r}{suggest(name, names)}")
                if not 0 < value < float("inf"):
                    raise ConfigError(f"data.{field_name}: {value} for {name!r} must be above 0 and finite")
        if config.weights and (missing := names.keys() - config.weights.keys()):
            raise ConfigError(f"data.weights has none for {min(missing)!r}; give one for every source, or none at all")
        super().__init__(
            config,
            names,
            config.weights or None,
            config.epochs,
            transforms,
            pure=config.pure,
            seed=seed,
            global_batch=global_batch,
            rank=rank,
            world=world,
        )

    def state(self) -> dict[str, Any]:
        """What must not change between the runs that share a checkpoint, the mixture included."""
        assert isinstance(self.config, Mixture.Config)
        own = {name: getattr(self.config, name) for name in ("weights", "epochs", "pure")}
        return super().state() | own


class _Steps(Dataset["Batch | ConfigError"]):
    """Step -> batch, for DataLoader: workers take whole steps in turn, and the loader keeps their order."""

    def __init__(self, stream: Batches) -> None:
        self._batch: Callable[[int], Batch] = stream.batch

    def __getitem__(self, step: int) -> Batch | ConfigError:
        try:
            return self._batch(step)
        except ConfigError as error:
            return error  # raised in a worker, it would reach the user inside that worker's traceback
