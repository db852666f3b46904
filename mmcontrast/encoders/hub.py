"""Half a transformers model, for the text and audio towers: from a folder, a hub name, or a run's assets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmcontrast.config import ConfigError


@dataclass(frozen=True)
class Half:
    """The part of a model that reads one modality.

    Attributes:
        config: of the whole model; saved as an asset, it makes the same half again.
        tower: gives `last_hidden_state`, and `pooler_output` in some families.
        projection: from the pooled width to the space of a two-tower model (CLIP, CLAP), or None.
    """

    config: Any
    tower: Any
    projection: nn.Module | None


def origin_of(model: str, restore: Path | None) -> str:
    """Where a transformers model is loaded from: the assets of a run, a folder, or a name for the hub.

    Raises:
        ConfigError: a path at which there is no folder.
    """
    origin = str(restore or Path(model).expanduser())
    if model.startswith(("/", ".", "~")) and not Path(origin).is_dir():
        raise ConfigError(f"there is no folder {origin!r} with a transformers model")
    return origin


def load_half(
    origin: str, kind: Literal["text", "audio"], *, weights: bool, changes: Mapping[str, Any] | None = None
) -> Half:
    """The text or audio half of a model: of two towers the one, of an encoder-decoder the encoder, else the whole.

    Nothing but tensors is unpickled, and no code of a repository is run.

    Args:
        origin: folder or hub name.
        kind: which half.
        weights: load them; otherwise only the architecture is made.
        changes: settings of the model to replace where it has them.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(origin)
        # A decoder would keep keys and values of every layer, and add to them when a layer is recomputed.
        for name, value in {"use_cache": False, **(changes or {})}.items():
            if hasattr(config, name):
                setattr(config, name, value)
        if weights:
            model: Any = AutoModel.from_pretrained(origin, config=config, dtype=torch.float32)
        else:
            model = AutoModel.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise refusal(origin, error) from None
    if hasattr(model, f"{kind}_model"):
        return Half(model.config, getattr(model, f"{kind}_model"), getattr(model, f"{kind}_projection", None))
    tower = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else model
    return Half(model.config, tower, None)


def refusal(origin: str, error: Exception) -> ConfigError:
    """The error of a model, tokenizer or feature extractor that transformers cannot load."""
    return ConfigError(f"transformers cannot load {origin!r}: {(str(error).splitlines() or [''])[0][:300]}")
