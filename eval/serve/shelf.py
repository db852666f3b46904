"""One index as the page and the API ask it: what it is, queries of several parts, samples and what they hold.

Nothing else of the server touches an index or a model.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.reader import SIGNAL
from mmcontrast.decode import Picture, Sound
from mmcontrast.encoders.timeseries import SignalTransform
from mmcontrast.eval.index import Index
from mmcontrast.eval.serve import media
from mmcontrast.eval.serve.samples import Place, Samples
from mmcontrast.eval.serve.schema import MAX_FILE_BYTES, Description, Hit, Model, Part, Plot, Sample, Tower
from mmcontrast.shards import FORMATS, BadSample
from mmcontrast.signals import Signal, signal


class NotFound(ConfigError):
    """There is no such index, sample or medium."""


class Shelf:
    """An index that is served under a name."""

    def __init__(self, name: str, index: Index) -> None:
        self.name, self.index = name, index
        self._encoding, self._drawing = Lock(), Lock()  # one at a time: a large file takes hundreds of megabytes
        model, manifest = index.model, index.manifest
        self.kinds = {m: model.encoder(m).kind for m in model.modalities}
        # Kind -> the modality of the model that is shown under it, the kind itself where the model has none.
        self.names = {kind: next((m for m, k in self.kinds.items() if k == kind), kind) for kind in FORMATS}
        self.samples = Samples([(manifest["shards"], manifest["data"])], self.names)
        self._positions: NDArray[np.int64] = index.rows.column("position").to_numpy()
        self._order = np.argsort(self._positions, kind="stable")

    # -------------------------------------------------------------------------------------------- what it is

    @cached_property
    def description(self) -> Description:
        """The index and the model that made it."""
        m = self.index.manifest
        return Description(
            name=self.name,
            modality=m["modality"],
            kind=self.kinds[m["modality"]],
            count=m["count"],
            dim=m["dim"],
            type=m["type"],
            recall_at_10=m["quality"].get("recall_at_10"),
            readable=self.samples.readable,
            # Its run and step; where on the disk they lie is nobody's business.
            model=Model(
                name="/".join(Path(m["model"]).parts[-2:]),
                hash=m["model_hash"],
                towers=[self._tower(name) for name in self.kinds],
            ),
        )

    def _tower(self, name: str) -> Tower:
        transform = self.index.model.encoder(name).transform(train=False)
        if not isinstance(transform, SignalTransform):
            return Tower(name=name, kind=self.kinds[name])
        c = transform.config
        return Tower(name=name, kind=self.kinds[name], rate=c.rate, channels=list(c.channels))

    # -------------------------------------------------------------------------------------------- queries

    def search(self, parts: Sequence[Part], *, top: int, others: Mapping[str, Shelf]) -> list[Hit]:
        """The nearest samples to all parts together, best first; never one that a part names.

        Args:
            parts: of the query.
            top: answers at most.
            others: the indices whose samples a part may name.

        Raises:
            ConfigError: a part that cannot be used, or parts that cancel each other.
            NotFound: a part names a sample or an index that is not there.
        """
        total = np.zeros(self.index.manifest["dim"], np.float32)
        for number, part in enumerate(parts, 1):
            try:
                total += part.weight * self._embedding(part, others)
            except BadSample as error:
                which = f"part {number} of the query" if len(parts) > 1 else "the query"
                raise ConfigError(f"{which} cannot be used: {error}") from None
        norm = float(np.linalg.norm(total))
        if not norm > 1e-6:
            raise ConfigError("the parts of the query cancel each other; change a weight, or leave one out")
        named = {self._row(p.like) for p in parts if p.like is not None and others.get(p.of or "", self) is self}
        scores, rows = self.index.index.search((total / norm)[None], min(top + len(named), self.description.count))
        found = [(float(s), r) for s, r in zip(scores[0], rows[0].tolist(), strict=True) if r >= 0 and r not in named]
        return [Hit(score=round(score, 6), **dict(self._sample(row))) for score, row in found[:top]]

    def _embedding(self, part: Part, others: Mapping[str, Shelf]) -> NDArray[np.float32]:
        """[D], unit norm."""
        given = [name for name in ("text", "data", "like") if getattr(part, name) is not None]
        if len(given) != 1:
            raise BadSample(f"it has {' and '.join(given) or 'nothing'}; give one of text, data and like")
        if part.like is not None:
            if part.of is not None and part.of not in others:
                raise NotFound(f"there is no index {part.of!r}{suggest(part.of, others)}")
            origin = others[part.of] if part.of is not None else self
            if origin is self:
                return self.index.index.reconstruct(self._row(part.like))
            return self._encoded(*self._from(origin, part.like))
        modality, kind = self._asked(part)
        if (kind == "text") != (part.text is not None):
            raise BadSample(f"{modality!r} is of kind {kind}: give it as `{'text' if kind == 'text' else 'data'}`")
        value = part.text if part.text is not None else self._file(part, kind, modality)
        if isinstance(value, str) and not value.strip():
            raise BadSample("its text is empty")
        return self._encoded(modality, value)

    def _encoded(self, modality: str, value: Any) -> NDArray[np.float32]:
        with self._encoding:
            return self.index.model.encode(modality, [value])[0].numpy()

    def _from(self, origin: Shelf, sample: str) -> tuple[str, Any]:
        """A sample of another index as this one's model can take it: what that index is of, or else what there is."""
        place, kind = origin.place(sample), origin.description.kind
        for own in sorted(self.kinds, key=lambda m: self.kinds[m] != kind):
            value = origin.samples.raw(place, origin.names[self.kinds[own]])
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
        tower = self._tower(modality)
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
        return self._sample(self._row(sample))

    def some(self, count: int, seed: int) -> list[Sample]:
        """Samples to begin with, drawn at random."""
        n = len(self._positions)
        rows = np.random.default_rng(seed).choice(n, min(count, n), replace=False)
        return [self._sample(row) for row in rows.tolist()]

    def kind(self, sample: str, modality: str) -> str | None:
        """Whether what a sample has under a name is an image, audio or timeseries; None where it has nothing to show.

        Raises:
            NotFound: the index does not have it.
        """
        return next((m.kind for m in self.samples.media(self.place(sample)) if m.modality == modality), None)

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
            return media.plot(value, self.samples.metadata(Place.of(sample), modality).get("units"))

    def tag(self, sample: str, *what: object) -> str:
        """Changes when what is shown of a sample does: the address alone may belong to another index tomorrow."""
        data = self.samples.fingerprints[self.place(sample).source]
        return f'"{data}-{sample}-{"-".join(map(str, what))}"'

    @contextmanager
    def _shown(self, sample: str, modality: str, kind: type | tuple[type, ...]) -> Generator[Any]:
        place = self.place(sample)
        with self._drawing:
            try:
                value = self.samples.raw(place, modality)
                if not isinstance(value, kind):
                    raise NotFound(f"sample {sample} has nothing of {modality[:100]!r} that can be shown so")
                yield value
            except BadSample as error:
                raise NotFound(f"{modality} of sample {sample} cannot be shown: {error}") from None

    def place(self, sample: str) -> Place:
        """Where a sample of the index lies; what was not indexed, or was deleted, is not shown either.

        Raises:
            NotFound: the index does not have it.
        """
        self._row(sample)
        return Place.of(sample)

    def _row(self, sample: str) -> int:
        place = Place.of(sample)
        at = int(np.searchsorted(self._positions, place.position, sorter=self._order))
        row = int(self._order[at]) if at < len(self._order) else -1
        if place.source or row < 0 or self._positions[row] != place.position:
            raise NotFound(f"the index {self.name} has no sample {sample}")
        return row

    def _sample(self, row: int) -> Sample:
        facts = self.index.rows.slice(row, 1).to_pylist()[0]
        place = Place(0, facts["position"])
        said = self.samples.text(place) or facts["text"]
        return Sample(
            id=str(place),
            key=media.text(facts["key"]),
            shard=media.text(facts["shard"]),
            text=None if said is None else media.text(said[: media.TEXT]),
            media=self.samples.media(place),
            metadata=media.metadata(self.samples.metadata(place)),
        )
