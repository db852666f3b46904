"""Which FAISS structure, by the number of vectors, the memory, the recall and the searches to come; and why.

Names are those of FAISS's `index_factory`, and any other that it knows can be given instead. Letters: n vectors, D
dimensions.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.segment import FLAT

FLAT_BELOW = 10_000
"""Vectors below which an exact search is so fast that nothing else pays."""
_TRAINING = 64  # vectors per list that its centre is trained on; FAISS warns below 39
_ITERATIONS = 10  # of the training
_CODES_TRAINING = 65_536
_MAX_LISTS = 65_536
_FLAT_LISTS = 8192  # more of them are themselves found by a graph
_NEIGHBOURS = 32  # M of HNSW, Malkov and Yashunin 2018, arXiv:1603.09320
_GRAPH_ABOVE = 0.99


@dataclass(frozen=True)
class Choice:
    """A structure.

    Attributes:
        factory: as FAISS writes it; `Flat` for none.
        memory: bytes that it takes in memory, beside the vectors, which stay on the disk. 0 for `Flat`.
        why: in a sentence or two.
    """

    factory: str
    memory: int
    why: str


def choose(
    n: int,
    dim: int,
    *,
    memory: int | None = None,
    recall: float = 0.95,
    searches: int | None = None,
    given: str | None = None,
) -> Choice:
    """The structure for n vectors.

    Flat for few vectors, and for few searches: building lists costs as much as many exact searches. Above, an inverted
    file with vectors of one byte per dimension if the memory allows it, and with a product quantiser if not; both rank
    their candidates by the true vectors, which are mapped from the disk. A graph is taken where recall close to 1 is
    asked for and the memory holds it.

    Args:
        n: vectors.
        dim: D.
        memory: bytes that the structure may take; by default half of this machine's.
        recall: recall@10 that is asked for.
        searches: searches that will come before the index is built anew; None means that there is no end of them.
        given: a structure that is wanted whatever the rest; `auto` or None chooses.

    Raises:
        ConfigError: a number that makes no sense, a structure that FAISS does not know, or one above the memory.
    """
    if not 0 < recall <= 1:
        raise ConfigError(f"recall is {recall}; ask for a share of the 10 nearest above 0, up to 1")
    if memory is not None and memory < 1:
        raise ConfigError(f"memory is {memory} bytes; give at least 1")
    budget = memory or _half_of_memory()
    if given not in (None, "auto"):
        size = size_of(given, n, dim)
        if memory is not None and size > memory:
            raise ConfigError(f"{given} takes about {_mb(size)} for {n} vectors, above the {_mb(memory)} given")
        return Choice(given, size, "as it was asked for")
    if n < FLAT_BELOW:
        return Choice(FLAT, 0, f"{n} vectors are fewer than {FLAT_BELOW}: an exact search is fast enough")
    lists = lists_of(n)
    worth = building_cost(n, lists)
    if searches is not None and searches < worth:
        return Choice(
            FLAT, 0, f"{searches} searches will come, and building lists costs as much as {worth} exact searches"
        )
    return _within(n, dim, lists, budget, recall)


def _within(n: int, dim: int, lists: int, budget: int, recall: float) -> Choice:
    """The first structure, from the most faithful on, that the budget holds."""
    coarse = f"IVF{lists}" if lists <= _FLAT_LISTS else f"IVF{lists}_HNSW32"
    candidates = [(f"{coarse},SQ8", "a byte per dimension; candidates are ranked by the vectors on the disk")]
    if recall > _GRAPH_ABOVE:
        candidates.insert(0, (f"HNSW{_NEIGHBOURS}", "a graph, which comes close to recall 1 in few steps"))
    for codes in _subquantizers(dim):
        what = f"{codes // 2} bytes per vector; candidates are ranked by the vectors on the disk"
        candidates.append((f"OPQ{codes},{coarse},PQ{codes}x4fs", what))
    too_large: list[str] = []
    for factory, what in candidates:
        size = size_of(factory, n, dim)
        if size <= budget:
            instead = f"; {' and '.join(too_large[-2:])} would take more" if too_large else ""
            return Choice(factory, size, f"{n} vectors of {dim} dimensions in {_mb(budget)}: {what}{instead}")
        too_large.append(f"{factory} ({_mb(size)})")
    return Choice(
        FLAT, 0, f"no structure for {n} vectors fits {_mb(budget)}: exact search over the vectors on the disk"
    )


def lists_of(n: int) -> int:
    """Lists of an inverted file: the power of two next to 4 √n, as FAISS's guidelines advise."""
    return min(_MAX_LISTS, 1 << round(math.log2(4 * math.sqrt(n))))


def building_cost(n: int, lists: int) -> int:
    """Exact searches that take as long as training and filling the lists: both are products with n vectors."""
    return lists + round(_ITERATIONS * min(1.0, _TRAINING * lists / n) * lists)


def size_of(factory: str, n: int, dim: int) -> int:
    """About how many bytes a structure takes, counted on an empty one.

    Raises:
        ConfigError: FAISS does not know the structure.
    """
    if factory == FLAT:
        return 0
    import faiss

    try:
        structure: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].splitlines()[0][:200]
        raise ConfigError(f"FAISS cannot make {factory!r} for {dim} dimensions: {reason}") from None
    total = 0
    if isinstance(structure, faiss.IndexPreTransform):
        total += 4 * dim * dim
        structure = faiss.downcast_index(structure.index)
    if isinstance(structure, faiss.IndexIVF):
        total += structure.nlist * 4 * dim + n * 8  # centres, and the number of each vector
    elif isinstance(structure, faiss.IndexHNSW):
        graph: Any = structure.hnsw
        links = graph.nb_neighbors(0)  # of the bottom level; half as many above, where a vector rarely is
        total += n * (4 * links + 12)
        structure = faiss.downcast_index(structure.storage)
    return total + n * int(structure.code_size)


def training_rows(structure: Any) -> int:
    """Vectors that a structure is trained on."""
    import faiss

    if isinstance(structure, faiss.IndexPreTransform):
        return max(_CODES_TRAINING, training_rows(faiss.downcast_index(structure.index)))
    return _TRAINING * structure.nlist if isinstance(structure, faiss.IndexIVF) else _CODES_TRAINING


def _subquantizers(dim: int) -> list[int]:
    """Numbers of 4-bit codes per vector that divide the dimensions, from the most on; FAISS wants even ones."""
    return [codes for codes in range(dim // 2, 1, -1) if dim % codes == 0 and codes % 2 == 0 and codes >= dim // 32]


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"
