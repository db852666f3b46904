"""Vectors on the disk -> a FAISS structure: trained on a sample, filled block by block.

Beside the structure itself, a block of vectors and the sample are all that is held. Letters: n vectors, D dimensions.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.choice import training_rows
from mmcontrast.eval.index.store import STRUCTURE, VECTORS
from mmcontrast.eval.index.vectors import Floats, open_vectors, read_blocks

_ROTATION_ITERATIONS, _ROTATION_ROWS = 20, 16_384


def write_structure(folder: Path, factory: str, *, progress: bool = False) -> None:
    """Build what searches the vectors of a segment, and write it beside them.

    Raises:
        ConfigError: FAISS does not know the structure, or cannot build it of these vectors.
    """
    import faiss
    from tqdm import tqdm

    vectors = folder / VECTORS
    n, dim = open_vectors(vectors).shape
    try:
        structure: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        codes = _fit_rotation(structure)  # held until the training is over
        if not structure.is_trained:
            rows = min(n, training_rows(structure))
            with tqdm(total=1, desc=f"train {factory} on {rows}", disable=not progress, leave=False):
                structure.train(_sample(vectors, n, rows))
            del codes
        if isinstance(structure, faiss.IndexHNSW):
            structure.hnsw.efConstruction = 100
        with tqdm(total=n, desc=f"fill {factory}", unit="vector", unit_scale=True, disable=not progress) as bar:
            for _, block in read_blocks(vectors):
                structure.add(block)
                bar.update(len(block))
        faiss.write_index(structure, str(folder / STRUCTURE))
    except RuntimeError as error:
        reason = str(error).rpartition("Error: ")[2].splitlines()[0][:200]
        raise ConfigError(f"FAISS cannot build {factory!r} of {n} vectors of {dim} dimensions: {reason}") from None


def _sample(path: Path, n: int, rows: int) -> Floats:
    """Rows drawn without replacement, in their order; the same ones each time."""
    chosen = np.sort(np.random.default_rng(0).choice(n, rows, replace=False))
    sample = np.empty((rows, open_vectors(path).shape[1]), np.float32)
    for first, block in read_blocks(path):
        start, stop = np.searchsorted(chosen, [first, first + len(block)])
        sample[start:stop] = block[chosen[start:stop] - first]
    return sample


def _fit_rotation(structure: Any) -> Any:
    """Have an OPQ rotation trained for the codes that follow it; by itself it trains for 8 bits, for hours."""
    faiss: Any = import_module("faiss")
    if not isinstance(structure, faiss.IndexPreTransform):
        return None
    rotation, inner = faiss.downcast_VectorTransform(structure.chain.at(0)), faiss.downcast_index(structure.index)
    if not isinstance(rotation, faiss.OPQMatrix) or not hasattr(inner, "pq"):
        return None
    codes = faiss.ProductQuantizer(rotation.d_out, rotation.M, inner.pq.nbits)
    rotation.pq, rotation.niter, rotation.max_train_points = codes, _ROTATION_ITERATIONS, _ROTATION_ROWS
    return codes
