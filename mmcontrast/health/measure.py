"""What is measured of a batch now and then, beside what every step tells: how it lies, what it holds, who is trained.

One small gather; all else is computed on rank 0, of its own rows alone. Between measurements a step costs nothing more.

Letters: n rows of a rank, N rows of the global batch, n_m rows that have modality m, T tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, Embeddings
from mmcontrast.geometry import centroid_distance, effective_rank, spread
from mmcontrast.objectives.base import Objective

ROWS = 512
"""Rows that geometry is measured on; its cost is bounded by [ROWS, ROWS] scores and one decomposition of [ROWS, D]."""


class Ranks(Protocol):
    """What the ranks have in common (`mmcontrast.sharding.World`)."""

    rank: int

    def gather(self, local: Tensor) -> Tensor:
        """[n, ...] of every rank, in rank order -> [N, ...]."""
        ...


@torch.no_grad()
def measure(
    z: Embeddings,
    present: Mapping[str, Tensor],
    batch: Batch,
    terms: Mapping[str, Objective],
    world: Ranks,
) -> dict[str, float]:
    """Numbers of one batch by name, on rank 0; every rank must call it and the others get none.

    - batch/rows/m: rows of the global batch that have modality m; batch/pairs/x-y: that have both.
    - batch/same_sample: share of the rows whose sample is there more than once; batch/same_text/m: share of the rows
      with a text whose text is.
    - chance/TERM: about the loss of embeddings that tell nothing apart (`Objective.chance`).
    - geometry/…, of at most `ROWS` rows of rank 0: `uniformity`, `cosine`, `effective_rank` and the most that this can
      be, `rank_limit`, of each modality; `alignment` and `centroid_distance` of each pair.

    Args:
        z: modality -> [n, D], unit norm.
        present: modality -> [n] bool.
        batch: the rows that they were made of.
        terms: name -> objective.
        world: the ranks that share the batch.
    """
    names = sorted(z)
    texts = [m for m in names if _is_text(batch.inputs.get(m))]
    columns = [batch.ids, *(present[m].long() for m in names)]
    # By name, not by what this rank's rows hold: all ranks must gather as many columns.
    columns += [_fingerprints(batch, m) if m in texts else torch.zeros_like(batch.ids) for m in names]
    table = world.gather(torch.stack(columns, 1)).cpu()
    if world.rank:
        return {}
    ids, has = table[:, 0], {m: table[:, 1 + i].bool() for i, m in enumerate(names)}
    counts = {m: int(mask.sum()) for m, mask in has.items()}
    found: dict[str, float] = {f"batch/rows/{m}": float(count) for m, count in counts.items()}
    found |= {f"batch/pairs/{x}-{y}": float((has[x] & has[y]).sum()) for x, y in combinations(names, 2)}
    found["batch/same_sample"] = _repeated(ids)
    for m in texts:
        found[f"batch/same_text/{m}"] = _repeated(table[has[m], 1 + len(names) + names.index(m)])
    for name, term in terms.items():
        chance = term.chance(counts)
        if chance is not None:
            found[f"chance/{name}"] = chance
    return found | _geometry(z, present)


def _geometry(z: Embeddings, present: Mapping[str, Tensor]) -> dict[str, float]:
    found: dict[str, float] = {}
    # A row that is not finite is told elsewhere, and no decomposition takes it.
    present = {m: present[m] & rows.isfinite().all(1) for m, rows in z.items()}
    for m, rows in z.items():
        having = rows[present[m]][:ROWS].float()
        if len(having) >= 2:
            found[f"geometry/uniformity/{m}"], found[f"geometry/cosine/{m}"] = spread(having, having)
            found[f"geometry/effective_rank/{m}"] = effective_rank(having)
            found[f"geometry/rank_limit/{m}"] = float(min(len(having) - 1, having.shape[1]))
    for x, y in combinations(sorted(z), 2):
        both = present[x] & present[y]
        a, b = z[x][both][:ROWS].float(), z[y][both][:ROWS].float()
        if len(a):
            found[f"geometry/alignment/{x}-{y}"] = float((a - b).square().sum(1).mean())
            found[f"geometry/centroid_distance/{x}-{y}"] = centroid_distance(a, b)
    return found


def gradient_norms(towers: Mapping[str, Iterable[nn.Parameter]]) -> dict[str, float]:
    """gradient/TOWER -> 2-norm over the parameters that train; every rank must call it, as sharded ones are summed."""
    found: dict[str, float] = {}
    for name, parameters in towers.items():
        trained = [p for p in parameters if p.requires_grad]
        if trained:
            norms = [torch.linalg.vector_norm(p.grad) for p in trained if p.grad is not None]
            full = [cast(Tensor, n.full_tensor()) if hasattr(n, "full_tensor") else n for n in cast(list[Any], norms)]
            found[f"gradient/{name}"] = float(torch.stack(full).square().sum().sqrt()) if full else 0.0
    return found


def _repeated(values: Tensor) -> float:
    """Share of the entries that are there more than once."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return float((counts[inverse] > 1).double().mean()) if len(values) else 0.0


def _tokens(x: Any) -> tuple[Tensor, Tensor | None] | None:
    """Token ids int64 [n_m, T] of a text tower's inputs, and the mask of what is no padding, where there is one."""
    parts = cast(Mapping[str, Tensor], x) if isinstance(x, Mapping) else {"ids": x}
    for name in ("ids", "input_ids"):
        ids = parts.get(name)
        if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim == 2:
            return ids, parts.get("attention_mask")
    return None


def _is_text(x: Any) -> bool:
    return x is not None and _tokens(x) is not None


def _fingerprints(batch: Batch, modality: str) -> Tensor:
    """[n] int64, equal where the token ids are (and, by a chance of 2^-64, elsewhere); 0 where there is no text."""
    found = torch.zeros_like(batch.ids)
    tokens = _tokens(batch.inputs[modality])
    assert tokens is not None
    ids, mask = tokens
    ids = ids if mask is None else (ids + 1) * mask
    # Places as odd factors, mixed so that exchanged words are another text; zeros at the end, of padding, add nothing.
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device) * _MIX
    hashed = ids * ((place ^ (place >> 29)) * _MIX | 1)
    hashed = (hashed ^ (hashed >> 32)) * _MIX
    return found.index_copy_(0, batch.rows[modality], hashed.sum(1))


_MIX = -7046029254386353131  # 2^64 divided by the golden ratio, as int64 (Knuth, TAOCP 3, 6.4)
