"""PTB-XL's electrocardiograms with the statements of cardiologists; `ecg_text` is its small sibling.

    mmcontrast prep ptbxl PTBXL data/ptbxl --rate 500
    torchrun --nproc_per_node 8 -m mmcontrast train ptbxl_text

A patch transformer from nothing on twelve leads at 500 Hz, patches of 50 ms; Bio_ClinicalBERT reads what was found
(Wagner et al. 2020, doi:10.1038/s41597-020-0495-6). Recordings of one patient are no negatives of each other. Folds 9
and 10 are for validation and test, and zero-shot classes are the five superclasses, where a recording has one alone.
It has not been run at this scale.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import HFText, MultiEncoder, SignalTransformer
from mmcontrast.encoders.warp import Warp
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.recipes.ecg_text import LEADS
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    return Trainer.Config(
        out=Path("runs/ptbxl_text"),
        model=MultiEncoder.Config(
            encoders={
                "ecg": SignalTransformer.Config(
                    channels=LEADS,
                    rate=500,
                    seconds=10.0,
                    unit=0.25,
                    patch=25,
                    width=512,
                    layers=8,
                    heads=8,
                    dropout=0.1,
                    jitter=0.02,
                    scaling=0.1,
                    warp=Warp.Config(time=0.1),
                    channel_dropout=0.1,
                ),
                "text": HFText.Config(model="emilyalsentzer/Bio_ClinicalBERT", max_length=128, train_top=4),
            },
            dim=512,
        ),
        data=Stream.Config(shards=("data/ptbxl/train",), groups=("patient",), workers=8),
        objectives={"clip": InfoNCE.Config(pairs=(("ecg", "text"),), never_negative=("patient",))},
        optimizer=AdamW.Config(lr=5e-4, weight_decay=0.1, lr_scales={"text": 0.1}),
        precision="bf16",
        evaluators={"val": ZeroShot.Config(data=("data/ptbxl/val",), modality="ecg")},
        eval_every=500,
        checkpoint=Checkpoints.Config(every=500),
        steps=3000,
        global_batch=512,
        micro_batch=64,
    )
