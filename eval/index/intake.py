"""What comes into an index: samples of shards, which are embedded, or embeddings that are there already."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Reader
from mmcontrast.eval.embed import has
from mmcontrast.eval.index.embeddings import fingerprint_of, is_embeddings, read_embeddings
from mmcontrast.eval.index.identity import Origin
from mmcontrast.eval.index.partitions import POOL, Work, embed_partitions, read_parts
from mmcontrast.eval.index.segment import Part
from mmcontrast.eval.index.store import PARTITIONS
from mmcontrast.sharding import meet
from mmcontrast.shards import open_shards

Skipped = list[tuple[str, str, str]]
"""Samples that could not be read: (shard, key, reason)."""


@dataclass(frozen=True)
class Encoding:
    """How samples are embedded.

    Attributes:
        processes: that encode, each with a model of its own; by default one per GPU.
        workers: processes that read and decode, for each that encodes.
        batch_size: samples encoded at once.
        trust: modules beside mmcontrast whose classes the run's config may name.
    """

    processes: int | None = None
    workers: int = 0
    batch_size: int = 128
    trust: Collection[str] = ()


class Intake:
    """Vectors and rows of one source, for one index."""

    def __init__(
        self, places: Sequence[str], origin: Origin, modality: str, encoding: Encoding, *, source: int = 0
    ) -> None:
        """Look at what is there.

        Args:
            places: shards, or one folder of embeddings as clip-retrieval lays them out.
            origin: the model.
            modality: what is indexed, or a pool.
            encoding: how samples are embedded.
            source: number of this source in the index.

        Raises:
            ConfigError: shards or embeddings that cannot be read, or without the modality.
        """
        self.places, self.modality, self.source, self.dim = places, modality, source, origin.model.config.dim
        self.ranks = meet()
        if self.ranks.size > 1 and encoding.processes is not None:
            raise ConfigError("torchrun starts the processes that encode; leave --processes out")
        self.work: Work | None = None
        if any(map(is_embeddings, places)):
            if len(places) > 1:
                raise ConfigError(
                    f"{', '.join(places)}: give one folder of embeddings, and add the others to the index"
                )
            self.data = fingerprint_of(Path(places[0]), modality)
            return
        shards, model = open_shards(places), origin.model
        names = modality.split(POOL)
        if not any(has(shards, model, m) for m in names):  # refused by the reader's own words
            Reader(shards, {m: model.encoder(m).transform(train=False) for m in names})
        self.data = shards.fingerprint
        self.work = Work(model=origin.place, shards=shards, modality=modality, source=source, **vars(encoding))

    @property
    def entry(self) -> dict[str, Any]:
        """As the manifest's `sources` say it."""
        return {"shards": [p if "://" in p else str(Path(p).resolve()) for p in self.places], "data": self.data}

    def helps(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Embed with the others that torchrun started, until all is embedded and the first of them is done with it."""
        if self.work is not None:
            embed_partitions(folder / PARTITIONS, self.work, self._plan(plan), self.ranks)
        self.ranks.wait()

    def take(self, folder: Path, plan: Mapping[str, Any], *, progress: bool = False) -> tuple[list[Part], Skipped]:
        """Vectors and rows, and the samples that were skipped.

        Args:
            folder: of the index; what is embedded is kept in it until `clean`.
            plan: what else decides what the vectors are; see `embed_partitions`.
            progress: show a bar on standard error.

        Raises:
            ConfigError: nothing could be read, or a process that encodes failed.
        """
        if self.work is None:
            parts, skipped = read_embeddings(Path(self.places[0]), self.modality, self.dim, source=self.source), []
        else:
            embed_partitions(folder / PARTITIONS, self.work, self._plan(plan), self.ranks, progress=progress)
            parts, skipped = read_parts(folder / PARTITIONS, self.work)
        parts = [part for part in parts if len(part.rows)]
        if not parts:
            raise ConfigError(
                f"no sample of {', '.join(self.places)} with the modality {self.modality!r} could be read"
            )
        return parts, skipped

    def clean(self, folder: Path) -> None:
        """Remove what was kept, now that the index has it; the others of torchrun may go on."""
        shutil.rmtree(folder / PARTITIONS, ignore_errors=True)
        self.ranks.wait()

    def _plan(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        return {**plan, "data": self.data, "source": self.source}
