"""One index as the page and the API ask it: what it is, queries of several parts, samples and what they hold.

Nothing else of the server touches an index or a model.
"""

from __future__ import annotations

import base64
import binascii
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.reader import SIGNAL
from mmcontrast.decode import Picture, Sound
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.encoders.timeseries import SignalTransform
from mmcontrast.eval.index.duplicates import find_duplicates
from mmcontrast.eval.index.facets import Facet, facets
from mmcontrast.eval.index.identity import shown_name
from mmcontrast.eval.index.query import bring_together
from mmcontrast.eval.index.rows import COLUMNS
from mmcontrast.eval.index.search import Index
from mmcontrast.eval.index.stored import Hit as Found
from mmcontrast.eval.index.stored import Stored
from mmcontrast.eval.serve import media
from mmcontrast.eval.serve.rows import Place, Rows
from mmcontrast.eval.serve.samples import Samples
from mmcontrast.eval.serve.schema import (
    MAX_FILE_BYTES,
    Column,
    Description,
    Group,
    Groups,
    Hit,
    Hits,
    Model,
    Part,
    Plot,
    Sample,
    Search,
    Tower,
    Value,
)
from mmcontrast.shards import FORMATS, BadSample
from mmcontrast.signals import Signal, signal

_FRESH_SECONDS = 1.0
_COMPARED = 50_000  # samples whose pairs are all looked at while somebody waits
_GROUPS, _MEMBERS = 60, 12  # shown


class NotFound(ConfigError):
    """There is no such index, sample or medium."""


class _Opened:
    """One generation of an index, and what is shown of it."""

    def __init__(self, shelf: Shelf) -> None:
        m, model = shelf.index.manifest, shelf.index.model
        self.rows = Rows(shelf.index)
        self.columns: list[Column] | None = None
        self.groups: dict[tuple[float, str | None], Groups] = {}
        self.samples = Samples([(source["shards"], source["data"]) for source in m["sources"]], shelf.names)
        self.description = Description(
            name=shelf.name,
            modality=m["modality"],
            kind=shelf.kinds[m["modality"].partition("+")[0]],
            count=m["count"],
            dim=m["dim"],
            type=m["type"],
            recall_at_10=m["quality"].get("recall_at_10"),
            joint="product" if m["joint"] == "product" else "sum",
            readable=self.samples.readable,
            model=Model(
                name=shown_name(m["model"]),
                hash=m["model_hash"],
                towers=[_tower(model, name) for name in shelf.kinds],
            ),
        )


class Shelf:
    """An index that is served under a name. What is written to the index while it is served is seen a second later."""

    def __init__(self, name: str, index: Index) -> None:
        self.name, self.index = name, index
        self._encoding, self._drawing, self._comparing = (
            Lock(),
            Lock(),
            Lock(),
        )  # one at a time: a large file takes hundreds of megabytes
        self._searching = Lock()  # an index must not be refreshed while it searches, nor its rows be read twice at once
        self.kinds = {m: index.model.encoder(m).kind for m in index.model.modalities}
        # Kind -> the modality of the model that is shown under it, the kind itself where the model has none.
        self.names = {kind: next((m for m, k in self.kinds.items() if k == kind), kind) for kind in FORMATS}
        self._opened, self._looked = _Opened(self), time.monotonic()

    @property
    def now(self) -> _Opened:
        """What stands in the index, or stood a second ago."""
        with self._searching:
            if time.monotonic() - self._looked > _FRESH_SECONDS:
                try:
                    if self.index.refresh():
                        self._opened = _Opened(self)
                except ConfigError as error:  # replaced by another, or removed: the old one still answers
                    print(f"{self.name} is served as it was: {error}", file=sys.stderr)
                self._looked = time.monotonic()
            return self._opened

    @property
    def description(self) -> Description:
        """The index and the model that made it."""
        return self.now.description

    # -------------------------------------------------------------------------------------------- queries

    def search(self, query: Search, *, others: Mapping[str, Shelf]) -> Hits:
        """The nearest samples to all parts together, best first; never one that a part names.

        Args:
            query: what is asked.
            others: the indices whose samples a part may name.

        Raises:
            ConfigError: a part that cannot be used, parts that cannot be brought together, or no filter.
            NotFound: a part names a sample or an index that is not there.
        """
        begun, now = time.perf_counter(), self.now
        pieces: list[tuple[str, NDArray[np.float32], float]] = []
        for number, part in enumerate(query.parts, 1):
            try:
                pieces.append((*self._embedding(part, now, others), part.weight))
            except BadSample as error:
                which = f"part {number} of the query" if len(query.parts) > 1 else "the query"
                raise ConfigError(f"{which} cannot be used: {error}") from None
        m = self.index.manifest
        z, joint = bring_together(pieces, query.joint, trained=m["joint"], target=m["modality"], modalities=self.kinds)
        named = [p.like for p in query.parts if p.like is not None and others.get(p.of or "", self) is self]
        with self._searching:
            hits = self.index.search_vectors(z[None], top=query.top + len(named), where=query.where)[0]
            passing = len(self.index) if query.where is None else self.index.count(query.where)
            now = self._opened  # of the generation that was searched
        shown = [hit for hit in hits if str(Place(hit.source, hit.position)) not in named][: query.top]
        answers = [self._answer(now, hit) for hit in shown]
        milliseconds = round(1000 * (time.perf_counter() - begun), 1)
        return Hits(index=self.name, milliseconds=milliseconds, joint=joint, passing=passing, hits=answers)

    def columns(self) -> list[Column]:
        """What a filter may ask for."""
        _ = self.now
        with self._searching:
            now = self._opened
            if now.columns is None:
                now.columns = [_column(facet) for facet in facets(self.index)]
            return now.columns

    def duplicates(self, threshold: float, where: str | None) -> Groups:
        """Groups of near-duplicates.

        Raises:
            ConfigError: so many samples that it would take minutes, or no filter.
        """
        with self._comparing:  # on files of its own, so that others search meanwhile
            try:
                opened = Stored(self.index.folder, verified=False)
            except ConfigError as error:
                print(f"{self.name}: {error}", file=sys.stderr)
                raise NotFound(f"the index {self.name} cannot be read any more") from None
            if opened.manifest["generation"] != self.index.manifest["generation"]:
                self._looked = -_FRESH_SECONDS  # what is shown of the samples must be of the same generation
            now = self.now
            if (threshold, where) in now.groups:
                return now.groups[threshold, where]
            if (count := opened.count(where)) > _COMPARED:
                raise ConfigError(
                    f"{count} samples are too many to compare while you wait, {_COMPARED} at most: give a filter, or "
                    "run mmcontrast index duplicates"
                )
            found = find_duplicates(opened, threshold, where=where, neighbours=0, most=_GROUPS)
            groups = [
                Group(count=len(g.members), samples=[self._answer(now, member) for member in g.members[:_MEMBERS]])
                for g in found.groups
            ]
            counted = Groups(
                index=self.name,
                threshold=threshold,
                looked_at=found.looked_at,
                count=found.count,
                redundant=found.redundant,
                groups=groups,
            )
            while len(now.groups) > 3:
                now.groups.pop(next(iter(now.groups)))
            now.groups[threshold, where] = counted
            return counted

    def _answer(self, now: _Opened, hit: Found) -> Hit:
        place = Place(hit.source, hit.position)
        return Hit(score=round(hit.score, 6), **self._facts(now, place, hit.key, hit.shard, hit.text, hit.metadata))

    def _embedding(self, part: Part, now: _Opened, others: Mapping[str, Shelf]) -> tuple[str, NDArray[np.float32]]:
        """The modality that a part is of, and its embedding [D], unit norm."""
        given = [name for name in ("text", "data", "like") if getattr(part, name) is not None]
        if len(given) != 1:
            raise BadSample(f"it has {' and '.join(given) or 'nothing'}; give one of text, data and like")
        if part.like is not None:
            if part.of is not None and part.of not in others:
                raise NotFound(f"there is no index {part.of!r}{suggest(part.of, others)}")
            origin = others[part.of] if part.of is not None else self
            if origin is self:
                return self.index.manifest["modality"], now.rows.vector(self._row(now, part.like))
            return self._encoded(*self._from(origin, part.like))
        modality, kind = self._asked(part)
        if (kind == "text") != (part.text is not None):
            raise BadSample(f"{modality!r} is of kind {kind}: give it as `{'text' if kind == 'text' else 'data'}`")
        value = part.text if part.text is not None else self._file(part, kind, modality)
        if isinstance(value, str) and not value.strip():
            raise BadSample("its text is empty")
        return self._encoded(modality, value)

    def _encoded(self, modality: str, value: Any) -> tuple[str, NDArray[np.float32]]:
        with self._encoding:
            return modality, self.index.model.encode(modality, [value])[0].numpy()

    def _from(self, origin: Shelf, sample: str) -> tuple[str, Any]:
        """A sample of another index as this one's model can take it: what that index is of, or else what there is."""
        there = origin.now
        place, kind = origin.place(sample, there), there.description.kind
        for own in sorted(self.kinds, key=lambda m: self.kinds[m] != kind):
            value = there.samples.raw(place, origin.names[self.kinds[own]])
            if value is not None:
                return own, value
        raise BadSample(f"sample {sample} of {origin.name} has nothing that the model of {self.name} knows")

    def _asked(self, part: Part) -> tuple[str, str]:
        if part.modality is not None:
            self.index.model.encoder(part.modality)  # or it is said which there are
            return part.modality, self.kinds[part.modality]
        if part.text is None or "text" not in self.kinds.values():
            raise BadSample(f"its modality is missing; the model has {', '.join(self.kinds)}")
        return self.names["text"], "text"

    def _file(self, part: Part, kind: str, modality: str) -> Any:
        try:
            data = base64.b64decode(cast(str, part.data), validate=True)
        except (binascii.Error, ValueError):
            raise BadSample("its data are not base64") from None
        if not data:
            raise BadSample("its file is empty")
        if len(data) > MAX_FILE_BYTES:
            raise BadSample(f"its file has {len(data)} bytes; the most are {MAX_FILE_BYTES}")
        if kind != SIGNAL:
            return data
        tower = _tower(self.index.model, modality)
        rate, channels = part.rate or tower.rate, part.channels or tower.channels or []
        try:
            return signal(data, lambda: {"rate": rate, "channels": channels})
        except BadSample as error:
            told = f"{error} (rate {rate:g}, channels {', '.join(channels)})"
            raise BadSample(f"{told}; say what the file is with `rate` and `channels`") from None

    # -------------------------------------------------------------------------------------------- samples

    def sample(self, sample: str) -> Sample:
        """What is known of a sample.

        Raises:
            NotFound: the index does not have it.
        """
        now = self.now
        return self._sample(now, self._row(now, sample))

    def some(self, count: int, seed: int, where: str | None = None) -> list[Sample]:
        """Samples to begin with, drawn at random of those that pass a filter; the same ones for the same seed.

        Raises:
            ConfigError: it is no filter.
        """
        _ = self.now
        with self._searching:
            rows, now = self.index.rows(where), self._opened  # of the same generation
        chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False) if len(rows) else rows
        return [self._sample(now, int(row)) for row in chosen]

    def kind(self, sample: str, modality: str) -> str | None:
        """Whether what a sample has under a name is an image, audio or timeseries; None where it has nothing to show.

        Raises:
            NotFound: the index does not have it.
        """
        now = self.now
        media = now.samples.media(self.place(sample, now))
        return next((m.kind for m in media if m.modality == modality), None)

    def picture(self, sample: str, modality: str, *, side: int) -> bytes:
        """A picture as WebP.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._shown(sample, modality, Picture) as value:
            return media.webp(value, side)

    def sound(self, sample: str, modality: str) -> bytes:
        """A sound as WAV.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._shown(sample, modality, Sound) as value:
            return media.wave(value)

    def plot(self, sample: str, modality: str) -> Plot:
        """The outline of a sound or signal.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._shown(sample, modality, (Sound, Signal)) as value:
            return media.plot(value, self.now.samples.facts(Place.of(sample), modality).get("units"))

    def tag(self, sample: str, *what: object) -> str:
        """Changes when what is shown of a sample does: the address alone may belong to another index tomorrow."""
        now = self.now
        data = now.samples.fingerprints[self.place(sample, now).source]
        return f'"{data}-{sample}-{"-".join(map(str, what))}"'

    @contextmanager
    def _shown(self, sample: str, modality: str, kind: type | tuple[type, ...]) -> Generator[Any]:
        now = self.now
        place = self.place(sample, now)
        with self._drawing:
            try:
                value = now.samples.raw(place, modality)
                if not isinstance(value, kind):
                    raise NotFound(f"sample {sample} has nothing of {modality[:100]!r} that can be shown so")
                yield value
            except BadSample as error:
                raise NotFound(f"{modality} of sample {sample} cannot be shown: {error}") from None

    def place(self, sample: str, now: _Opened) -> Place:
        """Where a sample of the index lies; what was not indexed, or was deleted, is not shown either.

        Raises:
            NotFound: the index does not have it.
        """
        self._row(now, sample)
        return Place.of(sample)

    def _row(self, now: _Opened, sample: str) -> int:
        row = now.rows.find(Place.of(sample))
        if row is None:
            raise NotFound(f"the index {self.name} has no sample {sample}")
        return row

    def _sample(self, now: _Opened, row: int) -> Sample:
        with self._searching:
            facts = now.rows.facts(row)
        key, shard, source, position, text = (facts.pop(name) for name in COLUMNS.names)
        meta = {name: value for name, value in facts.items() if value is not None}
        return Sample(**self._facts(now, Place(source, position), key, shard, text, meta))

    def _facts(
        self, now: _Opened, place: Place, key: str, shard: str, text: str | None, meta: Mapping[str, Any]
    ) -> dict[str, Any]:
        said = now.samples.text(place) or text
        return {
            "id": str(place),
            "key": media.text(key),
            "shard": media.text(shard),
            "text": None if said is None else media.text(said[: media.TEXT]),
            "media": now.samples.media(place),
            "metadata": media.metadata(meta),
        }


def _column(facet: Facet) -> Column:
    values = [Value(value=media.text(v) if isinstance(v, str) else v, count=n) for v, n in facet.values]
    name, f = media.text(facet.name), facet
    return Column(name=name, kind=f.kind, values=values, low=f.low, high=f.high, lacking=f.lacking)


def _tower(model: MultiEncoder, name: str) -> Tower:
    encoder = model.encoder(name)
    transform = encoder.transform(train=False)
    if not isinstance(transform, SignalTransform):
        return Tower(name=name, kind=encoder.kind)
    return Tower(name=name, kind=encoder.kind, rate=transform.config.rate, channels=list(transform.config.channels))
