"""Image towers of others: any open_clip architecture, any timm model, with weights of a file or without.

Letters: B rows, S side, C width, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError, suggest
from mmcontrast.encoders.base import read_weights
from mmcontrast.encoders.image import ImageEncoder


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
        image_size: int | None = None
        """Side of the square input, to which position embeddings are resampled; None takes the architecture's."""
        patch_dropout: float | None = None
        """Share of the patches that are dropped in training (FLIP, Li et al. 2023, arXiv:2212.00794); None takes the
        architecture's."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        _check_share("patch_dropout", config.patch_dropout or 0.0)
        clip, preprocess = open_clip_model(
            config.architecture,
            None if restore else config.weights,
            force_image_size=config.image_size,
            force_patch_dropout=config.patch_dropout,
        )
        mean, std = config.mean or preprocess["mean"], config.std or preprocess["std"]
        super().__init__(config, size=preprocess["size"], mean=mean, std=std)
        self.tower = clip.visual
        if config.patch_dropout is not None and not hasattr(self.tower, "patch_dropout"):
            raise ConfigError(f"patch_dropout: {config.architecture} has no patches to drop; leave it out")
        if hasattr(self.tower, "output_tokens"):
            self.tower.output_tokens = True
        with torch.no_grad():
            self.dim = self.eval().tower_outputs(self.example())[0].shape[1]
        if config.attention_pool:
            self.tower.proj = None  # which only the pooled vector would go through
            self.pool_by_attention()
        self.train()
        self.finish(config, pretrained=bool(restore or config.weights))

    def tower_outputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], and [B, T, width] where the architecture gives tokens."""
        found = self.tower(self.normalise(x))
        return found if isinstance(found, tuple) else (found, None)


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
        patch_dropout: float = 0.0
        """Share of the patches that are dropped in training, in vision transformers (FLIP, Li et al. 2023,
        arXiv:2212.00794)."""
        smaller_sizes: tuple[int, ...] = ()
        """Sides that training also uses, for less work and a tower that stands other resolutions: each micro-batch is
        brought to one of them or `image_size`. For convolutions, and transformers that resample their positions."""

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        import timm

        if not timm.is_model(config.model):
            raise ConfigError(f"timm has no model {config.model!r}{suggest(config.model, timm.list_models())[:400]}")
        tower = timm_model(config, None if restore else config.weights)
        facts = cast(dict[str, Any], tower.pretrained_cfg)
        super().__init__(config, size=config.image_size, mean=facts["mean"], std=facts["std"])
        self.tower: Any = tower
        self.sizes = (*config.smaller_sizes, config.image_size)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.tower.to(memory_format=self.layout)
        with torch.no_grad():  # asked, not read off: in some families the pooled width is not `num_features`
            self.tower.eval()
            self.dim = self.tower_outputs(self.example())[0].shape[1]
            self._try_sizes(config)
        if config.attention_pool:
            self.tower.reset_classifier(0, "")
            self.pool_by_attention()
        self.finish(config, pretrained=bool(restore or config.weights))

    def _try_sizes(self, config: Config) -> None:
        for size in config.smaller_sizes:
            if not 0 < size < config.image_size:
                raise ConfigError(f"smaller_sizes: {size} must be above 0 and below image_size {config.image_size}")
            try:
                self.tower(self._resized(self.normalise(self.example()), size))
            except (AssertionError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"smaller_sizes: {config.model} does not take {size} pixels: {reason}") from None

    @staticmethod
    def _resized(x: Tensor, size: int) -> Tensor:
        return nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)

    def tower_outputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, S, S] -> [B, C], and [B, T, width] of the last feature map or the last tokens."""
        pixels = self.normalise(x, self.layout)
        if self.training and len(self.sizes) > 1:
            size = self.sizes[int(torch.randint(len(self.sizes), ()))]
            pixels = pixels if size == self.size else self._resized(pixels, size)
        features = self.tower.forward_features(pixels)
        pooled = self.tower.forward_head(features)
        # Where attention pools, the head norms alone.
        return pooled, self._tokens(features if pooled.ndim == 2 else pooled)

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


def timm_model(config: TimmImage.Config, weights: str | None) -> Any:
    """A timm model for `image_size`; weights of the model's own size are taken to it by timm (`set_input_size`).

    Raises:
        ConfigError: settings that the model does not know, or weights of another model.
    """
    import timm

    _check_share("patch_dropout", config.patch_dropout)
    settings: dict[str, Any] = {"num_classes": 0}
    known = timm.get_pretrained_cfg(config.model)
    fixed = bool(known and known.fixed_input_size)  # with position embeddings; the others have no such argument
    if config.patch_dropout:
        settings["patch_drop_rate"] = config.patch_dropout
    if config.smaller_sizes and fixed:
        settings["dynamic_img_size"] = True
    size: dict[str, Any] = {"img_size": config.image_size} if fixed else {}
    try:
        tower: Any = timm.create_model(config.model, pretrained=False, **settings, **size)
    except TypeError as error:
        ours = {"patch_drop_rate": "patch_dropout", "dynamic_img_size": "smaller_sizes"}
        named = [n for n in settings if n in str(error)]
        if not named:
            raise
        raise ConfigError(f"timm's {config.model} has no {named[0]}: leave {ours[named[0]]} out") from None
    if weights is None:
        return tower
    tensors = read_weights(weights)
    try:
        load_tower(tower, tensors, weights)
    except ConfigError as error:
        native: Any = timm.create_model(config.model, pretrained=False, **settings)
        if not size or not hasattr(native, "set_input_size"):
            raise
        try:
            load_tower(native, tensors, weights)
        except ConfigError:
            raise error from None
        native.set_input_size((config.image_size, config.image_size))
        return native
    return tower


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ConfigError(f"{name} is {share}; it must be in 0..1 (without 1)")


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


def open_clip_model(architecture: str, weights: str | None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """An open_clip model and its preprocessing {size, mean, std}; nothing is fetched from a hub.

    Settings are those of open_clip's `create_model`, such as `force_image_size`.

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
        model = open_clip.create_model(architecture, pretrained=weights, pretrained_text=False, **settings)
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
