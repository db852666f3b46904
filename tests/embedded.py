"""Embeddings of our own, as if a model had made them of samples with these metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.sources import Files, Record


def embedded(
    z: Mapping[str, Any], meta: Sequence[Mapping[str, Any]], *, name: str = "test", classes: Sequence[str] = ()
) -> Embedded:
    """One item of each modality per sample; rows of z are made unit norm."""
    keys = [f"{name}-{i}" for i in range(len(meta))]
    vectors = {
        m: torch.nn.functional.normalize(torch.tensor(np.asarray(v, dtype=np.float32)), dim=1) for m, v in z.items()
    }
    return Embedded(
        z=vectors,
        rows={m: torch.arange(len(meta)) for m in z},
        keys=keys,
        positions=torch.arange(len(meta)),
        meta=meta,
        skipped=(),
        fingerprint=name,
        source=Files(Path(), [Record(key) for key in keys], classes),
        kinds={m: m for m in z},
    )


def clusters(
    count: int, *, seed: int, classes: tuple[str, ...] = ("ant", "bee", "cat", "dog", "eel", "fox"), noise: float = 1.0
) -> tuple[NDArray[Any], list[str]]:
    """Points [count, 8] around a centre for each class, and the classes; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(len(classes), 8))
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, len(classes), count)
    return centres[numbers] + noise * rng.normal(size=(count, 8)), [classes[k] for k in numbers]
