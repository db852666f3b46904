"""Rows of a table: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError

Cells = Mapping[str, Any]
"""Column -> value."""
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of the files that are tables."""


def read_rows(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[int, Cells | None]]:
    """Rows with their numbers from 1 (of the line, in JSON lines); None for one that is no row. Also of a .gz of them.

    Raises:
        ConfigError: it is of no such kind, or cannot be read.
    """
    zipped = path.suffix.lower() == ".gz"
    kind = Path(path.stem if zipped else path.name).suffix.lower()
    if kind not in TABLES:
        raise ConfigError(f"{path} is no table that can be read: use .csv, .tsv, .jsonl or .parquet")
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            batches = pq.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with (gzip.open if zipped else open)(path, "rt", encoding=encoding, newline="") as file:
            if kind in (".csv", ".tsv"):
                yield from enumerate(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","), 1)
            else:
                yield from ((number, _json_row(line)) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8; save it as UTF-8") from None
    except (csv.Error, OSError, EOFError, ValueError) as error:  # pyarrow's errors are of the latter two
        raise ConfigError(f"{path} cannot be read as {kind[1:]}: {error}") from None


def _json_row(line: str) -> Cells | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return cast(Cells, row) if isinstance(row, dict) else None


def read_table(path: Path) -> Iterator[tuple[int, Cells]]:
    """The same of a table in which every row must be one.

    Raises:
        ConfigError: it is of no such kind, or cannot be read, or a row of it cannot.
    """
    for number, row in read_rows(path):
        if row is None:
            raise ConfigError(f"{path} cannot be read as {path.suffix[1:].lower()}: line {number} is no JSON object")
        yield number, row
