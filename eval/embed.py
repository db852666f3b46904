"""Shards + a model -> embeddings of every modality, in the order of the samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError
from mmcontrast.data.compose import Compose
from mmcontrast.data.reader import Example, Reader
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import FORMATS, BadSample, ShardSet, open_shards


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
        fingerprint: of the shards.
        facts: what is known of the examples beside their scores, such as what chance would reach.
    """

    z: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    keys: Sequence[str]
    positions: Tensor
    meta: Sequence[Mapping[str, Any]]
    skipped: Sequence[tuple[str, str, str]]
    fingerprint: str
    reader: Reader
    facts: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, where the data come with a list of them."""
        return ()

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with {c} for the class name, where the data come with some."""
        return ()

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


class _Chunks(Dataset[tuple[Batch, list[Example]]]):
    """Chunk number -> its batch and examples, damaged samples left out and named."""

    def __init__(self, compose: Compose, size: int, draw: int) -> None:
        self.compose, self.reader, self.size, self.draw = compose, compose.reader, size, draw

    def __len__(self) -> int:
        return -(-len(self.compose) // self.size)

    def __getitem__(self, chunk: int) -> tuple[Batch, list[Example]]:
        examples: list[Example] = []
        skipped: list[tuple[str, str, str]] = []
        stop = min((chunk + 1) * self.size, len(self.compose))
        for position in map(self.compose.anchor, range(chunk * self.size, stop)):
            try:
                examples.append(self.compose.example(position, fold_seed("evaluation", self.draw, position)))
            except BadSample as error:
                skipped.append((*self.reader.shards.name(position), str(error)))
        batch = self.reader.collate(examples, skipped=skipped)
        return batch, [Example(e.position, e.key, {}, e.meta) for e in examples]


def embed(
    model: MultiEncoder,
    shards: Sequence[str] | ShardSet,
    *,
    modalities: Sequence[str] | None = None,
    compose: Compose.Config | None = None,
    draw: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = False,
) -> Embedded:
    """Embed all samples of some shards.

    Args:
        model: used in evaluation mode.
        shards: folders, globs or ranges; or what they opened as, since opening foreign shards means a scan.
        modalities: which to embed; by default all of the model.
        compose: how an example is made of samples; by default it is one sample as it is.
        draw: which of the examples that `compose` can make of an anchor; each number always means the same ones.
        batch_size: samples encoded at once.
        workers: processes that read and decode; 0 does it in this one.
        progress: show a bar on standard error.

    Raises:
        ConfigError: shards that cannot be opened, a modality that no sample has, or no sample left.
    """
    transforms = {m: model.encoder(m).transform(train=False) for m in modalities or model.modalities}
    opened = shards if isinstance(shards, ShardSet) else open_shards(shards)
    settings = compose or Compose.Config()
    reader = Reader(opened, transforms, made=settings.made())
    composed: Compose = settings.build(reader)
    chunks = _Chunks(composed, batch_size, draw)
    z: dict[str, list[Tensor]] = {m: [] for m in transforms}
    rows: dict[str, list[Tensor]] = {m: [] for m in transforms}
    examples: list[Example] = []
    skipped: list[tuple[str, str, str]] = []
    loader = DataLoader(chunks, batch_size=None, num_workers=workers)
    for batch, seen in _watched(loader, len(chunks), progress):
        for modality, x in batch.inputs.items():
            z[modality].append(model.embed(modality, x).float().cpu())
            rows[modality].append(batch.rows[modality] + len(examples))
        examples += seen
        skipped += batch.skipped
    if not examples:
        folders = dict.fromkeys(str(shard.path.parent) for shard in opened.shards)
        raise ConfigError(f"none of the {len(opened)} samples of {', '.join(folders)} could be read")
    return Embedded(
        z={m: torch.cat(parts) for m, parts in z.items() if parts},
        rows={m: torch.cat(parts) for m, parts in rows.items() if parts},
        keys=[e.key for e in examples],
        positions=torch.tensor([e.position for e in examples]),
        meta=[e.meta for e in examples],
        skipped=skipped,
        fingerprint=opened.fingerprint,
        reader=reader,
        facts=composed.facts,
    )


def has(shards: ShardSet, model: MultiEncoder, modality: str) -> bool:
    """Whether any sample of the shards has the modality.

    Raises:
        ConfigError: the model does not have the modality.
    """
    return any(shards.counts.get(e) for e in FORMATS[model.encoder(modality).kind])


def _watched(loader: Any, total: int, progress: bool) -> Iterator[tuple[Batch, list[Example]]]:
    from tqdm import tqdm

    yield from tqdm(loader, total=total, desc="embed", unit="batch", disable=not progress)
