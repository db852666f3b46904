"""What is known of the vectors, as columns: key, shard, source, position and text, and the fields of the metadata.

A field of the samples' metadata whose name is one of ours is kept with an underscore after it. A field that has values
of several types in different samples is kept as text; lists and objects as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.config import ConfigError

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("source", pa.int32()),
        ("position", pa.int64()),
        ("text", pa.string()),
    ]
)
"""Columns that every index has; `source` counts in the manifest's `sources`, `position` in that source's samples."""
MAX_COLUMNS = 200
GROUP = 8192
"""Rows of a row group, the least that is read for one hit."""


def table_of(columns: Mapping[str, Sequence[Any]], metas: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of `COLUMNS` and of the metadata.

    Raises:
        ConfigError: the metadata have too many fields.
    """
    names = dict.fromkeys(name for meta in metas for name in meta)
    if len(names) > MAX_COLUMNS:
        raise ConfigError(f"the samples' metadata have {len(names)} fields; an index keeps {MAX_COLUMNS} at most")
    arrays = [pa.array(columns[name], field.type) for name, field in zip(COLUMNS.names, COLUMNS, strict=True)]
    fields = list(COLUMNS)
    for name in names:
        array = _column([meta.get(name) for meta in metas])
        fields.append(pa.field(f"{name}_" if name in COLUMNS.names else name, array.type))
        arrays.append(array)
    return pa.table(arrays, schema=pa.schema(fields))


def _column(values: Sequence[Any]) -> pa.Array:
    plain = [v if isinstance(v, (str, int, float, bool, type(None))) else json.dumps(v) for v in values]
    kinds = {type(v) for v in plain} - {type(None)}
    if kinds == {int, float}:
        plain = [v if v is None else float(v) for v in plain]
    elif len(kinds) > 1:
        plain = [_text(v) for v in plain]
    try:
        return pa.array(plain)
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):  # beyond 64 bits, half a character
        texts = [_text(v) for v in plain]
        return pa.array([t if t is None else t.encode("utf-8", "replace").decode() for t in texts], pa.string())


def _text(value: Any) -> str | None:
    return value if isinstance(value, str | None) else json.dumps(value)


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for the rows of several: a column that is of several types in them is text.

    Raises:
        ConfigError: more columns than an index keeps.
    """
    kinds: dict[str, pa.DataType] = {}
    for schema in schemas:
        for name, field in zip(schema.names, schema, strict=True):
            kinds[name] = _common(kinds.get(name, pa.null()), field.type)
    if len(kinds) > MAX_COLUMNS + len(COLUMNS):
        raise ConfigError(f"the samples' metadata have {len(kinds)} fields; an index keeps {MAX_COLUMNS} at most")
    return pa.schema(list(kinds.items()))


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if {str(one), str(other)} <= {"int32", "int64", "double"}:
        return pa.float64()
    return pa.string()


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of a schema from `unified`; what it lacks is null."""
    arrays = [
        table.column(name).cast(field.type) if name in table.column_names else pa.nulls(len(table), field.type)
        for name, field in zip(schema.names, schema, strict=True)
    ]
    return pa.table(arrays, schema=schema)


def read_schema(path: Path) -> pa.Schema:
    """The columns of a file of rows, each of a type that we write.

    Raises:
        ConfigError: others.
        pyarrow.ArrowException: no Parquet file.
    """
    schema = pq.read_schema(path).remove_metadata()
    known = {"string", "int32", "int64", "double", "bool", "null"}
    if schema.names[: len(COLUMNS)] != COLUMNS.names or {str(kind) for kind in schema.types} - known:
        raise ConfigError(f"{path} has other columns than an index has; build it again")
    return schema
