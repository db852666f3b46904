"""CoCa on OpenMoji pictures and their names: one model that compares the two and writes names.

mmcontrast prep emoji data/emoji
mmcontrast train emoji_coca
mmcontrast caption runs/emoji_coca PICTURE...

EfficientNet-Lite0 stays as it is at 96 pixels; poolers, text tower and decoder learn from nothing. After 300 steps it
writes .59 of the training pictures' names exactly, and of concepts that it never saw none, as must be; but .27 of what
it writes of them shares a word with the name (a random training name: .02).
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import CascadePool, CoCaText, MultiEncoder, TimmImage
from mmcontrast.heads import Captioning
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.recipes import image_text
from mmcontrast.schedules import Cosine
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    image = image_text.recipe().model.encoders["image"]
    assert isinstance(image, TimmImage.Config)
    image.image_size, image.freeze = 96, ("all",)
    return Trainer.Config(
        out=Path("runs/emoji_coca"),
        model=MultiEncoder.Config(
            encoders={
                "image": CascadePool.Config(tower=image, queries=32, heads=4, width=128),
                "text": CoCaText.Config(context_length=16, width=128, layers=3, heads=4),
            },
            heads={"caption": Captioning.Config(weight=2.0, layers=3, heads=4)},
            dim=256,
        ),
        data=Stream.Config(shards=("data/emoji/train",), workers=1),
        objectives={"clip": InfoNCE.Config()},
        optimizer=AdamW.Config(lr=2e-3, weight_decay=0.1),
        schedule=Cosine.Config(warmup=0.05),
        checkpoint=Checkpoints.Config(every=50),
        steps=300,
        global_batch=128,
        micro_batch=128,
        block=128,
    )
