"""The gradient cache (GradCache, Gao et al. 2021, arXiv:2101.06983): a large contrastive batch in small pieces.

Three moves: (1) encode micro-batches without a graph, (2) take the loss and its gradient at the embeddings, with all
collectives and all of the loss's own randomness, once, (3) encode each micro-batch again and send its rows of that
gradient through the encoders. The last micro-batch keeps its graph from (1) and needs no second forward.

Randomness of the encoders (dropout, patch dropout) is a function of (seed, step, first row): each micro-batch is
seeded before it is encoded, so the second forward repeats the first, a resumed run repeats the uninterrupted one, and
nothing has to be saved. Other micro-batches draw other masks.

Heads (`mmcontrast.heads`) need tokens but no other sample. They run in the forwards that keep a graph, so once per
sample; the first pass leaves them out, and tokens live no longer than their micro-batch's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.heads.base import Head
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result, World

Encode = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Micro-batch -> modality -> [n_m, D], unit norm, the rows in the order of `MicroBatch.rows`; and, where heads run,
head -> its sum over the micro-batch, a scalar."""


def forward_backward(
    encode: Encode,
    batch: Batch,
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Result],
    *,
    micro_batch: int,
    seed: tuple[int, ...],
    first_row: int = 0,
    cotangent_scale: float = 1.0,
    heads: Mapping[str, Head] | None = None,
    encode_with_heads: Encode | None = None,
    world: World | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Add the gradient of `loss` to the encoders' `.grad`, holding the graph of one micro-batch at a time.

    With heads, also that of weight * sum / count for each, where sum and count are of all ranks; the result's loss and
    terms then hold them too, equal on every rank.

    Args:
        encode: the model on a micro-batch; must treat samples independently (no batch statistics).
        batch: this rank's rows.
        loss: (z, present) -> Result; z is modality -> [n, D] with zeros where absent, present modality -> [n] bool.
        micro_batch: rows that are encoded in one go.
        seed: with the first global row of a micro-batch, the seed of its randomness.
        first_row: global row of this rank's first row.
        cotangent_scale: factor on all gradients; the number of ranks where a wrapper averages over them.
        heads: name -> head of the model.
        encode_with_heads: `encode` that runs the heads as well; needed if there are any.
        world: the ranks that share the batch; by default all. Only heads ask it.
        no_sync: context in which neither forward nor backward reduces gradients over ranks (DDP's `no_sync`).
        sync: context for the last backward, which reduces what all of them have added up.
    """
    heads = heads or {}
    with_heads = encode_with_heads or encode
    pieces = list(batch.split(micro_batch))
    device = batch.ids.device
    # Before any forward: pass 2 must know by what to divide, and it ends micro-batch by micro-batch.
    counts = _sum_over_ranks({name: head.count(batch) for name, head in heads.items()}, world)
    sums = {name: torch.zeros((), device=device) for name in heads}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), no_sync():
        chunks: list[Mapping[str, Tensor]] = []
        for piece in pieces[:-1]:
            with torch.no_grad():
                chunks.append(_encode(encode, piece, seed, first_row))
        last = _encode(with_heads, pieces[-1], seed, first_row)
        chunks.append({m: last[m].detach() for m in batch.rows})

        present = {m: batch.present(m) for m in batch.rows}
        z = {m: _assemble([c[m] for c in chunks], batch.rows[m], len(batch)) for m in batch.rows}
        result = loss(z, present)

        cotangents = {m: g * cotangent_scale for m, g in result.gradients.items()}
        counts = {name: count.clamp(min=1).to(result.loss.dtype) for name, count in counts.items()}
        cotangents |= {name: head.weight * cotangent_scale / counts[name] for name, head in heads.items()}
        for piece in pieces[:-1]:
            encoded = _encode(with_heads, piece, seed, first_row)
            sums = {name: total + encoded[name].detach() for name, total in sums.items()}
            _backward(encoded, piece, cotangents)
            del encoded  # or else its tokens would live on beside the next micro-batch's
    sums = {name: total + last[name].detach() for name, total in sums.items()}
    with sync():
        _backward(last, pieces[-1], cotangents)
    if not heads:
        return result
    terms = {name: total / counts[name] for name, total in _sum_over_ranks(sums, world).items()}
    of_heads = torch.stack([heads[name].weight * term for name, term in terms.items()]).sum()
    return replace(result, loss=result.loss + of_heads, terms={**result.terms, **terms})


def _sum_over_ranks(values: Mapping[str, Tensor], world: World | None) -> dict[str, Tensor]:
    if not values:
        return {}
    return dict(zip(values, (world or World()).sum(list(values.values())), strict=True))


def _encode(encode: Encode, piece: MicroBatch, seed: tuple[int, ...], first_row: int) -> Mapping[str, Tensor]:
    torch.manual_seed(fold_seed(*seed, first_row + piece.start))
    return encode(piece)


def _assemble(chunks: list[Tensor], rows: Tensor, n: int) -> Tensor:
    """Encoded rows -> [n, D] with zeros where the row lacks the modality."""
    encoded = torch.cat(chunks)
    return encoded.new_zeros(n, encoded.shape[1]).index_copy(0, rows, encoded)


def _backward(encoded: Mapping[str, Tensor], piece: MicroBatch, cotangents: Mapping[str, Tensor]) -> None:
    outputs = {name: t for name, t in encoded.items() if t.requires_grad}
    if outputs:
        gradients = [cotangents[n][piece.rows[n]] if n in piece.rows else cotangents[n] for n in outputs]
        # The cotangent of a head's sum is of the loss's type; under autocast the sum may be of another.
        gradients = [g.to(t.dtype) for g, t in zip(gradients, outputs.values(), strict=True)]
        torch.autograd.backward(list(outputs.values()), gradients)


def batch_coupled_layers(model: nn.Module) -> list[str]:
    """Names of layers that mix samples in training mode (batch norm): the cache is not exact with them."""
    coupled = (nn.modules.batchnorm._BatchNorm,)  # pyright: ignore[reportPrivateUsage]
    return [name for name, layer in model.named_modules() if isinstance(layer, coupled) and layer.training]
