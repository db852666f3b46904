"""The samples of a data set in the shared space: what every question is asked of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmcontrast.data.reader import Reader
from mmcontrast.eval.sources import Source


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
