"""A table of picture files and captions (CSV, TSV, JSON lines or Parquet) -> shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data_prep.source import Grouped, Item, Row, picture_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from mmcontrast.tables import Cells, read_rows


@dataclass(frozen=True, kw_only=True)
class Table(Grouped):
    """A CSV, TSV, JSON-lines or Parquet table of picture files and captions.

    The other columns become each sample's metadata.
    """

    table: Path
    """The file; picture paths are relative to its folder."""
    image_column: str = "image"
    """Column with picture paths; an empty cell is a sample without picture."""
    text_column: str = "text"
    """Column with captions; an empty cell is a sample without text."""
    group_column: str | None = None
    """Column whose equal values stay in one split, such as patient; by default the caption."""

    def about(self, split: str) -> Mapping[str, Any]:
        """The file's name."""
        return {"source": "table", "path": self.table.name}

    def rows(self) -> Iterator[Row]:
        """One per row; its columns are checked by the first thousand."""
        if not self.table.is_file():
            raise ConfigError(f"there is no table {str(self.table)!r}")
        rows = read_rows(self.table)
        head = list(islice(rows, 1000))  # of JSON lines, some may lack a column and some be broken
        if not head:
            raise ConfigError(f"{self.table} has no rows")
        known = list(dict.fromkeys(column for _, row in head for column in row or () if column))
        for column in (self.image_column, self.text_column, self.group_column):
            if column is not None and column not in known:
                raise ConfigError(f"{self.table} has no column {column!r}{suggest(column, known)}")
        return (Row(number, self._where(number, row), row) for number, row in chain(head, rows))

    def _where(self, number: int, row: Cells | None) -> str:
        name = (row or {}).get(self.image_column)
        return f"row {number}, {name}" if name and isinstance(name, str) else f"row {number}"

    def encode(self, row: Row) -> Sequence[Item]:
        """Picture, text or both."""
        cells: Cells | None = row.data
        if cells is None:
            raise BadSample("not a JSON object")
        name, text = cells.get(self.image_column), " ".join(_text(cells.get(self.text_column)).split())
        if not name and not text:
            raise BadSample(f"neither {self.image_column} nor {self.text_column}")
        members: dict[str, Any] = self._picture(name) if name else {}
        if text:
            members["txt"] = text
        # Empty cells say nothing: as metadata, they would make one group of all rows that lack a label.
        others = {str(k): v for k, v in cells.items() if k not in (None, self.image_column, self.text_column)}
        meta = {k: v for k, v in others.items() if isinstance(v, (str, int, float)) and _text(v).strip()}
        group = _text(cells.get(self.group_column)) if self.group_column else text or str(name)
        if not group.strip():
            raise BadSample(f"no {self.group_column}, which decides its split")
        try:
            json.dumps([text, meta, group], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadSample("has characters that UTF-8 cannot hold") from None
        sample = Sample(f"{row.number:08d}", members | ({"json": meta} if meta else {}))
        return [Item(self.split_of(group), sample)]

    def _picture(self, name: Any) -> dict[str, Any]:
        if not isinstance(name, str):
            raise BadSample(f"{self.image_column} must be the path of a file, not {type(name).__name__}")
        try:
            return dict(picture_member(self.table.parent / name))
        except ValueError as error:  # a name that no file can have
            raise BadSample(str(error)) from None


def whole_table(path: Path, columns: Sequence[str], *, encoding: str = "utf-8-sig") -> list[tuple[int, Cells]]:
    """All rows of a table that belongs to a corpus, with their numbers.

    Raises:
        ConfigError: it is not there, cannot be read, is empty, or lacks a column.
    """
    if not path.is_file():
        raise ConfigError(f"there is no table {str(path)!r}")
    rows = [(number, row) for number, row in read_rows(path, encoding) if row is not None]
    if not rows:
        raise ConfigError(f"{path} has no rows")
    for column in columns:
        if column not in rows[0][1]:
            raise ConfigError(f"{path} has no column {column!r}{suggest(column, [str(c) for c in rows[0][1]])}")
    return rows


def _text(value: Any) -> str:
    """A cell as text; empty where it is missing, as NaN marks it in tables of numbers."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)
