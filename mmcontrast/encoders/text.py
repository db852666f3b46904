"""Text towers: a compact transformer with CLIP's vocabulary, any open_clip tower, any transformers model.

Letters: B rows, T tokens, C width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.clip_tokens import encode_by
from mmcontrast.encoders.hub import load_half, origin_of, refusal
from mmcontrast.encoders.image_models import open_clip_model


class TokenTransform(Transform):
    """str -> int64 [T], padded to the context length, by an open_clip tokenizer."""

    kind = "text"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._encode = tokenizer, encode_by(tokenizer)
        self.length = int(tokenizer.context_length)

    def __call__(self, value: Any) -> Tensor:
        """[T]."""
        if self._encode is None:
            return self.tokenizer([str(value)])[0]
        ids = [self.tokenizer.sot_token_id, *self._encode(str(value))[: self.length - 2], self.tokenizer.eot_token_id]
        return torch.tensor(ids + [0] * (self.length - len(ids)))

    def cut(self, value: Any, made: Tensor) -> bool:
        """Whether the end of the text was lost; not told for other tokenizers than CLIP's."""
        if self._encode is None or int(made[-1]) != self.tokenizer.eot_token_id:
            return False
        return len(self._encode(str(value))) > self.length - 2


class TokenTower:
    """An open_clip text tower that can also read texts without their padding, where what it pools does not see it.

    That is a causal tower that pools the end of text, be it the largest token (CLIP) or a named one. Others read their
    padding, and get all of it.
    """

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        pool, causal = getattr(tower, "pool_type", None), getattr(tower, "attn_mask", None) is not None
        # The class token of CoCa stands behind the padding.
        self.shortens = causal and pool in ("argmax", "eos") and getattr(tower, "cls_emb", 0) is None

    def shorten(self, x: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T'], up to the last end of text."""
        if not self.shortens:
            return x
        ends = (x if self.tower.pool_type == "argmax" else (x == self.tower.eos_id).int()).argmax(1)
        return x[:, : int(ends.max()) + 1]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T] -> [B, C], and [B, T, C] where the architecture gives tokens."""
        from open_clip.transformer import text_global_pool

        tower, length = self.tower, x.shape[1]
        if not self.shortens or length == tower.context_length:
            found = tower(x)
            return found if isinstance(found, tuple) else (found, None)
        # Its own `forward`, which does not cut its mask. The mask is not swapped: other threads may read with it.
        z = tower.token_embedding(x) + tower.positional_embedding[:length]
        z = z.to(tower.transformer.get_cast_dtype())
        z = tower.ln_final(tower.transformer(z, attn_mask=tower.attn_mask[:length, :length]))
        pooled = text_global_pool(z, x, pool_type=tower.pool_type, eos_token_id=tower.eos_id)
        if isinstance(tower.text_projection, torch.nn.Linear):
            pooled = tower.text_projection(pooled)
        elif tower.text_projection is not None:
            pooled = pooled @ tower.text_projection
        return pooled, z if tower.output_tokens else None


class TextTransformer(Encoder):
    """A causal text transformer (CLIP, Radford et al. 2021, arXiv:2103.00020, 2.4), CLIP's vocabulary."""

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings of the transformer."""

        context_length: int = 77
        """T; longer texts are cut."""
        width: int = 384
        """C."""
        layers: int = 12
        """Blocks."""
        heads: int = 6
        """Attention heads; must divide width."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        if config.width % config.heads:
            raise ConfigError(f"heads {config.heads} must divide width {config.width}")
        if config.context_length < 3:
            raise ConfigError(f"context_length {config.context_length} leaves no room for a word; use at least 3")
        from open_clip.tokenizer import SimpleTokenizer
        from open_clip.transformer import TextTransformer as OpenClipTransformer

        self.tokenizer = SimpleTokenizer(context_length=config.context_length)
        self.tower = OpenClipTransformer(
            context_length=config.context_length,
            vocab_size=self.tokenizer.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=config.width,
            output_tokens=True,
        )
        self.tower.text_projection = None  # the projection to the shared space is MultiEncoder's
        self.dim = config.width
        self.finish(config, pretrained=False)

    def transform(self, *, train: bool) -> TokenTransform:
        """The same in training and evaluation."""
        return TokenTransform(self.tokenizer)

    def example(self) -> Tensor:
        """An empty text."""
        return self.tokenizer([""]).to(self.tower.token_embedding.weight.device)

    def shorten(self, x: Tensor) -> Tensor:
        """Without padding that the tower cannot see."""
        return TokenTower(self.tower).shorten(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T] -> [B, C], [B, T, C]."""
        return TokenTower(self.tower)(x)


class OpenClipText(Encoder):
    """The text tower of any open_clip architecture, its projection included."""

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Which architecture, from which weights."""

        architecture: str
        """open_clip's name, such as ViT-B-32."""
        weights: str | None = None
        """File with the weights of the whole open_clip model; None starts from scratch."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        import open_clip

        # All architectures become the class whose text tower is a module of its own; CLIP's has loose parts.
        clip, _ = open_clip_model(config.architecture, None if restore else config.weights, force_custom_text=True)
        try:
            self.tokenizer: Any = open_clip.get_tokenizer(config.architecture)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the tokenizer of {config.architecture} is not on this machine: {reason}") from None
        self.tower: Any = clip.text
        with torch.no_grad():
            self.dim = self.forward(self.example())[0].shape[1]
        self.finish(config, pretrained=bool(restore or config.weights))

    def transform(self, *, train: bool) -> TokenTransform:
        """The same in training and evaluation."""
        return TokenTransform(self.tokenizer)

    def example(self) -> Tensor:
        """An empty text."""
        return self.tokenizer([""]).to(next(self.tower.parameters()).device)

    def shorten(self, x: Tensor) -> Tensor:
        """Without padding that the tower cannot see."""
        return TokenTower(self.tower).shorten(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T] -> [B, C], and [B, T, C] where the architecture gives tokens."""
        return TokenTower(self.tower)(x)


class HFTransform(Transform):
    """str -> token ids, padded to the longest of a batch, by a transformers tokenizer."""

    kind = "text"

    def __init__(self, tokenizer: Any, max_length: int, *, prefix: str = "", eos: bool = False) -> None:
        """`prefix` goes before every text; with `eos` every text ends in the tokenizer's end of text."""
        self.tokenizer, self.max_length, self.prefix = tokenizer, max_length, prefix
        # Tokenizers of decoders (GPT-2, Llama) set no end.
        bare = tokenizer("a")["input_ids"] if eos else []
        self.end = tokenizer.eos_token_id if eos and tokenizer.eos_token_id not in bare else None

    def __call__(self, value: Any) -> list[int]:
        """As many ids as the text has, up to `max_length`."""
        most = self.max_length - (self.end is not None)
        return self._ended(self.tokenizer(self.prefix + str(value), truncation=True, max_length=most)["input_ids"])

    def ids(self, value: Any) -> list[int]:
        """All of them."""
        return self._ended(self.tokenizer(self.prefix + str(value), verbose=False)["input_ids"])

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if self.end is None else [*ids, self.end]

    def cut(self, value: Any, made: list[int]) -> bool:
        """Whether the end of the text was lost."""
        return len(made) == self.max_length and len(self.ids(value)) > self.max_length

    def collate(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """-> input_ids and attention_mask, int64 [B, T]."""
        padded = self.tokenizer.pad({"input_ids": list(values)}, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


class HFText(Encoder):
    """Any text model of transformers with its tokenizer.

    Encoders (BERT, XLM-R and other multilingual ones), decoders (GPT-2, Qwen), the encoder of an encoder-decoder (T5,
    mT5, BART), and the text tower of a two-tower model (CLIP, CLAP).
    """

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Which model, and how it is pooled."""

        model: str
        """Folder of a transformers model and tokenizer, or a name that transformers can find."""
        pool: Literal["mean", "cls", "last", "eos", "pooler"] = "mean"
        """Mean over tokens, the first (BERT's CLS), the last that is no padding, the first end of text (CLIP; decoders
        get one), or what the model itself pools. CLIP's argmax of the ids is its first end of text, "eos"."""
        projected: bool = False
        """Also apply the model's own projection to the space that it was trained in (CLIP and CLAP: with "pooler")."""
        prefix: str = ""
        """Goes before every text: what a model was trained with, such as "query: " for E5."""
        max_length: int = 77
        """T at most; longer texts are cut."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        # Threads of the tokenizer would deadlock forked loader workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoTokenizer

        if config.max_length < 3:
            raise ConfigError(f"max_length {config.max_length} leaves no room for a word; use at least 3")
        origin = origin_of(config.model, restore)
        # Layers that are dropped at random would leave weights without a gradient, for which DDP waits.
        half = load_half(origin, "text", weights=restore is None, changes={"layerdrop": 0.0, "encoder_layerdrop": 0.0})
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(origin)
        except (OSError, ValueError) as error:
            raise refusal(origin, error) from None
        self.model_config, self.tower, self.projection = half.config, half.tower, half.projection
        # On the left, padding would shift positions by the longest text of a batch: samples would not be independent.
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.text_config, self.pool = config, config.pool
        self._check(config)
        if config.pool != "pooler":
            self.tower.pooler = None  # parameters that no gradient reaches would make DDP stop
        if not config.projected:
            self.projection = None
        self.dim = self._width(config)
        self.finish(config, pretrained=True)

    @torch.no_grad()
    def _width(self, config: Config) -> int:
        """C, asked of the longest text, which a model with fewer positions cannot read."""
        self.tower.eval()
        ids = self.example()["input_ids"]
        ids = ids.repeat(1, config.max_length)[:, : config.max_length]
        try:
            return self.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0].shape[1]
        except (IndexError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:200]
            raise ConfigError(f"{config.model} cannot read max_length {config.max_length} tokens: {reason}") from None

    def _check(self, config: Config) -> None:
        if "siglip" in self.model_config.model_type:
            raise ConfigError("SigLIP's text tower reads its padding: use OpenClipText, whose architectures have it")
        if config.pool == "eos" and self.tokenizer.eos_token_id is None:
            raise ConfigError(f"pool 'eos': the tokenizer of {config.model} has no end of text; use 'mean' or 'cls'")
        if config.projected and self.projection is None:
            raise ConfigError(f"projected: {config.model} has no projection of its own")
        if config.projected and config.pool != "pooler":
            raise ConfigError(f"projected: the projection of {config.model} is of what it pools; use pool 'pooler'")

    def transform(self, *, train: bool) -> HFTransform:
        """The same in training and evaluation."""
        c = self.text_config
        return HFTransform(self.tokenizer, c.max_length, prefix=c.prefix, eos=c.pool == "eos")

    def example(self) -> dict[str, Tensor]:
        """One word."""
        found = self.transform(train=False).collate([self.transform(train=False)("a")])
        return {name: t.to(self.tower.device) for name, t in found.items()}

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """input_ids and attention_mask [B, T] -> [B, C], [B, T, C]."""
        found = self.tower(input_ids=x["input_ids"], attention_mask=x["attention_mask"])
        tokens = found.last_hidden_state
        pooled = self._pooled(found, tokens, x)
        return pooled if self.projection is None else self.projection(pooled), tokens

    def _pooled(self, found: Any, tokens: Tensor, x: Mapping[str, Tensor]) -> Tensor:
        if self.pool == "pooler":
            pooled = getattr(found, "pooler_output", None)
            if pooled is None:
                raise ConfigError(f"pool 'pooler': {self.text_config.model} pools nothing itself; use 'mean' or 'cls'")
            return pooled
        if self.pool == "mean":
            mask = x["attention_mask"].to(tokens.dtype)[:, :, None]
            return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
        at = x["attention_mask"].long()
        # By position, not by counting: tokenizers pad on either side. From 1, for 0 is what padding gets.
        places = torch.arange(1, at.shape[1] + 1, device=at.device)
        if self.pool == "eos":
            at = at * (x["input_ids"] == self.tokenizer.eos_token_id)
        chosen = (at * places).argmax(1) if self.pool == "last" else (at * places.flip(0)).argmax(1)
        return tokens[torch.arange(len(at), device=at.device), chosen]

    def save_assets(self, folder: Path) -> None:
        """The tokenizer and the architecture, so that the run needs its origin no more."""
        self.tokenizer.save_pretrained(folder)
        self.model_config.save_pretrained(folder)
