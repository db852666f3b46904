"""ESC-50 -> shards: 2,000 environmental sounds of five seconds, 40 of each of 50 classes, in five folds.

    FOLDER/meta/esc50.csv           filename, fold, target, category, esc10, src_file, take
    FOLDER/audio/1-100032-A-0.wav   44,100 Hz

Piczak 2015, https://doi.org/10.1145/2733373.2806390; https://github.com/karolpiczak/ESC-50. Clips of one recording are
in one fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mmcontrast.data_prep.source import Folded, Item, Row, folder_there, numbered, sound_member
from mmcontrast.data_prep.table import whole_table
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from mmcontrast.tables import Cells

COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")


@dataclass(frozen=True, kw_only=True)
class ESC50(Folded):
    """ESC-50: environmental sounds of 50 classes in five folds (the extra [audio]).

    A sample is a sound of five seconds (`wav`), its class (`txt`), and metadata: `label`, the class; `fold`; `esc10`,
    whether it belongs to the ten easier classes; `recording`, which it was cut from; `seconds`. Zero-shot results are
    given for fold 1 or for all folds: `--val-folds --test-folds 1 2 3 4 5` writes all into the test split.
    """

    folds: ClassVar[range] = range(1, 6)

    folder: Path
    """Where meta/ and audio/ are."""
    val_folds: tuple[int, ...] = (2,)
    test_folds: tuple[int, ...] = (1,)

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "ESC-50",
            "licence": "CC BY-NC 3.0 (esc10: CC BY 3.0)",
            "paper": "https://doi.org/10.1145/2733373.2806390",
        }

    def rows(self) -> Sequence[Row]:
        """One per line of the table."""
        table = whole_table(folder_there(self.folder) / "meta" / "esc50.csv", COLUMNS)
        return numbered((f"row {number}, {cells['filename']}", cells) for number, cells in table)

    def encode(self, row: Row) -> Sequence[Item]:
        """A sound with its class."""
        cells: Cells = row.data
        fold = cells["fold"]
        if not (isinstance(fold, str) and fold.isdecimal()):
            raise BadSample("fold is no number")
        label = str(cells["category"] or "").replace("_", " ").strip()
        if not label:
            raise BadSample("no category")
        sound, seconds = sound_member(self.folder / "audio" / str(cells["filename"]))
        meta = {
            "label": label,
            "fold": int(fold),
            "esc10": cells["esc10"] == "True",
            "recording": cells["src_file"],
            "seconds": seconds,
        }
        split = self.split_of_fold(int(fold))
        return [Item(split, Sample(f"{row.number:06d}", {**sound, "txt": label, "json": meta}))]
