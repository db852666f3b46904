"""LibriSpeech -> shards: audio books, cut into utterances with what is said.

    FOLDER/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-0000.flac     16,000 Hz
    FOLDER/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt     a line per utterance: its name, its text
    FOLDER/SPEAKERS.TXT                                         id | sex | subset | minutes | name

Panayotov et al. 2015, https://doi.org/10.1109/ICASSP.2015.7178964; https://www.openslr.org/12 (CC BY 4.0). Subsets that
begin with train, dev and test are the splits; speakers are in one subset each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, Source, folder_there, numbered, sound_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample

BEGINNINGS = {"train": "train", "dev": "val", "test": "test"}
"""Beginning of a subset's name -> split."""


@dataclass(frozen=True, kw_only=True)
class LibriSpeech(Source):
    """LibriSpeech, or speech in its layout, with what is said (the extra [audio]).

    A sample is an utterance (`flac`), its text in lower case (`txt`), and metadata: `speaker`, `chapter`, `utterance`,
    `subset`, `sex` where SPEAKERS.TXT tells it, `seconds`.
    """

    folder: Path
    """Where train-clean-100/ and the like are, those that you have."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "LibriSpeech",
            "licence": "CC BY 4.0",
            "paper": "https://doi.org/10.1109/ICASSP.2015.7178964",
        }

    def rows(self) -> Sequence[Row]:
        """One per utterance, and one per recording that no text names."""
        folder = folder_there(self.folder)
        sexes = read_speakers(folder / "SPEAKERS.TXT")
        found: list[tuple[str, tuple[str, Path, str | None, str]]] = []
        for subset in sorted(path for path in folder.iterdir() if path.is_dir()):
            split = next((s for start, s in BEGINNINGS.items() if subset.name.startswith(start)), None)
            for chapter in sorted(subset.glob("*/*/")) if split else ():
                sex = sexes.get(chapter.parent.name, "")
                unnamed = {path for path in chapter.iterdir() if path.suffix.lower()[1:] in FORMATS["audio"]}
                for texts in sorted(chapter.glob("*.trans.txt")):
                    lines = texts.read_bytes().decode("utf-8", "replace").splitlines()
                    for number, line in enumerate(lines, 1):
                        name, _, text = line.strip().partition(" ")
                        path = next((p for p in unnamed if p.stem == name), chapter / f"{name}.flac")
                        unnamed.discard(path)
                        if name:
                            where = f"{texts.relative_to(folder).as_posix()}, line {number}"
                            found.append((where, (str(split), path, text.strip(), sex)))
                for path in sorted(unnamed):
                    found.append((path.relative_to(folder).as_posix(), (str(split), path, None, sex)))
        if not found:
            raise ConfigError(f"{folder} has no SUBSET/SPEAKER/CHAPTER with subsets such as train-clean-100")
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """An utterance with its text."""
        split, path, text, sex = row.data
        if not text:
            raise BadSample("no text")
        sound, seconds = sound_member(path)
        meta = {
            "speaker": path.parent.parent.name,
            "chapter": path.parent.name,
            "utterance": path.stem,
            "subset": path.parent.parent.parent.name,
            "seconds": seconds,
        } | ({"sex": sex} if sex else {})
        return [Item(split, Sample(f"{row.number:08d}", {**sound, "txt": text.lower(), "json": meta}))]


def read_speakers(path: Path) -> dict[str, str]:
    """Speaker -> female or male; nothing where there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if not line.startswith(";")]
    names = {"F": "female", "M": "male"}
    return {cell[0]: names[cell[1]] for cell in cells if len(cell) > 1 and cell[1] in names}
