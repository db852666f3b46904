"""An index on the disk, opened: its rows, and the exact or approximate search of vectors that pass a filter.

What needs no model is asked here; `search.Index` adds the model, and with it queries of texts, pictures and sounds.
Letters: n rows over all segments, q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from mmcontrast.config import ConfigError, suggest
from mmcontrast.decode import metadata
from mmcontrast.eval.index.filters import Filter, Mask
from mmcontrast.eval.index.identity import METRIC, check_same
from mmcontrast.eval.index.rows import COLUMNS, unified
from mmcontrast.eval.index.segment import Segment
from mmcontrast.eval.index.store import read_manifest, verify
from mmcontrast.eval.index.vectors import Floats, Ints
from mmcontrast.shards import FORMATS, METADATA, BadSample, ShardSet, open_shards

_ATTEMPTS = 20
_FILTERS_KEPT = 8


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


class Stored:
    """An index on disk, opened.

    Attributes:
        manifest: what is known of it.
        segments: what it is made of.
    """

    def __init__(self, folder: Path, *, verified: bool = True) -> None:
        """Open and verify.

        Args:
            folder: what `build_index` wrote.
            verified: compare every file with its hash, which reads all of it once.

        Raises:
            ConfigError: no index, changed files, or another metric.
        """
        self.folder, self._verified = folder, verified
        self._open()

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
            self._passing: dict[str | None, list[Mask]] = {}
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
        """Names of the rows' columns, and types as Arrow writes them; one that has several is text."""
        schema = unified(segment.columns for segment in self.segments)
        return dict(zip(schema.names, map(str, schema.types), strict=True))

    def column(self, segment: Segment, name: str) -> pa.ChunkedArray:
        """[rows of the segment] values of a column, of the type that it has in the whole index."""
        return segment.column(name).cast(pa.type_for_alias(self.columns[name]))

    def passing(self, where: str | None) -> list[Mask]:
        """Of each segment [rows], which are not deleted and pass a filter, or all that are not deleted.

        Raises:
            ConfigError: it is no filter of these columns; see `filters.Filter`.
        """
        if where not in self._passing:
            masks = [np.ones(len(s), np.bool_) if s.live is None else s.live for s in self.segments]
            if where is not None:
                asked = Filter(where)
                asked.check(self.columns)
                found = (asked.mask(partial(self.column, segment)) for segment in self.segments)
                masks = [mask & passes for mask, passes in zip(masks, found, strict=True)]
            while len(self._passing) >= _FILTERS_KEPT:
                self._passing.pop(next(iter(self._passing)))
            self._passing[where] = masks
        return self._passing[where]

    def count(self, where: str | None) -> int:
        """How many samples pass."""
        return len(self) if where is None else sum(int(np.count_nonzero(mask)) for mask in self.passing(where))

    def find(self, key: str) -> int:
        """The row of a sample; the first, if several have the key.

        Raises:
            ConfigError: no sample has it.
        """
        for segment, start in zip(self.segments, self._starts, strict=False):
            rows = segment.find(pa.array([key], pa.string()))
            if len(rows):
                return int(start + rows[0])
        known = self.segments[0].keys.slice(0, 10_000).to_pylist()
        near = suggest(key, known)
        raise ConfigError(f"the key {key!r} is not in {self.folder}{near if near.startswith('; did') else ''}")

    def vector(self, row: int) -> Floats:
        """[D], unit norm, of a row."""
        segment, number = self._locate(row)
        return np.array(segment.vectors[number], np.float32)

    def rows(self, where: str | None = None) -> Ints:
        """Rows that are not deleted and pass a filter, ascending."""
        masks = zip(self.passing(where), self._starts, strict=False)
        return np.concatenate([np.flatnonzero(mask) + start for mask, start in masks])

    def vectors(self, rows: Ints) -> Floats:
        """[len(rows), D] of ascending rows."""
        cuts = np.searchsorted(rows, self._starts)
        places = zip(self.segments, self._starts, cuts, cuts[1:], strict=False)
        return np.concatenate([np.asarray(s.vectors[rows[a:b] - start], np.float32) for s, start, a, b in places])

    def keys(self, rows: Ints) -> list[str]:
        """[len(rows)] keys of any rows."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        found = np.empty(len(rows), object)
        for number, segment in enumerate(self.segments):
            here = np.flatnonzero(numbers == number)
            found[here] = segment.keys.take(pa.array(rows[here] - self._starts[number])).to_pylist()
        return found.tolist()

    def facts(self, row: int) -> dict[str, Any]:
        """All columns of a row."""
        segment, number = self._locate(row)
        return segment.row(number)

    def _locate(self, row: int) -> tuple[Segment, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.segments[number], row - int(self._starts[number])

    def search_vectors(self, queries: Floats, *, top: int = 5, where: str | None = None) -> list[list[Hit]]:
        """The nearest samples to vectors of the model's space, [q, D], best first; of those that pass a filter.

        Raises:
            ConfigError: vectors of another dimension or that are not finite, `top` below 1, or no filter.
        """
        scores, rows = self.nearest(queries, top, where)
        return [
            [self.hit(float(s), int(i)) for s, i in zip(row, places, strict=True) if i >= 0]
            for row, places in zip(scores, rows, strict=True)
        ]

    def nearest(self, queries: Floats, top: int, where: str | None = None) -> tuple[Floats, Ints]:
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
        masks = [None] * len(self.segments) if where is None else self.passing(where)
        found = [segment.search(queries, top, mask) for segment, mask in zip(self.segments, masks, strict=True)]
        if len(found) == 1:
            return found[0]
        scores = np.concatenate([s for s, _ in found], 1)
        rows = np.concatenate(
            [np.where(r < 0, -1, r + start) for (_, r), start in zip(found, self._starts, strict=False)], 1
        )
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)

    def hit(self, score: float, row: int) -> Hit:
        """What is known of a row, as an answer with this score."""
        values = self.facts(row)
        metadata = {k: v for k, v in values.items() if k not in COLUMNS.names and v is not None}
        own = {name: values[name] for name in COLUMNS.names}
        return Hit(score, **own, metadata=metadata)

    def member(self, hit: Hit, kind: str) -> tuple[bytes, str] | None:
        """What the shards hold of an answer, and its extension; None where they are gone, changed, or hold none.

        Args:
            hit: the answer.
            kind: image, text, audio or timeseries.
        """
        return self._read(hit, FORMATS[kind])

    def meta(self, hit: Hit) -> Mapping[str, Any]:
        """The metadata of an answer as they were stored, such as rate and channels of a signal; empty without.

        Raises:
            BadSample: they are no JSON object.
        """
        found = self._read(hit, (METADATA,))
        meta: Mapping[str, Any] = {} if found is None else metadata(found[0])
        own = meta.get(self.manifest["modality"])
        return cast(Mapping[str, Any], own) if isinstance(own, Mapping) else meta

    def _read(self, hit: Hit, extensions: Sequence[str]) -> tuple[bytes, str] | None:
        shards = self._source(hit.source)
        if shards is None:
            return None
        try:
            present = shards.extensions(hit.position)
            for extension in extensions:
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
