"""The gradient cache (GradCache, Gao et al. 2021, arXiv:2101.06983): a large contrastive batch in small pieces.

Three moves: (1) encode micro-batches without a graph, (2) take the loss and its gradient at the embeddings, with all
collectives and all of the loss's own randomness, once, (3) encode each micro-batch again and send its rows of that
gradient through the encoders. The last micro-batch keeps its graph from (1) and needs no second forward.

Randomness of the encoders (dropout, patch dropout) is a function of (seed, step, first row): each micro-batch is
seeded before it is encoded, so the second forward repeats the first, a resumed run repeats the uninterrupted one, and
nothing has to be saved. Other micro-batches draw other masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result

Encode = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Micro-batch -> modality -> [n_m, D], unit norm, the rows in the order of `MicroBatch.rows`."""


def forward_backward(
    encode: Encode,
    batch: Batch,
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Result],
    *,
    micro_batch: int,
    seed: tuple[int, ...],
    first_row: int = 0,
    cotangent_scale: float = 1.0,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Add the gradient of `loss` to the encoders' `.grad`, holding the graph of one micro-batch at a time.

    Args:
        encode: the model on a micro-batch; must treat samples independently (no batch statistics).
        batch: this rank's rows.
        loss: (z, present) -> Result; z is modality -> [n, D] with zeros where absent, present modality -> [n] bool.
        micro_batch: rows that are encoded in one go.
        seed: with the first global row of a micro-batch, the seed of its randomness.
        first_row: global row of this rank's first row.
        cotangent_scale: factor on the embedding gradients; the number of ranks where a wrapper averages over them.
        no_sync: context in which neither forward nor backward reduces gradients over ranks (DDP's `no_sync`).
        sync: context for the last backward, which reduces what all of them have added up.
    """
    pieces = list(batch.split(micro_batch))
    device = batch.ids.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), no_sync():
        chunks: list[Mapping[str, Tensor]] = []
        for piece in pieces[:-1]:
            with torch.no_grad():
                chunks.append(_encode(encode, piece, seed, first_row))
        last = _encode(encode, pieces[-1], seed, first_row)
        chunks.append({m: t.detach() for m, t in last.items()})

        present = {m: batch.present(m) for m in batch.rows}
        z = {m: _assemble([c[m] for c in chunks], batch.rows[m], len(batch)) for m in batch.rows}
        result = loss(z, present)

        cotangents = {m: g * cotangent_scale for m, g in result.gradients.items()}
        for piece in pieces[:-1]:
            _backward(_encode(encode, piece, seed, first_row), piece, cotangents)
    with sync():
        _backward(last, pieces[-1], cotangents)
    return result


def _encode(encode: Encode, piece: MicroBatch, seed: tuple[int, ...], first_row: int) -> Mapping[str, Tensor]:
    torch.manual_seed(fold_seed(*seed, first_row + piece.start))
    return encode(piece)


def _assemble(chunks: list[Tensor], rows: Tensor, n: int) -> Tensor:
    """Encoded rows -> [n, D] with zeros where the row lacks the modality."""
    encoded = torch.cat(chunks)
    return encoded.new_zeros(n, encoded.shape[1]).index_copy(0, rows, encoded)


def _backward(encoded: Mapping[str, Tensor], piece: MicroBatch, cotangents: Mapping[str, Tensor]) -> None:
    outputs = {m: t for m, t in encoded.items() if t.requires_grad}
    if outputs:
        torch.autograd.backward(list(outputs.values()), [cotangents[m][piece.rows[m]] for m in outputs])


def batch_coupled_layers(model: nn.Module) -> list[str]:
    """Names of layers that mix samples in training mode (batch norm): the cache is not exact with them."""
    coupled = (nn.modules.batchnorm._BatchNorm,)  # pyright: ignore[reportPrivateUsage]
    return [name for name, layer in model.named_modules() if isinstance(layer, coupled) and layer.training]
