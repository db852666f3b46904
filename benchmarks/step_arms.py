"""The arms of `benchmarks.step`: each makes a batch and returns the work that goes from it to all gradients.

All arms have the same open_clip towers, weights and inputs. Peers are run as they come:

* open_clip: `open_clip_train.train.train_one_epoch` with `--accum-freq`, the function itself, on batches from a list.
* GradCache: the authors' class from PyPI (gradcache 0.0.1), with one model and chunk per tower and open_clip's loss.

Letters: N rows of the batch, B rows of a micro-batch, K = N / B micro-batches, D dimensions.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import Keep, forward_backward, pieces_of
from mmcontrast.objectives import InfoNCE
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result, value_and_grad

Gradients = Callable[[], Mapping[str, Tensor]]
SEED = (0,)
BLOCK, ONE = 1024, Keep()  # the trainer's own


@dataclass(frozen=True, kw_only=True)
class Towers:
    """Sizes of both towers.

    Attributes:
        side: of the square pictures; patches are of 8 x 8.
        width: of both.
        layers: of both.
        context: tokens of a text.
        d: D.
        dropout: share of patches that are dropped, and of the numbers that both towers end in.
    """

    side: int
    width: int
    layers: int
    context: int
    d: int = 512
    dropout: float = 0.0


SMALL = Towers(side=64, width=128, layers=4, context=32)
TINY = Towers(side=32, width=64, layers=2, context=16)


def model(towers: Towers) -> nn.Module:
    """open_clip's CLIP."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        image_size=towers.side,
        patch_size=8,
        width=towers.width,
        layers=towers.layers,
        head_width=32,
        patch_dropout=towers.dropout,
    )
    text = CLIPTextCfg(
        context_length=towers.context,
        vocab_size=1024,
        width=towers.width,
        heads=towers.width // 32,
        layers=towers.layers,
    )
    clip: Any = CLIP(towers.d, vision, text, output_dict=True)
    if towers.dropout:
        clip.visual.ln_post = nn.Sequential(clip.visual.ln_post, nn.Dropout(towers.dropout))
        clip.ln_final = nn.Sequential(clip.ln_final, nn.Dropout(towers.dropout))
    return clip.train()


def inputs(n: int, towers: Towers) -> dict[str, Tensor]:
    """Noise pictures [N, 3, S, S], and texts [N, T] of random tokens; the largest one ends each."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 1023, (n, towers.context), generator=generator)
    texts[:, -1] = 1023
    return {"image": torch.randn(n, 3, towers.side, towers.side, generator=generator), "text": texts}


def _encoder(clip: Any, modality: str) -> Callable[[Tensor], Tensor]:
    """Inputs [B, ...] -> [B, D], unit norm."""
    encode = clip.encode_image if modality == "image" else clip.encode_text
    return lambda x: encode(x, normalize=True)


def _gradients(clip: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


def _batch(n: int, towers: Towers) -> Batch:
    rows = torch.arange(n)
    return Batch(inputs=inputs(n, towers), rows={"image": rows, "text": rows}, ids=rows)


def ours(n: int, towers: Towers, micro_batch: int, *, keep: Keep = ONE) -> Gradients:
    """`forward_backward`, with the trainer's one kept graph or those that are asked for."""
    clip: Any = model(towers)
    batch = _batch(n, towers)
    objective: InfoNCE = InfoNCE.Config(pairs=(("image", "text"),), scale=clip.logit_scale.exp().item()).build()
    encoders = {m: _encoder(clip, m) for m in batch.rows}
    weights = [*clip.parameters(), *clip.buffers()]

    def encode(piece: MicroBatch) -> Mapping[str, Tensor]:
        return {m: encoders[m](x) for m, x in piece.inputs.items()}

    def loss(z: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Result:
        return value_and_grad({"clip": objective}, z, present, batch.ids, block=BLOCK)

    def work() -> Mapping[str, Tensor]:
        for module in (clip, objective):
            module.zero_grad(set_to_none=True)
        forward_backward(encode, batch, loss, micro_batch=micro_batch, seed=SEED, keep=keep, weights=weights)
        assert objective.log_scale.grad is not None
        return _gradients(clip) | {"logit_scale": objective.log_scale.grad.sum()}  # the temperature is the objective's

    return work


def full_batch(n: int, towers: Towers, micro_batch: int) -> Gradients:
    """Plain autograd on the whole batch in one piece: the naive way, and with `micro_batch` < n the reference.

    The reference has all graphs of all micro-batches at once and one loss; its masks are those of ours.
    """
    from open_clip.loss import ClipLoss

    clip: Any = model(towers)
    batch, loss = _batch(n, towers), ClipLoss()
    encoders = {m: _encoder(clip, m) for m in batch.rows}

    def work() -> Mapping[str, Tensor]:
        clip.zero_grad(set_to_none=True)
        z: dict[str, list[Tensor]] = {m: [] for m in encoders}
        for piece in pieces_of(batch, micro_batch):
            torch.manual_seed(fold_seed(*SEED, piece.start, *piece.apart))
            for m, x in piece.inputs.items():
                z[m].append(encoders[m](x))
        loss(torch.cat(z["image"]), torch.cat(z["text"]), clip.logit_scale.exp()).backward()
        return _gradients(clip)

    return work


def naive(n: int, towers: Towers) -> Gradients:
    """The full batch in one piece."""
    return full_batch(n, towers, n)


def floor(n: int, towers: Towers, micro_batch: int, *, kept: int) -> Gradients:
    """Forward and backward of every micro-batch of each tower, without any loss; all but `kept` have a forward before.

    That is what a gradient cache cannot do without. A backward is worth two forwards, so with none kept it is four,
    and with all of them three, the least that any exact step can take.
    """
    clip: Any = model(towers)
    data = inputs(n, towers)
    cotangent = torch.randn(micro_batch, towers.d, generator=torch.Generator().manual_seed(2)) / n

    def work() -> Mapping[str, Tensor]:
        clip.zero_grad(set_to_none=True)
        left = kept
        for modality, x in data.items():
            encode, pieces = _encoder(clip, modality), x.split(micro_batch)
            with torch.no_grad():
                for piece in pieces[left:]:
                    encode(piece)
            left = max(0, left - len(pieces))
            for piece in pieces:
                z = encode(piece)
                torch.autograd.backward([z], [cotangent[: len(z)]])
        return _gradients(clip)

    return work


class _Tower(nn.Module):
    def __init__(self, clip: nn.Module, modality: str) -> None:
        super().__init__()
        self.clip, self.encode = clip, _encoder(clip, modality)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def grad_cache(n: int, towers: Towers, micro_batch: int) -> Gradients:
    """GradCache of its authors."""
    import gradcache
    from open_clip.loss import ClipLoss

    # The release was packaged under another name than its modules call each other by.
    sys.modules.setdefault("grad_cache", gradcache)
    from gradcache.grad_cache import GradCache

    clip: Any = model(towers)
    data, loss = inputs(n, towers), ClipLoss()

    def of_embeddings(image: Tensor, text: Tensor) -> Tensor:
        return cast(Tensor, loss(image, text, clip.logit_scale.exp()))

    cache: Any = GradCache(
        models=[_Tower(clip, "image"), _Tower(clip, "text")], chunk_sizes=micro_batch, loss_fn=of_embeddings
    )

    def work() -> Mapping[str, Tensor]:
        clip.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        cache(data["image"], data["text"])
        return _gradients(clip)

    return work


class _Loader:
    """What `train_one_epoch` asks of a data loader."""

    def __init__(self, data: Mapping[str, Tensor], micro_batch: int) -> None:
        pieces = [x.split(micro_batch) for x in (data["image"], data["text"])]
        self.batches = list(zip(*pieces, strict=True))
        self.num_batches, self.num_samples = len(self.batches), len(data["image"])

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(self.batches)


def open_clip(n: int, towers: Towers, micro_batch: int) -> Gradients:
    """One optimizer step of open_clip's own loop; the optimizer does nothing."""
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    clip = model(towers)
    loader = _Loader(inputs(n, towers), micro_batch)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=int)}
    arguments = Namespace(
        device="cpu",
        precision="fp32",
        accum_freq=loader.num_batches,
        skip_scheduler=True,
        distill=False,
        grad_clip_norm=None,
        rank=1,  # says nothing
        horovod=False,
    )
    optimizer = SimpleNamespace(zero_grad=lambda: clip.zero_grad(set_to_none=True), step=lambda: None)

    def work() -> Mapping[str, Tensor]:
        torch.manual_seed(0)
        train_one_epoch(clip, data, ClipLoss(), 0, optimizer, None, None, None, arguments)
        return _gradients(clip)

    return work


def relative_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """L2 over all parameters of the towers; the temperature is told apart."""
    names = [name for name in want if name != "logit_scale"]
    assert got.keys() == want.keys() and any(bool(want[name].any()) for name in names)
    difference = sum(float((got[n].double() - want[n].double()).square().sum()) for n in names)
    return (difference / sum(float(want[n].double().square().sum()) for n in names)) ** 0.5
