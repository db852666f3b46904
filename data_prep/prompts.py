"""Spoken prompts of Asterisk, a telephone exchange -> shards: parallel sentences in five languages with their texts.

The Debian packages `asterisk-core-sounds-XX-wav` bring the recordings (8 kHz, one professional speaker per language;
English and Spanish have the same one) and `asterisk-core-sounds-XX` their texts; CC BY-SA 3.0 (en, es, fr) and
CC BY 3.0 (it, ru). Prompts are divided, not recordings: a prompt is in the same split in all languages.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.debian import package_files
from mmcontrast.data_prep.split import Item, Refused, Summary, write_splits
from mmcontrast.decode import audio
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

LANGUAGES = ("en", "es", "fr", "it", "ru")
SOUNDS = "usr/share/asterisk/sounds"
_SILENT = 0.01  # largest amplitude of what counts as silence


def prepare(
    out: Path,
    *,
    languages: Sequence[str] = LANGUAGES,
    root: Path = Path("/"),
    fetch: bool = False,
    val: float = 0.05,
    test: float = 0.2,
    overwrite: bool = False,
) -> Summary:
    """Write OUT/train, OUT/val and OUT/test.

    A sample is a recording (`wav`), its text where it is known (`txt`), and metadata: `language`, `prompt` (the same
    for the same sentence in all languages), `speaker`, `seconds`. Tones and silence are refused.

    Args:
        out: where the shards are written.
        languages: two letters each.
        root: / if the packages are installed, or where they were unpacked.
        fetch: download and unpack the packages into the user's cache.
        val: share of the prompts for validation.
        test: share of the prompts for testing.
        overwrite: replace shards that are there.

    Raises:
        ConfigError: a package is not there, or shards are there already.
    """
    for language in languages:
        if not re.fullmatch("[a-z]{2}", language):
            raise ConfigError(f"a language is two letters such as en, got {language!r}")
    packages = [f"asterisk-core-sounds-{language}{end}" for language in languages for end in ("-wav", "")]
    documents = [_texts(language).parent.as_posix() for language in languages]
    root = package_files("prompts", packages, [SOUNDS, *documents], root=root, fetch=fetch)
    texts = {language: read_texts(root / _texts(language)) for language in languages}
    # A text in brackets says what is to be heard, not what is said; in any language, since translations vary.
    unspoken = {p for known in texts.values() for p, text in known.items() if re.fullmatch(r"\[.*\]|\(.*\)", text)}
    recordings = [(language, *found) for language in languages for found in _recordings(root / SOUNDS, language)]
    about = {
        "source": "Asterisk core sounds",
        "licence": "CC BY-SA 3.0 (en, es, fr), CC BY 3.0 (it, ru)",
        "packages": packages,
    }

    def items() -> Iterator[Item | Refused]:
        for number, (language, speaker, path) in enumerate(recordings):
            prompt = path.relative_to(root / SOUNDS / speaker).with_suffix("").as_posix()
            if prompt in unspoken:
                yield Refused(f"{language}/{prompt}", "not speech, as its text says")
            else:
                meta = {"language": language, "prompt": prompt, "speaker": speaker}
                yield _item(number, path, meta, texts[language].get(prompt))

    return write_splits(items(), out, val=val, test=test, overwrite=overwrite, about=about, total=len(recordings))


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


def _item(number: int, path: Path, meta: dict[str, Any], text: str | None) -> Item | Refused:
    where = f"{meta['language']}/{meta['prompt']}"
    try:
        data = path.read_bytes()
        sound = audio(data)
        if float(sound.read().abs().max()) < _SILENT:
            return Refused(where, "silent")
    except (OSError, BadSample) as error:
        return Refused(where, getattr(error, "strerror", None) or str(error))
    members: dict[str, Any] = {"wav": data} | ({"txt": text} if text else {})
    facts = meta | {"seconds": round(sound.frames / sound.rate, 3)}
    return Item(Sample(f"{number:06d}", members | {"json": facts}), meta["prompt"])
