"""OpenMoji pictures with their names, spoken and written -> shards: three modalities from pip.

Pictures and concepts are those of `emoji`, and so are the splits. The speech is eSpeak's, whose sound for the same word
varies a little from run to run; a hash of name and language chooses the speaker.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data_prep.emoji import Emoji, emojis, render
from mmcontrast.data_prep.espeak import speaker
from mmcontrast.data_prep.source import Grouped, Item, Row, numbered
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

VOICES = {
    "en": "en-us",
    "ar": "ar",
    "de": "de",
    "es": "es",
    "fa": "fa",
    "fr": "fr-fr",
    "id": "id",
    "it": "it",
    "ko": "ko",
    "pt": "pt",
    "ru": "ru",
    "tr": "tr",
    "zh": "cmn",
}
"""Language of names -> eSpeak's voice. Japanese is left out: eSpeak does not read its characters."""
VARIANTS = ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4")
_SILENT = 300  # largest amplitude of what counts as silence, of 32,767


@dataclass(frozen=True, kw_only=True)
class Spoken(Grouped):
    """OpenMoji pictures with their names, spoken by eSpeak and written (the extras [demo,speech]).

    A sample is a picture (`png`), its name in one of the languages (`txt`), the same spoken (`flac`, 22,050 Hz), and
    metadata: `label`, the name in English; `concept`, shared by its variants; `emoji`; `language`; `voice`; `seconds`.
    """

    languages: tuple[str, ...] = ("en",)
    """One sample per emoji and language: ar, de, en, es, fa, fr, id, it, ko, pt, ru, tr, zh."""

    @property
    def splits(self) -> Sequence[str]:
        """Those that concepts are divided into."""
        if not self.languages:
            raise ConfigError("name at least one language, such as en")
        for language in self.languages:
            if language not in VOICES:
                raise ConfigError(f"{language!r} is no language that can be spoken{suggest(language, list(VOICES))}")
        return super().splits

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "OpenMoji, spoken by eSpeak NG",
            "licence": "CC BY-SA 4.0",
            "names": "emoji (Python package)",
            "languages": self.languages,
        }

    def rows(self) -> Sequence[Row]:
        """One per emoji and language that has a name for it."""
        known, names = emojis(), {language: _names(language) for language in self.languages}
        speaker()  # now, not in a worker
        return numbered(
            (f"{emoji.name} ({language})", (emoji, language, name))
            for emoji in known
            for language in self.languages
            if (name := names[language].get(emoji.characters))
        )

    def encode(self, row: Row) -> Sequence[Item]:
        """A picture with its name, written and spoken; nothing where OpenMoji has none."""
        emoji: Emoji = row.data[0]
        language, name = row.data[1:]
        png = render(emoji.characters)
        if png is None:
            return []
        digest = hashlib.sha256(f"{language}:{name}".encode()).digest()
        voice = f"{VOICES[language]}+{VARIANTS[digest[0] % len(VARIANTS)]}"
        speech = speaker().say(name, voice)
        if not speech.size or int(np.abs(speech.astype(np.int32)).max()) < _SILENT:
            raise BadSample("silent")
        meta = {
            "label": emoji.name,
            "concept": emoji.concept,
            "emoji": emoji.characters,
            "language": language,
            "voice": voice,
            "seconds": round(len(speech) / speaker().rate, 3),
        }
        members = {"png": png, "txt": name, "flac": _flac(speech, speaker().rate), "json": meta}
        return [Item(self.split_of(emoji.concept), Sample(f"{row.number:06d}", members))]


def _names(language: str) -> dict[str, str]:
    """Characters -> name."""
    import emoji

    if language != "en":
        emoji.config.load_language(language)
    return {
        characters: str(facts[language]).strip(":").replace("_", " ")
        for characters, facts in emoji.EMOJI_DATA.items()
        if language in facts
    }


def _flac(samples: Any, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()
