"""CoCa on OpenMoji pictures and their names: small towers from scratch that compare the two and write names.

mmcontrast prep emoji data/emoji
mmcontrast train emoji_coca
mmcontrast caption runs/emoji_coca PICTURE...

23 epochs are few for words from nothing. On training pictures the caption loss falls to 2.1 nats a token
(6.0 on the validation split, whose concepts are new); what is written tells colours, faces and people ("white circle"
for a ghost), the exact name is right for 2 of 282 training pictures and for none of 81 of validation.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import CascadePool, CoCaText, MultiEncoder, ViT
from mmcontrast.heads import Captioning
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW, Cosine
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    return Trainer.Config(
        out=Path("runs/emoji_coca"),
        model=MultiEncoder.Config(
            encoders={
                "image": CascadePool.Config(
                    tower=ViT.Config(
                        image_size=48,
                        patch_size=8,
                        width=96,
                        layers=3,
                        heads=3,
                        crop_scale=(0.8, 1.0),
                        color_jitter=0.2,
                    ),
                    queries=32,
                    heads=3,
                ),
                "text": CoCaText.Config(context_length=16, width=96, layers=2, heads=3),
            },
            heads={"caption": Captioning.Config(weight=2.0, layers=2, heads=3)},
            dim=256,
        ),
        data=Stream.Config(shards=("data/emoji/train",), workers=1),
        objectives={"clip": InfoNCE.Config()},
        optimizer=AdamW.Config(lr=2e-3, weight_decay=0.1),
        schedule=Cosine.Config(warmup=0.05),
        checkpoint=Checkpoints.Config(every=50),
        steps=250,
        global_batch=128,
        micro_batch=128,
        block=128,
    )
