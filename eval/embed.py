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
        rows: modality -> [n_m] int64, ascending places in `keys`.
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

    def paired(self, x: str, y: str) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that have both modalities, and both embeddings of them: [p], [p, D], [p, D]."""
        for modality in (x, y):
            if modality not in self.rows:
                return torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), torch.zeros(0, 0)
        both = self.rows[x][torch.isin(self.rows[x], self.rows[y])]
        z = [self.z[m][torch.searchsorted(self.rows[m], both)] for m in (x, y)]
        return both, z[0], z[1]


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


def fields_of(meta: Sequence[Mapping[str, Any]]) -> str:
    """Names of the metadata fields, for messages."""
    return ", ".join(sorted({name for m in meta[:100] for name in m})) or "none"


def _watched(loader: Any, total: int, progress: bool) -> Iterator[tuple[Batch, list[Example]]]:
    from tqdm import tqdm

    yield from tqdm(loader, total=total, desc="embed", unit="batch", disable=not progress)
