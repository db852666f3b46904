"""What an encoder is: one modality, from a decoded sample to a vector.

Letters: B rows, C width of the tower, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.encoders.depth import layers
from mmcontrast.encoders.lora import Lora, check_adapters


class Transform:
    """Decoded sample -> model input. It runs in loader workers, so it holds no weights."""

    kind: str = ""
    """Kind of modality (`mmcontrast.shards.FORMATS`): decides the decoder and the members that are read."""

    def __call__(self, value: Any) -> Any:
        """One decoded sample -> one model input."""
        raise NotImplementedError

    def begin(self, value: Any) -> Callable[[], Any]:
        """Make all random draws, and return what makes the model input: that may run in another thread.

        By default everything is done at once. A transform that has much to compute after its draws overrides this,
        and is `begin(value)()` itself.
        """
        return partial(_given, self(value))

    def cut(self, value: Any, made: Any) -> bool:
        """Whether the model input lacks a part of the sample for its length; what is cut is counted and reported."""
        return False

    def collate(self, values: Sequence[Any]) -> Any:
        """Model inputs of several samples -> a tensor or a mapping of tensors, [B, ...] each."""
        return torch.stack(list(values))


def _given(value: Any) -> Any:
    return value


class Encoder(nn.Module, Configurable):
    """One modality's tower.

    An encoder must treat samples independently, since the gradient cache cuts batches at will. Batch norm
    therefore always runs on stored statistics, which a tower has only if it was pretrained.

    Attributes:
        kind: kind of modality (`mmcontrast.shards.FORMATS`).
        dim: C, the width of the pooled output.
        fresh: prefixes of the names of parameters that were never trained before; LoRA leaves them to train as a whole.
    """

    kind: str
    dim: int
    fresh: Sequence[str] = ()

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every encoder has."""

        freeze: tuple[str, ...] = ()
        """Prefixes of parameter names that do not train; "all" also stops its dropout."""
        lora: Lora.Config = field(default_factory=Lora.Config)
        """Adapters of low rank, which alone train."""
        train_top: int | None = None
        """Layers, from the top, that train (`encoders.depth`); 0 is `freeze` of all, None trains every one."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.frozen = "all" in config.freeze or config.train_top == 0

    def transform(self, *, train: bool) -> Transform:
        """How this tower's samples are prepared; with augmentation in training."""
        raise NotImplementedError

    def example(self) -> Any:
        """One valid input row, [1, ...]: stands in where a rank has no row of the modality."""
        raise NotImplementedError

    def shorten(self, x: Any) -> Any:
        """Inputs [B, ...] without what no pooled output depends on, such as padding behind the longest text's end."""
        return x

    def forward(self, x: Any) -> tuple[Tensor, Tensor | None]:
        """Inputs [B, ...] -> pooled [B, C], and tokens [B, T, C] where the tower has them."""
        raise NotImplementedError

    def save_assets(self, folder: Path) -> None:
        """Write what, beside the weights, is needed to build this tower again without its origin."""

    def train(self, mode: bool = True) -> Encoder:
        """Training mode for all but batch norm and frozen towers."""
        super().train(mode and not self.frozen)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()
        return self

    def finish(self, config: Config, *, pretrained: bool) -> None:
        """Last line of a subclass's `__init__`: stop what is frozen, adapt, refuse batch norm without statistics.

        Raises:
            ConfigError: an untrained tower with batch norm, a `freeze` prefix that no parameter has, more layers in
                `train_top` than there are, or LoRA where nothing can be adapted.
        """
        norms = [name for name, layer in self.named_modules() if isinstance(layer, _BatchNorm)]
        if norms and not pretrained:
            raise ConfigError(
                f"{type(self).__name__} has batch norm ({norms[0]} and {len(norms) - 1} more): it mixes "
                "samples and cannot be trained from scratch under a gradient cache; give pretrained weights, "
                "or a tower without it"
            )
        for prefix in config.freeze:
            found = [p for n, p in self.named_parameters() if prefix == "all" or n.startswith(prefix)]
            if not found:
                names = sorted({n.rpartition(".")[0] for n, _ in self.named_parameters()})
                raise ConfigError(f"freeze: no parameter starts with {prefix!r}; there are {', '.join(names[:8])} …")
            for parameter in found:
                parameter.requires_grad_(False)
        if config.train_top is not None:
            self._train_top(config.train_top)
        if config.lora.rank and (self.frozen or config.train_top is not None):
            raise ConfigError(
                "lora freezes a tower itself: leave freeze 'all' and train_top out, or set lora.rank to 0"
            )
        lora: Lora = config.lora.build()
        training = self.training
        if config.lora.rank:
            lora.adapt(self, self.fresh)
            check_adapters(self.eval(), self.example())
        self.train(training)

    def _train_top(self, count: int) -> None:
        found = layers(self)
        if not 0 <= count <= len(found):
            raise ConfigError(
                f"train_top is {count}; {type(self).__name__} has {len(found)} layers, the stem among them: "
                f"use 0 to {len(found)}"
            )
        below = {name for names in found[: len(found) - count] for name in names}
        for name, parameter in self.named_parameters():
            if name in below:
                parameter.requires_grad_(False)


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file, or a torch file read without unpickling anything but tensors.

    Raises:
        ConfigError: not there, or not such a file.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no weights file {path!r}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as weights: {error}") from None
    if isinstance(found, dict) and "state_dict" in found:
        found = cast(dict[str, Any], found)["state_dict"]
    items = cast(dict[Any, Any], found) if isinstance(found, dict) else {}
    tensors = {name: t for name, t in items.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        raise ConfigError(f"{path} holds no tensors by name")
    return tensors
