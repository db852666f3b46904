"""Captioning (CoCa, Yu et al. 2022, arXiv:2205.01917): a text tower's own tokens go on to be a decoder of pictures.

The text tower's layers are the unimodal half of the decoder: causal, without a look at the picture. This head is the
multimodal half: per layer, causal self-attention over the text, then cross-attention to the tokens of the picture.
Position t predicts token t + 1. The loss is the sum of -log P(token | those before it, picture) over the tokens after
the first of every text, its end among them; what lies behind the end is known by the text's length, for the padding
id can be a token of the vocabulary (0 is "!" in CLIP's, and texts such as "!©" hold it).

Letters: B rows, L positions of a text, T tokens of a picture, C width, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError
from mmcontrast.heads.base import Head, Tower, in_common
from mmcontrast.heads.generation import Caption, Decoding, generate
from mmcontrast.heads.vocabulary import summed_cross_entropy


@runtime_checkable
class CausalText(Protocol):
    """A text tower that a caption can be written with; its inputs are {ids [B, L], lengths [B]}."""

    vocab_size: int
    start: int
    end: int
    context_length: int

    def prefix(self, ids: Tensor) -> Tensor:
        """Unfinished texts without padding, int64 [B, L] -> tokens [B, L, C], as `forward` gives them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids without start and end."""
        ...


class Captioning(Head):
    """CoCa's multimodal decoder and caption loss; in the paper its weight is 2 beside 1 for the contrastive term."""

    @dataclass(kw_only=True)
    class Config(Head.Config):
        """Which towers, and the decoder's size; its width is theirs."""

        source: str = "image"
        """Modality that is described; its tower must give tokens."""
        text: str = "text"
        """Modality of the captions; its tower must be causal, such as CoCaText."""
        layers: int = 12
        """Layers; as many as the text tower has, in the paper."""
        heads: int = 12
        """Attention heads; must divide the width."""

    def __init__(self, config: Config, towers: Mapping[str, Tower]) -> None:
        """Build the decoder for the model's towers, by modality.

        Raises:
            ConfigError: a modality that the model lacks, or towers that do not fit.
        """
        super().__init__(config)
        for name in (config.source, config.text):
            if name not in towers:
                raise ConfigError(f"the captioning head reads the modality {name!r}; the model has {', '.join(towers)}")
        tower = towers[config.text]
        if not isinstance(tower, CausalText):
            raise ConfigError(
                f"captions need a causal text tower such as CoCaText; {config.text!r} is a {type(tower).__name__}"
            )
        widths = {name: _token_width(name, towers[name]) for name in (config.source, config.text)}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ConfigError(f"captions need tokens of one width, but found {found}; a CascadePool can set it")
        width = widths[config.text]
        if config.layers < 1 or width % config.heads:
            raise ConfigError(f"layers {config.layers} must be at least 1, heads {config.heads} divide width {width}")
        from open_clip.transformer import MultimodalTransformer

        self.source, self.text = config.source, config.text
        self.modalities = (config.source, config.text)
        self.decoder: Any = MultimodalTransformer(
            width=width, layers=config.layers, heads=config.heads, context_length=tower.context_length
        )
        # Made of uninitialised memory there; and applied below to real targets only, never to padding.
        self.decoder.text_projection = None
        self.vocabulary = nn.Linear(width, tower.vocab_size, bias=False)
        self._initialise(width, config.layers)

    def _initialise(self, width: int, layers: int) -> None:
        """As in CLIP's text transformer, whose branches shrink with the depth (two layers of three branches here)."""
        inner = width**-0.5 * (2 * layers) ** -0.5
        for block in [*self.decoder.resblocks, *self.decoder.cross_attn]:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=inner)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=inner)
        nn.init.normal_(self.vocabulary.weight, std=width**-0.5)

    def count(self, batch: Batch) -> Tensor:
        """Target tokens of the rows that have both picture and caption."""
        places = in_common(batch.rows, self.modalities)[self.text]
        if not len(places):
            return torch.zeros((), dtype=torch.int64, device=batch.ids.device)
        return (batch.inputs[self.text]["lengths"][places] - 1).sum()

    def forward(self, inputs: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> Tensor:
        """Tokens [B, T, C] and [B, L, C] -> the sum of the targets' cross-entropies."""
        ids, lengths = inputs[self.text]["ids"], inputs[self.text]["lengths"]
        hidden = self.decoder(tokens[self.source], tokens[self.text][:, :-1])  # [B, L - 1, C]
        real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[:, None]
        return summed_cross_entropy(hidden[real], self.vocabulary.weight, ids[:, 1:][real])

    def generate(self, tower: CausalText, source: Tensor, decoding: Decoding, *, first_row: int = 0) -> list[Caption]:
        """Write a caption for each row of `source`, the tokens [B, T, C] of the described modality.

        Args:
            tower: the text tower that this head was built for.
            source: one row per caption.
            decoding: how words are chosen.
            first_row: place of the first row among all that are described, which the random draws depend on.
        """

        def next_logits(ids: Tensor, rows: Tensor) -> Tensor:
            hidden = self.decoder(source[rows], tower.prefix(ids))[:, -1]
            return self.vocabulary(hidden).float()

        return generate(
            next_logits,
            len(source),
            decoding,
            start=tower.start,
            end=tower.end,
            room=tower.context_length - 2,
            first_row=first_row,
            device=source.device,
        )


def _token_width(name: str, tower: Tower) -> int:
    with torch.no_grad():  # asked, not read off: towers name it in many ways
        _, tokens = tower(tower.example())
    if tokens is None:
        raise ConfigError(f"captions need tokens, and the tower {name!r} ({type(tower).__name__}) gives none")
    return tokens.shape[2]
