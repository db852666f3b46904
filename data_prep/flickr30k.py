"""Flickr30k -> shards: 31,014 photographs of Karpathy's splits (29,000, 1,014, 1,000) with five captions each.

    FOLDER/dataset_flickr30k.json           splits and captions
    FOLDER/flickr30k-images/1000092795.jpg

Young et al. 2014, https://aclanthology.org/Q14-1006.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.data_prep.captions import captioned_item, karpathy_rows
from mmcontrast.data_prep.source import Item, Row, Source, first_there


@dataclass(frozen=True, kw_only=True)
class Flickr30k(Source):
    """Flickr30k: photographs with five captions each, in Karpathy's splits.

    A sample is a photograph (`jpg`), its first caption (`txt`), and metadata: `captions`, all five; `id`; `file`.
    """

    folder: Path
    """Where dataset_flickr30k.json and the folder of photographs are."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "Flickr30k",
            "licence": "for research and teaching only; photographs by Flickr's terms of use",
            "paper": "https://aclanthology.org/Q14-1006",
        }

    def rows(self) -> Sequence[Row]:
        """One per photograph."""
        table = first_there(self.folder, "dataset_flickr30k.json", "karpathy/dataset_flickr30k.json")
        photographs = first_there(self.folder, "flickr30k-images", "flickr30k_images", "images")
        return karpathy_rows(table, lambda entry: photographs / str(entry.get("filename")))

    def encode(self, row: Row) -> Sequence[Item]:
        """A photograph with its captions."""
        return [captioned_item(row)]
