"""Cross-entropy over a large vocabulary without a matrix of all its logits.

The loss is a sum, so what comes from above is one number, and the gradient of a row can be had as soon as its logits
are there: each chunk of rows is turned from logits into gradients in place, in the forward. What is kept for the
backward has the shapes of the inputs, and no product is computed twice.

Letters: R rows (target tokens), C width, V words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = 1024) -> Tensor:
    """The sum over rows of -log softmax(weight @ hidden)[target].

    Args:
        hidden: [R, C].
        weight: [V, C].
        targets: [R] int64.
        chunk: rows whose logits exist at once.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _Sum.apply(hidden, weight, targets, chunk)  # pyright: ignore[reportReturnType]
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return sum((_chunk(h, weight, t)[0] for h, t in parts), start=_zero(hidden))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = _zero(hidden)
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            loss, scores = _chunk(hidden[part], weight, targets[part])
            total += loss
            scores[torch.arange(len(scores), device=scores.device), targets[part]] -= 1  # d loss / d logits
            scores = scores.to(hidden.dtype)
            of_hidden[part] = scores @ weight
            of_weight += scores.T @ hidden[part]
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_hidden, of_weight = ctx.saved_tensors
        return (of_hidden * gradient).to(of_hidden.dtype), (of_weight * gradient).to(of_weight.dtype), None, None


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over some rows, and their softmax [R, V]; float32 at least, also under autocast."""
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(1, keepdim=True)
    loss = (normaliser - logits.gather(1, targets[:, None])).sum()
    return loss, logits.sub_(normaliser).exp_()
