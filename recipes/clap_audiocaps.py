"""CLAP on AudioCaps: HTSAT and RoBERTa, both pretrained; `emoji_speech_text` is its small sibling.

    mmcontrast prep audiocaps AUDIOCAPS data/audiocaps
    torchrun --nproc_per_node 8 -m mmcontrast train clap_audiocaps

The towers are those of LAION's CLAP (Wu et al. 2023, arXiv:2211.06687): the sounds' of its checkpoint, the texts'
of RoBERTa. Clips are of ten seconds; of longer ones a random crop is taken. It has not been run at this scale.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.data import Stream
from mmcontrast.encoders import HFAudio, HFText, MultiEncoder
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    return Trainer.Config(
        out=Path("runs/clap_audiocaps"),
        model=MultiEncoder.Config(
            encoders={
                "audio": HFAudio.Config(
                    model="laion/clap-htsat-unfused", seconds=10.0, pad="repeatpad", features="device"
                ),
                "text": HFText.Config(model="FacebookAI/roberta-base", max_length=77),
            },
            dim=512,
            projection="mlp",
        ),
        data=Stream.Config(shards=("data/audiocaps/train",), workers=8),
        objectives={"clap": InfoNCE.Config(pairs=(("audio", "text"),))},
        optimizer=AdamW.Config(lr=1e-4, weight_decay=0.1, layer_decay={"text": 0.85}),
        precision="bf16",
        evaluators={"val": Retrieval.Config(data=("data/audiocaps/val",), pair=("audio", "text"))},
        eval_every=500,
        checkpoint=Checkpoints.Config(every=500),
        steps=5000,
        global_batch=768,
        micro_batch=96,
    )
