"""Rows of a table: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of the files that are tables."""


def read_table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers from 1, and column -> value.

    Raises:
        ConfigError: it cannot be read, or a row of it cannot.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            batches = pq.ParquetFile(path).iter_batches()
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
            return
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind in (".csv", ".tsv"):
                yield from enumerate(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","), 1)
                return
            for number, line in enumerate(file, 1):
                row = json.loads(line) if line.strip() else None
                if isinstance(row, dict):
                    yield number, cast(dict[str, Any], row)
                elif row is not None:
                    raise ValueError(f"line {number} is no JSON object")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8; save it as UTF-8") from None
    except (csv.Error, OSError, ValueError) as error:  # pyarrow's errors are of the latter two
        raise ConfigError(f"{path} cannot be read as {kind[1:]}: {error}") from None
