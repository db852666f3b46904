"""The gradient cache (GradCache, Gao et al. 2021, arXiv:2101.06983): a large contrastive batch in small pieces.

Three moves: (1) encode micro-batches without a graph, (2) take the loss and its gradient at the embeddings, with all
collectives and all of the loss's own randomness, once, (3) encode each micro-batch again and send its rows of that
gradient through the encoders. The first micro-batches keep their graphs from (1), as many as memory is given for, and
need no second forward.

Randomness of the encoders (dropout, patch dropout) is a function of seed, step, first row and, where towers are encoded
apart, the tower: each micro-batch is seeded before it is encoded, so the second forward repeats the first, a resumed
run repeats the uninterrupted one, and nothing has to be saved. Other micro-batches draw other masks.

Heads (`mmcontrast.heads`) need tokens but no other sample. They run in the forwards that keep a graph, so once per
sample; the first pass leaves them out, and tokens live no longer than their micro-batch's graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch, tensors_in
from mmcontrast.heads.base import Head
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result, World

Encode = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Micro-batch -> modality of each tower that runs -> [n_m, D], unit norm, the rows in the order of `MicroBatch.rows`;
and, where heads run, head -> its sum over the micro-batch, a scalar."""


@dataclass(frozen=True)
class Keep:
    """How many graphs of the first pass are kept for the second: at least `graphs`, and more while they fit `bytes`.

    A graph is that of one micro-batch in one tower, or in towers that a head reads together.

    What is kept changes no gradient but by rounding, and no random number. The measure is what autograd saves for the
    backward; it is the same in every run, so that a resumed run keeps the same graphs.
    """

    graphs: int = 1
    bytes: int = 0


def forward_backward(
    encode: Encode,
    batch: Batch,
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Result],
    *,
    micro_batch: int | Mapping[str, int],
    seed: tuple[int, ...],
    step: int = 0,
    first_row: int = 0,
    keep: Keep = Keep(),
    weights: Iterable[Tensor] = (),
    cotangent_scale: float = 1.0,
    heads: Mapping[str, Head] | None = None,
    encode_with_heads: Encode | None = None,
    world: World | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Result:
    """Add the gradient of `loss` to the encoders' `.grad`, holding the graphs of a few micro-batches at a time.

    With heads, also that of weight * sum / count for each, where sum and count are of all ranks; the result's loss and
    terms then hold them too, equal on every rank.

    Args:
        encode: the model on a micro-batch; must treat samples independently (no batch statistics).
        batch: this rank's rows.
        loss: (z, present) -> Result; z is modality -> [n, D] with zeros where absent, present modality -> [n] bool.
        micro_batch: rows that are encoded in one go; by modality, if the towers differ. Modalities that a head reads
            together must have the same.
        seed: with the first global row of a micro-batch, the seed of its randomness.
        step: the optimizer step, which decides the heads' weights.
        first_row: global row of this rank's first row.
        keep: graphs of the first pass that are kept; all of them, if every tower encodes the batch in one go.
        weights: of the model, which do not count as kept.
        cotangent_scale: factor on all gradients; the number of ranks where a wrapper averages over them.
        heads: name -> head of the model.
        encode_with_heads: `encode` that runs the heads as well; needed if there are any.
        world: the ranks that share the batch; by default all. Only heads ask it.
        no_sync: context in which neither forward nor backward reduces gradients over ranks (DDP's `no_sync`).
        sync: context for the last backward, which reduces what all of them have added up.
    """
    heads = heads or {}
    with_heads = encode_with_heads or encode
    pieces = pieces_of(batch, micro_batch, [head.modalities for head in heads.values()])
    device = batch.ids.device
    # Before any forward: pass 2 must know by what to divide, and it ends micro-batch by micro-batch.
    counts = _sum_over_ranks({name: head.count(batch) for name, head in heads.items()}, world)
    sums = {name: torch.zeros((), device=device) for name in heads}
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type), no_sync():
        chunks: dict[str, list[Tensor]] = {m: [] for m in batch.rows}
        least = least_kept([piece.start for piece in pieces], keep.graphs)
        kept = _Kept(least, keep.bytes, [*weights, *tensors_in(batch.inputs)])
        for piece in pieces:
            if kept.tries:
                encoded = kept.offered(lambda piece=piece: _encode(with_heads, piece, seed, first_row, device))
            else:
                with torch.no_grad():
                    encoded = _encode(encode, piece, seed, first_row, device)
            for m in piece.rows:
                chunks[m].append(encoded[m].detach())
            del encoded  # or else the graph of one that did not fit would live on

        present = {m: batch.present(m) for m in batch.rows}
        z = {m: _assemble(chunks.pop(m), batch.rows[m], len(batch)) for m in batch.rows}
        result = loss(z, present)
        del z

        cotangents = {m: g * cotangent_scale for m, g in result.gradients.items()}
        counts = {name: count.clamp(min=1).to(result.loss.dtype) for name, count in counts.items()}
        cotangents |= {name: head.weight_at(step) * cotangent_scale / counts[name] for name, head in heads.items()}
        for at, piece in enumerate(pieces):
            encoded = kept.graphs.popleft() if kept.graphs else _encode(with_heads, piece, seed, first_row, device)
            sums = {name: total + encoded[name].detach() if name in encoded else total for name, total in sums.items()}
            with sync() if at == len(pieces) - 1 else nullcontext():
                _backward(encoded, piece, cotangents)
            del encoded  # or else its tokens would live on beside the next micro-batch's
    if not heads:
        return result
    terms = {name: total / counts[name] for name, total in _sum_over_ranks(sums, world).items()}
    of_heads = torch.stack([heads[name].weight_at(step) * term for name, term in terms.items()]).sum()
    return replace(result, loss=result.loss + of_heads, terms={**result.terms, **terms})


def pieces_of(
    batch: Batch, micro_batch: int | Mapping[str, int], joined: Iterable[Sequence[str]] = ()
) -> list[MicroBatch]:
    """The micro-batches of one tower after the other, each of one tower, or of towers that a head reads together.

    So only one tower has its activations in memory, and the cache of a processor its weights.

    Args:
        batch: this rank's rows.
        micro_batch: rows, or modality -> rows; the same for all that are joined.
        joined: the modalities of each head.
    """
    groups = [[m] for m in batch.rows]
    for together in joined:
        touched = [group for group in groups if any(m in together for m in group)]
        merged = [m for m in batch.rows if any(m in group for group in touched)]
        groups = [group for group in groups if group not in touched] + [merged]
    sizes = [micro_batch if isinstance(micro_batch, int) else micro_batch[group[0]] for group in groups]
    if len(groups) == 1:
        return list(batch.split(sizes[0]))
    pieces = [piece for group, size in zip(groups, sizes, strict=True) for piece in batch.split(size, group)]
    # A wrapper that reduces gradients waits for those of all towers in the last backward. The others run after those
    # of the piece, whose random numbers must not depend on which piece is a rank's last.
    own = pieces[-1].apart
    return [*pieces[:-1], replace(pieces[-1], towers=(*own, *(m for m in batch.rows if m not in own)))]


def least_kept(starts: Sequence[int], graphs: int) -> int:
    """Graphs that are kept whatever their bytes, of pieces with these first rows, where `graphs` are asked for.

    One, since the graph at work takes its memory in any case; all, where every tower encodes the batch in one go: who
    does so has the memory for it.
    """
    return max(1, graphs) if any(starts) else len(starts)


class _Kept:
    """The graphs of the first pass that the second need not make again: at least some, and more while they fit."""

    def __init__(self, least: int, budget: int, there: Iterable[Tensor]) -> None:
        self.graphs: deque[Mapping[str, Tensor]] = deque()  # left one by one, so that each is let go of once used
        self._least, self._left = least, budget
        self._saved = _Saved(there) if budget else None

    @property
    def tries(self) -> bool:
        return len(self.graphs) < self._least or self._left > 0

    def offered(self, encode: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Encode, and keep the graph if it fits."""
        with self._saved or nullcontext():
            encoded = encode()
        if self._saved and self.graphs:
            self._left -= self._saved.bytes
        if self._left >= 0 or len(self.graphs) < self._least:
            self.graphs.append(encoded)
        return encoded


class _Saved:
    """Bytes that autograd saves within a context, each memory once, without that of `there`."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._there = {t.untyped_storage().data_ptr() for t in there}
        self._seen: set[int] = set()

    def __enter__(self) -> None:
        self.bytes, self._seen = 0, set(self._there)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda t: t)
        self._hooks.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _note(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        whole = t if t._base is None else t._base  # pyright: ignore[reportPrivateUsage]
        # Parameters that sharding has gathered are others than the model's.
        if not isinstance(whole, nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return t


def _sum_over_ranks(values: Mapping[str, Tensor], world: World | None) -> dict[str, Tensor]:
    if not values:
        return {}
    return dict(zip(values, (world or World()).sum(list(values.values())), strict=True))


def _encode(
    encode: Encode, piece: MicroBatch, seed: tuple[int, ...], first_row: int, device: torch.device
) -> Mapping[str, Tensor]:
    # Towers that are encoded apart must not draw the same masks. torch.manual_seed would ask every kind of device.
    folded = fold_seed(*seed, first_row + piece.start, *piece.apart)
    torch.default_generator.manual_seed(folded)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(folded)
    return encode(piece)


def _assemble(chunks: list[Tensor], rows: Tensor, n: int) -> Tensor:
    """Encoded rows -> [n, D] with zeros where the row lacks the modality."""
    encoded = torch.cat(chunks)
    if len(encoded) == n:  # of ascending rows, so all are there
        return encoded
    return encoded.new_zeros(n, encoded.shape[1]).index_copy(0, rows, encoded)


def _backward(encoded: Mapping[str, Tensor], piece: MicroBatch, cotangents: Mapping[str, Tensor]) -> None:
    outputs = {name: t for name, t in encoded.items() if t.requires_grad}
    if outputs:
        gradients = [_cotangent(name, t, piece, cotangents) for name, t in outputs.items()]
        torch.autograd.backward(list(outputs.values()), gradients)


def _cotangent(name: str, output: Tensor, piece: MicroBatch, cotangents: Mapping[str, Tensor]) -> Tensor:
    if name in piece.rows:
        found = cotangents[name][piece.rows[name]]
    elif output.ndim:  # a tower that ran on a dummy row for the sake of the others
        found = torch.zeros_like(output)
    else:
        found = cotangents[name]
    return found.to(output.dtype)  # under autocast a head's sum may be of another type than the loss


def batch_coupled_layers(model: nn.Module) -> list[str]:
    """Names of layers that mix samples in training mode (batch norm): the cache is not exact with them."""
    coupled = (nn.modules.batchnorm._BatchNorm,)  # pyright: ignore[reportPrivateUsage]
    return [name for name, layer in model.named_modules() if isinstance(layer, coupled) and layer.training]
