"""The smallest real things: pictures, shards of them, a model, and the run folder that holds it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import Configurable, to_dict
from mmcontrast.encoders import MultiEncoder, TextTransformer, ViT
from mmcontrast.shard_writer import Sample, ShardWriter

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 60),
    "blue": (30, 60, 220),
    "yellow": (230, 220, 40),
    "white": (245, 245, 245),
    "black": (10, 10, 10),
}
SHAPES = ("square", "bar", "corner")


def png(colour: str, shape: str = "square", *, size: int = 20, seed: int = 0) -> bytes:
    """A noisy picture of a coloured shape."""
    noise = np.random.default_rng(seed).integers(0, 60, (size, size, 3))
    picture = 100 + noise
    part = {
        "square": (slice(4, 16), slice(4, 16)),
        "bar": (slice(8, 12), slice(0, 20)),
        "corner": (slice(0, 10),) * 2,
    }
    picture[part[shape]] = np.array(COLOURS[colour])
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def samples(count: int = 18, *, seed: int = 0) -> list[Sample]:
    """Samples with picture, text and labels; the pictures differ, texts come back every 18 samples."""
    kinds = [(c, s) for s in SHAPES for c in COLOURS]
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    return [
        Sample(
            f"{i:06d}",
            {
                "png": png(colour, shape, seed=seed + i),
                "txt": f"a {colour} {shape}",
                "json": {"label": colour, "shape": shape},
            },
        )
        for i, (colour, shape) in enumerate(chosen)
    ]


def write_shards(out: Path, content: Sequence[Sample], *, per_shard: int = 1000) -> str:
    """Shards of some samples; returns the folder as the commands take it."""
    with ShardWriter(out, max_samples=per_shard) as writer:
        for sample in content:
            writer.write(sample)
    return str(out)


def vit(**settings: Any) -> ViT.Config:
    """A vision transformer of one layer."""
    defaults: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    return ViT.Config(**(defaults | settings))


def text_transformer(**settings: Any) -> TextTransformer.Config:
    """A text transformer of one layer."""
    defaults: dict[str, Any] = {"context_length": 10, "width": 16, "layers": 1, "heads": 2}
    return TextTransformer.Config(**(defaults | settings))


def model_config(**settings: Any) -> MultiEncoder.Config:
    """Image and text in a space of 8 dimensions."""
    defaults: dict[str, Any] = {"encoders": {"image": vit(), "text": text_transformer()}, "dim": 8}
    return MultiEncoder.Config(**(defaults | settings))


def write_run(folder: Path, config: MultiEncoder.Config | None = None, *, seed: int = 0, step: int = 1) -> Path:
    """A run folder with an untrained model, as the trainer leaves one; returns the folder."""
    config = config or model_config()
    torch.manual_seed(seed)
    model: MultiEncoder = config.build()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": to_dict(config)}), "utf-8")
    model.save_assets(folder / "assets")
    Checkpoints.Config(background=False).build(folder).save(step, {"model": model.state_dict()}, {})
    return folder


class Sum(Configurable):
    """An evaluator that says which weights it was given."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Nothing to set."""

    def __init__(self, config: Config) -> None:
        pass

    def run(self, model: MultiEncoder) -> dict[str, float]:
        return {"sum": checksum(model.state_dict())}


def checksum(tensors: dict[str, Tensor]) -> float:
    return float(sum(t.double().abs().sum() for t in tensors.values()))
