"""What a report shows of embeddings: some queries with their answers, and the two modalities in one plane.

Plain values that JSON can hold, and bounded: which samples, not what is in them. Samples are read again when they are
drawn.

Letters: n queries, m candidates, p pairs, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.ranks import Ranks
from mmcontrast.randomness import fold_seed

QUERIES = 8
"""Queries at random, and as many of the worst ranks."""
ANSWERS = 5
"""First answers of a query."""
_FITTED = 2000  # pairs that the plane is fitted to
_DRAWN = 300  # pairs that are drawn
_EDGES = (1, 2, 6, 11, 51, 101, 501, 1001, 5001, 10_001, 100_001)  # of the counted ranks


def items_of(data: Embedded, modality: str, places: Tensor) -> Tensor:
    """[n, 2] of n places in z[modality]: position of the sample, and which of its values of the modality."""
    rows = data.rows[modality]
    first = torch.searchsorted(rows, rows[places])
    return torch.stack([data.positions[rows[places]], places - first], 1)


def gallery(
    zx: Tensor, zy: Tensor, right: Tensor, right_of: Tensor, ranks: Ranks, x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Queries of one direction with their first answers.

    Args:
        zx: [n, D] queries.
        zy: [m, D] candidates.
        right: [n] labels.
        right_of: [m] those of the candidates; equal ones are right.
        ranks: of the queries.
        x: [n, 2] items, as of `items_of`.
        y: [m, 2].

    Returns:
        `ranks`, [first, last, queries] of ranks of the best right answer; and `random` and `worst`, each a list of
        queries: `item`, its `rank`, the best right `answer` and the `first` answers, each with `item`, `score` and
        whether it is `right`.
    """
    best = ranks.best.cpu()
    generator = torch.Generator().manual_seed(fold_seed("gallery", len(zx)) % 2**63)
    some = torch.randperm(len(zx), generator=generator)[:QUERIES].sort().values
    worst = best.argsort(descending=True, stable=True)[:QUERIES]
    worst = worst[best[worst] > 0]

    def query(i: int) -> dict[str, Any]:
        scores = torch.nan_to_num(zy @ zx[i], nan=-2.0, posinf=-2.0, neginf=-2.0)
        fits = right_of == right[i]
        found = scores.topk(min(ANSWERS, len(scores))).indices.tolist()
        answer = int(torch.where(fits, scores, -torch.inf).argmax()) if bool(fits.any()) else None

        def said(j: int) -> dict[str, Any]:
            return {"item": y[j].tolist(), "score": round(float(scores[j]), 4), "right": bool(fits[j])}

        return {
            "item": x[i].tolist(),
            "rank": int(best[i]) + 1,
            "answer": None if answer is None else said(answer),
            "first": [said(j) for j in found],
        }

    return {
        "ranks": _counted(best.numpy() + 1, ranks.candidates),
        "random": [query(i) for i in some.tolist()],
        "worst": [query(i) for i in worst.tolist()],
    }


def _counted(ranks: np.ndarray[Any, Any], most: int) -> list[list[int]]:
    """How many ranks lie within 1, 2 to 5, 6 to 10 and so on."""
    edges = [e for e in _EDGES if e <= most] + [most + 1]
    counts, _ = np.histogram(ranks, bins=edges)
    return [[a, b - 1, int(n)] for a, b, n in zip(edges, edges[1:], counts.tolist(), strict=False)]


def plane(data: Embedded, x: str, y: str) -> dict[str, Any] | None:
    """Pairs in the plane of the two directions in which both modalities together vary most (PCA).

    Of samples with several values of a modality, the first.

    Returns:
        `items` and `at` of up to 300 pairs, one of each modality, and the `shares` of the variance that the two
        directions carry; None for fewer than three pairs or two dimensions, or where all lie in one point.
    """
    rows = data.having(x, y)
    places = [torch.searchsorted(data.rows[m], rows) for m in (x, y)]
    generator = torch.Generator().manual_seed(fold_seed("plane", len(rows)) % 2**63)
    chosen = torch.randperm(len(rows), generator=generator)[:_FITTED]
    zx, zy = (data.z[m][place[chosen]] for m, place in zip((x, y), places, strict=True))
    finite = zx.isfinite().all(1) & zy.isfinite().all(1)
    chosen, zx, zy = chosen[finite], zx[finite], zy[finite]
    if len(chosen) < 3 or zx.shape[1] < 2:
        return None
    both = torch.cat([zx, zy]).double().cpu().numpy()
    if not (np.ptp(both, axis=0) > 0).any():
        return None  # all in one point
    from sklearn.decomposition import PCA

    fitted = PCA(2, svd_solver="covariance_eigh").fit(both)
    n = min(_DRAWN, len(chosen))
    at = [np.round(fitted.transform(z[:n].double().cpu().numpy()), 4).tolist() for z in (zx, zy)]
    items = [items_of(data, m, place[chosen[:n]]).tolist() for m, place in zip((x, y), places, strict=True)]
    return {
        "items": [list(pair) for pair in zip(*items, strict=True)],
        "at": [list(pair) for pair in zip(*at, strict=True)],
        "shares": [round(float(s), 4) for s in fitted.explained_variance_ratio_],
    }
