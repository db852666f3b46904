"""Pictures with text and sounds with text, from two sources, in one space: they meet only through text.

    mmcontrast prep emoji data/emoji
    mmcontrast prep spoken data/spoken
    mmcontrast train mixed_sources

No batch ever holds a picture beside its sound, and no term compares the two (as in ImageBind, Girdhar et al. 2023,
arXiv:2305.05665). After 200 steps (4 minutes of processor time) they are near all the same. Within 10 of 162 concepts
that neither source had in training, chance .062, is the spoken name, sought by the picture, for .22 [.15, .28], and the
picture, sought by the spoken name, for .16 [.10, .22]; what was trained is found for .51 (picture by text) and .49
(speech by text). Among the 1,409 concepts that both sources had, chance .007, it is .11 [.09, .13] and .09 [.08, .11].
Where pictures and sounds are contrasted directly (`emoji_speech_text`), the first two are .25 and .26.
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
