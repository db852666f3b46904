"""What CoCa (Yu et al. 2022, arXiv:2205.01917) asks of its towers: cascaded pooling, and a text tower with a CLS token.

Letters: B rows, T tokens of the pooled tower, Q queries, L positions of a text, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.clip_tokens import ClipTokens


class CascadePool(Encoder):
    """Pools another tower's tokens by attention, twice: Q queries for captions, and one query over those to compare.

    CoCa, section 3.2: with "cascade" design, so that the contrastive vector is a summary of what captions see.
    """

    fresh = ("captions.", "contrast.")

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Which tower, and the poolers."""

        tower: Encoder.Config
        """The tower whose tokens are pooled; its own pooled vector is not used."""
        queries: int = 256
        """Q, tokens that a caption can look at."""
        heads: int = 8
        """Attention heads of both poolers; must divide the width."""
        width: int | None = None
        """C of what comes out; a captioning head needs that of its text tower. None takes the width of the tokens."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if config.queries < 1:
            raise ConfigError(f"queries is {config.queries}; at least 1 must look at the tokens")
        from open_clip.transformer import AttentionalPooler

        self.tower: Encoder = config.tower.build(restore=restore)
        self.kind = self.tower.kind
        with torch.no_grad():
            _, tokens = self.tower(self.tower.example())
        if tokens is None:
            raise ConfigError(f"{type(self.tower).__name__} gives no tokens that could be pooled")
        self.dim = tokens.shape[2] if config.width is None else config.width
        if self.dim < 1 or self.dim % config.heads:
            raise ConfigError(f"heads {config.heads} must divide width {self.dim}")
        self.captions = AttentionalPooler(self.dim, tokens.shape[2], config.heads, config.queries)
        self.contrast = AttentionalPooler(self.dim, self.dim, config.heads, 1)
        self.finish(config, pretrained=True)  # the tower has refused norms without statistics already

    def transform(self, *, train: bool) -> Transform:
        """The tower's."""
        return self.tower.transform(train=train)

    def example(self) -> Any:
        """The tower's."""
        return self.tower.example()

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        """Inputs [B, ...] -> [B, C], [B, Q, C]."""
        tokens = self.captions(self.tower(x)[1])
        return self.contrast(tokens)[:, 0], tokens

    def save_assets(self, folder: Path) -> None:
        """The tower's."""
        self.tower.save_assets(folder)


class CoCaTransform(Transform):
    """str -> ids from start to end, cut to L; a batch is padded to its longest text, and lengths go with it."""

    kind = "text"

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length, self._encode = tokenizer, context_length, ClipTokens(tokenizer)

    def __call__(self, value: Any) -> Tensor:
        """[length], int64."""
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return torch.tensor([start, *self._ids(value)[: self.context_length - 2], end])

    def _ids(self, value: Any) -> list[int]:
        # A text that spells out "<end_of_text>" would otherwise end there.
        ends = (self.tokenizer.sot_token_id, self.tokenizer.eot_token_id)
        return [i for i in self._encode(str(value)) if i not in ends]

    def cut(self, value: Any, made: Tensor) -> bool:
        """Whether the end of the text was lost."""
        return len(made) == self.context_length and len(self._ids(value)) > self.context_length - 2

    def collate(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """-> ids [B, L], zeros behind the end, and lengths [B]; both int64."""
        ids = nn.utils.rnn.pad_sequence(list(values), batch_first=True)
        return {"ids": ids, "lengths": torch.tensor([len(v) for v in values])}


class CoCaText(Encoder):
    """CoCa's unimodal text decoder: causal, CLIP's vocabulary, a learned CLS behind the text for the pooled vector.

    The tokens are those of the text without the CLS, so that a captioning head can go on from them. CLS has a
    position of its own, whatever the padding: a text's embedding does not depend on its neighbours in the batch.
    """

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings of the transformer."""

        context_length: int = 76
        """L without the CLS; longer texts are cut."""
        width: int = 768
        """C."""
        layers: int = 12
        """Layers."""
        heads: int = 12
        """Attention heads; must divide width."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if config.width % config.heads:
            raise ConfigError(f"heads {config.heads} must divide width {config.width}")
        if config.context_length < 3:
            raise ConfigError(f"context_length {config.context_length} leaves no room for a word; use at least 3")
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import TextTransformer

        self.tokenizer = SimpleTokenizer(context_length=config.context_length)
        self.context_length, self.vocab_size = config.context_length, self.tokenizer.vocab_size
        self.start, self.end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        self.heads = config.heads
        # Its layers, but not its forward: that one takes every id 0 for padding, and 0 is "!" in front of a sign.
        self.tower: Any = TextTransformer(
            context_length=config.context_length,
            vocab_size=self.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            embed_cls=True,
            output_dim=None,
        )
        self.dim = config.width
        self.finish(config, pretrained=False)

    def transform(self, *, train: bool) -> CoCaTransform:
        """The same in training and evaluation."""
        return CoCaTransform(self.tokenizer, self.context_length)

    def example(self) -> dict[str, Tensor]:
        """An empty text."""
        transform, device = self.transform(train=False), self.tower.cls_emb.device
        return {name: t.to(device) for name, t in transform.collate([transform("")]).items()}

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """{ids [B, L], lengths [B]} -> [B, C], [B, L, C]."""
        ids, lengths = x["ids"], x["lengths"]
        cls = (self.tower.cls_emb + self.tower.positional_embedding[-1]).expand(len(ids), 1, -1)
        hidden = torch.cat([self._embed(ids), cls], 1)
        visible = visible_to(lengths, ids.shape[1])
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~visible, -torch.inf)
        hidden = self.tower.transformer(hidden, attn_mask=mask.repeat_interleave(self.heads, 0))
        return self.tower.ln_final(hidden[:, -1]), hidden[:, :-1]

    def prefix(self, ids: Tensor) -> Tensor:
        """Unfinished texts without padding, int64 [B, L] -> the tokens [B, L, C] that `forward` gives there.

        No token sees what follows it, so the end and the CLS need not be known.
        """
        mask = self.tower.attn_mask[: ids.shape[1], : ids.shape[1]]
        return self.tower.transformer(self._embed(ids), attn_mask=mask)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids without start and end."""
        return self.tokenizer.decode(list(ids)).strip()

    def _embed(self, ids: Tensor) -> Tensor:
        return self.tower.token_embedding(ids) + self.tower.positional_embedding[: ids.shape[1]]


def visible_to(lengths: Tensor, length: int) -> Tensor:
    """[B, L + 1, L + 1] bool: may the query (second axis) look at the key (third axis)? The last is the CLS.

    Texts are causal and padding is hidden from all. The CLS sees its text and itself; open_clip's mask for its
    released CoCa weights is one place off, which shows the CLS one padding token and hides it from itself.
    """
    places = torch.arange(length + 1, device=lengths.device)
    causal = places[:, None] >= places
    key = (places < lengths[:, None]) | (places == length)
    # Padding looks at the text before it: a row of the softmax without any key would be undefined.
    return causal & key[:, None, :]
