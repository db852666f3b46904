"""clip-retrieval's folder of embeddings: written beside an index, or read instead of shards.

    FOLDER/img_emb/img_emb_0.npy        [n, D], float32 here; others write float16, which is read as well
    FOLDER/text_emb/text_emb_0.npy      of texts; other modalities have folders of their names
    FOLDER/metadata/metadata_0.parquet  n rows: image_path, caption, and whatever else is known

Numbers are padded with zeros to the same width. Nothing in such a folder is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmcontrast.checkpoint import sync
from mmcontrast.config import ConfigError
from mmcontrast.eval.index.rows import COLUMNS
from mmcontrast.eval.index.segment import Part
from mmcontrast.eval.index.vectors import open_vectors, write_vectors

_NAMES = {"image": "img"}
_PATH, _CAPTION, _KEY = "image_path", "caption", "key"
_BLOCK = 1 << 20


def is_embeddings(place: str) -> bool:
    """Whether a folder is of this kind."""
    return "://" not in place and Path(place).is_dir() and any(Path(place).glob("*_emb/*_emb_*.npy"))


def fingerprint_of(folder: Path, modality: str) -> str:
    """Changes when the embeddings of a modality or their metadata do."""
    digest = hashlib.sha256()
    for vectors, rows in _files(folder, modality):
        for file in (vectors, rows):
            if file is not None:
                with open(file, "rb") as opened:
                    digest.update(f"{file.name!r} {hashlib.file_digest(opened, 'sha256').hexdigest()} ".encode())
    return digest.hexdigest()[:16]


def read_embeddings(folder: Path, modality: str, dim: int, *, source: int) -> list[Part]:
    """The embeddings of a modality, mapped, and their rows.

    A row's key is its `key`, or else its `image_path`, or else file and number; its text is the `caption`.

    Args:
        folder: of the embeddings.
        modality: whose they are.
        dim: of the model that made them.
        source: number of this folder in the index.

    Raises:
        ConfigError: no embeddings of the modality, of another dimension, or with other metadata than they need.
    """
    parts: list[Part] = []
    first = 0
    for file, rows in _files(folder, modality):
        vectors = open_vectors(file, dtypes=("<f4", "<f2"))
        if vectors.shape[1] != dim:
            raise ConfigError(
                f"{file} has {vectors.shape[1]} dimensions, the model {dim}: it is not the model that made them"
            )
        try:
            table = pa.table({"": pa.nulls(len(vectors))}) if rows is None else pq.read_table(rows)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{rows} cannot be read: {str(error)[:200]}") from None
        if len(table) != len(vectors):
            raise ConfigError(
                f"{file} has {len(vectors)} vectors, {rows} {len(table)} rows; they do not belong together"
            )
        parts.append(Part(vectors, _rows(table, file, source, first)))
        first += len(vectors)
    return parts


def write_embeddings(folder: Path, modality: str, parts: Sequence[Part], dim: int) -> None:
    """Write a modality's folder and the metadata.

    Raises:
        ConfigError: the folder is there and not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder for the embeddings")
    name = _name(modality)
    vectors, metadata = folder / f"{name}_emb", folder / "metadata"
    for made in (vectors, metadata):
        made.mkdir(parents=True, exist_ok=True)
    width = len(str(len(parts) - 1))
    for number, part in enumerate(parts):
        rows = part.table()
        # `key`, `shard` and `position` as we know them; what names and describes a sample as clip-retrieval does.
        rows = rows.drop_columns(["source", "text"])
        rows = rows.append_column(_PATH, part.table().column("key")).append_column(
            _CAPTION, part.table().column("text")
        )
        pq.write_table(rows, metadata / f"metadata_{number:0{width}d}.parquet")
        path = vectors / f"{name}_emb_{number:0{width}d}.npy"
        write_vectors(path, part.blocks(), dim)
        sync(path)


def _name(modality: str) -> str:
    return _NAMES.get(modality, modality)


def _files(folder: Path, modality: str) -> list[tuple[Path, Path | None]]:
    """Vectors, and the metadata of the same number where there are any."""
    name = _name(modality)
    found = sorted((folder / f"{name}_emb").glob(f"{name}_emb_*.npy"), key=lambda file: (len(file.stem), file.stem))
    if not found:
        known = sorted(path.name.removesuffix("_emb") for path in folder.glob("*_emb"))
        names = [next((m for m, n in _NAMES.items() if n == k), k) for k in known]
        raise ConfigError(f"{folder} has no embeddings of {modality!r}; it has {', '.join(names)}: give --modality")
    rows = [folder / "metadata" / f"metadata_{file.stem.rpartition('_')[2]}.parquet" for file in found]
    return [(file, table if table.is_file() else None) for file, table in zip(found, rows, strict=True)]


def _rows(table: pa.Table, file: Path, source: int, first: int) -> pa.Table:
    n = len(table)
    known: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        if name:
            known[name] = _column(table.column(name))
    keys = next((known[k] for k in (_KEY, _PATH) if k in known and not known[k].null_count), None)
    if keys is None or str(keys.type) != "string":
        keys = pa.array([f"{file.stem}-{i}" for i in range(n)])
    text = known.pop(_CAPTION, pa.nulls(n, pa.string()))
    own: dict[str, Any] = {
        "key": keys,
        "shard": pa.array([file.name] * n),
        "source": pa.array(np.full(n, source, np.int32)),
        "position": pa.array(np.arange(first, first + n)),
        "text": text if str(text.type) == "string" else text.cast(pa.string()),
    }
    known.pop(_KEY, None)
    if _PATH in known and known[_PATH].equals(
        pa.chunked_array([*keys.chunks] if isinstance(keys, pa.ChunkedArray) else [keys])
    ):
        known.pop(_PATH)
    named = {f"{name}_" if name in COLUMNS.names else name: column for name, column in known.items()}
    return pa.table(own | named)


def _column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As an index keeps it: text, whole numbers, numbers, true or false; whatever else as JSON."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column
    if pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return column.cast(pa.int64())
    if pa.types.is_floating(kind):
        return column.cast(pa.float64())
    texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])
