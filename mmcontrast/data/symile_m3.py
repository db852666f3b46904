"""Tuples of picture, speech and text whose parts tell something only together, drawn from labelled real samples.

A picture of class c; speech in a language l, of unrelated content; and a text with one word per language, each naming
another class, of which the word in language l names c. Neither speech nor text alone tells which word counts: a score
that adds what each of them says about a picture leaves as many classes as there are words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import numpy as np

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data.compose import Compose, pick
from mmcontrast.data.reader import Reader
from mmcontrast.shards import BadSample, open_shards

_KEPT_BYTES = 64 << 20  # of decoded pictures, per process


class SymileM3(Compose):
    """The construction of Symile-M3 (Saporta et al. 2024, arXiv:2411.01053, sec. 5), drawn on the fly.

    The stream's shards hold pictures whose metadata name the class in every language; `speech` holds recordings whose
    metadata name their language. Every class has one anchor. Per example, its picture, the language, the recording,
    the classes of the other words and the order of the words are drawn uniformly.
    Tuples that are drawn once and repeated are memorised instead.

    Classes are the distinct sets of names that are one word in each language and shared with no other class; pictures
    without such names are no anchors.
    """

    @dataclass(kw_only=True)
    class Config(Compose.Config):
        """Where speech is, and which metadata tell languages and names."""

        speech: tuple[str, ...]
        """Folders, globs, ranges or addresses of shards with recordings."""
        languages: tuple[str, ...] = ("en", "es", "fr", "it", "ru")
        """One word of the text per language."""
        names: str = "names"
        """Metadata field of a picture: language -> name of what it shows."""
        language: str = "language"
        """Metadata field of a recording: its language."""
        image: str = "image"
        """The modality that is read from the stream's shards."""
        audio: str = "audio"
        """The modality that gets a recording."""
        text: str = "text"
        """The modality that gets the words."""

        def made(self) -> tuple[str, ...]:
            """Speech and text."""
            return (self.audio, self.text)

    def __init__(self, config: Config, reader: Reader) -> None:
        """Read the metadata of all pictures and recordings.

        Raises:
            ConfigError: fewer than two languages, a language without recordings, or fewer classes than languages.
        """
        super().__init__(config, reader)
        if len(set(config.languages)) < max(2, len(config.languages)):
            raise ConfigError(f"languages {config.languages}: name at least two, each once")
        for modality in reader.transforms:
            if modality not in (known := (config.image, config.audio, config.text)):
                raise ConfigError(f"SymileM3 does not make the modality {modality!r}{suggest(modality, known)}")
        self.config = config
        self.facts = {"pairwise_bound": 1 / len(config.languages)}
        self._kept: dict[int, Any] = {}
        self._room = _KEPT_BYTES
        names = [self._names(position) for position in range(len(reader.shards))]
        self.words = _distinct({n for n in names if n is not None})
        number = {n: k for k, n in enumerate(self.words)}
        self.pictures: list[list[int]] = [[] for _ in self.words]
        for position, n in enumerate(names):
            if n in number:
                self.pictures[number[n]].append(position)
        # One anchor per class: if classes with many pictures were shown more often than named, a text alone would tell.
        self.classes = {pictures[0]: k for k, pictures in enumerate(self.pictures)}
        self.anchors = np.array(sorted(self.classes), dtype=np.int64)
        if len(self.words) < len(config.languages):
            raise ConfigError(
                f"{len(self.words)} classes have a name of one word in each of {', '.join(config.languages)} in the "
                f"metadata field {config.names!r}; a text needs {len(config.languages)}"
            )
        heard = {m: t for m, t in reader.transforms.items() if m == config.audio}
        self.recordings = Reader(open_shards(config.speech), heard)
        self.spoken: dict[str, list[int]] = {language: [] for language in config.languages}
        for position in range(len(self.recordings.shards)):
            language = str(_meta(self.recordings, position).get(config.language))
            if language in self.spoken:
                self.spoken[language].append(position)
        if silent := [language for language, found in self.spoken.items() if not found]:
            raise ConfigError(
                f"no recording of {', '.join(config.speech)} has the {config.language} {', '.join(silent)}; prepare "
                "more, or name other languages"
            )

    def _names(self, position: int) -> tuple[str, ...] | None:
        """The names of what a picture shows, one per language; None where one is missing or several words."""
        found = _meta(self.reader, position).get(self.config.names)
        if not isinstance(found, Mapping):
            return None
        names = tuple(str(cast(Mapping[str, Any], found).get(language, "")) for language in self.config.languages)
        return names if all(len(name.split()) == 1 for name in names) else None

    def raw(self, position: int, draw: Random) -> Mapping[str, Any]:
        """Picture, speech and words."""
        languages = self.config.languages
        spoken = pick(draw, len(languages))
        recordings = self.spoken[languages[spoken]]
        recording = recordings[pick(draw, len(recordings))]
        others: list[int] = []
        while len(others) < len(languages) - 1:
            other = pick(draw, len(self.words))
            if other != self.classes[position] and other not in others:
                others.append(other)
        chosen = others[:spoken] + [self.classes[position]] + others[spoken:]
        words = [self.words[c][k] for k, c in enumerate(chosen)]
        for last in range(len(words) - 1, 0, -1):
            other = pick(draw, last + 1)
            words[last], words[other] = words[other], words[last]
        pictures = self.pictures[self.classes[position]]
        shown = pick(draw, len(pictures))
        found: dict[str, Any] = {self.config.text: " ".join(words)}
        if self.config.image in self.reader.transforms:
            found[self.config.image] = self._picture(pictures[shown])
        if self.config.audio in self.reader.transforms:
            try:
                found[self.config.audio] = self.recordings.raw(recording, self.config.audio)
            except BadSample as error:
                raise BadSample(f"{'/'.join(self.recordings.shards.name(recording))}: {error}") from None
        return {m: found[m] for m in self.reader.transforms if found[m] is not None}

    def _picture(self, position: int) -> Any:
        """The decoded picture, kept where there is room: a small set of anchors comes back hundreds of times."""
        if position in self._kept:
            return self._kept[position]
        picture = self.reader.raw(position, self.config.image)
        if picture is not None and self._room >= (size := 3 * picture.height * picture.width):
            self._kept[position] = picture = picture.decoded()
            self._room -= size
        return picture

    def meta(self, position: int) -> Mapping[str, Any]:
        """The class, as the field `class`, beside the picture's own metadata."""
        return {**self.reader.meta(position), "class": self.words[self.classes[position]][0]}

    def state(self) -> dict[str, Any]:
        """Which recordings are drawn from, too."""
        return super().state() | {"speech": self.recordings.shards.fingerprint}


def _distinct(classes: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The classes, in order, without those that share a word with an earlier one or have one for two languages."""
    kept: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for words in sorted(classes):
        if len(set(words)) == len(words) and not taken & set(words):
            kept.append(words)
            taken |= set(words)
    return kept


def _meta(reader: Reader, position: int) -> Mapping[str, Any]:
    try:
        return reader.meta(position)
    except BadSample:
        return {}
