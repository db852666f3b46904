"""How embeddings lie on the sphere: how even, how wide, how far apart. Numbers only, without a model.

Letters: n rows, D dimensions.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor


def spread(a: Tensor, b: Tensor, t: float = 2.0, *, chunk: int = 1024) -> tuple[float, float]:
    """Log mean e^{-t |a_i - b_j|^2} and mean cosine over i != j, of unit rows [n, D]; holds [chunk, n] scores at most.

    Of a modality with itself the first is its uniformity (Wang and Isola 2020, arXiv:2005.10242, eq. 4).
    """
    n = len(a)
    powers, cosines = 0.0, 0.0
    for start in range(0, n, chunk):
        scores = a[start : start + chunk] @ b.T
        own = torch.arange(len(scores), device=scores.device)
        cosines += float(scores.sum() - scores[own, own + start].sum())
        scores = (t * (2 * scores - 2)).exp()
        powers += float(scores.sum() - scores[own, own + start].sum())
    pairs = n * (n - 1)
    # Points on opposite sides at a large t: the mean may be below the smallest number.
    return math.log(max(powers / pairs, sys.float_info.min)), cosines / pairs


def centroid_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|: the modality gap (Liang et al. 2022, arXiv:2203.02053), 0 without one, at most 2."""
    return float((a.mean(0) - b.mean(0)).norm())


def effective_rank(z: Tensor) -> float:
    """e^entropy of the normalised singular values of the centred rows (Roy and Vetterli 2007), 1 to min(n - 1, D)."""
    values = torch.linalg.svdvals(z - z.mean(0))
    tiny = torch.finfo(z.dtype).tiny
    p = values / values.sum().clamp(min=tiny)
    return float(torch.exp(-(p * p.clamp(min=tiny).log()).sum()))
