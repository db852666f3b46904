"""Networks over frames, for sounds and signals: a convolutional one and a transformer, both blind to padding.

Their norms work on single frames, and what is masked is zero wherever frames meet: no sample sees another, and none its
padding. Letters: B rows, F frames, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn


def masked_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """[B, F, W] that is zero where masked, [B, F] -> the mean of what is there, [B, W]."""
    return frames.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class FrameConvNet(nn.Module):
    """Stages of a strided convolution and residual blocks: a ResNet in one dimension, with the blocks of ConvNeXt.

    ResNet: He et al. 2016, arXiv:1512.03385. A block is a depthwise convolution and two layers on each frame (Liu et
    al. 2022, arXiv:2201.03545).
    """

    def __init__(self, inputs: int, widths: Sequence[int], blocks: Sequence[int], *, kernel: int = 5) -> None:
        """`inputs` numbers per frame; each stage halves the frames, has a width, and so many blocks."""
        super().__init__()
        self.down = nn.ModuleList(
            nn.Conv1d(a, b, kernel, stride=2, padding=kernel // 2)
            for a, b in zip([inputs, *widths], widths, strict=False)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(_Block(width) for _ in range(count)) for width, count in zip(widths, blocks, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1])

    def group_matcher(self, *, coarse: bool) -> Callable[[str], tuple[int, int]]:
        """Parameter -> its place in the order of layers, by timm's convention (`encoders.depth`)."""
        counts = [len(cast(nn.ModuleList, stage)) for stage in self.stages]

        def place(name: str) -> tuple[int, int]:
            part, *rest = name.split(".")
            if part == "norm":
                return len(counts) - 1, counts[-1] - 1
            return int(rest[0]), -1 if part == "down" else int(rest[1])

        return place

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, inputs] that is zero where masked, [B, F] -> [B, F / 2^stages, W], zero where masked; its mask."""
        x = frames.transpose(1, 2)
        for down, stage in zip(self.down, self.stages, strict=True):
            mask = mask[:, ::2]
            x = nn.functional.gelu(down(x)) * mask[:, None]
            for block in stage:  # pyright: ignore[reportGeneralTypeIssues]
                x = block(x, mask)
        return self.norm(x.transpose(1, 2)) * mask[:, :, None], mask


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """[B, W, F] -> [B, W, F]; what is padded stays zero, or else it would leak back."""
        return frames + self.layers(self.mix(frames).transpose(1, 2)).transpose(1, 2) * mask[:, None]


class FrameTransformer(nn.Module):
    """A pre-norm transformer encoder (Vaswani et al. 2017, arXiv:1706.03762) on tokens that know their places."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        # Nested tensors would drop the tail that all rows pad, and with it the shape that callers rely on.
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B, F, W], [B, F] -> [B, F, W], zero where masked."""
        return self.layers(tokens, src_key_padding_mask=~mask) * mask[:, :, None]


def sines(count: int, width: int) -> Tensor:
    """[count, width]: sines and cosines of the place, from period 2 pi to 20,000 pi (Vaswani et al., sec. 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(count)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :width]
