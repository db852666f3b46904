"""CLIP ViT-B/16 on DataComp or CC12M as img2dataset wrote them; `image_text` is its small sibling.

    mmcontrast prep index data/cc12m                 # manifests beside img2dataset's tars
    torchrun --nnodes 4 --nproc_per_node 8 -m mmcontrast train clip_vit_b16 --data.shards data/cc12m

128 M samples are seen in global batches of 4,096 at a rate of 5e-4 after 500 steps of warm-up, as at DataComp's medium
scale (Gadre et al. 2023, arXiv:2304.14108), whose tower is ViT-B/32. Half of the patches are dropped (FLIP, Li et al.
2023, arXiv:2212.00794). It has not been run at this scale.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import MultiEncoder, OpenClipImage, OpenClipText
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.schedules import Cosine
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    steps = 128_000_000 // 4096
    return Trainer.Config(
        out=Path("runs/clip_vit_b16"),
        model=MultiEncoder.Config(
            encoders={
                "image": OpenClipImage.Config(architecture="ViT-B-16", patch_dropout=0.5, half_scale=True),
                "text": OpenClipText.Config(architecture="ViT-B-16"),
            },
            dim=512,
            projection="none",
        ),
        data=Stream.Config(shards=("data/datacomp",), lanes=32, workers=8),
        objectives={"clip": InfoNCE.Config()},
        optimizer=AdamW.Config(lr=5e-4, weight_decay=0.2),
        schedule=Cosine.Config(warmup=500 / steps),
        precision="bf16",
        checkpoint=Checkpoints.Config(every=1000),
        steps=steps,
        global_batch=4096,
        micro_batch=128,
    )
