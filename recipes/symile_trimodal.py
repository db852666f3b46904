"""Picture from speech and text together, where neither of them suffices: Symile on real pictures and voices.

    mmcontrast prep stamps data/stamps --fetch
    mmcontrast prep prompts data/prompts --fetch
    mmcontrast train symile_trimodal
    mmcontrast train clip_trimodal          # the same towers with pairwise InfoNCE, which cannot do it

A tuple (Saporta et al. 2024, arXiv:2411.01053, sec. 5) is a picture of one of 123 things, a spoken prompt that says
something else, and five words in five languages; the word in the language that is spoken names the picture. A pairwise
score is bounded by 1/5. Tuples are drawn on the fly. In the test, prompts were never heard and texts never read in
training; pictures, words and the four speakers' voices were. After 700 steps the right picture of 123 is first for .90
[.87, .93] (chance .008). Negatives that exchange a single modality do it: with shuffled ones it was .49.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream, SymileM3
from mmcontrast.encoders import BagOfWords, MelConvNet, MultiEncoder, TimmImage
from mmcontrast.eval.joint import Joint
from mmcontrast.objectives import Symile
from mmcontrast.optim import AdamW
from mmcontrast.recipes import image_text
from mmcontrast.trainer import Trainer

# All of them: what is held out are prompts and combinations of words, not what things look like.
PICTURES = ("data/stamps/train", "data/stamps/val", "data/stamps/test")


def recipe() -> Trainer.Config:
    image = image_text.recipe().model.encoders["image"]
    assert isinstance(image, TimmImage.Config)
    # Frozen: a tower from scratch would first have to tell the pictures apart, before any product can.
    image.image_size, image.freeze, image.crop_scale = 32, ("all",), (0.8, 1.0)
    image.color_jitter = image.grayscale = 0.0
    return Trainer.Config(
        out=Path("runs/symile_trimodal"),
        model=MultiEncoder.Config(
            encoders={
                "image": image,
                "audio": MelConvNet.Config(sample_rate=8000, seconds=1.5, mels=40, width=64, layers=2),
                "text": BagOfWords.Config(buckets=8192, width=512),
            },
            dim=512,
        ),
        data=Stream.Config(
            shards=PICTURES,
            compose=SymileM3.Config(speech=("data/prompts/train",)),
            groups=("class",),
            workers=1,
        ),
        # The product of three unit vectors of 512 dimensions is small: a start at CLIP's 14 learns slowly. Where all
        # parts of a negative are others', the words alone tell it, and the spoken language would matter little.
        objectives={"symile": Symile.Config(modalities=("image", "audio", "text"), scale=60.0, negatives="single")},
        optimizer=AdamW.Config(lr=5e-3, weight_decay=0.1),
        evaluators={
            "test": Joint.Config(
                data=PICTURES,
                compose=SymileM3.Config(speech=("data/prompts/test",)),
                label="class",
                draws=10,
            )
        },
        checkpoint=Checkpoints.Config(every=100),
        steps=700,
        global_batch=256,
    )
