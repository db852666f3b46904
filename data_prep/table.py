"""A table of picture files and captions (CSV, TSV, JSON lines or Parquet) -> shards."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError, suggest
from mmcontrast.data_prep.split import Item, Refused, Summary, write_splits
from mmcontrast.decode import image
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample

Row = Mapping[str, Any]


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
        ConfigError: no such file or column, or no usable row. Single bad rows are refused by number, and it
        goes on.
    """
    if not table.is_file():
        raise ConfigError(f"there is no table {str(table)!r}")
    rows = _read(table)
    head = list(islice(rows, 1000))  # of JSON lines, some may lack a column and some be broken
    if not head:
        raise ConfigError(f"{table} has no rows")
    known = list(dict.fromkeys(column for _, row in head for column in row or () if column))
    for column in (image_column, text_column, group_column):
        if column is not None and column not in known:
            raise ConfigError(f"{table} has no column {column!r}{suggest(column, known)}")

    def items() -> Iterator[Item | Refused]:
        for number, row in chain(head, rows):
            yield _item(table.parent, number, row, image_column, text_column, group_column)

    about = {"source": "table", "path": table.name}
    return write_splits(items(), out, val=val, test=test, overwrite=overwrite, about=about)


def _read(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Rows with their numbers (lines, in JSON lines); None for one that is no row."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"):
        raise ConfigError(f"{path} is no table that can be read: use .csv, .tsv, .jsonl or .parquet")
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            batches = pq.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                yield from enumerate(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","), 1)
            else:
                yield from ((number, _json_row(line)) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8; save it as UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:  # pyarrow's errors are of the latter two
        raise ConfigError(f"{path} cannot be read as {kind[1:]}: {error}") from None


def _json_row(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(Row, row) if isinstance(row, dict) else None


def _item(
    folder: Path, number: int, row: Row | None, image_column: str, text_column: str, group_column: str | None
) -> Item | Refused:
    where = f"row {number}"
    if row is None:
        return Refused(where, "not a JSON object")
    name, text = row.get(image_column), " ".join(_text(row.get(text_column)).split())
    if not name and not text:
        return Refused(where, f"neither {image_column} nor {text_column}")
    members: dict[str, Any] = {}
    if name:
        if not isinstance(name, str):
            return Refused(where, f"{image_column} must be the path of a file, not {type(name).__name__}")
        extension = Path(name).suffix.lower()[1:]
        if extension not in FORMATS["image"]:
            return Refused(where, f"{name}: not one of {', '.join(FORMATS['image'])}")
        try:
            members[extension] = (folder / name).read_bytes()
            image(members[extension])
        except (OSError, ValueError, BadSample) as error:
            return Refused(where, f"{name}: {getattr(error, 'strerror', None) or error}")
    if text:
        members["txt"] = text
    # Empty cells say nothing: as metadata, they would make one group of all rows that lack a label.
    others = {str(k): v for k, v in row.items() if k not in (None, image_column, text_column)}
    meta = {k: v for k, v in others.items() if isinstance(v, (str, int, float)) and _text(v).strip()}
    group = _text(row.get(group_column)) if group_column else text or str(name)
    if not group.strip():
        return Refused(where, f"no {group_column}, which decides its split")
    try:
        json.dumps([text, meta, group], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Refused(where, "has characters that UTF-8 cannot hold")
    return Item(Sample(f"{number:08d}", members | ({"json": meta} if meta else {})), group)


def _text(value: Any) -> str:
    """A cell as text; empty where it is missing, as NaN marks it in tables of numbers."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)
