"""A segment: vectors that came together, their rows, and a FAISS structure to search them by where they are many.

The vectors themselves are always kept, mapped into memory: they are what compacting and merging read, what a stored
key is looked up in, and what gives the candidates of a quantised structure their true scores. Deleted rows and filters
are one thing, a mask; where little is left by it, the search is exact. Letters: n rows, D dimensions, q queries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.eval.index import rows as metadata
from mmcontrast.eval.index.store import ROWS, STRUCTURE, VECTORS
from mmcontrast.eval.index.vectors import (
    Floats,
    Ints,
    block_rows,
    forget,
    nearest,
    open_vectors,
    scores_of,
    search_by_products,
    write_vectors,
)

EXACT_BELOW = 20_000
"""Rows that a mask leaves, below which they are searched exactly: cheaper than a search that avoids the rest."""
_GROUPS_KEPT = 64

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Effort:
    """How hard a structure is searched.

    Attributes:
        probe: lists of an inverted file that are read, or candidates that a walk through a graph keeps.
        rerank: candidates per answer that are put in order by their true scores.
    """

    probe: int = 1
    rerank: int = 1


FLAT = "Flat"
"""The type of a segment without a structure, in FAISS's language."""


@dataclass(frozen=True)
class Part:
    """Vectors and rows to be written.

    Attributes:
        vectors: [n, D], mapped.
        rows: n rows.
        keep: which of them, ascending; None takes all.
    """

    vectors: NDArray[Any]
    rows: pa.Table
    keep: Ints | None = None

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The kept vectors, some at a time."""
        step = block_rows(self.vectors.shape[1])
        n = len(self.vectors) if self.keep is None else len(self.keep)
        for start in range(0, n, step):
            places = slice(start, start + step) if self.keep is None else self.keep[start : start + step]
            yield np.asarray(self.vectors[places])
            forget(self.vectors)

    def table(self) -> pa.Table:
        """The kept rows."""
        return self.rows if self.keep is None else self.rows.take(pa.array(self.keep))


def write_rows(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write tables one after the other; returns their rows."""
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(metadata.fitted(table, schema), row_group_size=metadata.GROUP)
            count += len(table)
    return count


def write_parts(folder: Path, parts: Sequence[Part], dim: int) -> int:
    """Write the vectors and rows of a segment; returns n.

    Raises:
        ConfigError: vectors that cannot be searched, or of another dimension.
    """
    n = write_vectors(folder / VECTORS, (block for part in parts for block in part.blocks()), dim)
    schema = metadata.unified([metadata.COLUMNS, *(part.rows.schema for part in parts)])
    written = write_rows(folder / ROWS, (part.table() for part in parts), schema)
    assert written == n, f"{written} rows of {n} vectors"
    return n


class Segment:
    """A segment, opened."""

    def __init__(self, folder: Path, entry: Mapping[str, Any], dim: int) -> None:
        """Open the files that the manifest's entry names.

        Raises:
            FileNotFoundError: a file is not there.
            ConfigError: files that do not belong together, or that cannot be read.
        """
        self.folder, self.entry = folder, entry
        self.type, self.effort = str(entry["type"]), Effort(**entry["effort"])
        self.vectors: Floats = open_vectors(folder / VECTORS)
        try:
            self.columns = metadata.read_schema(folder / ROWS)
            self._file = pq.ParquetFile(folder / ROWS, memory_map=True)
            self.structure = open_structure(folder / STRUCTURE) if STRUCTURE in entry["files"] else None
        except (RuntimeError, pa.ArrowException) as error:
            raise ConfigError(f"{folder} cannot be read: {str(error)[:200]}; build the index again") from None
        deleted = [name for name in entry["files"] if name.startswith("deleted")]
        self.deleted: Ints = _read_deleted(folder / deleted[0], len(self)) if deleted else np.zeros(0, np.int64)
        facts = {(len(self), dim), (entry["rows"], dim), (self._file.metadata.num_rows, dim), self.vectors.shape}
        if self.structure is not None:
            facts.add((self.structure.ntotal, self.structure.d))
        if len(facts) > 1 or (self.structure is None) != (self.type == FLAT):
            raise ConfigError(f"{folder}: vectors, rows and manifest do not belong together; build the index again")
        self._starts = np.cumsum(
            [0, *(self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups))]
        )
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def live(self) -> Mask | None:
        """[n] which rows are not deleted; None where none is."""
        if not len(self.deleted):
            return None
        mask = np.ones(len(self), np.bool_)
        mask[self.deleted] = False
        return mask

    @cached_property
    def keys(self) -> pa.ChunkedArray:
        """[n] the keys."""
        return self.column("key")

    def column(self, name: str) -> pa.ChunkedArray:
        """[n] values of a column; null where the segment has no such one."""
        if name not in self.columns.names:
            return pa.chunked_array([pa.nulls(len(self))])
        return self._file.read([name]).column(0)

    def find(self, keys: pa.Array | pa.ChunkedArray) -> Ints:
        """Live rows that have one of the keys, ascending."""
        rows = np.flatnonzero(pc.call_function("is_in", [self.keys], pc.SetLookupOptions(keys)).to_numpy())
        return rows if self.live is None else rows[self.live[rows]]

    def rows(self) -> pa.Table:
        """All rows."""
        return self._file.read()

    def row(self, number: int) -> dict[str, Any]:
        """One row."""
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        if group not in self._groups:
            if len(self._groups) >= _GROUPS_KEPT:
                self._groups.popitem(last=False)
            self._groups[group] = self._file.read_row_group(group)
        self._groups.move_to_end(group)
        return self._groups[group].slice(number - int(self._starts[group]), 1).to_pylist()[0]

    def part(self) -> Part:
        """What is not deleted, to be written again."""
        return Part(self.vectors, self.rows(), None if self.live is None else np.flatnonzero(self.live))

    def search(
        self, queries: Floats, k: int, allowed: Mask | None = None, effort: Effort | None = None
    ) -> tuple[Floats, Ints]:
        """Scores and rows of the k best among the live ones that are allowed, [q, k]; -1 where there are fewer."""
        mask = self.live if allowed is None else allowed if self.live is None else allowed & self.live
        left = len(self) if mask is None else int(np.count_nonzero(mask))
        if self.structure is None or (mask is not None and left < EXACT_BELOW):
            return nearest(queries, k, self._blocks(mask))
        effort = effort or self.effort
        wanted = min(left, k * effort.rerank)
        # Of the rows that are visited, only a share is allowed: visit as many more.
        probe = min(len(self), -(-effort.probe * len(self) // max(1, left)))
        parameters = search_parameters(self.structure, probe, wanted, mask)
        search_by_products()
        scores, found = self.structure.search(queries, max(1, wanted), params=parameters)
        found[(found < 0) | (found >= len(self))] = -1
        if not has_true_scores(self.structure):
            scores = scores_of(queries, self.vectors, found)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            scores, found = np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)
        scores, found = _padded(scores[:, :k], found[:, :k], k)
        short = np.flatnonzero((found[:, : min(k, left)] < 0).any(1))
        if len(short):  # the structure missed rows that there are
            scores[short], found[short] = nearest(queries[short], k, self._blocks(mask))
        return scores, found

    def _blocks(self, mask: Mask | None) -> Iterator[tuple[Ints | int, Floats]]:
        step = block_rows(self.vectors.shape[1])
        if mask is None:
            for start in range(0, len(self), step):
                yield start, self.vectors[start : start + step]
        else:
            numbers = np.flatnonzero(mask)
            for start in range(0, len(numbers), step):
                some = numbers[start : start + step]
                yield some, self.vectors[some]


def entry_of(folder: Path, rows: int, *, kind: str = FLAT, effort: Effort | None = None) -> dict[str, Any]:
    """The manifest's entry for a segment that was just written; its files are hashed on commit."""
    names = [VECTORS, ROWS, *([] if kind == FLAT else [STRUCTURE])]
    return {
        "folder": folder.name,
        "rows": rows,
        "type": kind,
        "effort": asdict(effort or Effort()),
        "files": dict[str, Any].fromkeys(names),
    }


def write_deleted(folder: Path, generation: int, numbers: Ints) -> str:
    """Write the numbers of the deleted rows; returns the file's name."""
    name = f"deleted-{generation:06d}.npy"
    np.save(folder / name, np.unique(numbers).astype("<i8"), allow_pickle=False)
    return name


def _read_deleted(path: Path, n: int) -> Ints:
    try:
        numbers = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({str(error)[:200]}); build the index again") from None
    if numbers.dtype != np.int64 or numbers.ndim != 1 or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < n):
        raise ConfigError(f"{path} names rows that the segment does not have; build the index again")
    return numbers


def open_structure(path: Path) -> Any:
    """A FAISS file, mapped into memory where its type allows.

    Raises:
        FileNotFoundError: it is not there.
        RuntimeError: FAISS cannot read it.
        ConfigError: it scores by something else than the inner product.
    """
    import faiss

    # A crafted file cannot make FAISS allocate more than what lies on disk.
    limit = faiss.get_deserialization_vector_byte_limit()
    faiss.set_deserialization_vector_byte_limit(path.stat().st_size)
    try:
        structure = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    finally:
        faiss.set_deserialization_vector_byte_limit(limit)
    if structure.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ConfigError(f"{path} does not score by the inner product; build the index again")
    return structure


def has_true_scores(structure: Any) -> bool:
    """Whether a structure holds the vectors as they are."""
    import faiss

    return isinstance(structure, (faiss.IndexHNSWFlat, faiss.IndexIVFFlat))


def search_parameters(structure: Any, probe: int, candidates: int, mask: Mask | None = None) -> Any:
    """FAISS's parameters for one search."""
    faiss: Any = import_module("faiss")  # its own stubs know neither these classes nor their fields
    chosen: dict[str, Any] = {}
    if mask is not None:
        chosen["sel"] = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
    if isinstance(structure, faiss.IndexPreTransform):
        inner = search_parameters(faiss.downcast_index(structure.index), probe, candidates, mask)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(structure, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(probe, structure.nlist), **chosen)
    if isinstance(structure, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=max(probe, candidates), **chosen)
    return faiss.SearchParameters(**chosen)


def _padded(scores: Floats, found: Ints, k: int) -> tuple[Floats, Ints]:
    """[q, k], with -1 where there is nothing."""
    lacking = k - scores.shape[1]
    scores = np.pad(scores, ((0, 0), (0, lacking)), constant_values=-np.inf)
    return scores, np.pad(found, ((0, 0), (0, lacking)), constant_values=-1)
