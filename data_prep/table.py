"""A table of picture files and captions (CSV, TSV, JSON lines or Parquet) -> shards."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data_prep.split import Item, Refused, Summary, write_splits
from mmcontrast.decode import image
from mmcontrast.shards import FORMATS, BadSample, Sample


def prepare(
    table: Path,
    out: Path,
    *,
    val: float,
    test: float,
    image_column: str = "image",
    text_column: str = "text",
    group_column: str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write the shards; the other columns become each sample's metadata.

    Args:
        table: .csv, .tsv, .jsonl or .parquet; picture paths are relative to its folder.
        out: where OUT/train and so on are written.
        val: share of the groups for validation.
        test: share of the groups for testing.
        image_column: column with picture paths; an empty cell is a sample without picture.
        text_column: column with captions; an empty cell is a sample without text.
        group_column: column whose equal values stay in one split, such as patient; by default the caption.
        overwrite: replace shards that are there.

    Raises:
        ConfigError: no such file or column, or no usable row. Single bad rows are refused by number, and it goes on.
    """
    if not table.is_file():
        raise ConfigError(f"there is no table {str(table)!r}")
    rows = _read(table)
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{table} has no rows")
    for column in (image_column, text_column, group_column):
        if column is not None and column not in first:
            raise ConfigError(f"{table} has no column {column!r}{suggest(column, first.keys())}")

    def items() -> Iterator[Item | Refused]:
        yield _item(table.parent, 1, first, image_column, text_column, group_column)
        for number, row in enumerate(rows, 2):
            yield _item(table.parent, number, row, image_column, text_column, group_column)

    about = {"source": "table", "path": table.name}
    return write_splits(items(), out, val=val, test=test, overwrite=overwrite, about=about)


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
    elif kind in (".jsonl", ".ndjson"):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line) if line.strip() else {}
                except ValueError:
                    row = {}
                yield cast(Mapping[str, Any], row) if isinstance(row, dict) else {}
    elif kind == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        raise ConfigError(f"{path} is no table that can be read: use .csv, .tsv, .jsonl or .parquet")


def _item(
    folder: Path, number: int, row: Mapping[str, Any], image_column: str, text_column: str, group_column: str | None
) -> Item | Refused:
    where = f"row {number}"
    name, text = row.get(image_column), " ".join(str(row.get(text_column) or "").split())
    if not name and not text:
        return Refused(where, f"neither {image_column} nor {text_column}")
    members: dict[str, Any] = {}
    if name:
        path = folder / str(name)
        extension = path.suffix.lower()[1:]
        if extension not in FORMATS["image"]:
            return Refused(where, f"{name}: not one of {', '.join(FORMATS['image'])}")
        try:
            members[extension] = path.read_bytes()
            image(members[extension])
        except (OSError, BadSample) as error:
            return Refused(where, f"{name}: {error}")
    if text:
        members["txt"] = text
    meta = {
        str(k): v
        for k, v in row.items()
        if k not in (None, image_column, text_column) and isinstance(v, (str, int, float, bool))
    }
    if meta:
        members["json"] = meta
    group = str(row.get(group_column)) if group_column else (text or str(name))
    return Item(Sample(f"{number:08d}", members), group)
