"""CoCa-Base on CC12M as img2dataset wrote it: one model that compares and writes; `emoji_coca` is its small sibling.

    mmcontrast prep index data/cc12m
    torchrun --nnodes 4 --nproc_per_node 8 -m mmcontrast train coca_vit_b16

Sizes are those of CoCa-Base (Yu et al. 2022, arXiv:2205.01917) but for patches of 16 pixels: a ViT of 12 layers, 12
layers of text and 12 that look at the picture, all 768 wide, 256 queries of the captions; the captions' loss has
weight 2. It has not been run at this scale.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.data import Stream
from mmcontrast.encoders import CascadePool, CoCaText, ViT
from mmcontrast.heads import Captioning
from mmcontrast.recipes import clip_vit_b16
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    config = clip_vit_b16.recipe()
    config.out = Path("runs/coca_vit_b16")
    config.model.encoders = {
        "image": CascadePool.Config(tower=ViT.Config(width=768, layers=12, heads=12, half_scale=True), heads=12),
        "text": CoCaText.Config(),
    }
    config.model.projection = "linear"
    config.model.heads = {"caption": Captioning.Config(weight=2.0)}
    assert isinstance(config.data, Stream.Config)
    config.data.shards = ("data/cc12m",)
    config.micro_batch = 64
    return config
