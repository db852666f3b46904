"""Tiny shards and a tiny recipe: coloured shapes with captions, towers that train in seconds."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import Configurable
from mmcontrast.data import Stream
from mmcontrast.encoders import MultiEncoder, TextTransformer, ViT
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.optim import AdamW
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.trainer import Trainer

COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "cross", "bar")


def picture(color: str, shape: str) -> bytes:
    image = Image.new("RGB", (40, 40), "white")
    draw = ImageDraw.Draw(image)
    match shape:
        case "circle":
            draw.ellipse((8, 8, 32, 32), fill=color)
        case "square":
            draw.rectangle((8, 8, 32, 32), fill=color)
        case "cross":
            draw.line((6, 6, 34, 34), fill=color, width=6)
            draw.line((34, 6, 6, 34), fill=color, width=6)
        case _:
            draw.rectangle((4, 17, 36, 24), fill=color)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_shapes(folder: Path, *, per_shard: int = 7, missing: bool = False) -> Path:
    """24 samples in uneven shards; with `missing`, some lack their picture and some their caption."""
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
            members: dict[str, bytes | str | dict[str, str]] = {"json": {"label": shape, "color": color}}
            if not (missing and number % 5 == 1):
                members["png"] = picture(color, shape)
            if not (missing and number % 7 == 2):
                members["txt"] = f"a {color} {shape}"
            writer.write(Sample(f"{number:04d}", members))
    return folder


class Trouble(Objective):
    """At one step, and on one rank or on all, a loss that is not finite, or a signal that comes from outside."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        what: Literal["nan", "SIGTERM", "SIGUSR1"] = "nan"
        step: int = 2
        rank: int | None = None

    modalities = candidates = ("image",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def prepare(self, z: object, present: object, ids: Tensor, step: int) -> dict[str, Tensor]:
        here = dist.get_rank() if dist.is_initialized() else 0
        now = step == self.config.step and self.config.rank in (None, here)
        if now and self.config.what != "nan":
            os.kill(os.getpid(), getattr(signal, self.config.what))
        return {"factor": torch.tensor(float("nan") if now and self.config.what == "nan" else 0.0)}

    def partial(self, block: Block) -> Totals:
        return Totals({"loss": (block.anchors["image"] * block.aux["factor"]).sum()})

    def finalize(self, totals: Totals, present: object) -> Tensor:
        return totals.sums["loss"]

    def update(self, z: object, ids: Tensor) -> None:
        self.seen += 1


class Scripted(Configurable):
    """An evaluator that says what it was told to say, one value after the other."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        values: tuple[float, ...] = ()

    def __init__(self, config: Config) -> None:
        self.left = list(config.values)

    def run(self, model: object) -> dict[str, float]:
        return {"score": self.left.pop(0)}


def recipe() -> Trainer.Config:
    return Trainer.Config(
        model=MultiEncoder.Config(
            encoders={
                "image": ViT.Config(
                    image_size=32,
                    patch_size=8,
                    width=32,
                    layers=1,
                    heads=2,
                    patch_dropout=0.25,
                    color_jitter=0.1,
                ),
                "text": TextTransformer.Config(context_length=8, width=32, layers=1, heads=2),
            },
            dim=16,
        ),
        data=Stream.Config(shards=("shapes",), workers=0),
        objectives={"clip": InfoNCE.Config()},
        # The bias of attention's keys has no gradient but rounding, which a smaller eps would turn into steps.
        optimizer=AdamW.Config(lr=1e-3, eps=1e-5),
        checkpoint=Checkpoints.Config(every=2, keep=10),
        steps=8,
        global_batch=8,
        micro_batch=2,
        tower_micro_batch={"text": 4},
        keep_graphs=2,
        block=3,
        log_every=1,
    )
