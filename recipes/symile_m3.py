"""Symile-M3: picture, spoken prompt, and words in five languages at full scale; `symile_trimodal` is its small sibling.

    mmcontrast prep imagefolder IMAGENET data/imagenet --translations translations.json
    mmcontrast prep common_voice COMMONVOICE data/voices
    torchrun --nproc_per_node 8 -m mmcontrast train symile_m3

Towers as in the paper (Saporta et al. 2024, arXiv:2411.01053, sec. 5): CLIP's picture tower, Whisper's encoder and a
multilingual text encoder (XLM-R), each frozen under a learned projection. The translations, a JSON file of the paper's
code, name each class in each of the languages. It has not been run at this scale.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.data import Stream, SymileM3
from mmcontrast.encoders import HFAudio, HFText, OpenClipImage
from mmcontrast.eval.joint import Joint
from mmcontrast.recipes import symile_trimodal
from mmcontrast.trainer import Trainer


def recipe() -> Trainer.Config:
    config = symile_trimodal.recipe()
    config.out = Path("runs/symile_m3")
    config.model.encoders = {
        "image": OpenClipImage.Config(architecture="ViT-L-14", weights="weights/ViT-L-14.safetensors", freeze=("all",)),
        "audio": HFAudio.Config(model="openai/whisper-large-v3", seconds=10.0, freeze=("all",)),
        "text": HFText.Config(model="FacebookAI/xlm-roberta-large", freeze=("all",)),
    }
    config.model.dim = 8192
    voices = {split: SymileM3.Config(speech=(f"data/voices/{split}",)) for split in ("train", "val")}
    config.data = Stream.Config(
        shards=("data/imagenet/train",), compose=voices["train"], groups=("class",), lanes=8, workers=8
    )
    config.evaluators = {"val": Joint.Config(data=("data/imagenet/val",), compose=voices["val"], label="class")}
    config.eval_every = 2000
    config.optimizer.lr = 1e-3
    config.precision = "bf16"
    config.checkpoint.every = 2000
    config.steps, config.global_batch, config.micro_batch = 50_000, 2048, 64
    return config
