"""Common Voice -> shards: sentences read aloud by volunteers, in any of more than a hundred languages.

    FOLDER/LANGUAGE/train.tsv, dev.tsv, test.tsv    client_id, path, sentence, …, age, gender, accents, locale, …
    FOLDER/LANGUAGE/clips/NAME.mp3

Ardila et al. 2020, arXiv:1912.06670 (CC0). The corpus keeps a speaker in one split. With pictures whose metadata name
their class in the same languages (`imagefolder --translations`), these are what Symile-M3 is composed of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, Source, folder_there, numbered, sound_member
from mmcontrast.data_prep.table import whole_table
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

TABLES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}


@dataclass(frozen=True, kw_only=True)
class CommonVoice(Source):
    """Common Voice: sentences read aloud, one folder per language (the extra [audio]).

    A sample is a recording (`mp3`), its sentence (`txt`), and metadata: `language`, `speaker`, `seconds`, and `age`,
    `gender` and `accents` where the speaker gave them.
    """

    folder: Path
    """Where the languages' folders are."""
    languages: tuple[str, ...] = ()
    """Names of those folders; none means all of them."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {"source": "Common Voice", "licence": "CC0-1.0", "paper": "arXiv:1912.06670"}

    def rows(self) -> Sequence[Row]:
        """One per line of the tables."""
        folder = folder_there(self.folder)
        known = sorted(path.parent.name for path in folder.glob("*/train.tsv"))
        if not known:
            raise ConfigError(f"{folder} has no LANGUAGE/train.tsv; is it the corpus's folder?")
        found: list[tuple[str, tuple[str, str, Mapping[str, Any]]]] = []
        for language in self.languages or known:
            if language not in known:
                raise ConfigError(f"{folder} has no language {language!r}; there are {', '.join(known)}")
            for split, name in TABLES.items():
                for number, cells in whole_table(folder / language / name, ("client_id", "path", "sentence")):
                    found.append((f"{language}/{name}, row {number}, {cells['path']}", (language, split, cells)))
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """A sentence that is spoken."""
        language, split, cells = row.data
        text = " ".join(str(cells["sentence"] or "").split())
        if not text:
            raise BadSample("no sentence")
        sound, seconds = sound_member(self.folder / language / "clips" / str(cells["path"]))
        told = {key: cells[key] for key in ("age", "gender", "accents") if cells.get(key)}
        meta = {"language": language, "speaker": cells["client_id"], "seconds": seconds, **told}
        return [Item(split, Sample(f"{row.number:08d}", {**sound, "txt": text, "json": meta}))]
