"""Speech Commands -> shards: one second of sound with one of 35 words, by 2,618 speakers.

    FOLDER/WORD/SPEAKER_nohash_TAKE.wav             16,000 Hz
    FOLDER/validation_list.txt, testing_list.txt    files of these splits; speakers are divided

Warden 2018, arXiv:1804.03209 (CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, Source, folder_there, numbered, sound_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}


@dataclass(frozen=True, kw_only=True)
class SpeechCommands(Source):
    """Speech Commands: single words of many speakers (the extra [audio]).

    A sample is a recording (`wav`), the word (`txt`), and metadata: `label`, the word; `speaker`; `take`; `seconds`.
    Background noise is left out.
    """

    folder: Path
    """Where the words' folders and the two lists are."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {"source": "Speech Commands", "licence": "CC BY 4.0", "paper": "arXiv:1804.03209"}

    def rows(self) -> Sequence[Row]:
        """One per recording, sorted by path; a file that a list names and that is not there is one as well."""
        folder = folder_there(self.folder)
        splits: dict[str, str] = {}
        for split, name in LISTS.items():
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} has no {name}, which says what is held out; is it the corpus's folder?")
            splits |= {line.strip(): split for line in (folder / name).read_text("utf-8").splitlines() if line.strip()}
        there = {path.relative_to(folder).as_posix() for path in folder.glob("[!_]*/*.wav")}
        if not there:
            raise ConfigError(f"{folder} has no WORD/*.wav")
        return numbered((name, splits.get(name, "train")) for name in sorted(there | splits.keys()))

    def encode(self, row: Row) -> Sequence[Item]:
        """A word that is spoken."""
        word, _, file = row.where.partition("/")
        speaker, nohash, take = file.removesuffix(".wav").partition("_nohash_")
        if not (speaker and nohash and take.isdecimal()):
            raise BadSample("its name is not SPEAKER_nohash_TAKE.wav")
        sound, seconds = sound_member(self.folder / row.where)
        meta = {"label": word, "speaker": speaker, "take": int(take), "seconds": seconds}
        return [Item(row.data, Sample(f"{row.number:06d}", {**sound, "txt": word, "json": meta}))]
