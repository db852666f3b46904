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
from mmcontrast.encoders.image import open_clip_model


class TokenTransform(Transform):
    """str -> int64 [T], padded to the context length, by an open_clip tokenizer."""

    kind = "text"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._encode = tokenizer, encode_by(tokenizer)

    def __call__(self, value: Any) -> Tensor:
        """[T]."""
        if self._encode is None:
            return self.tokenizer([str(value)])[0]
        length = int(self.tokenizer.context_length)
        ids = [self.tokenizer.sot_token_id, *self._encode(str(value))[: length - 2], self.tokenizer.eot_token_id]
        return torch.tensor(ids + [0] * (length - len(ids)))


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T] -> [B, C], [B, T, C]."""
        return self.tower(x)


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
        clip, _ = open_clip_model(config.architecture, None if restore else config.weights, custom_text=True)
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T] -> [B, C], and [B, T, C] where the architecture gives tokens."""
        found = self.tower(x)
        return found if isinstance(found, tuple) else (found, None)


class HFTransform(Transform):
    """str -> token ids, padded to the longest of a batch, by a transformers tokenizer."""

    kind = "text"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, value: Any) -> list[int]:
        """As many ids as the text has."""
        return self.tokenizer(str(value), truncation=True, max_length=self.max_length)["input_ids"]

    def collate(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """-> input_ids and attention_mask, int64 [B, T]."""
        padded = self.tokenizer.pad({"input_ids": list(values)}, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


class HFText(Encoder):
    """Any text model of transformers with its tokenizer, pooled by mean, first or last token."""

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Which model, and how it is pooled."""

        model: str
        """Folder of a transformers model and tokenizer, or a name that transformers can find."""
        pool: Literal["mean", "first", "last"] = "mean"
        """Mean over tokens, the first (BERT's CLS) or the last that is no padding."""
        max_length: int = 77
        """T at most; longer texts are cut."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        # Threads of the tokenizer would deadlock forked loader workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        origin = str(restore or Path(config.model).expanduser())
        if config.model.startswith(("/", ".", "~")) and not Path(origin).is_dir():
            raise ConfigError(f"there is no folder {origin!r} with a transformers model")
        self.pool, self.max_length = config.pool, config.max_length
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(origin)
            if restore is None:
                self.tower: Any = AutoModel.from_pretrained(origin, dtype=torch.float32)
            else:
                self.tower = AutoModel.from_config(AutoConfig.from_pretrained(origin), dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise ConfigError(f"transformers cannot load {origin!r}: {str(error).splitlines()[0]}") from None
        # On the left, padding would shift positions by the longest text of a batch: samples would not be independent.
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Tokens are pooled below: parameters that no gradient reaches would make DDP stop.
        self.tower.pooler = None
        self.dim = int(self.tower.config.hidden_size)
        self.finish(config, pretrained=True)

    def transform(self, *, train: bool) -> HFTransform:
        """The same in training and evaluation."""
        return HFTransform(self.tokenizer, self.max_length)

    def example(self) -> dict[str, Tensor]:
        """One word."""
        found = self.transform(train=False).collate([self.transform(train=False)("a")])
        return {name: t.to(self.tower.device) for name, t in found.items()}

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """input_ids and attention_mask [B, T] -> [B, C], [B, T, C]."""
        tokens = self.tower(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
        mask = x["attention_mask"].to(tokens.dtype)[:, :, None]
        if self.pool == "mean":
            return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1), tokens
        at = x["attention_mask"].long()
        places = torch.arange(1, at.shape[1] + 1, device=at.device)  # from 1, for 0 is what padding gets
        # By position, not by counting: tokenizers pad on either side.
        chosen = (at * places).argmax(1) if self.pool == "last" else (at * places.flip(0)).argmax(1)
        return tokens[torch.arange(len(at), device=at.device), chosen], tokens

    def save_assets(self, folder: Path) -> None:
        """The tokenizer and the architecture, so that the run needs its origin no more."""
        self.tokenizer.save_pretrained(folder)
        self.tower.config.save_pretrained(folder)
