"""What corpora of pictures with several captions share: Karpathy's splits, and how a sample is made.

Karpathy and Fei-Fei 2015, arXiv:1412.2306; dataset_flickr30k.json and dataset_coco.json of caption_datasets.zip.
Results of retrieval are given on these splits: 1,000 pictures of Flickr30k, 5,000 of COCO.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, captions_of, numbered, picture_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}
"""Karpathy's split -> ours; restval, the rest of COCO's validation set, is trained on by all who follow him."""


@dataclass(frozen=True)
class Captioned:
    """A picture with its captions, and metadata beside them. The split is None where the corpus gives none."""

    split: str | None
    path: Path
    captions: Sequence[Any]
    meta: dict[str, Any]


def read_json(path: Path, *lists: str) -> dict[str, Any]:
    """A JSON object whose fields of these names are lists of objects.

    Raises:
        ConfigError: the file is something else, or cannot be read.
    """
    try:
        value: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    for name in lists:
        found: Any = cast(dict[str, Any], value).get(name) if isinstance(value, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in cast(list[Any], found)):
            raise ConfigError(f"{path} has no list of objects {name!r}; is it the corpus's file?")
    return cast(dict[str, Any], value)


def karpathy_rows(path: Path, place: Callable[[dict[str, Any]], Path]) -> list[Row]:
    """One per picture of a file of Karpathy's.

    Args:
        path: the file.
        place: entry -> where its picture is.
    """
    found: list[tuple[str, Captioned]] = []
    for number, entry in enumerate(read_json(path, "images")["images"], 1):
        file = str(entry.get("filename"))
        captions = [s.get("raw") if isinstance(s, dict) else s for s in entry.get("sentences") or ()]
        ids = {"id": entry.get("cocoid", entry.get("imgid")), "file": file}
        split = KARPATHY.get(str(entry.get("split")))
        found.append((f"{path.name}, row {number}, {file}", Captioned(split, place(entry), captions, ids)))
    return numbered(found)


def captioned_item(row: Row) -> Item:
    """The sample of a picture: it, its first caption, and all of them in the metadata.

    Raises:
        BadSample: it has no caption or split, or cannot be decoded.
        OSError: it cannot be read.
    """
    found: Captioned = row.data
    if found.split is None:
        raise BadSample("no split that is known")
    caption, meta = captions_of(found.captions)
    members = {**picture_member(found.path), "txt": caption, "json": {**meta, **found.meta}}
    return Item(found.split, Sample(f"{row.number:06d}", members))
