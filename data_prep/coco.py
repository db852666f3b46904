"""COCO Captions -> shards: 123,287 photographs with five captions each.

    FOLDER/dataset_coco.json                        Karpathy's splits: 113,287 (with restval), 5,000, 5,000
    FOLDER/train2014/COCO_train2014_000000000009.jpg, val2014/…

or, as the corpus itself is divided, without captions for testing:

    FOLDER/annotations/captions_train2017.json, captions_val2017.json
    FOLDER/train2017/000000000009.jpg, val2017/…    likewise for 2014

Chen et al. 2015, arXiv:1504.00325.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmcontrast.data_prep.captions import Captioned, captioned_item, karpathy_rows, read_json
from mmcontrast.data_prep.source import SPLITS, Item, Row, Source, first_there, folder_there, numbered


@dataclass(frozen=True, kw_only=True)
class COCO(Source):
    """COCO Captions: photographs with five captions each, in Karpathy's splits or their own.

    A sample is a photograph (`jpg`), its first caption (`txt`), and metadata: `captions`, all of them; `id`; `file`;
    `licence`, the photograph's, where the corpus's own tables are read.
    """

    folder: Path
    """Where the tables and the folders of photographs are."""
    division: Literal["karpathy", "2014", "2017"] = "karpathy"
    """Whose splits: Karpathy's, on which retrieval is reported, or the corpus's of a year, which have no test split."""

    @property
    def splits(self) -> Sequence[str]:
        """Those of the division."""
        return SPLITS if self.division == "karpathy" else ("train", "val")

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": f"COCO Captions ({self.division})",
            "licence": "captions: CC BY 4.0; photographs by Flickr's terms of use",
            "paper": "arXiv:1504.00325",
        }

    def rows(self) -> Sequence[Row]:
        """One per photograph."""
        folder = folder_there(self.folder)
        if self.division != "karpathy":
            return numbered(row for split in self.splits for row in _own(folder, split, self.division))
        table = first_there(folder, "dataset_coco.json", "karpathy/dataset_coco.json", "annotations/dataset_coco.json")
        root = first_there(folder, "val2014", "images/val2014").parent
        return karpathy_rows(table, lambda entry: root / str(entry.get("filepath")) / str(entry.get("filename")))

    def encode(self, row: Row) -> Sequence[Item]:
        """A photograph with its captions."""
        return [captioned_item(row)]


def _own(folder: Path, split: str, year: str) -> list[tuple[str, Captioned]]:
    """The photographs of a split as the corpus itself has it."""
    table = folder / "annotations" / f"captions_{split}{year}.json"
    photographs = first_there(folder, f"{split}{year}", f"images/{split}{year}")
    read = read_json(table, "images", "annotations")
    captions: dict[Any, list[Any]] = {}
    for annotation in read["annotations"]:
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption"))
    licences = {licence.get("id"): licence.get("url") for licence in read.get("licenses") or ()}
    found: list[tuple[str, Captioned]] = []
    for number, entry in enumerate(read["images"], 1):
        file, licence = str(entry.get("file_name")), licences.get(entry.get("license"))
        meta = {"id": entry.get("id"), "file": file} | ({"licence": licence} if licence else {})
        captioned = Captioned(split, photographs / file, captions.get(entry.get("id"), []), meta)
        found.append((f"{table.name}, row {number}, {file}", captioned))
    return found
