"""The gap between modalities on OpenMoji: frozen towers, learned heads, and terms that bring the modalities together.

    mmcontrast prep emoji data/emoji
    mmcontrast train emoji_gap --out runs/gap
    mmcontrast eval runs/gap data/emoji/test --tasks zero_shot retrieval geometry

CLIP beside alignment, uniformity and uniformity across modalities, at weight 1 as in Fahim et al. 2024
(arXiv:2405.18570, CUAXU). Without the last, `--objectives.cross-uniformity.weight 0`, it is their CUA; without all
three it is CLIP.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.encoders import TimmImage
from mmcontrast.eval.geometry import Geometry
from mmcontrast.objectives import Alignment, CrossUniformity, Uniformity
from mmcontrast.recipes import emoji
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    config = emoji.recipe()
    image = config.model.encoders["image"]
    assert isinstance(image, TimmImage.Config)
    image.freeze = ("all",)
    config.model.projection = "mlp"
    config.out = Path("runs/emoji_gap")
    config.objectives |= {
        "alignment": Alignment.Config(),
        "uniformity": Uniformity.Config(),
        "cross_uniformity": CrossUniformity.Config(),
    }
    config.evaluators["geometry"] = Geometry.Config(data=("data/emoji/val",))
    config.steps = 100
    return config
