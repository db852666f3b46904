"""A text tower without order: the sum of its words' embeddings, in any language and script.

Letters: B rows, T words, C width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.randomness import fold_seed

_HASHES = 2


class WordTransform(Transform):
    """str -> the rows of its words, int64 [words, 2]; what is not letter or digit parts words, case counts not."""

    kind = "text"

    def __init__(self, buckets: int, max_words: int) -> None:
        self.buckets, self.max_words = buckets, max_words
        self.known: dict[str, list[int]] = {}

    def __call__(self, value: Any) -> Tensor:
        """[words, 2], rows from 1; at least one word, so that a text of signs alone still has an embedding."""
        words = _words(value)[: self.max_words] or [""]
        return torch.tensor([self._rows(word) for word in words])

    def cut(self, value: Any, made: Tensor) -> bool:
        """Whether the last words were lost."""
        return len(made) == self.max_words and len(_words(value)) > self.max_words

    def _rows(self, word: str) -> list[int]:
        if word not in self.known:
            if len(self.known) >= 100_000:
                self.known.clear()
            self.known[word] = [1 + fold_seed("word", word, k) % self.buckets for k in range(_HASHES)]
        return self.known[word]

    def collate(self, values: Sequence[Tensor]) -> Tensor:
        """[B, T, 2], padded with row 0."""
        return nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def _words(value: Any) -> list[str]:
    return re.findall(r"\w+", str(value).lower())


class BagOfWords(Encoder):
    """The sum of word embeddings, each the sum of two hashed rows (Svenstrup et al. 2017, arXiv:1709.03933).

    No vocabulary is needed, and two words are one only if both of their hashes agree.
    """

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings of the bag."""

        buckets: int = 16_384
        """Rows of the table of embeddings."""
        width: int = 256
        """C."""
        max_words: int = 64
        """Words after these are not read."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        for name in ("buckets", "width", "max_words"):
            if getattr(config, name) < 1:
                raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
        # Torch's start, of unit variance: Adam's steps do not shrink with the rows, and would turn smaller ones about
        # before the other towers can follow.
        self.table = nn.EmbeddingBag(1 + config.buckets, config.width, mode="sum", padding_idx=0)
        self.buckets, self.max_words = config.buckets, config.max_words
        self.dim = config.width
        self.finish(config, pretrained=False)

    def transform(self, *, train: bool) -> WordTransform:
        """The same in training and evaluation."""
        return WordTransform(self.buckets, self.max_words)

    def example(self) -> Tensor:
        """One word."""
        return self.transform(train=False)("a")[None].to(self.table.weight.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [B, T, 2] -> [B, C]."""
        return self.table(x.flatten(1)), None
