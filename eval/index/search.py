"""An index on the disk, opened to be searched with the model that made it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint
from mmcontrast.config import ConfigError
from mmcontrast.eval.index.identity import METRIC, check_same, identity_of
from mmcontrast.eval.index.rows import COLUMNS
from mmcontrast.eval.index.segment import Segment
from mmcontrast.eval.index.store import read_manifest, verify
from mmcontrast.eval.index.vectors import Floats, Ints
from mmcontrast.shards import FORMATS, BadSample, ShardSet, open_shards

_ATTEMPTS = 20


@dataclass(frozen=True)
class Hit:
    """One answer.

    Attributes:
        score: inner product with the query, a cosine for a query of one modality.
        key: of the sample.
        shard: file name of its shard.
        position: of the sample in its source.
        text: its caption; None where it has none.
        source: which of the manifest's `sources` it came with.
        metadata: its labels and other fields.
    """

    score: float
    key: str
    shard: str
    position: int
    text: str | None
    source: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Index:
    """An index on disk, opened with the model that made it.

    Attributes:
        manifest: what is known of it.
        model: that made it.
    """

    def __init__(
        self, folder: Path, *, model: Path | None = None, trust: Collection[str] = (), verified: bool = True
    ) -> None:
        """Open and verify.

        Args:
            folder: what `build_index` wrote.
            model: where the model lies now, if it moved since; its hash must be the index's.
            trust: as for `mmcontrast.load`.
            verified: compare every file with its hash, which reads all of it once.

        Raises:
            ConfigError: no index, changed files, or another model, dimension or metric.
        """
        self.folder, self._verified = folder, verified
        self._open()
        origin = model or Path(self.manifest["model"])
        if not origin.is_dir():
            raise ConfigError(f"{folder} needs the model {origin}, which is not there; say where with --model")
        checkpoint = find_checkpoint(origin)
        self.model = load_checkpoint(checkpoint, trust=trust)
        # The hash first: of another model, preprocessing and dimensions differ as well, and say less.
        check_same(
            self.manifest, identity_of(checkpoint, self.model, self.manifest["modality"]), str(folder), str(checkpoint)
        )

    def _open(self) -> None:
        """Open the newest generation; one that is replaced meanwhile has lost files, then the next is opened."""
        for attempt in range(_ATTEMPTS):
            manifest = read_manifest(self.folder)
            if manifest["metric"] != METRIC:
                raise ConfigError(
                    f"{self.folder} scores by {manifest['metric'][:50]!r}, searches by {METRIC!r}; build it again"
                )
            try:
                if self._verified:
                    verify(self.folder, manifest)
                entries = manifest["segments"]
                segments = [Segment(self.folder / e["folder"], e, manifest["dim"]) for e in entries]
            except FileNotFoundError as error:
                again = read_manifest(self.folder)
                if again["generation"] == manifest["generation"] or attempt == _ATTEMPTS - 1:
                    raise ConfigError(f"the index is incomplete: {error}; build it again") from None
                continue
            if sum(len(s) - len(s.deleted) for s in segments) != manifest["count"]:
                raise ConfigError(f"{self.folder}: vectors, rows and manifest do not belong together; build it again")
            self.manifest, self.segments = manifest, segments
            self._starts = np.cumsum([0, *map(len, segments)])
            self._shards: dict[int, ShardSet | None] = {}
            self.__dict__.pop("columns", None)
            return

    def refresh(self) -> bool:
        """Go on with what was written since, if anything was; whether it was.

        Until then an opened index answers from the generation that it opened, whatever is written.

        Raises:
            ConfigError: what stands there now is no index of this model.
        """
        now = read_manifest(self.folder)
        if now["generation"] == self.manifest["generation"] and now["segments"] == self.manifest["segments"]:
            return False
        check_same(self.manifest, now, str(self.folder), "what was opened")
        self._open()
        return True

    def __len__(self) -> int:
        return int(self.manifest["count"])

    @cached_property
    def columns(self) -> dict[str, str]:
        """Names and types of the rows' columns."""
        found: dict[str, str] = {}
        for segment in self.segments:
            found |= dict(zip(segment.columns.names, map(str, segment.columns.types), strict=True))
        return found

    def search(self, modality: str, queries: Sequence[Any], *, top: int = 5) -> list[list[Hit]]:
        """The nearest samples to each query, best first; fewer than `top` where the index is smaller.

        Raises:
            ConfigError: the model has no such modality, `top` is below 1, or a query cannot be read.
        """
        try:
            z = self.model.encode(modality, queries).numpy()
        except BadSample as error:
            raise ConfigError(f"a query cannot be used: {error}") from None
        return self.search_vectors(z, top=top)

    def search_vectors(self, queries: Floats, *, top: int = 5) -> list[list[Hit]]:
        """The nearest samples to vectors of the model's space, [q, D]; see `search`.

        Raises:
            ConfigError: vectors of another dimension or that are not finite, or `top` below 1.
        """
        scores, rows = self.nearest(queries, top)
        return [
            [self._hit(float(s), int(i)) for s, i in zip(row, where, strict=True) if i >= 0]
            for row, where in zip(scores, rows, strict=True)
        ]

    def nearest(self, queries: Floats, top: int) -> tuple[Floats, Ints]:
        """Scores and rows of the `top` best, [q, top]; rows are numbered over all segments, -1 where there are fewer.

        Raises:
            ConfigError: as for `search_vectors`.
        """
        if top < 1:
            raise ConfigError(f"top is {top}; ask for at least 1 result")
        dim = self.manifest["dim"]
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ConfigError(f"queries are {queries.shape[-1]}-dimensional, {self.folder} has {dim} dimensions")
        if not np.isfinite(queries).all():
            raise ConfigError("a query is not finite; the model cannot embed it")
        queries = np.ascontiguousarray(queries, np.float32)
        top = min(top, len(self))
        found = [segment.search(queries, top) for segment in self.segments]
        if len(found) == 1:
            return found[0]
        scores = np.concatenate([s for s, _ in found], 1)
        rows = np.concatenate(
            [np.where(r < 0, -1, r + start) for (_, r), start in zip(found, self._starts, strict=False)], 1
        )
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def _hit(self, score: float, row: int) -> Hit:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        values = self.segments[number].row(row - int(self._starts[number]))
        metadata = {k: v for k, v in values.items() if k not in COLUMNS.names and v is not None}
        own = {name: values[name] for name in COLUMNS.names}
        return Hit(score, **own, metadata=metadata)

    def picture(self, hit: Hit) -> bytes | None:
        """The stored picture of an answer; None where the shards are gone, changed, or hold none."""
        found = self.member(hit, "image")
        return None if found is None else found[0]

    def member(self, hit: Hit, kind: str) -> tuple[bytes, str] | None:
        """What the shards hold of an answer, and its extension; None where they are gone, changed, or hold none.

        Args:
            hit: the answer.
            kind: image, text, audio or timeseries.
        """
        shards = self._source(hit.source)
        if shards is None:
            return None
        try:
            present = shards.extensions(hit.position)
            for extension in FORMATS[kind]:
                if extension in present:
                    return shards.read(hit.position, extension), extension
        except (ConfigError, BadSample, OSError, IndexError):
            return None
        return None

    def _source(self, number: int) -> ShardSet | None:
        """The shards of a source, if they are still there and unchanged."""
        if number not in self._shards:
            try:
                source = self.manifest["sources"][number]
                shards = open_shards(source["shards"])
                self._shards[number] = shards if shards.fingerprint == source["data"] else None
            except (ConfigError, OSError, LookupError, TypeError):
                self._shards[number] = None
        return self._shards[number]
