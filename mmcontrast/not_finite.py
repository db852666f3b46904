"""A loss or gradient that is not finite: what was in the batch, for the person who has to find out why."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast.batch import Batch, Embeddings

FILE = "not_finite.jsonl"


def describe(batch: Batch, z: Embeddings, rank: int) -> dict[str, Any]:
    """The samples of a rank's batch, and those that a tower makes not finite; z is modality -> [n, D]."""
    bad = {m: torch.nonzero(~torch.isfinite(t).all(1)).flatten().tolist() for m, t in z.items()}
    return {
        "rank": rank,
        "keys": list(batch.keys),
        "not_finite": {m: [batch.keys[row] for row in rows] for m, rows in bad.items() if rows},
        "skipped": [list(entry) for entry in batch.skipped],
    }


def write(folder: Path, step: int, loss: Tensor, norm: Tensor, ranks: Sequence[Mapping[str, Any]]) -> str:
    """Append all of it to `not_finite.jsonl`; returns a sentence for the person."""
    line = {"step": step, "time": time.time(), "loss": str(float(loss)), "grad_norm": str(float(norm)), "ranks": ranks}
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    culprits = [f"{m} of {key!r}" for r in ranks for m, keys in r["not_finite"].items() for key in keys]
    towers = f"; not finite: {', '.join(culprits[:4])}{' …' if len(culprits) > 4 else ''}" if culprits else ""
    return (
        f"step {step}: loss {float(loss)}, gradient norm {float(norm)}{towers}; the weights are as before it, the "
        f"samples of the batch are in {folder / FILE}"
    )
