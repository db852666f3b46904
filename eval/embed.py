"""Data + a model -> embeddings of every modality, in the order of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmcontrast.config import ConfigError
from mmcontrast.data.compose import Compose
from mmcontrast.data.reader import Reader
from mmcontrast.encoders.base import Transform
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.layouts import open_data
from mmcontrast.eval.sources import Shards, Source
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import BadSample, ShardSet


@dataclass(frozen=True)
class Embedded:
    """The samples of some shards in the shared space.

    Attributes:
        z: modality -> [n_m, D] float32 on the CPU, the samples that have it.
        rows: modality -> [n_m] int64, ascending places in `keys`; one comes several times if a sample has several, such
            as captions.
        keys: [n] sample keys.
        positions: [n] int64 places in the shards.
        meta: [n] metadata objects.
        skipped: damaged samples, left out: (shard, key, reason).
        fingerprint: of the data.
        source: where the samples are.
        kinds: modality -> its kind.
        facts: what is known of the examples beside their scores, such as what chance would reach.
        shard_reader: reads them where they are in shards.
    """

    z: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    keys: Sequence[str]
    positions: Tensor
    meta: Sequence[Mapping[str, Any]]
    skipped: Sequence[tuple[str, str, str]]
    fingerprint: str
    source: Source
    kinds: Mapping[str, str]
    facts: Mapping[str, float] = field(default_factory=dict[str, float])
    shard_reader: Reader | None = None

    @property
    def reader(self) -> Reader:
        """Reads the shards that the samples are in."""
        assert self.shard_reader is not None, "these samples are in files"
        return self.shard_reader

    def texts(self, modality: str, rows: Tensor) -> list[str | None]:
        """The text of some rows' samples, of those that have several the first."""
        listed: list[int] = rows.tolist()
        found = [self.source.values(int(self.positions[row]), modality, "text") for row in listed]
        return [str(values[0]) if values else None for values in found]

    def names_of(self, rows: Tensor) -> list[str]:
        """Names of some rows' samples; each sample has its own, the same for every model."""
        listed: list[int] = rows.tolist()
        return [f"{self.keys[row]} ({int(self.positions[row])})" for row in listed]

    def having(self, *modalities: str) -> Tensor:
        """Rows that have all of the modalities, ascending."""
        rows = torch.arange(len(self.keys))
        for modality in modalities:
            rows = rows[torch.isin(rows, self.rows.get(modality, torch.zeros(0, dtype=torch.int64)))]
        return rows

    def items_of(self, modality: str, rows: Tensor) -> Tensor:
        """Places in z[modality] of what some rows have of it, in their order."""
        return torch.isin(self.rows[modality], rows).nonzero()[:, 0]

    def paired(self, x: str, y: str) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs of the two modalities within a sample: its row and both embeddings, [p], [p, D], [p, D]."""
        both = self.having(x, y)
        if not len(both):
            return both, torch.zeros(0, 0), torch.zeros(0, 0)
        mine = self.items_of(x, both)
        start, stop = (torch.searchsorted(self.rows[y], self.rows[x][mine], right=right) for right in (False, True))
        i = torch.arange(len(mine)).repeat_interleave(stop - start)
        place = torch.arange(len(i)) - ((stop - start).cumsum(0) - (stop - start))[i]
        return self.rows[x][mine[i]], self.z[x][mine[i]], self.z[y][start[i] + place]


@dataclass(frozen=True)
class _Sample:
    """One sample as the model takes it: modality -> inputs, none, one or several."""

    position: int
    key: str
    inputs: Mapping[str, Sequence[Any]]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class _Chunk:
    """Some samples, and their inputs in batches: modality -> batches, and the sample that each input is of."""

    samples: Sequence[_Sample]
    batches: Mapping[str, Sequence[Any]]
    rows: Mapping[str, Tensor]
    skipped: Sequence[tuple[str, str, str]]


class _Chunks(Dataset[_Chunk]):
    """Chunk number -> its samples, damaged ones left out and named. Runs in loader workers."""

    def __init__(self, source: Source, transforms: Mapping[str, Transform], size: int) -> None:
        self.source, self.transforms, self.size = source, transforms, size

    def count(self) -> int:
        """Samples to be read."""
        return len(self.source)

    def sample(self, number: int) -> _Sample:
        """Read one.

        Raises:
            BadSample: it is damaged, or has none of the modalities.
        """
        inputs: dict[str, Sequence[Any]] = {}
        for modality, transform in self.transforms.items():
            values = self.source.values(number, modality, transform.kind)
            if values:
                inputs[modality] = [transform(value) for value in values]
        if not inputs:
            raise BadSample(f"has none of {', '.join(self.transforms)}")
        return _Sample(number, self.source.name(number)[1], inputs, self.source.meta(number))

    def __len__(self) -> int:
        return -(-self.count() // self.size)

    def __getitem__(self, chunk: int) -> _Chunk:
        samples: list[_Sample] = []
        skipped: list[tuple[str, str, str]] = []
        for number in range(chunk * self.size, min((chunk + 1) * self.size, self.count())):
            try:
                samples.append(self.sample(number))
            except BadSample as error:
                skipped.append((*self.source.name(number), str(error)))
        batches: dict[str, Sequence[Any]] = {}
        rows: dict[str, Tensor] = {}
        for modality, transform in self.transforms.items():
            flat = [x for sample in samples for x in sample.inputs.get(modality, ())]
            rows[modality] = torch.tensor([i for i, s in enumerate(samples) for _ in s.inputs.get(modality, ())]).long()
            # As large as without several captions: memory is bounded by the batch.
            batches[modality] = [transform.collate(flat[i : i + self.size]) for i in range(0, len(flat), self.size)]
        # Inputs stay behind: they are in the batches.
        return _Chunk([_Sample(s.position, s.key, {}, s.meta) for s in samples], batches, rows, skipped)


class _Composed(_Chunks):
    """Examples that are composed of samples, each by the draw's number."""

    def __init__(
        self, source: Source, transforms: Mapping[str, Transform], size: int, compose: Compose, draw: int
    ) -> None:
        super().__init__(source, transforms, size)
        self.compose, self.draw = compose, draw

    def count(self) -> int:
        """Anchors."""
        return len(self.compose)

    def sample(self, number: int) -> _Sample:
        """Compose one."""
        position = self.compose.anchor(number)
        e = self.compose.example(position, fold_seed("evaluation", self.draw, position))
        return _Sample(e.position, e.key, {m: [x] for m, x in e.inputs.items()}, e.meta)


def embed(
    model: MultiEncoder,
    data: Sequence[str] | ShardSet | Source,
    *,
    modalities: Sequence[str] | None = None,
    compose: Compose.Config | None = None,
    draw: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = False,
) -> Embedded:
    """Embed all samples of some data.

    Args:
        model: used in evaluation mode.
        data: names as `open_data` takes them, or what was opened, since opening foreign shards means a scan.
        modalities: which to embed; by default all of the model.
        compose: how an example is made of samples in shards; by default it is one sample as it is.
        draw: which of the examples that `compose` can make of an anchor; each number always means the same ones.
        batch_size: samples encoded at once.
        workers: processes that read and decode; 0 does it in this one.
        progress: show a bar on standard error.

    Raises:
        ConfigError: data that cannot be opened, a modality that no sample has, or no sample left.
    """
    transforms = {m: model.encoder(m).transform(train=False) for m in modalities or model.modalities}
    source = Shards(data) if isinstance(data, ShardSet) else open_data(data) if isinstance(data, Sequence) else data
    reader, facts = None, dict[str, float]()
    if isinstance(source, Shards):
        settings = compose or Compose.Config()
        reader = Reader(source.shards, transforms, made=settings.made())
    if compose is None:
        for modality, transform in transforms.items():
            if not source.has(transform.kind):
                raise ConfigError(f"no sample has the modality {modality!r}: there are no files of {transform.kind}")
        chunks = _Chunks(source, transforms, batch_size)
    else:
        if reader is None:
            raise ConfigError("examples can be composed of samples in shards only; write shards: mmcontrast prep")
        composed: Compose = compose.build(reader)
        chunks, facts = _Composed(source, transforms, batch_size, composed, draw), dict(composed.facts)
    z: dict[str, list[Tensor]] = {m: [] for m in transforms}
    rows: dict[str, list[Tensor]] = {m: [] for m in transforms}
    samples: list[_Sample] = []
    skipped: list[tuple[str, str, str]] = []
    loader = DataLoader(chunks, batch_size=None, num_workers=workers)
    for chunk in _watched(loader, len(chunks), progress):
        for modality, batches in chunk.batches.items():
            z[modality] += [model.embed(modality, x).float().cpu() for x in batches]
            rows[modality].append(chunk.rows[modality] + len(samples))
        samples += chunk.samples
        skipped += chunk.skipped
    if not samples:
        where = ", ".join(dict.fromkeys(source.name(number)[0] for number in range(min(len(source), 20))))
        reasons = "; ".join(dict.fromkeys(reason for *_, reason in skipped[:20]))
        raise ConfigError(f"none of the {len(source)} samples of {where} could be read: {reasons[:300]}")
    return Embedded(
        z={m: torch.cat(parts) for m, parts in z.items() if parts},
        rows={m: torch.cat(rows[m]) for m, parts in z.items() if parts},
        keys=[s.key for s in samples],
        positions=torch.tensor([s.position for s in samples]),
        meta=[s.meta for s in samples],
        skipped=skipped,
        fingerprint=source.fingerprint,
        source=source,
        shard_reader=reader,
        kinds={m: t.kind for m, t in transforms.items()},
        facts=facts,
    )


def has(data: ShardSet | Source, model: MultiEncoder, modality: str) -> bool:
    """Whether any sample has the modality.

    Raises:
        ConfigError: the model does not have the modality.
    """
    source = Shards(data) if isinstance(data, ShardSet) else data
    return source.has(model.encoder(modality).kind)


def _watched(loader: Any, total: int, progress: bool) -> Iterator[_Chunk]:
    from tqdm import tqdm

    yield from tqdm(loader, total=total, desc="embed", unit="batch", disable=not progress)
