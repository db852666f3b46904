"""CLIP_benchmark's layout, written with plain tarfile as its exporter writes it; and a tiny open_clip model."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

ARCHITECTURE = "tiny-for-tests"
CLASSES = list(tiny.COLOURS)
TEMPLATES = ["a photo of a {c}.", "{c}", "the {c} thing"]


def write(root: Path, kind: str, count: int, *, shards: int = 2) -> Path:
    """Pictures with labels (`classification`, `multilabel`) or with captions (`retrieval`) under ROOT/test."""
    folder = root / "test"
    folder.mkdir(parents=True)
    members: list[list[tuple[str, bytes]]] = [[] for _ in range(shards)]
    for i, sample in enumerate(tiny.samples(count)):
        colour, shape = (str(v) for v in _labels(sample.members["json"]))
        number = CLASSES.index(colour)
        files = [("png", sample.members["png"])]
        if kind == "retrieval":
            captions = [f"a {colour} {shape} number {i}", f"{shape} {i}", f"{colour}\\nand {i}"][: 1 + i % 3]
            files.append(("txt", "\n".join(captions).encode()))
        elif kind == "multilabel":
            flags = np.zeros(len(CLASSES), np.int64)
            flags[[number, (number + i) % len(CLASSES)]] = 1
            file = io.BytesIO()
            np.save(file, flags)
            files.append(("npy", file.getvalue()))
        else:
            files.append(("cls", str(number).encode()))
        assert all(isinstance(data, bytes) for _, data in files)
        members[i * shards // count] += [(f"s{i:07d}.{name}", data) for name, data in files]  # type: ignore[misc]
    for number, content in enumerate(members):
        _tar(folder / f"{number}.tar", content)
    (folder / "nshards.txt").write_text(f"{shards}\n")
    if kind == "classification":
        (root / "dataset_type.txt").unlink(missing_ok=True)
    else:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def _labels(meta: Any) -> Sequence[str]:
    return meta["label"], meta["shape"]


def _tar(path: Path, content: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def open_clip_weights(folder: Path) -> str:
    """Register the architecture, save random weights; returns what the command calls the model."""
    import open_clip
    import torch

    tower = {"layers": 1, "width": 64, "heads": 2}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **tower},
    }
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.manual_seed(0)
    model: Any = open_clip.create_model(ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.mul_(3)  # or else all pictures would look the same
        model.token_embedding.weight.mul_(30)
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"{ARCHITECTURE},{folder / 'weights.pt'}"
