"""The samples that an index was made of, looked at in their shards; what was not indexed of them can be shown, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Literal, cast

from mmcontrast.config import ConfigError
from mmcontrast.data.reader import SIGNAL, Reader
from mmcontrast.encoders.base import Transform
from mmcontrast.eval.serve.rows import Place
from mmcontrast.eval.serve.schema import Medium
from mmcontrast.shards import FORMATS, BadSample, open_shards

_SHOWN: tuple[Literal["image", "audio", "timeseries"], ...] = ("image", "audio", SIGNAL)


class Samples:
    """Samples of several sets of shards, for any thread."""

    def __init__(self, sources: Sequence[tuple[Sequence[str], str]], names: Mapping[str, str]) -> None:
        """Open what is there.

        Args:
            sources: shards, and the fingerprint that they must have.
            names: kind of modality -> the name under which it is shown, for every kind.
        """
        self._names = names
        self._lock = Lock()  # open shards are files in a cache, which one thread could close under another
        self._readers = [_reader(patterns, fingerprint, names) for patterns, fingerprint in sources]
        self.fingerprints = [fingerprint for _, fingerprint in sources]

    @property
    def readable(self) -> bool:
        """Whether all shards are there and as they were."""
        return None not in self._readers

    def media(self, place: Place) -> list[Medium]:
        """What can be shown of a sample, pictures first."""
        reader = self._readers[place.source]
        if reader is None:
            return []
        with self._lock:
            try:
                present = set(reader.shards.extensions(place.position))
            except (ConfigError, OSError, IndexError):
                return []
        return [Medium(modality=self._names[kind], kind=kind) for kind in _SHOWN if present & set(FORMATS[kind])]

    def raw(self, place: Place, modality: str) -> Any:
        """The decoded value of a modality; None where the sample lacks it, or the shards are gone.

        Raises:
            BadSample: it is damaged.
        """
        reader = self._readers[place.source]
        if reader is None or modality not in reader.members:
            return None
        with self._lock:
            try:
                return reader.raw(place.position, modality)
            except (ConfigError, OSError):  # it went away while it is served; where it lay is nobody's business
                raise BadSample("its shard cannot be read") from None

    def text(self, place: Place) -> str | None:
        """The caption; None where there is none that can be read."""
        try:
            return cast(str | None, self.raw(place, self._names["text"]))
        except BadSample:
            return None

    def facts(self, place: Place, modality: str) -> Mapping[str, Any]:
        """What the sample's metadata say of one modality; empty where there are none that can be read."""
        reader = self._readers[place.source]
        if reader is None:
            return {}
        with self._lock:
            try:
                meta = reader.meta(place.position)
            except (BadSample, ConfigError, OSError):
                return {}
        own = meta.get(modality)
        return cast(Mapping[str, Any], own) if isinstance(own, Mapping) else meta


def _reader(patterns: Sequence[str], fingerprint: str, names: Mapping[str, str]) -> Reader | None:
    try:
        shards = open_shards(patterns)
        if shards.fingerprint != fingerprint:
            return None
        return Reader(shards, {name: _looked_at(kind) for kind, name in names.items()}, lacking=True)
    except (ConfigError, OSError):
        return None


def _looked_at(kind: str) -> Transform:
    """What a reader needs of a kind that is looked at and not embedded."""
    transform = Transform()
    transform.kind = kind
    return transform
