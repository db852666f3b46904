"""The arms of the loss benchmark: ours, the peers, the matrix products alone, and the exact gradient.

Each function makes unit-norm float32 inputs from a fixed seed and returns the work to be measured: loss and gradients
of the embeddings and of the scale, as a mapping from modality to gradient. All arms of a comparison get the same
numbers. Peers get leaves that require gradients, normalised before; their gradients are dropped before each repetition.

Letters: N rows of the global batch, n rows per rank, d dimensions, B rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcontrast.batch import Embeddings
from mmcontrast.objectives import InfoNCE, SigLIP
from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.symile import Symile
from mmcontrast.sharding import value_and_grad

Gradients = Callable[[], Mapping[str, Tensor]]


class Arm(Protocol):
    """Makes inputs of n rows and d dimensions and returns the work on them."""

    def __call__(self, n: int, d: int) -> Gradients:
        """The work."""
        ...


BLOCK = 1024  # the trainer's own
SCALE = 1 / 0.07
"""CLIP's start."""
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


def pairs(n: int, d: int, cosine: float = 0.5) -> dict[str, Tensor]:
    """Random unit images and texts [n, d]; the cosine of matched pairs is about this, 1 / sqrt(d) more or less."""
    generator = torch.Generator().manual_seed(0)
    image = _unit(torch.randn(n, d, generator=generator))
    text = _unit(torch.randn(n, d, generator=generator))
    text = _unit(text.mul_(math.sqrt(1 - cosine**2)).add_(image, alpha=cosine))
    return {"image": image, "text": text}


def triples(n: int, d: int) -> dict[str, Tensor]:
    """Random unit rows [n, d] of three modalities."""
    generator = torch.Generator().manual_seed(0)
    return {m: _unit(torch.randn(n, d, generator=generator)) for m in ("image", "text", "audio")}


def _unit(x: Tensor) -> Tensor:
    return x.div_(x.norm(dim=1, keepdim=True))


def _ours(objective: Objective, z: Embeddings, first: int = 0, **options: Any) -> Gradients:
    n = len(next(iter(z.values())))
    present = {m: torch.ones(n, dtype=torch.bool) for m in z}
    ids = torch.arange(first, first + n)

    def work() -> Mapping[str, Tensor]:
        objective.zero_grad(set_to_none=True)
        return value_and_grad({"loss": objective}, z, present, ids, block=BLOCK, **options).gradients

    return work


def _peer(
    loss: Callable[[Embeddings, Sequence[nn.Parameter]], Tensor], z: Embeddings, *parameters: nn.Parameter
) -> Gradients:
    leaves = {m: t.requires_grad_() for m, t in z.items()}

    def work() -> Mapping[str, Tensor]:
        for leaf in (*leaves.values(), *parameters):
            leaf.grad = None
        loss(leaves, parameters).backward()
        return {m: leaf.grad for m, leaf in leaves.items() if leaf.grad is not None}

    return work


def _log(scale: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(scale)))


def clip_ours(
    n: int,
    d: int,
    *,
    scale: float = SCALE,
    cosine: float = 0.5,
    kept: bool = False,
    gradient_dtype: torch.dtype | None = None,
) -> Gradients:
    """InfoNCE: in two passes at O(B N) memory, or with a byte budget that keeps the score tiles (`kept`)."""
    objective = InfoNCE.Config(pairs=(("image", "text"),), scale=scale).build()
    budget = 4 * n * n if kept else 0
    return _ours(objective, pairs(n, d, cosine), keep_bytes=budget, gradient_dtype=gradient_dtype)


def clip_peer(n: int, d: int, *, scale: float = SCALE, cosine: float = 0.5) -> Gradients:
    """open_clip's ClipLoss."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return _peer(lambda z, p: loss(z["image"], z["text"], p[0].exp()), pairs(n, d, cosine), _log(scale))


def matmuls(n: int, d: int, *, scores: int, times: int = 1) -> Gradients:
    """The matrix products alone, in the same tiles, into memory that is there: the least that a loss can take.

    The scores, `scores` times, and the two gradients: 8 N^2 d FLOPs where the scores are computed twice, 6 where once.
    All of it `times` times, for losses with several score matrices.
    """
    z = pairs(n, d)
    image, text = z["image"], z["text"]
    out = {m: torch.zeros_like(t) for m, t in z.items()}
    tile = torch.zeros(min(BLOCK, n), n)

    def work() -> Mapping[str, Tensor]:
        for start in [*range(0, n, BLOCK)] * times:
            rows, to = image[start : start + BLOCK], out["image"][start : start + BLOCK]
            for _ in range(scores):
                torch.mm(rows, text.T, out=tile[: len(rows)])
            torch.mm(tile[: len(rows)], text, out=to)
            out["text"].addmm_(tile[: len(rows)].T, rows)
        return out

    return work


def clip_exact(n: int, d: int, *, scale: float, cosine: float) -> dict[str, Tensor]:
    """The gradient in float64, in closed form.

    1 - P_ii is the sum of the other P_ij, never a difference: at scale 100 and cosine 0.5 it is about 1e-12, which
    float64 would round in the fourth digit.
    """
    z = {m: t.double() for m, t in pairs(n, d, cosine).items()}
    scores = scale * z["image"] @ z["text"].T  # [n, n]

    def slopes(s: Tensor) -> Tensor:
        """softmax(s) - 1 over rows."""
        diagonal = s.diagonal().clone()
        off = torch.logsumexp(s.fill_diagonal_(-torch.inf), 1)
        p = s.sub_(torch.logaddexp(off, diagonal)[:, None]).exp_()
        return p.diagonal_scatter(-p.sum(1))

    slope = (slopes(scores.clone()) + slopes(scores.T.clone()).T) * (scale / (2 * n))
    return {"image": slope @ z["text"], "text": slope.T @ z["image"]}


def relative_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The larger of the modalities' relative L2 errors."""
    assert got.keys() == want.keys() and all(t.any() for t in want.values())
    return max(float((got[m].double() - want[m]).norm() / want[m].norm()) for m in want)


def siglip_ours(n: int, d: int) -> Gradients:
    """SigLIP in one pass at O(B N) memory."""
    objective = SigLIP.Config(pairs=(("image", "text"),), scale=SIGLIP_SCALE, bias=SIGLIP_BIAS).build()
    return _ours(objective, pairs(n, d))


def siglip_peer(n: int, d: int) -> Gradients:
    """open_clip's SigLipLoss."""
    from open_clip.loss import SigLipLoss

    loss = SigLipLoss()
    bias = nn.Parameter(torch.tensor(SIGLIP_BIAS))
    return _peer(lambda z, p: loss(z["image"], z["text"], p[0].exp(), p[1]), pairs(n, d), _log(SIGLIP_SCALE), bias)


def symile_ours(n: int, d: int) -> Gradients:
    """Symile with one shuffled negative per other row, at O(B N) memory."""
    return _ours(Symile.Config(modalities=("image", "text", "audio")).build(), triples(n, d))


def symile_peer(n: int, d: int) -> Gradients:
    """The authors' package, negative sampling "n"."""
    from symile import Symile as SymileLoss

    loss = cast("Callable[..., Tensor]", SymileLoss("n"))  # annotated as if it returned a float
    return _peer(lambda z, p: loss(list(z.values()), p[0].exp()), triples(n, d), _log(SCALE))


def _rows_of_this_rank(n: int, d: int) -> dict[str, Tensor]:
    first = dist.get_rank() * n
    return {m: t[first : first + n].clone() for m, t in pairs(dist.get_world_size() * n, d).items()}


def dist_ours(n: int, d: int) -> Gradients:
    """InfoNCE on this rank's rows of the global batch."""
    objective = InfoNCE.Config(pairs=(("image", "text"),), scale=SCALE).build()
    return _ours(objective, _rows_of_this_rank(n, d), first=dist.get_rank() * n)


def dist_peer(n: int, d: int) -> Gradients:
    """open_clip's ClipLoss with `local_loss` and `gather_with_grad`; its gradients are W times ours, for DDP's mean."""
    from open_clip.loss import ClipLoss

    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=dist.get_world_size())
    return _peer(lambda z, p: loss(z["image"], z["text"], p[0].exp()), _rows_of_this_rank(n, d), _log(SCALE))
