"""One index as the page and the API ask it: what it is, queries of several parts, samples and what they hold.

Nothing else of the server touches an index, a model or shards; and here no two threads do at once, since neither a
model nor open shards may be used so.
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
from mmcontrast.data.reader import SIGNAL, Reader
from mmcontrast.decode import Picture, Sound
from mmcontrast.encoders.base import Transform
from mmcontrast.encoders.timeseries import SignalTransform
from mmcontrast.eval.index import Index
from mmcontrast.eval.serve import media
from mmcontrast.eval.serve.schema import MAX_FILE_BYTES, Description, Hit, Medium, Model, Part, Plot, Sample, Tower
from mmcontrast.shards import FORMATS, BadSample, open_shards
from mmcontrast.signals import Signal, signal


class NotFound(ConfigError):
    """There is no such index, sample or medium."""


class Shelf:
    """An index that is served under a name."""

    def __init__(self, name: str, index: Index) -> None:
        self.name, self.index = name, index
        self._encoding, self._reading, self._drawing = Lock(), Lock(), Lock()
        self._positions: NDArray[np.int64] = index.rows.column("position").to_numpy()
        self._order = np.argsort(self._positions, kind="stable")

    # -------------------------------------------------------------------------------------------- what it is

    @cached_property
    def description(self) -> Description:
        """The index and the model that made it."""
        m, model = self.index.manifest, self.index.model
        path = Path(m["model"])
        return Description(
            name=self.name,
            modality=m["modality"],
            kind=model.encoder(m["modality"]).kind,
            count=len(self._positions),
            dim=m["dim"],
            type=m["type"],
            recall_at_10=m["quality"].get("recall_at_10"),
            readable=self._reader is not None,
            # Its run and step; where on the disk they lie is nobody's business.
            model=Model(name="/".join(path.parts[-2:]), hash=m["model_hash"], towers=[*map(self._tower, self._kinds)]),
        )

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """Modality of the model -> its kind."""
        return {m: self.index.model.encoder(m).kind for m in self.index.model.modalities}

    def _tower(self, name: str) -> Tower:
        transform = self.index.model.encoder(name).transform(train=False)
        if not isinstance(transform, SignalTransform):
            return Tower(name=name, kind=self._kinds[name])
        c = transform.config
        return Tower(name=name, kind=self._kinds[name], rate=c.rate, channels=list(c.channels))

    # -------------------------------------------------------------------------------------------- queries

    def search(self, parts: Sequence[Part], *, top: int, others: Mapping[str, Shelf]) -> list[Hit]:
        """The nearest samples to all parts together, best first; never one that a part names.

        Args:
            parts: of the query.
            top: answers at most.
            others: the indices whose samples a part may name.

        Raises:
            ConfigError: a part that cannot be used, or parts that cancel each other.
            NotFound: a part names a sample that the index does not have.
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
        wanted = min(top + len(named), len(self._positions))
        scores, rows = self.index.index.search((total / norm)[None], wanted)
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

    def _from(self, origin: Shelf, position: int) -> tuple[str, Any]:
        """A sample of another index as this one's model can take it: what that index is of, or else what there is."""
        origin.sample(position)
        kind = origin.description.kind
        for own in sorted(self._kinds, key=lambda m: self._kinds[m] != kind):
            value = origin.raw(position, origin.names[self._kinds[own]])
            if value is not None:
                return own, value
        raise BadSample(f"sample {position} of {origin.name} has nothing that the model of {self.name} knows")

    def _asked(self, part: Part) -> tuple[str, str]:
        if part.modality is not None:
            self.index.model.encoder(part.modality)  # or it is said which there are
            return part.modality, self._kinds[part.modality]
        texts = [m for m, kind in self._kinds.items() if kind == "text"]
        if part.text is None or not texts:
            raise BadSample(f"its modality is missing; the model has {', '.join(self._kinds)}")
        return texts[0], "text"

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

    def sample(self, position: int) -> Sample:
        """What is known of a sample.

        Raises:
            NotFound: the index does not have it.
        """
        return self._sample(self._row(position))

    def some(self, count: int, seed: int) -> list[Sample]:
        """Samples to begin with, drawn at random."""
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(self._positions), min(count, len(self._positions)), replace=False)
        return [self._sample(row) for row in rows.tolist()]

    def picture(self, position: int, modality: str, *, side: int) -> bytes:
        """A picture as WebP.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._reads(position, modality, Picture) as value:
            return media.webp(value, side)

    def sound(self, position: int, modality: str) -> bytes:
        """A sound as WAV.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._reads(position, modality, Sound) as value:
            return media.wave(value)

    def plot(self, position: int, modality: str) -> Plot:
        """The outline of a sound or signal.

        Raises:
            NotFound: the sample has none, or it cannot be read.
        """
        with self._reads(position, modality, (Sound, Signal)) as value:
            meta = self._metadata(position)
            own = meta.get(modality)
            return media.plot(value, (cast(Mapping[str, Any], own) if isinstance(own, Mapping) else meta).get("units"))

    def tag(self, position: int, *what: object) -> str:
        """Changes when what is shown of a sample does: the address alone may belong to another index tomorrow."""
        return f'"{self.index.manifest["data"]}-{position}-{"-".join(map(str, what))}"'

    @contextmanager
    def _reads(self, position: int, modality: str, kind: type | tuple[type, ...]) -> Generator[Any]:
        """The decoded value; one at a time, since the largest takes hundreds of megabytes."""
        self._row(position)
        with self._drawing:
            try:
                value = self.raw(position, modality)
                if not isinstance(value, kind):
                    raise NotFound(f"sample {position} has nothing of {modality[:100]!r} that can be shown so")
                yield value
            except BadSample as error:
                raise NotFound(f"{modality} of sample {position} cannot be shown: {error}") from None

    def _row(self, position: int) -> int:
        place = int(np.searchsorted(self._positions, position, sorter=self._order))
        row = int(self._order[place]) if place < len(self._order) else -1
        if row < 0 or self._positions[row] != position:
            raise NotFound(f"the index {self.name} has no sample {position}")
        return row

    def _sample(self, row: int) -> Sample:
        facts = self.index.rows.slice(row, 1).to_pylist()[0]
        position = facts["position"]
        try:
            said = self.raw(position, self.names["text"])
        except BadSample:
            said = None
        said = said if isinstance(said, str) else facts["text"]
        return Sample(
            id=position,
            key=media.text(facts["key"]),
            shard=media.text(facts["shard"]),
            text=None if said is None else media.text(said[: media.TEXT]),
            media=self._media(position),
            metadata=media.metadata(self._metadata(position)),
        )

    def _media(self, position: int) -> list[Medium]:
        if self._reader is None:
            return []
        with self._reading:
            present = set(self._reader.shards.extensions(position))
        kinds = [kind for kind in ("image", "audio", SIGNAL) if present & set(FORMATS[kind])]
        return [Medium.model_validate({"modality": self.names[kind], "kind": kind}) for kind in kinds]

    @cached_property
    def names(self) -> dict[str, str]:
        """Kind -> the modality of the model that is shown under it; the kind itself where the model has none."""
        return {kind: next((m for m, k in self._kinds.items() if k == kind), kind) for kind in FORMATS}

    @cached_property
    def _reader(self) -> Reader | None:
        """Whatever the samples hold, also what the model does not know; None where the shards are gone or changed."""
        try:
            shards = open_shards(self.index.manifest["shards"])
            if shards.fingerprint != self.index.manifest["data"]:
                return None
            return Reader(shards, {name: _looks_at(kind) for kind, name in self.names.items()}, lacking=True)
        except (ConfigError, OSError):
            return None

    def raw(self, position: int, modality: str) -> Any:
        """The decoded value of a modality; None where the sample lacks it, or the shards are gone.

        Raises:
            BadSample: it is damaged.
        """
        if self._reader is None or modality not in self._reader.members:
            return None
        with self._reading:
            try:
                return self._reader.raw(position, modality)
            except (ConfigError, OSError) as error:  # a shard that went away while it is served
                raise BadSample(str(error)[:200]) from None

    def _metadata(self, position: int) -> Mapping[str, Any]:
        if self._reader is None:
            return {}
        with self._reading:
            try:
                return self._reader.meta(position)
            except (BadSample, ConfigError, OSError):
                return {}


def _looks_at(kind: str) -> Transform:
    """What a reader needs of a kind that is looked at and not embedded."""
    transform = Transform()
    transform.kind = kind
    return transform
