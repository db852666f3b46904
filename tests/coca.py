"""A tiny CoCa, batches for it, the slow formula of its caption loss, and a recipe on coloured shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch
from mmcontrast.encoders import CascadePool, CoCaText, MultiEncoder
from mmcontrast.heads import Captioning
from mmcontrast.trainer import Trainer
from tests import shapes, tiny

TEXTS = (
    "a cat",
    "!© and more",  # its first token has the id 0, which pads the others
    "",
    "two red squares and a bar on top of the other things",  # is cut
    "a",
    "five green bars",
)


def model_config(**settings: Any) -> MultiEncoder.Config:
    """Tokens of width 8 on both sides, from a picture tower of width 16."""
    defaults: dict[str, Any] = {
        "encoders": {
            "image": CascadePool.Config(tower=tiny.vit(), queries=3, heads=2, width=8),
            "text": CoCaText.Config(context_length=9, width=8, layers=2, heads=2),
        },
        "heads": {"caption": Captioning.Config(layers=2, heads=2, weight=2.0)},
        "dim": 6,
    }
    return MultiEncoder.Config(**(defaults | settings))


def build(config: MultiEncoder.Config | None = None, seed: int = 0) -> MultiEncoder:
    """The model in float64, with weights large enough for differences to show."""
    torch.manual_seed(seed)
    model: MultiEncoder = (config or model_config()).build()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = parameter + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def head_of(model: MultiEncoder) -> Captioning:
    head = model.terms["caption"]
    assert isinstance(head, Captioning)
    return head


def batch_of(model: MultiEncoder, texts: list[str | None], pictures: list[bool], seed: int = 0) -> Batch:
    """Rows with the given texts and with random pictures; None and False are missing."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(texts), 3, 16, 16), generator=generator, dtype=torch.uint8)
    transform = model.encoder("text").transform(train=True)
    rows = {
        "image": torch.tensor([i for i, there in enumerate(pictures) if there], dtype=torch.int64),
        "text": torch.tensor([i for i, text in enumerate(texts) if text is not None], dtype=torch.int64),
    }
    inputs: dict[str, Any] = {}
    if len(rows["image"]):
        inputs["image"] = pixels[rows["image"]]
    if len(rows["text"]):
        inputs["text"] = transform.collate([transform(text) for text in texts if text is not None])
    return Batch(inputs=inputs, rows=rows, ids=torch.arange(len(texts)))


# ------------------------------------------------------------------------------------------------- the slow formula


Sees = Callable[[int, int], bool]


def _before(query: int, key: int) -> bool:
    return key <= query


def _everything(query: int, key: int) -> bool:
    return True


def norm(layer: Any, x: Tensor) -> Tensor:
    """Layer norm of one vector [C]."""
    return (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def attend(layer: nn.MultiheadAttention, queries: list[Tensor], keys: list[Tensor], sees: Sees) -> list[Tensor]:
    """Attention, one head and one query at a time; query i looks at the keys j with sees(i, j)."""
    width, heads = layer.embed_dim, layer.num_heads
    d = width // heads
    assert layer.in_proj_weight is not None and layer.in_proj_bias is not None
    of_q, of_k, of_v = layer.in_proj_weight.split(width)
    plus_q, plus_k, plus_v = layer.in_proj_bias.split(width)
    found: list[Tensor] = []
    for i, query in enumerate(queries):
        parts: list[Tensor] = []
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            q = (of_q @ query + plus_q)[part]
            seen = [j for j in range(len(keys)) if sees(i, j)]
            weights = [((of_k @ keys[j] + plus_k)[part] @ q / d**0.5).exp() for j in seen]
            values = [(of_v @ keys[j] + plus_v)[part] for j in seen]
            total = torch.stack(weights).sum()
            parts.append(torch.stack([w / total * v for w, v in zip(weights, values, strict=True)]).sum(0))
        found.append(layer.out_proj.weight @ torch.cat(parts) + layer.out_proj.bias)
    return found


def block(layer: Any, x: list[Tensor], sees: Sees, other: list[Tensor] | None = None) -> list[Tensor]:
    """Pre-norm attention and two-layer perceptron; to the vectors of `other`, if there are any, else to x itself."""
    queries = [norm(layer.ln_1, v) for v in x]
    keys = queries if other is None else [norm(layer.ln_1_kv, v) for v in other]
    x = [v + a for v, a in zip(x, attend(layer.attn, queries, keys, sees), strict=True)]
    found: list[Tensor] = []
    for v in x:
        hidden = layer.mlp.c_fc.weight @ norm(layer.ln_2, v) + layer.mlp.c_fc.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        found.append(v + layer.mlp.c_proj.weight @ hidden + layer.mlp.c_proj.bias)
    return found


def slow_caption_loss(model: MultiEncoder, ids: list[int], picture: Tensor) -> Tensor:
    """Sum over the targets of one text without padding, picture tokens [T, C]: every word from those before it."""
    text: Any = model.encoder("text")
    head = head_of(model)
    look = list(picture)
    total = torch.zeros((), dtype=picture.dtype)
    for at in range(1, len(ids)):
        x = [text.tower.token_embedding.weight[i] + text.tower.positional_embedding[p] for p, i in enumerate(ids[:at])]
        for layer in text.tower.transformer.resblocks:
            x = block(layer, x, _before)
        for layer, across in zip(head.decoder.resblocks, head.decoder.cross_attn, strict=True):
            x = block(layer, x, _before)
            x = block(across, x, _everything, look)
        scores = head.vocabulary.weight @ norm(head.decoder.ln_final, x[-1])
        total = total - (scores[ids[at]].exp() / scores.exp().sum()).log()
    return total


def slow_contrastive_loss(x: Tensor, y: Tensor, has_x: Tensor, has_y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: each row of a pair against all rows that have the other modality."""
    terms: list[Tensor] = []
    for i in range(len(x)):
        if has_x[i] and has_y[i]:
            for anchor, others, has in ((x[i], y, has_y), (y[i], x, has_x)):
                scores = {j: (scale * (anchor @ others[j])).exp() for j in range(len(x)) if has[j]}
                terms.append(-(scores[i] / torch.stack(list(scores.values())).sum()).log())
    return torch.stack(terms).mean()


# ------------------------------------------------------------------------------------------------- a run


def recipe() -> Trainer.Config:
    """`shapes.recipe` with captions: what a sample lacks, it lacks."""
    config = shapes.recipe()
    config.tower_micro_batch = {}  # the head reads both towers
    tower = config.model.encoders["image"]
    model = MultiEncoder.Config(
        encoders={
            "image": CascadePool.Config(tower=tower, queries=4, heads=2),
            "text": CoCaText.Config(context_length=8, width=32, layers=1, heads=2),
        },
        heads={"caption": Captioning.Config(weight=2.0, layers=1, heads=2)},
        dim=16,
    )
    return replace(config, model=model)
