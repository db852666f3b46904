"""Pictures with text and sounds with text, from two sources, in one space: who meets only through text.

mmcontrast prep emoji data/emoji
mmcontrast prep spoken data/spoken
mmcontrast train mixed_sources
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.data import Mixture, Source
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.objectives import InfoNCE, pairs_with
from mmcontrast.recipes import emoji_speech_text
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    config = emoji_speech_text.recipe()
    config.out = Path("runs/mixed_sources")
    config.data = Mixture.Config(
        sources={
            "pictures": Source.Config(shards=("data/emoji/train",)),
            "sounds": Source.Config(shards=("data/spoken/train",), members={"image": ()}),
        },
        workers=1,
    )
    config.objectives = {"clip": InfoNCE.Config(pairs=pairs_with("text", "image", "audio"))}
    config.evaluators["image_audio_known"] = Retrieval.Config(data=("data/spoken/train",), pair=("image", "audio"))
    return config
