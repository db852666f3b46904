"""What one rank gets for one optimizer step, with modalities that may be missing.

Letters: n rows on this rank, n_m rows that have modality m, D dimensions of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

Embeddings = Mapping[str, Tensor]
"""modality -> [n, D], unit norm, float32 (float64 in tests)."""


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to a tensor, or to every tensor of a mapping (an encoder's inputs are one or the other)."""
    if isinstance(value, Tensor):
        return function(value)
    return {name: map_tensors(item, function) for name, item in cast(Mapping[str, Any], value).items()}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an encoder's inputs, or of those of several."""
    found: list[Tensor] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


@dataclass(frozen=True)
class Batch:
    """The samples of one rank and one step.

    Attributes:
        inputs: modality -> tensor (or mapping of tensors) of the rows that HAVE it, [n_m, ...]; no entry where
            no row has it.
        rows: modality -> [n_m] int64, ascending: the rows of the batch that they belong to.
        ids: [n] int64, stable sample ids; equal ids are one sample and never negatives of each other.
        groups: name -> [n] int64 labels such as concept or patient.
        keys: [n] names of the samples, for messages.
        skipped: damaged samples that were replaced, as (shard, key, reason); of several sources, SOURCE/shard.
        sources: [n] names of the sources that they are of; that of an only source is empty.
        cut: modality -> rows of which a part was left out, for its length: the end of a text, what a crop left.
    """

    inputs: Mapping[str, Any]
    rows: Mapping[str, Tensor]
    ids: Tensor
    groups: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    keys: Sequence[str] = ()
    skipped: Sequence[tuple[str, str, str]] = ()
    sources: Sequence[str] = ()
    cut: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __len__(self) -> int:
        return len(self.ids)

    def present(self, modality: str) -> Tensor:
        """[n] bool: which rows have the modality."""
        mask = torch.zeros(len(self), dtype=torch.bool, device=self.ids.device)
        mask[self.rows[modality]] = True
        return mask

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies from pinned memory overlap with computation."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=True)

        return replace(
            self,
            inputs={m: map_tensors(x, move) for m, x in self.inputs.items()},
            rows={m: move(r) for m, r in self.rows.items()},
            ids=move(self.ids),
            groups={g: move(t) for g, t in self.groups.items()},
        )

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader before the copy to an accelerator."""
        return replace(self, inputs={m: map_tensors(x, Tensor.pin_memory) for m, x in self.inputs.items()})

    def split(self, micro_batch: int, modalities: Sequence[str] | None = None) -> Iterator[MicroBatch]:
        """Consecutive runs of `micro_batch` rows, the last possibly shorter; of all modalities, or of some alone."""
        asked = list(self.rows) if modalities is None else modalities
        host_rows = {m: self.rows[m].cpu() for m in asked}
        for start in range(0, len(self), micro_batch):
            stop = min(start + micro_batch, len(self))
            inputs: dict[str, Any] = {}
            rows: dict[str, Tensor] = {}
            for modality, index in host_rows.items():
                low, high = (int(v) for v in torch.searchsorted(index, torch.tensor([start, stop])))
                rows[modality] = self.rows[modality][low:high]
                if low < high:
                    part = slice(low, high)
                    inputs[modality] = map_tensors(self.inputs[modality], lambda t, part=part: t[part])
            yield MicroBatch(start, inputs, rows, None if modalities is None else tuple(modalities))


@dataclass(frozen=True)
class MicroBatch:
    """Some consecutive rows of a batch, and the towers that are to encode them.

    Attributes:
        start: its first row in the whole batch.
        inputs: as in `Batch`, of these rows; no entry for a modality that none of them has.
        rows: modality -> positions in the whole batch.
        towers: those to run, in this order; None runs all. One without a row runs on a dummy row.
    """

    start: int
    inputs: Mapping[str, Any]
    rows: Mapping[str, Tensor]
    towers: tuple[str, ...] | None = None

    @property
    def apart(self) -> tuple[str, ...]:
        """Its modalities, where others are encoded in other pieces."""
        return () if self.towers is None else tuple(self.rows)
