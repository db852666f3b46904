"""A folder of pictures and captions -> shards.

A picture's caption is the text file beside it (`dog.jpg`, `dog.txt`); without one, the name of its folder
(`golden_retriever/0001.jpg` -> "golden retriever"). The folder's name also becomes its label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Grouped, Item, Row, folder_there, numbered, picture_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample


@dataclass(frozen=True, kw_only=True)
class Folder(Grouped):
    """A folder of pictures, each with a text file beside it or in a folder named after its class.

    Pictures with equal captions of their own stay in one split; classes are divided.
    """

    folder: Path
    """Where the pictures are, at any depth."""

    def about(self, split: str) -> Mapping[str, Any]:
        """The folder's name."""
        return {"source": "folder", "path": self.folder.name}

    def rows(self) -> Sequence[Row]:
        """One per picture, sorted by path."""
        files = sorted(p for p in folder_there(self.folder).rglob("*") if p.is_file())
        pictures = [p for p in files if p.suffix.lower()[1:] in FORMATS["image"]]
        if not pictures:
            raise ConfigError(
                f"{self.folder} has no pictures; looked for {', '.join(FORMATS['image'])} in it and below"
            )
        return numbered((_printable(p.relative_to(self.folder)), p) for p in pictures)

    def encode(self, row: Row) -> Sequence[Item]:
        """The picture with its caption."""
        path: Path = row.data
        label = "" if path.parent == self.folder else _printable(path.parent.name).replace("_", " ").strip()
        beside = path.with_suffix(".txt")
        own = " ".join(beside.read_text("utf-8-sig").split()) if beside.is_file() else ""
        if not (own or label):
            raise BadSample("no caption: no text file beside it, and not in a named folder")
        meta = {"file": row.where} | ({"label": label} if label else {})
        sample = Sample(f"{row.number:08d}", {**picture_member(path), "txt": own or label, "json": meta})
        # A class whose name stands in for captions must not move to one split as a whole.
        return [Item(self.split_of(own if own not in ("", label) else row.where), sample)]


def _printable(path: Path | str) -> str:
    """A name that need not be Unicode, as what UTF-8 can hold."""
    return str(path).encode("utf-8", "backslashreplace").decode()
