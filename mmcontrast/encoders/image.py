"""Image towers: a compact ViT of our own settings, any open_clip architecture, any timm model.

Pictures cross the worker queue as uint8 [3, S, S] and are normalised here, on the device. Letters: B rows, S
side, C width, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from mmcontrast.config import ConfigError, suggest
from mmcontrast.decode import Box, picture_from
from mmcontrast.encoders.base import Encoder, Transform, read_weights

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
    """Normalisation, augmentation and inputs that all image towers share."""

    kind = "image"

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

    def __init__(self, config: Config, *, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config)
        if not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale {config.crop_scale} must rise within 0..1")
        self.image_config, self.size = config, size
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
        self.finish(config, pretrained=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], [B, T, C]."""
        return self.tower(self.normalise(x))


class OpenClipImage(ImageEncoder):
    """The image tower of any open_clip architecture, its projection included."""

    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        """Which architecture, from which weights."""

        architecture: str
        """open_clip's name, such as ViT-B-32."""
        weights: str | None = None
        """File with the weights of the whole open_clip model; None starts from scratch."""
        mean: tuple[float, float, float] | None = None
        """Mean colour (0..1) that the weights were trained with (SigLIP: 0.5); None takes CLIP's."""
        std: tuple[float, float, float] | None = None
        """Deviation of the colours (0..1); None takes CLIP's."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        clip, preprocess = open_clip_model(config.architecture, None if restore else config.weights)
        mean, std = config.mean or preprocess["mean"], config.std or preprocess["std"]
        super().__init__(config, size=preprocess["size"], mean=mean, std=std)
        self.tower = clip.visual
        if hasattr(self.tower, "output_tokens"):
            self.tower.output_tokens = True
        with torch.no_grad():
            self.dim = self._split(self.tower.eval()(self.normalise(self.example())))[0].shape[1]
        self.finish(config, pretrained=bool(restore or config.weights))

    @staticmethod
    def _split(found: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        return found if isinstance(found, tuple) else (found, None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], and [B, T, C] where the architecture gives tokens."""
        return self._split(self.tower(self.normalise(x)))


class TimmImage(ImageEncoder):
    """Any timm model, pooled as timm pools it."""

    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        """Which model, from which weights."""

        model: str
        """timm's name, such as convnext_tiny."""
        weights: str | None = None
        """File with the model's weights, its classifier allowed; None starts from scratch."""
        image_size: int = 224
        """Side of the square input, in pixels."""
        channels_last: bool = True
        """Memory order of the pictures; faster for convolutions."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        import timm

        if not timm.is_model(config.model):
            raise ConfigError(f"timm has no model {config.model!r}{suggest(config.model, timm.list_models())[:400]}")
        known = timm.get_pretrained_cfg(config.model)
        # Towers with position embeddings are built for one size; the others have no such argument.
        size: Any = {"img_size": config.image_size} if known and known.fixed_input_size else {}
        tower = timm.create_model(config.model, pretrained=False, num_classes=0, **size)
        facts = cast(dict[str, Any], tower.pretrained_cfg)
        super().__init__(config, size=config.image_size, mean=facts["mean"], std=facts["std"])
        self.tower: Any = tower
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.tower.to(memory_format=self.layout)
        if config.weights and not restore:
            load_tower(self.tower, read_weights(config.weights), config.weights)
        with torch.no_grad():  # asked, not read off: in some families the pooled width is not `num_features`
            self.tower.eval()
            self.dim = self.forward(self.example())[0].shape[1]
        self.finish(config, pretrained=bool(restore or config.weights))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], and [B, T, width] of the last feature map or the last tokens."""
        features = self.tower.forward_features(self.normalise(x, self.layout))
        return self.tower.forward_head(features), self._tokens(features)

    def _tokens(self, features: Tensor) -> Tensor | None:
        """Families differ in what they end in: tokens [B, T, width], or a map with the width first or last."""
        width = self.tower.num_features
        if features.ndim == 3 and features.shape[2] == width:
            return features
        if features.ndim == 4 and features.shape[1] == width:
            return features.flatten(2).transpose(1, 2)
        if features.ndim == 4 and features.shape[3] == width:
            return features.flatten(1, 2)
        return None


def load_tower(tower: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Load weights by name; what the tower lacks (a classifier) is left, what the weights lack is an error.

    Other packages name the tensors of the same architecture otherwise. If no name agrees, tensors are taken
    in order, provided that every one agrees in its last name (weight, running_mean, …) and its shape.

    Raises:
        ConfigError: names the first missing or misshapen tensor.
    """
    # Counters of batch norm, which inference never reads; old files lack them.
    wanted = {n: t for n, t in tower.state_dict().items() if not n.endswith("num_batches_tracked")}
    if not wanted.keys() & weights.keys():
        found = [n for n in weights if not n.endswith("num_batches_tracked")]
        pairs = zip(wanted, found, strict=False)
        weights = {ours: weights[theirs] for ours, theirs in pairs if _last(ours) == _last(theirs)}
    for name, tensor in wanted.items():
        if name not in weights:
            raise ConfigError(f"{path} has no tensor {name!r}: it holds another model")
        if weights[name].shape != tensor.shape:
            raise ConfigError(f"{path}: {name!r} has shape {list(weights[name].shape)}, not {list(tensor.shape)}")
    tower.load_state_dict({n: weights[n] for n in wanted}, strict=False)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def open_clip_model(architecture: str, weights: str | None, *, custom_text: bool = False) -> tuple[Any, dict[str, Any]]:
    """An open_clip model and its preprocessing {size, mean, std}; nothing is fetched from a hub.

    With `custom_text` the text tower is a module of its own in every architecture.

    Raises:
        ConfigError: no such architecture, or weights that do not fit it.
    """
    import open_clip

    # Not left to open_clip: it would take `hf-hub:…` for an architecture and a known tag for a file.
    if architecture not in open_clip.list_models():
        known = open_clip.list_models()
        raise ConfigError(f"open_clip has no architecture {architecture!r}{suggest(architecture, known)[:400]}")
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(f"there is no weights file {weights!r}")
    try:
        model = open_clip.create_model(
            architecture, pretrained=weights, pretrained_text=False, force_custom_text=custom_text
        )
    except Exception as error:  # of torch, safetensors, pickle or the hub, by what is wrong
        raise ConfigError(
            f"open_clip cannot make {architecture}{f' with {weights}' if weights else ''}: {_reason(error)}"
        ) from None
    found = cast(dict[str, Any], open_clip.get_model_preprocess_cfg(model))
    size = found["size"]
    return model, found | {"size": size if isinstance(size, int) else size[0]}


def _reason(error: Exception) -> str:
    """The line of an error that names a tensor, or the first one; torch lists every tensor of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if '"' in line or "size mismatch" in line), lines[0])[:200]
