"""Image towers: what all of them share, and compact ones of our own settings, a ViT and a ConvNet.

Pictures cross the worker queue as uint8 [3, S, S] and are normalised here, on the device. Letters: B rows, S
side, C width, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from mmcontrast.config import ConfigError
from mmcontrast.decode import Box, picture_from
from mmcontrast.encoders.base import Encoder, Transform

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Logarithm of the narrowest crop's shape, and the span up to the widest, in torchvision's precision.
_LOWEST, _SLANT = np.float32(math.log(3 / 4)), np.float32(2 * math.log(4 / 3))


class ImageTransform(Transform):
    """Picture -> uint8 [3, S, S]: a random crop with changed colours in training, the centre otherwise."""

    kind = "image"

    def __init__(self, size: int, config: ImageEncoder.Config | None) -> None:
        """`config` brings the augmentation; None is for evaluation."""
        self.size, self.config = size, config
        self.jitter: Any = None
        if config is not None and (j := config.color_jitter):
            from torchvision.transforms import v2

            self.jitter = v2.ColorJitter(brightness=j, contrast=j, saturation=j)

    def __call__(self, value: Any) -> Tensor:
        """Anything that `decode.picture_from` takes."""
        return self.begin(value)()

    def begin(self, value: Any) -> Callable[[], Tensor]:
        """Draw the crop and the changes of colour."""
        picture = picture_from(value)
        size = (self.size, self.size)
        if self.config is None:
            side = min(picture.height, picture.width)
            box = ((picture.height - side) // 2, (picture.width - side) // 2, side, side)
            return partial(picture.crop, box, size)
        box = random_box(picture.height, picture.width, self.config.crop_scale)
        crop = partial(picture.crop, box, size, half_scale=self.config.half_scale)
        jitter = None if self.jitter is None else self.jitter.make_params([])
        gray = self.config.grayscale > 0 and float(torch.rand(1)) < self.config.grayscale
        return crop if jitter is None and not gray else partial(self._coloured, crop, jitter, gray)

    def _coloured(self, crop: Callable[[], Tensor], jitter: dict[str, Any] | None, gray: bool) -> Tensor:
        pixels = crop()
        if jitter is not None:
            pixels = self.jitter.transform(pixels, jitter)
        if gray:
            from torchvision.transforms.v2.functional import rgb_to_grayscale

            pixels = rgb_to_grayscale(pixels, num_output_channels=3)
        return pixels

    def collate(self, values: Sequence[Tensor]) -> Tensor:
        """-> [B, 3, S, S], channels last in memory as the crops are."""
        # Torch's own stacks at once where the trainer will read it, in memory that a worker shares.
        return default_collate([value.permute(1, 2, 0) for value in values]).permute(0, 3, 1, 2)


def random_box(height: int, width: int, scale: tuple[float, float]) -> Box:
    """A crop of a random share and shape, the same as torchvision's `RandomResizedCrop` draws (3/4 to 4/3).

    Inception's augmentation (Szegedy et al. 2015, arXiv:1409.4842, section 6), in a fifth of the time.
    """
    low, high = np.float32(scale[0]), np.float32(scale[1] - scale[0])
    for _ in range(10):
        share, slant = torch.rand(2).numpy()
        area = height * width * float(share * high + low)
        ratio = float(np.exp(slant * _SLANT + _LOWEST))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ())), h, w
    # Too long or too high for any: the middle, of the nearest shape.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


class ImageEncoder(Encoder):
    """Normalisation, augmentation, inputs and attention pooling that all image towers share.

    A subclass has `tower_outputs`, and calls `pool_by_attention` when its tower is built.
    """

    kind = "image"
    fresh = ("pooler.",)

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        """Settings that every image tower has."""

        crop_scale: tuple[float, float] = (0.9, 1.0)
        """Share of the picture that a random training crop keeps, from and to."""
        color_jitter: float = 0.0
        """Largest relative change of brightness, contrast and saturation in training."""
        grayscale: float = 0.0
        """Share of the training pictures that lose their colour."""
        half_scale: bool = False
        """Decode a JPEG at half its resolution in training where the crop is at least twice the tower's size.
        Photographs of 640 x 480 then take a fifth less time, at 37 to 45 dB from the exact pixels of the crop."""
        attention_pool: bool = False
        """Pool the tokens by attention of one learned query, then an MLP (MAP, Zhai et al. 2022, arXiv:2106.04560,
        section 3.2), instead of as the tower pools. The pooler is new, whatever weights the tower has."""

    def __init__(self, config: Config, *, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config)
        if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale {config.crop_scale} must rise within 0..1")
        self.image_config, self.size = config, size
        self.pooler: nn.Module | None = None
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None] * 255, persistent=False)

    def transform(self, *, train: bool) -> ImageTransform:
        """Augmentation in training, the centre square otherwise."""
        return ImageTransform(self.size, self.image_config if train else None)

    def example(self) -> Tensor:
        """A black picture."""
        return torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=self.mean.device)

    def tower_outputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C] as the tower pools, and [B, T, width] where it gives tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], and [B, T, width] where the tower gives tokens."""
        pooled, tokens = self.tower_outputs(x)
        return pooled if self.pooler is None else self.pooler(tokens), tokens

    def pool_by_attention(self) -> None:
        """Put the attention in the place of the tower's pooling, whose own weights stop training.

        Raises:
            ConfigError: the tower gives no tokens.
        """
        from timm.layers.attention_pool import AttentionPoolLatent

        with torch.enable_grad():
            _, tokens = self.eval().tower_outputs(self.example())
            if tokens is None:
                raise ConfigError(f"attention_pool: {type(self).__name__} gives no tokens that could be pooled")
            tokens.sum().backward()
        for parameter in self.parameters():  # no gradient would reach these, for which DDP waits
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad(set_to_none=True)
        width = self.dim = tokens.shape[2]
        heads = next(h for h in range(max(1, width // 64), 0, -1) if width % h == 0)
        self.pooler = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
        self.train()

    def normalise(self, x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """uint8 [B, 3, S, S] in any layout -> the tower's range, in the layout that it works in."""
        found = torch.empty(x.shape, dtype=self.mean.dtype, device=x.device, memory_format=layout)
        # Layout, type and difference in one pass, and no further memory: on a CPU new pages cost more than the sums.
        return torch.sub(x, self.mean, out=found).div_(self.std)


class ViT(ImageEncoder):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) of any size, by open_clip."""

    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        """Settings of the transformer."""

        image_size: int = 224
        """Side of the square input, in pixels."""
        patch_size: int = 16
        """Side of a patch; must divide image_size."""
        width: int = 384
        """C."""
        layers: int = 12
        """Blocks."""
        heads: int = 6
        """Attention heads; must divide width."""
        mlp_ratio: float = 4.0
        """Width of the hidden layer of a block, relative to width."""
        patch_dropout: float = 0.0
        """Share of the patches that are dropped in training."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config, size=config.image_size, mean=CLIP_MEAN, std=CLIP_STD)
        if config.image_size % config.patch_size:
            raise ConfigError(f"patch_size {config.patch_size} must divide image_size {config.image_size}")
        if config.width % config.heads:
            raise ConfigError(f"heads {config.heads} must divide width {config.width}")
        from open_clip.transformer import VisionTransformer

        self.tower = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            patch_dropout=config.patch_dropout,
            output_dim=config.width,
            output_tokens=True,
        )
        self.tower.proj = None  # the projection to the shared space is MultiEncoder's
        self.dim = config.width
        if config.attention_pool:
            self.pool_by_attention()
        self.finish(config, pretrained=False)

    def tower_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> [B, C] of the CLS, [B, T, C]."""
        return self.tower(self.normalise(x))


class ConvNet(ImageEncoder):
    """A ConvNeXt (Liu et al. 2022, arXiv:2201.03545) of any size, by timm; its norms are of each sample alone."""

    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        """Settings of the network."""

        image_size: int = 224
        """Side of the square input, in pixels."""
        patch_size: int = 4
        """Side of the patches that the first layer embeds; each further stage halves the map."""
        widths: tuple[int, int, int, int] = (48, 96, 192, 384)
        """Width of each of the four stages; the last is C."""
        blocks: tuple[int, int, int, int] = (2, 2, 4, 2)
        """Blocks of each stage."""
        drop_path: float = 0.0
        """Largest share of the rows for which training leaves a block out; it rises with the depth."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config, size=config.image_size, mean=CLIP_MEAN, std=CLIP_STD)
        widths, blocks = config.widths, config.blocks
        if len(widths) != 4 or len(blocks) != 4 or min(*widths, *blocks) < 1:
            raise ConfigError(f"widths {widths} and blocks {blocks} must be four numbers of at least 1, one per stage")
        if config.patch_size < 1 or config.image_size < 8 * config.patch_size:
            raise ConfigError(
                f"patch_size is {config.patch_size} and image_size {config.image_size}; give at least 1, and 8 patches"
            )
        if not 0 <= config.drop_path < 1:
            raise ConfigError(f"drop_path {config.drop_path} must be in 0..1 (without 1)")
        from timm.models.convnext import ConvNeXt

        self.tower: Any = ConvNeXt(
            num_classes=0, depths=blocks, dims=widths, patch_size=config.patch_size, drop_path_rate=config.drop_path
        ).to(memory_format=torch.channels_last)
        self.dim = widths[-1]
        if config.attention_pool:
            self.tower.reset_classifier(0, "")
            self.pool_by_attention()
        self.finish(config, pretrained=False)

    def tower_outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [B, 3, S, S] -> the mean [B, C], the last map [B, T, C]; normed where attention pools."""
        features = self.tower.forward_features(self.normalise(x, torch.channels_last))
        pooled = self.tower.forward_head(features)
        return pooled, (features if pooled.ndim == 2 else pooled).flatten(2).transpose(1, 2)
