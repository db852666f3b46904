"""OpenMoji pictures and their names, both towers from scratch: a compact ViT and a compact text transformer.

mmcontrast prep emoji data/emoji
mmcontrast train emoji_scratch --out runs/emoji_scratch
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import MultiEncoder, TextTransformer, ViT
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    return Trainer.Config(
        out=Path("runs/emoji_scratch"),
        model=MultiEncoder.Config(
            encoders={
                "image": ViT.Config(
                    image_size=64,
                    patch_size=8,
                    width=192,
                    layers=4,
                    heads=3,
                    crop_scale=(0.6, 1.0),
                    color_jitter=0.3,
                    grayscale=0.25,
                ),
                "text": TextTransformer.Config(context_length=16, width=192, layers=3, heads=3),
            },
            dim=256,
        ),
        data=Stream.Config(shards=("data/emoji/train",), workers=1),
        objectives={"clip": InfoNCE.Config()},
        optimizer=AdamW.Config(lr=1e-3, weight_decay=0.1),
        checkpoint=Checkpoints.Config(every=50),
        steps=200,
        global_batch=256,
        micro_batch=128,
        block=128,
    )
