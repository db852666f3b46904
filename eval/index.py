"""A FAISS index that knows which model made it, and refuses queries of any other.

INDEX/index.faiss        unit vectors, inner product
INDEX/rows.parquet       key, shard, position and text of every vector
INDEX/manifest.json      model and its hash, modality, shards, measured recall, SHA-256 of the files
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint, model_hash
from mmcontrast.config import ConfigError
from mmcontrast.eval.embed import Embedded, embed, has
from mmcontrast.shards import FORMATS, BadSample, ShardSet, open_shards

VERSION = 1
_FIELDS: Mapping[str, type] = {
    "version": int,
    "model": str,
    "model_hash": str,
    "modality": str,
    "dim": int,
    "count": int,
    "type": str,
    "shards": list,
    "data": str,
    "quality": dict,
    "files": dict,
}
_FILES = ("index.faiss", "manifest.json", "rows.parquet")
_COLUMNS = {"key": "string", "shard": "string", "position": "int64", "text": "string"}
_FLAT_BELOW = 10_000
_QUERIES = 1000


@dataclass(frozen=True)
class Hit:
    """One answer: cosine score, and which sample it is."""

    score: float
    key: str
    shard: str
    position: int
    text: str | None


def build_index(
    model_path: Path,
    shards: Sequence[str],
    out: Path,
    *,
    modality: str = "image",
    overwrite: bool = False,
    trust: Collection[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Embed one modality of some shards and index it; returns the manifest.

    Below 10,000 vectors search is exact (flat); above, a graph (HNSW, Malkov and Yashunin 2018,
    arXiv:1603.09320). Either way recall@10 against exact search is measured, with the shards' own texts as
    queries where there are any.

    Raises:
        ConfigError: `out` exists, no such model or modality, or shards that cannot be read.
    """
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another folder, or replace it with --overwrite")
    if out.exists() and not (out.is_dir() and {p.name for p in out.iterdir()} <= set(_FILES)):
        raise ConfigError(f"{out} holds more than an index, and --overwrite would delete it; choose another folder")
    checkpoint = find_checkpoint(model_path)
    model = load_checkpoint(checkpoint, trust=trust)
    kind = model.encoder(modality).kind
    opened = open_shards(shards)
    others = [m for m in model.modalities if model.encoder(m).kind == "text" and has(opened, model, m)]
    text = modality if kind == "text" else next(iter(others), None)
    data = embed(model, opened, modalities=list(dict.fromkeys([modality, text or modality])), progress=progress)
    if modality not in data.z:
        raise ConfigError(f"no sample of {', '.join(shards)} with the modality {modality!r} could be read")
    vectors = data.z[modality].numpy()
    if not np.isfinite(vectors).all():
        raise ConfigError(f"{checkpoint} gives embeddings that are not finite; such a model cannot be searched with")
    graph = len(vectors) >= _FLAT_BELOW
    index: Any
    if graph:
        index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 64
    else:
        index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    queries = data.z[text].numpy() if text is not None and text in data.z else vectors
    quality = _recall(index, vectors, queries[:: max(1, len(queries) // _QUERIES)][:_QUERIES])

    temporary, replaced = (out.with_name(out.name + end) for end in (".tmp", ".old"))
    for left in (temporary, replaced):  # of a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        faiss.write_index(index, str(temporary / "index.faiss"))
        schema = pa.schema(list(_COLUMNS.items()))
        pq.write_table(pa.table(_rows(data, modality, text), schema=schema), temporary / "rows.parquet")
        manifest: dict[str, Any] = {
            "version": VERSION,
            "model": str(checkpoint.resolve()),
            "model_hash": model_hash(checkpoint),
            "modality": modality,
            "dim": int(vectors.shape[1]),
            "count": len(vectors),
            "metric": "inner product of unit vectors",
            "type": "hnsw32" if graph else "flat",
            "shards": [str(Path(s).resolve()) for s in shards],
            "data": data.fingerprint,
            "quality": quality,
            "skipped": [list(s) for s in data.skipped],
            "files": {p.name: _hash(p) for p in sorted(temporary.iterdir())},
        }
        text_of = json.dumps(manifest, indent=2, ensure_ascii=False)
        (temporary / "manifest.json").write_text(text_of + "\n", "utf-8")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if out.exists():
        out.rename(replaced)
    temporary.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
    return manifest


def _rows(data: Embedded, modality: str, text: str | None) -> dict[str, list[Any]]:
    rows = data.rows[modality].tolist()
    positions = [int(data.positions[r]) for r in rows]
    texts = [data.reader.raw(p, text) for p in positions] if text is not None and text in data.z else [None] * len(rows)
    return {
        "key": [data.keys[r] for r in rows],
        "shard": [data.reader.shards.name(p)[0] for p in positions],
        "position": positions,
        "text": texts,
    }


def _recall(index: Any, vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> dict[str, float]:
    """recall@10 of the index against all inner products, and how many queries measured it."""
    import faiss

    k = min(10, len(vectors))
    _, found = index.search(queries, k)
    _, exact = faiss.knn(queries, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)  # in blocks, never all scores
    shared = [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(found, exact, strict=True)]
    return {"recall_at_10": float(np.mean(shared)), "queries": float(len(queries))}


class Index:
    """An index on disk, opened with the model that made it."""

    def __init__(self, folder: Path, *, model: Path | None = None, trust: Collection[str] = ()) -> None:
        """Open and verify.

        Args:
            folder: what `build_index` wrote.
            model: where the model lies now, if it moved since; its hash must be the index's.
            trust: as for `mmcontrast.load`.

        Raises:
            ConfigError: no index, changed files, or another model.
        """
        import faiss
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.manifest = _read_manifest(folder)
        for name, digest in self.manifest["files"].items():
            if _hash(folder / Path(name).name) != digest:
                raise ConfigError(f"{folder / name} has changed since the index was built; build it again")
        origin = model or Path(self.manifest["model"])
        if not origin.is_dir():
            raise ConfigError(f"{folder} needs the model {origin}, which is not there; say where with --model")
        checkpoint = find_checkpoint(origin)
        if model_hash(checkpoint) != self.manifest["model_hash"]:
            raise ConfigError(
                f"{folder} was made by the model {self.manifest['model_hash']}, {checkpoint} is "
                f"{model_hash(checkpoint)}: their spaces differ; give the right --model, or build it again"
            )
        self.model = load_checkpoint(checkpoint, trust=trust)
        # A crafted file cannot make FAISS allocate more than what lies on disk.
        faiss.set_deserialization_vector_byte_limit((folder / "index.faiss").stat().st_size)
        try:
            self.index: Any = faiss.read_index(str(folder / "index.faiss"))
            self.rows: Any = pq.read_table(folder / "rows.parquet")
        except (RuntimeError, pa.ArrowException) as error:
            raise ConfigError(f"{folder} cannot be read: {str(error)[:200]}; build it again") from None
        facts = (self.manifest["count"], self.manifest["dim"], self.model.config.dim, list(_COLUMNS.items()))
        columns = [(name, str(kind)) for name, kind in zip(self.rows.schema.names, self.rows.schema.types, strict=True)]
        if self.index.ntotal != len(self.rows) or facts != (
            len(self.rows),
            self.index.d,
            self.index.d,
            columns,
        ):
            raise ConfigError(f"{folder}: vectors, rows and manifest do not belong together; build it again")

    def search(self, modality: str, queries: Sequence[Any], *, top: int = 5) -> list[list[Hit]]:
        """The nearest samples to each query, best first; fewer than `top` where the index is smaller.

        Raises:
            ConfigError: the model has no such modality, `top` is below 1, or a query cannot be read.
        """
        if top < 1:
            raise ConfigError(f"top is {top}; ask for at least 1 result")
        try:
            z = self.model.encode(modality, queries).numpy()
        except BadSample as error:
            raise ConfigError(f"a query cannot be used: {error}") from None
        scores, places = self.index.search(z, min(top, len(self.rows)))
        return [
            [Hit(float(s), **self._row(i)) for s, i in zip(row, where, strict=True) if i >= 0]
            for row, where in zip(scores, places.tolist(), strict=True)
        ]

    def _row(self, place: int) -> dict[str, Any]:
        return self.rows.slice(place, 1).to_pylist()[0]

    def picture(self, hit: Hit) -> bytes | None:
        """The stored picture of an answer; None where the shards are gone, changed, or hold none."""
        try:
            present = self._shards.extensions(hit.position) if self._shards else []
            for extension in FORMATS["image"]:
                if self._shards and extension in present:
                    return self._shards.read(hit.position, extension)
        except (ConfigError, BadSample, OSError, IndexError):
            return None
        return None

    @cached_property
    def _shards(self) -> ShardSet | None:
        """The shards that were indexed, if they are still there and unchanged."""
        try:
            shards = open_shards(self.manifest["shards"])
        except (ConfigError, OSError):
            return None
        return shards if shards.fingerprint == self.manifest["data"] else None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not an index: {error}") from None
    manifest = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong or not {"index.faiss", "rows.parquet"} <= set(manifest["files"]):
        raise ConfigError(f"{path} is not the manifest of an index; build it again")
    if manifest["version"] > VERSION:
        raise ConfigError(f"{path} has version {manifest['version']}, this one reads {VERSION}: upgrade mmcontrast")
    return manifest


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"the index is incomplete: {error}") from None
