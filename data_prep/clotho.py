"""Clotho -> shards: 15 to 30 seconds of sound from Freesound, with five captions each.

    FOLDER/clotho_captions_development.csv      file_name, caption_1 … caption_5
    FOLDER/clotho_metadata_development.csv      file_name, keywords, sound_id, …, manufacturer, license
    FOLDER/development/NAME.wav                 44,100 Hz; likewise for validation and evaluation

The tables may lie in clotho_csv_files/ and the recordings in clotho_audio_files/. Drossos et al. 2020,
arXiv:1910.09387; https://zenodo.org/records/4783391 (version 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.data_prep.source import (
    Item,
    Row,
    Source,
    captions_of,
    first_there,
    numbered,
    sound_member,
)
from mmcontrast.data_prep.table import whole_table
from mmcontrast.shard_writer import Sample
from mmcontrast.tables import Cells

PARTS = {"development": "train", "validation": "val", "evaluation": "test"}
"""Part of the corpus -> split."""
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


@dataclass(frozen=True, kw_only=True)
class Clotho(Source):
    """Clotho: sounds of Freesound with five captions each (the extra [audio]).

    A sample is a sound (`wav`), its first caption (`txt`), and metadata: `captions`, all five; `keywords`; `sound`, its
    number at Freesound; `author` and `licence`, which differ from sound to sound; `file`; `seconds`.
    """

    folder: Path
    """Where the tables and the folders of recordings are."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "Clotho",
            "licence": "captions: Tampere University's, not commercial; sounds: Creative Commons, as each says",
            "paper": "arXiv:1910.09387",
        }

    def rows(self) -> Sequence[Row]:
        """One per line of the tables of captions."""
        found: list[tuple[str, tuple[str, Path, Cells, Cells]]] = []
        for part, split in PARTS.items():
            name = f"clotho_captions_{part}.csv"
            table = first_there(self.folder, name, f"clotho_csv_files/{name}")
            sounds = first_there(self.folder, part, f"clotho_audio_files/{part}")
            known = _metadata(table.with_name(f"clotho_metadata_{part}.csv"))
            for number, cells in whole_table(table, ("file_name", *CAPTIONS)):
                file = str(cells["file_name"])
                found.append((f"{name}, row {number}, {file}", (split, sounds / file, cells, known.get(file, {}))))
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """A sound with its captions."""
        split, path, cells, known = row.data
        caption, meta = captions_of(cells[column] for column in CAPTIONS)
        sound, seconds = sound_member(path)
        keywords = [word.strip() for word in str(known.get("keywords") or "").split(";") if word.strip()]
        facts = {
            "keywords": keywords,
            "sound": known.get("sound_id"),
            "author": known.get("manufacturer"),
            "licence": known.get("license"),
        }
        meta |= {key: value for key, value in facts.items() if value} | {"file": path.name, "seconds": seconds}
        return [Item(split, Sample(f"{row.number:06d}", {**sound, "txt": caption, "json": meta}))]


def _metadata(path: Path) -> dict[str, Cells]:
    """File -> its line. Authors' names are in Latin-1 in some of the tables, in UTF-8 in others."""
    try:
        path.read_bytes().decode("utf-8-sig")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "latin-1"
    except FileNotFoundError:
        encoding = "utf-8-sig"  # the table's own error says so
    table = whole_table(path, ("file_name", "keywords", "sound_id", "manufacturer", "license"), encoding=encoding)
    return {str(cells["file_name"]): cells for _, cells in table}
