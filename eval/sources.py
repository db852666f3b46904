"""What can be asked about: samples in shards, or in files as they lie in a folder. One interface for both."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.reader import Reader
from mmcontrast.decode import DECODERS
from mmcontrast.encoders.base import Transform
from mmcontrast.shards import FORMATS, MAX_MEMBER_BYTES, METADATA, BadSample, ShardSet


class Source(Protocol):
    """Samples 0..n-1, of each of which one modality may have no value, one, or several (captions)."""

    @property
    def fingerprint(self) -> str:
        """Changes when the content or the order of the samples does."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of all classes, in the order that numbers labels; empty if the data do not say."""
        ...

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with {c} for a class name that come with the data."""
        ...

    @property
    def questions(self) -> Sequence[str]:
        """Tasks that the data are made for; empty if the data do not say."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def has(self, kind: str) -> bool:
        """Whether any sample has a modality of this kind (`mmcontrast.shards.FORMATS`)."""
        ...

    def name(self, position: int) -> tuple[str, str]:
        """Where a sample lies (shard or file), and its key."""
        ...

    def values(self, position: int, modality: str, kind: str) -> Sequence[Any]:
        """Decoded values of one modality.

        Raises:
            BadSample: one is damaged.
        """
        ...

    def meta(self, position: int) -> Mapping[str, Any]:
        """Labels and groups of a sample.

        Raises:
            BadSample: they are damaged.
        """
        ...


class Shards:
    """Samples in shards.

    CLIP_benchmark's shards hold the label in a member of its own, `cls` (a number) or, of several labels, `npy` (zeros
    and ones by class); and all captions of a picture in one text, one a line. Ours hold them as a list in the metadata,
    `json:captions`, beside the first one in `txt`.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        label: Literal["cls", "npy"] | None = None,
        lines: bool = False,
        texts: Sequence[str] = (),
        classes: Sequence[str] = (),
        templates: Sequence[str] = (),
        questions: Sequence[str] = (),
    ) -> None:
        """Read some shards.

        Args:
            shards: the samples.
            label: member with the label, beside those of the metadata.
            lines: whether a text holds a caption in each line.
            texts: where captions are, a text member such as `txt` or a metadata field as `json:FIELD`, which may be a
                list; without any, the sample's text.
            classes: names of all classes.
            templates: prompts that come with the data.
            questions: tasks that the data are made for.

        Raises:
            ConfigError: no sample has a member that `texts` names.
        """
        for place in texts:
            member, colon, _ = place.partition(":")
            if bool(colon) != (member == METADATA) or not shards.counts.get(member):
                raise ConfigError(
                    f"texts: {place!r} is no text member and no field json:NAME that the samples have"
                    f"{suggest(member, shards.counts)}"
                )
        self.shards, self.label, self.lines, self.texts = shards, label, lines, texts
        self.classes, self.templates, self.questions = classes, templates, questions
        # Other captions are other content.
        self.fingerprint = " ".join([shards.fingerprint, *texts])
        self._readers: dict[str, Reader] = {}
        self._labels = Reader(shards, {})

    def __len__(self) -> int:
        """Samples of all shards."""
        return len(self.shards)

    def has(self, kind: str) -> bool:
        """Whether any sample has a member that holds the kind."""
        return any(self.shards.counts.get(extension) for extension in FORMATS[kind])

    def name(self, position: int) -> tuple[str, str]:
        """Shard file and key."""
        return self.shards.name(position)

    def reader(self, modality: str, kind: str) -> Reader:
        """Reads one modality.

        Raises:
            ConfigError: no sample has it.
        """
        if modality not in self._readers:
            transform = Transform()
            transform.kind = kind
            self._readers[modality] = Reader(self.shards, {modality: transform})
        return self._readers[modality]

    def values(self, position: int, modality: str, kind: str) -> Sequence[Any]:
        """The member's value, the lines of a text, or the captions of `texts`."""
        if kind == "text" and self.texts:
            return [text for place in self.texts for text in self._captions(position, place)]
        value = self.reader(modality, kind).raw(position, modality)
        if value is None:
            return ()
        return [line for line in value.splitlines() if line.strip()] if self.lines and kind == "text" else (value,)

    def _captions(self, position: int, place: str) -> Sequence[str]:
        member, _, name = place.partition(":")
        if not name:
            try:
                found: Any = DECODERS["text"](self.shards.read(position, member))
            except KeyError:
                return ()
        else:
            found = self._labels.meta(position).get(name)
        listed: list[Any] = list(cast(list[Any], found)) if isinstance(found, list) else [found]
        return [" ".join(text.split()) for text in listed if isinstance(text, str) and text.strip()]

    def meta(self, position: int) -> Mapping[str, Any]:
        """The member json, and the label."""
        found: Mapping[str, Any] = {}
        if self.shards.counts.get("json"):
            found = self._labels.meta(position)
        if self.label is None:
            return found
        try:
            data = self.shards.read(position, self.label)
            if self.label == "cls":
                return {**found, "label": int(data)}
            flags = np.load(io.BytesIO(data), allow_pickle=False)
            return {**found, "label": np.flatnonzero(flags).tolist()}
        except KeyError:
            return found
        except ValueError:
            raise BadSample(f"{self.label} is no label") from None


@dataclass(frozen=True)
class Record:
    """One sample in files.

    Attributes:
        key: its name.
        files: kind -> files that hold it.
        texts: its captions.
        meta: its labels and groups.
    """

    key: str
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict[str, "Sequence[Path]"])
    texts: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Files:
    """Samples in files that lie in a folder."""

    root: Path
    records: Sequence[Record]
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    questions: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and times of change; the files are not read for it.

        Raises:
            ConfigError: a file is not there.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for record in self.records:
            said: list[Any] = [record.key, *record.texts, sorted(record.meta.items(), key=lambda item: item[0])]
            for path in (path for paths in record.files.values() for path in paths):
                try:
                    facts = path.stat()
                except OSError as error:
                    raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
                said += [path.name, facts.st_size, facts.st_mtime_ns]
            digest.update(repr(said).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """All records."""
        return len(self.records)

    def has(self, kind: str) -> bool:
        """Whether any record has the kind."""
        return any(record.texts if kind == "text" else record.files.get(kind) for record in self.records)

    def name(self, position: int) -> tuple[str, str]:
        """The folder and the record's key."""
        return self.root.name, self.records[position].key

    def values(self, position: int, modality: str, kind: str) -> Sequence[Any]:
        """Captions, or the decoded files."""
        record = self.records[position]
        return record.texts if kind == "text" else [_decoded(path, kind) for path in record.files.get(kind, ())]

    def meta(self, position: int) -> Mapping[str, Any]:
        """The record's."""
        return self.records[position].meta


def _decoded(path: Path, kind: str) -> Any:
    try:
        if path.stat().st_size > MAX_MEMBER_BYTES:
            raise BadSample(f"file above {MAX_MEMBER_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from None
    if kind not in DECODERS:
        raise BadSample(f"files of kind {kind} are not read")
    return DECODERS[kind](data)
