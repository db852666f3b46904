"""Samples of any data in batches as the model takes them: what is read and decoded in loader workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmcontrast.data.compose import Compose
from mmcontrast.encoders.base import Transform
from mmcontrast.eval.sources import Source
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import BadSample


@dataclass(frozen=True)
class Sample:
    """One sample as the model takes it: modality -> inputs, none, one or several."""

    position: int
    key: str
    inputs: Mapping[str, Sequence[Any]]
    meta: Mapping[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Some samples: modality -> inputs in batches, and the number of the sample that each input is of."""

    batches: Mapping[str, Sequence[Any]]
    rows: Mapping[str, Tensor]
    samples: Mapping[int, Sample]
    skipped: Mapping[int, str]


class Chunks(Dataset[Chunk]):
    """Chunk number -> its samples, damaged ones left out and named. Runs in loader workers."""

    composed = False

    def __init__(self, source: Source, transforms: Mapping[str, Transform], size: int) -> None:
        self.source, self.transforms, self.size = source, transforms, size

    def count(self) -> int:
        """Samples to be read."""
        return len(self.source)

    def sample(self, number: int) -> Sample:
        """Read one.

        Raises:
            BadSample: it is damaged.
        """
        inputs: dict[str, Sequence[Any]] = {}
        for modality, transform in self.transforms.items():
            values = self.source.values(number, modality, transform.kind)
            if values:
                inputs[modality] = [transform(value) for value in values]
        return Sample(number, "", inputs, {})

    def __len__(self) -> int:
        return -(-self.count() // self.size)

    def __getitem__(self, chunk: int) -> Chunk:
        samples: dict[int, Sample] = {}
        skipped: dict[int, str] = {}
        for number in range(chunk * self.size, min((chunk + 1) * self.size, self.count())):
            try:
                samples[number] = self.sample(number)
            except BadSample as error:
                skipped[number] = str(error)
        batches: dict[str, Sequence[Any]] = {}
        rows: dict[str, Tensor] = {}
        for modality, transform in self.transforms.items():
            flat = [x for sample in samples.values() for x in sample.inputs.get(modality, ())]
            rows[modality] = torch.tensor([i for i, s in samples.items() for _ in s.inputs.get(modality, ())]).long()
            # As large as without several captions: memory is bounded by the batch.
            batches[modality] = [transform.collate(flat[i : i + self.size]) for i in range(0, len(flat), self.size)]
        # Inputs stay behind: they are in the batches.
        told = {i: replace(s, inputs={}) for i, s in samples.items()} if self.composed else {}
        return Chunk(batches, rows, told, skipped)


class Composed(Chunks):
    """Examples that are composed of samples, each by the draw's number."""

    composed = True

    def __init__(
        self, source: Source, transforms: Mapping[str, Transform], size: int, compose: Compose, draw: int
    ) -> None:
        super().__init__(source, transforms, size)
        self.compose, self.draw = compose, draw

    def count(self) -> int:
        """Anchors."""
        return len(self.compose)

    def sample(self, number: int) -> Sample:
        """Compose one."""
        position = self.compose.anchor(number)
        e = self.compose.example(position, fold_seed("evaluation", self.draw, position))
        return Sample(e.position, e.key, {m: [x] for m, x in e.inputs.items()}, e.meta)
