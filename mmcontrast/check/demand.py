"""What a recipe asks of its shards, and what a run of it would do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mmcontrast.check.likeness import Places
from mmcontrast.check.measure import MEASURES
from mmcontrast.check.survey import Source
from mmcontrast.check.tokens import TokenCounter, token_counter
from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.source import Source as SourceOfData
from mmcontrast.data.stream import Batches, Mixture
from mmcontrast.encoders.audio import AudioEncoder
from mmcontrast.encoders.base import Encoder
from mmcontrast.shards import FORMATS
from mmcontrast.trainer import Trainer

MAX_BAD_FRACTION = 0.01
"""Share of damaged samples that training allows by default."""
_DRAWN = 50_000  # samples of the first batches, in all


@dataclass(frozen=True)
class Evaluation:
    """Data that a model is asked about. `composed`: its examples are drawn from several samples."""

    name: str
    patterns: tuple[str, ...]
    composed: bool = False


@dataclass(frozen=True)
class Demand:
    """What is asked of the shards.

    Attributes:
        sources: modality -> where its members are found.
        made: modalities that do not come from the shards.
        groups: metadata fields that become group labels.
        max_bad_fraction: share of damaged samples beyond which a run stops.
        sides: modality -> side in pixels that its tower takes.
        hears: modality -> (samples per second, seconds) that its tower takes.
        counters: modality -> counter of its tower's tokens.
        evaluations: what the recipe is evaluated on.
        patterns: its own shards.
        run: the recipe; None where there is none.
        source: the name of its source, if there are several.
    """

    sources: Mapping[str, Source]
    made: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    max_bad_fraction: float = MAX_BAD_FRACTION
    sides: Mapping[str, int] = field(default_factory=dict[str, int])
    hears: Mapping[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    counters: Mapping[str, TokenCounter] = field(default_factory=dict[str, TokenCounter])
    evaluations: Sequence[Evaluation] = ()
    patterns: tuple[str, ...] = ()
    run: Trainer.Config | None = None
    source: str = ""


def any_use(counts: Mapping[str, int]) -> Demand:
    """Without a recipe: every kind of modality of which there is a member, by the name of its kind."""
    return Demand({kind: Source(kind, e) for kind, e in FORMATS.items() if any(counts.get(x) for x in e)})


def demand_of(config: Trainer.Config, *, patterns: tuple[str, ...] = (), source: str | None = None) -> Demand:
    """What a recipe asks. Its text towers are built, for their tokenizers: without weights where that can be.

    Args:
        config: the recipe.
        patterns: shards in place of the recipe's own.
        source: which of several sources of the recipe is meant.

    Raises:
        ConfigError: a tower that cannot be built, no such source, or several and none is named.
    """
    config, name, data = _source(config, patterns, source)
    towers = {m: _innermost(tower) for m, tower in config.model.towers().items()}
    kinds = {m: str(getattr(tower.owner, "kind", "")) for m, tower in towers.items()}
    members = {m: data.members.get(m, FORMATS.get(kind, ())) for m, kind in kinds.items()}
    choices: Mapping[str, float] = getattr(data.compose, "choices", {})  # captions that are members of the sample
    made = data.compose.made()
    for modality in made:
        members[modality] = tuple(choice for choice in choices if ":" not in choice)
    for modality, kind in kinds.items():
        if kind not in MEASURES and members[modality]:
            raise ConfigError(f"{modality!r} is of kind {kind!r}, which cannot be read{suggest(kind, MEASURES)}")
    counters = {m: token_counter(_transform(towers[m])) for m, kind in kinds.items() if kind == "text"}
    sides = {m: _side(tower) for m, tower in towers.items() if kinds[m] == "image"}
    return Demand(
        {m: Source(kind, members[m]) for m, kind in kinds.items() if members[m]},
        tuple(m for m in made if not members[m]),
        config.data.groups,
        config.data.max_bad_fraction,
        {m: side for m, side in sides.items() if side},
        {m: (t.sample_rate, t.seconds) for m, t in towers.items() if isinstance(t, AudioEncoder.Config)},
        {m: counter for m, counter in counters.items() if counter},
        [_evaluation(n, evaluator) for n, evaluator in config.evaluators.items()],
        data.shards,
        config,
        name,
    )


def _source(
    config: Trainer.Config, patterns: tuple[str, ...], wanted: str | None
) -> tuple[Trainer.Config, str, SourceOfData.Config]:
    """The recipe with `patterns` in place of a source's own shards, that source's name ("" of the only one), and it."""
    data = config.data
    if isinstance(data, SourceOfData.Config):
        if wanted is not None:
            raise ConfigError(f"the recipe has one source of data, without a name: leave out --source {wanted}")
        data = replace(data, shards=patterns or data.shards)
        return replace(config, data=data), "", data
    assert isinstance(data, Mixture.Config)
    if wanted is None or wanted not in data.sources:
        known = ", ".join(data.sources)
        given = "name one with --source" if wanted is None else f"{wanted!r} is none of them"
        raise ConfigError(f"the recipe reads several sources ({known}): {given}")
    source = replace(data.sources[wanted], shards=patterns or data.sources[wanted].shards)
    return replace(config, data=replace(data, sources=data.sources | {wanted: source})), wanted, source


def _innermost(tower: Encoder.Config) -> Encoder.Config:
    """The tower that takes the samples, under those that only pool it."""
    inner = getattr(tower, "tower", None)
    return _innermost(inner) if isinstance(inner, Encoder.Config) else tower


def _transform(tower: Encoder.Config) -> Any:
    try:
        with torch.device("meta"):  # parameters without memory
            return tower.build().transform(train=False)
    except (ConfigError, RuntimeError, NotImplementedError):  # towers that load weights or run while they are built
        return tower.build().transform(train=False)


def _side(tower: Encoder.Config) -> int | None:
    side = getattr(tower, "image_size", None)
    architecture = getattr(tower, "architecture", None)
    if side is None and architecture is not None:
        import open_clip

        side = (open_clip.get_model_config(architecture) or {}).get("vision_cfg", {}).get("image_size")
    return side if isinstance(side, int) else None


def _evaluation(name: str, evaluator: Any) -> Evaluation:
    compose = getattr(evaluator, "compose", None)
    composed = compose is not None and bool(compose.made()) and not hasattr(compose, "choices")
    return Evaluation(name, tuple(getattr(evaluator, "data", ())), composed)


@dataclass(frozen=True)
class Ranks:
    """What one number of processes does with the shards.

    Attributes:
        ranks: processes that train.
        readers: processes that read, on all of them.
        per_rank: samples of a step on one rank.
        own_lanes: whether no two ranks read the same lane.
        problem: why it cannot be run, or None.
    """

    ranks: int
    readers: int
    per_rank: int
    own_lanes: bool
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """A run of the recipe on these shards.

    Attributes:
        steps: optimizer steps.
        global_batch: samples of a step.
        share: share of them that is of this source; 1 where it is the only one.
        lanes: places of the data that are read at once.
        window: samples among which a lane is shuffled.
        window_bytes: memory of all shuffles, per reading process.
        per_epoch: examples that an epoch shows.
        steps_per_epoch: steps in which they are shown.
        epochs: how often the run goes through them.
        ranks: for the numbers of processes that were asked for.
        problem: why no number of processes can run it, or None.
    """

    steps: int
    global_batch: int
    share: float
    lanes: int
    window: int
    window_bytes: int
    per_epoch: int
    steps_per_epoch: float
    epochs: float
    ranks: Sequence[Ranks]
    problem: str | None = None

    @property
    def others(self) -> float:
        """Samples of this source that one of them meets in a batch."""
        return max(0.0, self.global_batch * self.share - 1)


@dataclass(frozen=True)
class _Kind:
    """In place of a transform, of which the order of examples needs nothing else."""

    kind: str

    def __call__(self, value: Any) -> Any:
        return value

    def collate(self, values: Sequence[Any]) -> Any:
        return values


def plan(config: Trainer.Config, source: str, ranks: Sequence[int]) -> tuple[Plan, list[Places]]:
    """What a run does with a source of its data, by the stream of the run itself, and its first batches.

    Of a batch, the positions of the samples that are this source's, of all ranks.
    """
    data, batch = config.data, config.global_batch
    problem, per_epoch, window, share, seen = None, 0, 0, 0.0, 0
    first: list[Places] = []
    try:
        kinds = {m: _Kind(str(getattr(_innermost(t).owner, "kind", ""))) for m, t in config.model.towers().items()}
        stream: Batches = data.build(kinds, seed=config.seed, global_batch=batch)
        order = next(s.order for s in stream.sources if s.name == source)
        per_epoch, window = order.per_epoch, min(order.window, order.lane_length)
        steps = config.steps if stream.steps is None else min(config.steps, stream.steps)
        if steps < config.steps:
            problem = f"the sources last for {steps} steps, the run has {config.steps}"
        seen = stream.seen(steps)[source]
        share = seen / (steps * batch) if steps else 0.0
        first = [_batch(stream, source, step) for step in range(min(steps, max(1, _DRAWN // batch)))]
    except ConfigError as error:
        problem = str(error)
    planned = Plan(
        config.steps,
        batch,
        share,
        data.lanes,
        window,
        8 * window * data.lanes,
        per_epoch,
        per_epoch / (batch * share) if share else 0.0,
        seen / per_epoch if per_epoch else 0.0,
        [_on_ranks(config, size) for size in ranks],
        problem,
    )
    return planned, first


def _batch(stream: Batches, source: str, step: int) -> Places:
    places = [stream.place(step, slot) for slot in range(stream.global_batch)]
    found = [stream.sources[k].position(lane, turn) for k, lane, turn in places if stream.sources[k].name == source]
    return np.array(found, dtype=np.int64)


def _on_ranks(config: Trainer.Config, ranks: int) -> Ranks:
    batch = config.global_batch
    problem = f"the global batch ({batch}) must be a multiple of the ranks ({ranks})" if batch % ranks else None
    return Ranks(ranks, ranks * max(1, config.data.workers), batch // ranks, config.data.lanes % ranks == 0, problem)
