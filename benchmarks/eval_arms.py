"""The arms of `benchmarks.eval`: ours, FAISS, open_clip's metrics and CLIP_benchmark, on the same numbers.

Arms of retrieval get unit-norm embeddings from a fixed seed, whose matched pairs have a cosine at which about half of
them are found, and return their metrics by CLIP_benchmark's names, so that a comparison of times is one of equal
answers. Peers are their own functions: nothing of them is written anew here.

Letters: N pairs, d dimensions.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.loss_arms import pairs
from benchmarks.stream_data import photographs
from mmcontrast.eval.answer import answer
from mmcontrast.eval.models import Asked, load_asked
from mmcontrast.eval.ranks import rank_both_ways
from mmcontrast.eval.spec import read_spec
from mmcontrast.eval.zero_shot import class_embeddings

Metrics = Callable[[], Mapping[str, float]]
"""One repetition; what it found."""
K = (1, 5, 10)
COSINE = 0.17
ARCHITECTURE = "benchmark-of-evaluation"


def embeddings(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Pictures and texts, [N, d] each."""
    made = pairs(n, d, COSINE)
    return made["image"], made["text"]


def ours(n: int, d: int) -> Metrics:
    """Exact ranks both ways; recalls and median ranks of them."""
    image, text = embeddings(n, d)
    labels = torch.arange(n)

    def work() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, ranks in zip(("text", "image"), rank_both_ways(image, text, labels, labels), strict=True):
            found |= {f"{name}_retrieval_recall@{k}": float((ranks.best < k).double().mean()) for k in K}
            found[f"{name}_retrieval_median_rank"] = math.floor(np.median(ranks.best)) + 1.0
        return found

    return work


def faiss_flat(n: int, d: int) -> Metrics:
    """An exact index of each side, searched with the other for the ten best; no ranks beyond."""
    import faiss

    image, text = (z.numpy() for z in embeddings(n, d))
    faiss.omp_set_num_threads(torch.get_num_threads())
    own = np.arange(n)[:, None]

    def work() -> dict[str, float]:
        found: dict[str, float] = {}
        for name, candidates, queries in (("text", text, image), ("image", image, text)):
            index: Any = faiss.IndexFlatIP(d)
            index.add(candidates)
            hits = index.search(queries, max(K))[1] == own
            found |= {f"{name}_retrieval_recall@{k}": float(hits[:, :k].any(1).mean()) for k in K}
        return found

    return work


def product(n: int, d: int) -> Callable[[], None]:
    """The floor: all scores once, tile by tile, and nothing done with them."""
    image, text = embeddings(n, d)
    tile = torch.empty(1024, 2048)

    def work() -> None:
        for rows in image.split(len(tile)):
            for columns in text.split(tile.shape[1]):
                torch.mm(rows, columns.T, out=tile[: len(rows), : len(columns)])

    return work


def open_clip_metrics(n: int, d: int) -> Metrics:
    """What open_clip computes after each epoch."""
    from open_clip_train.train import get_clip_metrics

    image, text = embeddings(n, d)

    def work() -> dict[str, float]:
        theirs = get_clip_metrics(image, text, torch.tensor(1.0))
        found: dict[str, float] = {}
        for name, way in (("text", "image_to_text"), ("image", "text_to_image")):
            found |= {f"{name}_retrieval_recall@{k}": float(theirs[f"{way}_R@{k}"]) for k in K}
            found[f"{name}_retrieval_median_rank"] = float(theirs[f"{way}_median_rank"])
        return found

    return work


class _Embedded:
    """A model whose inputs are its embeddings."""

    def encode_image(self, x: Tensor) -> Tensor:
        """As they are."""
        return x

    def encode_text(self, x: Tensor) -> Tensor:
        """As they are."""
        return x


def clip_benchmark_retrieval(n: int, d: int) -> Metrics:
    """`zeroshot_retrieval.evaluate` in its batches of 64, of a model that costs nothing."""
    from clip_benchmark.metrics import zeroshot_retrieval

    image, text = embeddings(n, d)
    batches = [(image[i : i + 64], [[j] for j in range(i, min(i + 64, n))]) for i in range(0, n, 64)]

    def work() -> dict[str, float]:
        with _quiet():
            return zeroshot_retrieval.evaluate(
                _Embedded(), batches, text.__getitem__, "cpu", amp=False, recall_k_list=[*K]
            )

    return work


# -------------------------------------------------------------------------------------------- a whole model


def open_clip_model(folder: Path, *, layers: int) -> str:
    """Register a small architecture and save weights of it from a fixed seed; ARCHITECTURE,WEIGHTS."""
    import open_clip

    tower = {"layers": layers, "width": 128, "heads": 4}
    config = {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": layers, "width": 128, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **tower},
    }
    (folder / f"{ARCHITECTURE}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{ARCHITECTURE}.json")
    torch.manual_seed(0)
    model: Any = open_clip.create_model(ARCHITECTURE)
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"{ARCHITECTURE},{folder / 'weights.pt'}"


def peer_model(given: str) -> tuple[Any, Any, Any]:
    """Model, preparation of pictures, and tokenizer, as CLIP_benchmark loads them."""
    import open_clip

    architecture, weights = given.split(",")
    model, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    return model.eval(), prepare, open_clip.get_tokenizer(architecture)


def names(classes: int, templates: int) -> tuple[list[str], list[str]]:
    """The first of ImageNet's class names, and of CLIP's prompts with {c}, as open_clip carries them."""
    import open_clip

    known, prompts = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    return [str(name) for name in known[:classes]], [str(prompt("{c}")) for prompt in prompts[:templates]]


def head_ours(given: str, classes: int, templates: int) -> Callable[[], Tensor]:
    """[C, D]."""
    asked = load_asked(given)
    listed, prompts = names(classes, templates)
    return lambda: class_embeddings(
        asked.model, "text", [[prompt.replace("{c}", name) for prompt in prompts] for name in listed]
    )


def head_clip_benchmark(given: str, classes: int, templates: int) -> Callable[[], Tensor]:
    """[C, D]."""
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    model, _, tokenizer = peer_model(given)
    listed, prompts = names(classes, templates)

    def work() -> Tensor:
        with _quiet():
            return zero_shot_classifier(model, tokenizer, listed, prompts, "cpu", amp=False).T

    return work


def write_shards(root: Path, kind: str, *, pictures: int, classes: int, templates: int) -> Path:
    """CLIP_benchmark's layout: photographs with the number of a class, or with five captions."""
    folder = root / "test"
    folder.mkdir(parents=True)
    listed, prompts = names(classes, templates)
    # All different: of equal ones a peer counts whichever its sort puts first, and the answers would differ.
    made = photographs(pictures, 480)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(pictures):
            label = number % classes
            captions = [prompt.replace("{c}", f"{listed[label]} {number}") for prompt in prompts[:5]]
            other = ("txt", "\n".join(captions)) if kind == "retrieval" else ("cls", str(label))
            for extension, data in (("jpg", made[number]), (other[0], other[1].encode())):
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / "nshards.txt").write_text("1\n")
    if kind == "retrieval":
        (root / "dataset_type.txt").write_text("retrieval\n")
    else:
        (root / "classnames.txt").write_text("\n".join(listed) + "\n")
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(prompts) + "\n")
    return root


def shards_ours(asked: Asked, root: Path) -> Metrics:
    """From the shards to the answer, its intervals included."""

    def work() -> dict[str, float]:
        (found,), _ = answer([asked], [read_spec(str(root))])
        return {name: value for name, value in found.to_json()["metrics"].items() if value is not None}

    return work


def shards_clip_benchmark(given: str, root: Path) -> Metrics:
    """As its command does, in float32 and without worker processes."""
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, prepare, tokenizer = peer_model(given)
    # Its `float(array of one number)` is an error since NumPy 2.4; nothing else of it is touched.
    zeroshot_classification.__dict__["float"] = _number
    task = "zeroshot_retrieval" if (root / "dataset_type.txt").exists() else "zeroshot_classification"

    def work() -> dict[str, float]:
        with _quiet():
            data: Any = build_dataset("wds/" + root.name, root=str(root), transform=prepare, task=task)
            loader: Any = torch.utils.data.DataLoader(data.batched(64), batch_size=None)
            if task == "zeroshot_retrieval":
                return zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[*K])
            return zeroshot_classification.evaluate(
                model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False
            )

    return work


@contextmanager
def _quiet() -> Generator[None]:
    """Without CLIP_benchmark's bars and webdataset's advice among our progress."""
    with redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _number(value: Any) -> float:
    return np.asarray(value).item()
