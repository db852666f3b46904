"""What the index benchmark builds and searches with: ours, plain FAISS flat, and the structure that autofaiss picks.

autofaiss 2.18 asks for numpy below 2, so it is not installed beside us. What it does is decided by its index key, and
`autofaiss_key` follows the rules of its public source (`get_optimal_index_keys_v2`), which plain FAISS then builds as
autofaiss would: a training sample of 100 vectors per list, vectors added in blocks. Letters: n vectors, D dimensions.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from math import floor, log2, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.counters import peak_resident_mb
from benchmarks.index_data import Clusters, Floats
from mmcontrast.eval.index.build import Asked, Queries, write_base
from mmcontrast.eval.index.rows import table_of
from mmcontrast.eval.index.segment import Effort, Part, Segment
from mmcontrast.eval.index.store import Update, read_manifest
from mmcontrast.eval.index.vectors import Ints, open_vectors, read_blocks, write_vectors

TOP = 10
_TRAINED = 100  # vectors per list that autofaiss trains on
_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

faiss: Any = import_module("faiss")  # its own stubs know few of its names


@dataclass(frozen=True)
class Data:
    """Vectors in partitions, as an embedding run leaves them, and queries of both kinds to tune by and to measure by.

    Attributes:
        folder: that holds them.
    """

    folder: Path

    @classmethod
    def draw(cls, folder: Path, n: int, dim: int, queries: int) -> Data:
        """Draw n vectors and the queries, and write them."""
        clusters = Clusters(dim)
        for number, block in enumerate(clusters.vectors(n)):
            write_vectors(folder / f"part-{number:06d}.npy", [block], dim)
        for kind in (False, True):
            for stream, use in ((1, "tune"), (2, "measure")):
                drawn = clusters.vectors(queries, stream=stream, other_modality=kind)
                write_vectors(folder / f"{use}-{'across' if kind else 'within'}.npy", drawn, dim)
        return cls(folder)

    def queries(self, use: str, kind: str) -> Floats:
        """[q, D] to "tune" or to "measure" with: "within" the modality of the vectors, or from "across"."""
        return np.array(open_vectors(self.folder / f"{use}-{kind}.npy"))

    @property
    def files(self) -> Sequence[Path]:
        """Of the vectors, in order."""
        return sorted(self.folder.glob("part-*.npy"))

    def blocks(self) -> Iterator[Floats]:
        """All vectors, some at a time, read and not mapped."""
        for file in self.files:
            yield from (block for _, block in read_blocks(file))

    def parts(self) -> list[Part]:
        """As a build has them."""
        parts: list[Part] = []
        for number, file in enumerate(self.files):
            vectors = open_vectors(file)
            n = len(vectors)
            keys = [f"{number:03d}-{i:06d}" for i in range(n)]
            columns = {"key": keys, "shard": [file.name] * n, "source": [0] * n, "position": [*range(n)]}
            parts.append(Part(vectors, table_of(columns | {"text": [None] * n}, [{}] * n)))
        return parts


@dataclass(frozen=True)
class Building:
    """What building took, in a fresh process.

    Attributes:
        key: the structure, as FAISS writes it.
        seconds: until the index is on the disk; ours is then tuned and measured as well.
        peak_mb: resident memory above that of the process with its libraries loaded.
        file_mb: the structure.
        why: ours says why.
    """

    key: str
    seconds: float
    peak_mb: float
    file_mb: float
    why: str = ""


def build_ours(data: Data, out: Path, asked: Asked, threads: int) -> Building:
    """What `mmcontrast index build` does after embedding."""
    faiss.omp_set_num_threads(threads)
    parts = data.parts()
    queries = Queries(data.queries("tune", "across"), "queries of the other modality")
    dim = queries.z.shape[1]
    about = {
        "model": "none",
        "model_hash": "0" * 16,
        "modality": "image",
        "preprocessing": {},
        "dim": dim,
        "metric": "inner product",
        "normalisation": "unit length",
        "joint": "sum",
        "sources": [],
        "skipped": [],
        "skipped_count": 0,
    }

    def work() -> None:
        with Update(out, create=True) as update:
            write_base(update, parts, about, asked, queries)

    start = time.perf_counter()
    peak_mb = peak_resident_mb(work)
    seconds = time.perf_counter() - start
    manifest = read_manifest(out)
    return Building(manifest["type"], seconds, peak_mb, manifest["quality"]["memory_mb"], manifest["why"])


def build_plain(data: Data, out: Path, key: str, threads: int) -> Building:
    """An index by its key, as autofaiss has FAISS build it; its search is tuned afterwards, by the recall."""
    faiss.omp_set_num_threads(threads)
    n, dim = sum(len(open_vectors(file)) for file in data.files), open_vectors(data.files[0]).shape[1]

    def work() -> None:
        index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = min(n, _TRAINED * int(re.findall(r"IVF(\d+)", key)[0]))
            share = rows / n
            index.train(np.concatenate([block[: round(share * len(block))] for block in data.blocks()]))
        for block in data.blocks():
            index.add(block)
        faiss.write_index(index, str(out))

    start = time.perf_counter()
    peak_mb = peak_resident_mb(work)
    return Building(key, time.perf_counter() - start, peak_mb, out.stat().st_size / 1e6)


def autofaiss_key(n: int, dim: int, memory: int) -> str:
    """The first of the keys that autofaiss proposes for an index that may take so many bytes.

    Flat below 1000 vectors, a graph of 15 neighbours below 10 000; then a graph if at least 8 links per vector fit,
    with at most 32; an inverted file of whole vectors below a million, if that fits; and else a rotation and a product
    quantiser with the most bytes per vector that fit.

    Raises:
        ValueError: autofaiss proposes nothing for so little memory.
    """
    if n < 1000:
        return "Flat"
    if n < 10_000:
        return "HNSW15"
    links = floor((memory / (4 * n) - dim) / 2)
    if links >= 8:
        return f"HNSW{min(links, 32)}"
    lists = 1 << round(log2(4 * sqrt(n))) if n < 1_000_000 else 16_384 if n < 10_000_000 else 65_536
    if n < 1_000_000 and 4 * dim * (n + lists) <= memory:
        return f"IVF{lists},Flat"
    coarse = f"IVF{lists}" if lists < 1000 else f"IVF{lists}_HNSW32"
    for codes in (256, 128, 64, 48, 32, 24, 16, 8, 4):
        if codes < dim and 4 * dim / (codes + 8) >= 4 * n * dim / memory:
            return f"OPQ{codes}_{(min(dim // codes, 6) + 1) * codes},{coarse},PQ{codes}x8"
    raise ValueError(f"autofaiss proposes nothing for {n} vectors in {memory} bytes")


Search = Callable[[Floats], Ints]
"""Queries [q, D] -> the numbers of the `TOP` nearest, [q, TOP]."""


def ours(folder: Path) -> dict[str, Search]:
    """Searches of ours by effort, from the least on; the one that the build chose is called "chosen"."""
    manifest = read_manifest(folder)
    (entry,) = manifest["segments"]
    segment = Segment(folder / entry["folder"], entry, manifest["dim"])

    def by(effort: Effort) -> Search:
        return lambda z: segment.search(z, TOP, effort=effort)[1]

    efforts = {f"probe {p}": replace(segment.effort, probe=p) for p in _PROBES}
    return {"chosen": by(segment.effort)} | {name: by(effort) for name, effort in efforts.items()}


def plain(file: Path) -> dict[str, Search]:
    """Searches of a plain index by its one setting, as autofaiss sets it, from the least on."""
    index = faiss.read_index(str(file))

    def graph(width: int) -> Search:
        given = faiss.SearchParametersHNSW(efSearch=width)
        return lambda z: index.search(z, TOP, params=given)[1]

    def lists(probes: int) -> Search:
        inner = faiss.downcast_index(faiss.downcast_index(index.index) if _is_rotated(index) else index)
        graph = isinstance(faiss.downcast_index(inner.quantizer), faiss.IndexHNSW)
        coarse = faiss.SearchParametersHNSW(efSearch=2 * probes) if graph else None
        given = faiss.SearchParametersIVF(nprobe=probes, quantizer_params=coarse)
        if _is_rotated(index):
            given = faiss.SearchParametersPreTransform(index_params=given)
        return lambda z: index.search(z, TOP, params=given)[1]

    if isinstance(index, faiss.IndexHNSW):
        return {f"efSearch {width}": graph(width) for width in (16, 32, 64, 128, 256, 512)}
    return {f"nprobe {p}": lists(p) for p in (16, 32, 64, 128, 256, 512)}


def _is_rotated(index: Any) -> bool:
    return isinstance(index, faiss.IndexPreTransform)


def flat(data: Data) -> Search:
    """Plain FAISS, exact: all vectors in memory."""
    index = faiss.IndexFlatIP(open_vectors(data.files[0]).shape[1])
    for block in data.blocks():
        index.add(block)
    return lambda z: index.search(z, TOP)[1]


def recall(found: Ints, exact: Ints) -> float:
    """Share of the exact answers that were found, mean over queries; [q, TOP] both."""
    return float(np.mean([len({*a} & {*b}) / len(b) for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))
