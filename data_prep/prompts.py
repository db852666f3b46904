"""Spoken prompts of Asterisk, a telephone exchange -> shards: parallel sentences in five languages with their texts.

The Debian packages `asterisk-core-sounds-XX-wav` bring the recordings (8 kHz, one professional speaker per language;
English and Spanish have the same one) and `asterisk-core-sounds-XX` their texts; CC BY-SA 3.0 (en, es, fr) and
CC BY 3.0 (it, ru). Prompts are divided, not recordings: a prompt is in the same split in all languages.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.debian import package_files
from mmcontrast.data_prep.source import Grouped, Item, Row, numbered
from mmcontrast.decode import audio
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

LANGUAGES = ("en", "es", "fr", "it", "ru")
SOUNDS = "usr/share/asterisk/sounds"
_SILENT = 0.01  # largest amplitude of what counts as silence


@dataclass(frozen=True)
class Recording:
    """A file, its metadata, what is said in it where that is known, and whether it is speech at all."""

    path: Path
    meta: Mapping[str, str]
    text: str | None
    spoken: bool


@dataclass(frozen=True, kw_only=True)
class Prompts(Grouped):
    """Asterisk's spoken prompts with their texts in five languages, from Debian packages (the extra [audio]).

    A sample is a recording (`wav`), its text where it is known (`txt`), and metadata: `language`, `prompt` (the same
    for the same sentence in all languages), `speaker`, `seconds`. Tones and silence are refused.
    """

    languages: tuple[str, ...] = LANGUAGES
    """Two letters each."""
    root: Path = Path("/")
    """/ if the packages are installed, or the folder they were unpacked in."""
    fetch: bool = False
    """Download and unpack the packages into the cache folder instead."""
    test: float = 0.2

    def _packages(self) -> list[str]:
        return [f"asterisk-core-sounds-{language}{end}" for language in self.languages for end in ("-wav", "")]

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "Asterisk core sounds",
            "licence": "CC BY-SA 3.0 (en, es, fr), CC BY 3.0 (it, ru)",
            "packages": self._packages(),
        }

    def rows(self) -> Sequence[Row]:
        """One per recording."""
        for language in self.languages:
            if not re.fullmatch("[a-z]{2}", language):
                raise ConfigError(f"a language is two letters such as en, got {language!r}")
        documents = [_texts(language).parent.as_posix() for language in self.languages]
        root = package_files("prompts", self._packages(), [SOUNDS, *documents], root=self.root, fetch=self.fetch)
        texts = {language: read_texts(root / _texts(language)) for language in self.languages}
        # A text in brackets says what is to be heard, not what is said; in any language, since translations vary.
        unspoken = {p for known in texts.values() for p, text in known.items() if re.fullmatch(r"\[.*\]|\(.*\)", text)}
        found: list[tuple[str, Recording]] = []
        for language in self.languages:
            for speaker, path in _recordings(root / SOUNDS, language):
                prompt = path.relative_to(root / SOUNDS / speaker).with_suffix("").as_posix()
                meta = {"language": language, "prompt": prompt, "speaker": speaker}
                found.append(
                    (f"{language}/{prompt}", Recording(path, meta, texts[language].get(prompt), prompt not in unspoken))
                )
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """A recording with its text."""
        found: Recording = row.data
        if not found.spoken:
            raise BadSample("not speech, as its text says")
        data = found.path.read_bytes()
        sound = audio(data)
        if float(sound.read().abs().max()) < _SILENT:
            raise BadSample("silent")
        members: dict[str, Any] = {"wav": data} | ({"txt": found.text} if found.text else {})
        members["json"] = {**found.meta, "seconds": round(sound.frames / sound.rate, 3)}
        return [Item(self.split_of(found.meta["prompt"]), Sample(f"{row.number:06d}", members))]


def _recordings(folder: Path, language: str) -> list[tuple[str, Path]]:
    """(speaker's folder, file) of a language, such as en_US_f_Allison."""
    speakers = sorted(path for path in folder.glob(f"{language}_*") if path.is_dir())
    found = [(speaker.name, path) for speaker in speakers for path in sorted(speaker.rglob("*.wav"))]
    if not found:
        raise ConfigError(
            f"{folder}/{language}_* has no .wav files: install asterisk-core-sounds-{language}-wav (8 kHz WAV), "
            "or leave the language out with --languages"
        )
    return found


def _texts(language: str) -> Path:
    return Path(f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz")


def read_texts(path: Path) -> dict[str, str]:
    """Prompt -> what is said, from lines `prompt: text`.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); unpack its package again") from None
    pairs = (line.partition(":") for line in lines if line.strip() and not line.startswith(";"))
    return {prompt.strip(): text.strip() for prompt, _, text in pairs if text.strip()}
