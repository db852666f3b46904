"""OpenMoji pictures with their names, spoken and written: three modalities, every two of them contrasted.

mmcontrast prep spoken data/spoken
mmcontrast train emoji_speech_text
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import MelConvNet, TimmImage
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.objectives import InfoNCE, all_pairs
from mmcontrast.recipes import emoji
from mmcontrast.trainer import Trainer

PAIRS = all_pairs("image", "text", "audio")


def recipe() -> Trainer.Config:
    config = emoji.recipe()
    config.out = Path("runs/emoji_speech_text")
    image = config.model.encoders["image"]
    assert isinstance(image, TimmImage.Config)
    image.freeze = ("all",)
    config.model.projection = "mlp"
    config.model.encoders["audio"] = MelConvNet.Config(
        sample_rate=16_000, seconds=2.0, mels=64, width=192, layers=4, time_mask=0.15, mel_mask=0.15
    )
    config.data = Stream.Config(shards=("data/spoken/train",), workers=1)
    config.objectives = {"clip": InfoNCE.Config(pairs=PAIRS)}
    config.evaluators = {f"{x}_{y}": Retrieval.Config(data=("data/spoken/test",), pair=(x, y)) for x, y in PAIRS}
    config.checkpoint = Checkpoints.Config(every=50)
    config.steps = 200
    config.global_batch = 128
    config.micro_batch = 64
    return config
