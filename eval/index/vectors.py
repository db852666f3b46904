"""Vectors on the disk: written in blocks, read in blocks, searched exactly.

A file is read by offset, not mapped, where all of it passes through: mapped pages would count as ours. Letters: n
vectors, D dimensions, q queries, k answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from mmap import MADV_DONTNEED, mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mmcontrast.config import ConfigError

BLOCK_BYTES = 32 << 20
_OFF_UNIT = 1e-5
_PRODUCTS_FROM = 4096  # numbers in a batch of queries

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def write_vectors(path: Path, blocks: Iterable[Floats], dim: int) -> int:
    """Write blocks [b, D] as one `.npy` of float32; returns n.

    Vectors that are off unit length (as those stored in float16 are) are normalised.

    Raises:
        ConfigError: another dimension, or a vector that is zero or not finite.
    """
    count = 0
    with open(path, "wb") as file:
        _write_header(file, 0, dim)
        for block in blocks:
            if block.ndim != 2 or block.shape[1] != dim:
                raise ConfigError(f"vectors are {block.shape[-1]}-dimensional, the model's space has {dim} dimensions")
            unit(block, first=count).tofile(file)
            count += len(block)
        file.seek(0)
        _write_header(file, count, dim)
    return count


def _write_header(file: Any, count: int, dim: int) -> None:
    # numpy pads a header such that a longer first number fits in its place.
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, dim)})


def unit(block: NDArray[Any], *, first: int = 0) -> Floats:
    """The block as float32 of unit length; rows that have it already keep their bits.

    Raises:
        ConfigError: a vector that is zero or not finite; `first` is the number of the first one.
    """
    block = np.ascontiguousarray(block, np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
    if not (np.isfinite(length).all() and length.all()):
        row = first + int(np.flatnonzero(~np.isfinite(length) | (length == 0))[0])
        raise ConfigError(f"vector {row} is zero or not finite; a model that gives such ones cannot be searched with")
    off = np.abs(length - 1) > _OFF_UNIT
    if off.any():
        block = block.copy()
        block[off] /= length[off, None].astype(np.float32)
    return block


def open_vectors(path: Path, *, dtypes: tuple[str, ...] = ("<f4",)) -> NDArray[Any]:
    """Map a `.npy` of vectors into memory, [n, D]; nothing is unpickled.

    Raises:
        ConfigError: no such file, or of another shape or type.
    """
    try:
        with open(path, "rb") as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            shape, by_column, dtype = read(file)
            start, size = file.tell(), path.stat().st_size
        if dtype.str not in dtypes or by_column or len(shape) != 2 or shape[1] < 1:
            raise ValueError(f"it has {dtype.str} {shape}")
        if size - start != shape[0] * shape[1] * dtype.itemsize:
            raise ValueError("it is cut off")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ConfigError(f"{path} is no .npy of vectors ({str(error)[:200]})") from None
    if not shape[0]:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", start, shape)


def forget(vectors: NDArray[Any]) -> None:
    """Give the pages of mapped vectors back: those that were read would count as ours until the map is closed."""
    if isinstance(vectors.base, mmap):
        vectors.base.madvise(MADV_DONTNEED)


def read_blocks(path: Path) -> Iterator[tuple[int, Floats]]:
    """(number of the first vector, block [b, D]) of a file that `write_vectors` wrote."""
    vectors = open_vectors(path)
    (n, dim), start = vectors.shape, path.stat().st_size - vectors.nbytes
    del vectors
    step = block_rows(dim)
    with open(path, "rb") as file:
        file.seek(start)
        for first in range(0, n, step):
            rows = min(step, n - first)
            yield first, np.fromfile(file, np.float32, rows * dim).reshape(rows, dim)


def block_rows(dim: int) -> int:
    """Vectors of a block."""
    return max(1, BLOCK_BYTES // (4 * dim))


def search_by_products() -> None:
    """Have FAISS compare batches of some queries by matrix products, lists' centres as well as vectors.

    Its own setting waits for 128 000 numbers, which are 250 queries of 512 dimensions; batches of 10 to 100 took 3 to
    13 times as long.
    """
    faiss: Any = import_module("faiss")  # its own stubs do not know the variable
    faiss.cvar.distance_compute_blas_threshold = _PRODUCTS_FROM


def nearest(queries: Floats, k: int, blocks: Iterable[tuple[Ints | int, Floats]]) -> tuple[Floats, Ints]:
    """Exact search: scores and numbers of the k vectors with the largest inner product, [q, k] each, best first.

    A block comes with the number of its first vector, or with that of each. Where there are fewer than k vectors, what
    is missing is -1.
    """
    import faiss

    search_by_products()
    heap = faiss.ResultHeap(len(queries), k, keep_max=True)
    for numbers, block in blocks:
        if len(block):
            scores, found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, found + numbers if isinstance(numbers, int) else numbers[found])
    heap.finalize()
    return heap.D, heap.I


def scores_of(queries: Floats, vectors: Floats, numbers: Ints) -> Floats:
    """Inner products of each query with the vectors of the numbers, [q, k]; -inf where a number is -1."""
    faiss: Any = import_module("faiss")  # its own stubs do not know the function
    numbers = np.ascontiguousarray(numbers)
    assert not len(numbers) or (numbers.min() >= -1 and numbers.max() < len(vectors))  # FAISS would read beyond
    found = np.empty(numbers.shape, np.float32)
    pointers = [faiss.swig_ptr(a) for a in (found, queries, vectors, numbers)]
    faiss.fvec_inner_products_by_idx(*pointers, queries.shape[1], *numbers.shape)
    return found
