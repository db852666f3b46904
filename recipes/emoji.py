"""OpenMoji pictures and their names with the towers of `image_text`, at 64 pixels.

mmcontrast prep emoji data/emoji
mmcontrast train emoji
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.data import Stream
from mmcontrast.encoders import TimmImage
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.recipes import image_text
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    config = image_text.recipe()
    image = config.model.encoders["image"]
    assert isinstance(image, TimmImage.Config)
    image.image_size = 64
    config.out = Path("runs/emoji")
    assert isinstance(config.data, Stream.Config)
    config.data.shards = ("data/emoji/train",)
    config.data.workers = 1
    config.evaluators = {"val": Retrieval.Config(data=("data/emoji/val",))}
    config.checkpoint.every = 20
    config.steps = 60
    config.micro_batch = config.block = 128
    return config
