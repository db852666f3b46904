"""The same numbers as CLIP_benchmark, for the same open_clip model and the same shards in its layout."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark import cli as theirs
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.layouts import open_data
from mmcontrast.eval.models import load_asked
from tests import clip_benchmark_data as made


@dataclass(frozen=True)
class SideBySide:
    folder: Path
    model: str
    classification: Path
    retrieval: Path
    several: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> SideBySide:
    folder = tmp_path_factory.mktemp("clip_benchmark")
    return SideBySide(
        folder,
        made.open_clip_weights(folder),
        made.write(folder / "colours", "classification", 64),
        made.write(folder / "pairs", "retrieval", 50),
        made.write(folder / "several", "multilabel", 45),
    )


def _number(value: Any) -> float:
    return np.asarray(value).item()


def _theirs(both: SideBySide, root: Path, **settings: Any) -> dict[str, float]:
    """As their command does it, in float32 (`--no_amp`)."""
    import open_clip

    architecture, weights = both.model.split(",")
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    model.eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    task = "zeroshot_retrieval" if root == both.retrieval else "zeroshot_classification"
    data: Any = build_dataset("wds/" + root.name, root=str(root), transform=transform, task=task)
    loader: Any = torch.utils.data.DataLoader(data.batched(16), batch_size=None)
    loader.dataset.classes = data.classes
    if data.classes is None:
        return zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    # Its `float(array of one number)` is an error since NumPy 2.4; nothing else of it is touched.
    zeroshot_classification.__dict__["float"] = _number
    return zeroshot_classification.evaluate(
        model, loader, tokenizer, data.classes, data.templates, "cpu", amp=False, **settings
    )


def _ours(both: SideBySide, root: Path) -> dict[str, Any]:
    main(["eval", both.model, str(root), "--json", str(both.folder / "found.json")])
    (found,) = json.loads((both.folder / "found.json").read_text())
    return found


def test_classification_is_the_same(both: SideBySide) -> None:
    want, found = _theirs(both, both.classification), _ours(both, both.classification)
    assert found["task"] == "zeroshot_classification"
    assert 0.05 < want["acc1"] < want["acc5"] < 1 and abs(want["acc1"] - want["mean_per_class_recall"]) > 1e-4, (
        "nothing compared"
    )
    assert {name: found["metrics"][name] for name in want} == pytest.approx(want, abs=1e-6)
    assert found["metrics"]["samples"] == 64 and found["metrics"]["classes"] == len(made.CLASSES)


def test_several_labels_are_the_same(both: SideBySide) -> None:
    want, found = _theirs(both, both.several), _ours(both, both.several)
    assert found["task"] == "zeroshot_classification" and want.keys() == {"mean_average_precision"}
    got = found["metrics"]["mean_average_precision"]
    assert got == pytest.approx(want["mean_average_precision"], abs=1e-6)
    assert abs(got - found["metrics"]["mean_average_precision_chance"]) > 0.01, "nothing compared"
    assert found["metrics"]["samples"] == 45 and found["metrics"]["labels"] > 60


def test_retrieval_with_several_captions_is_the_same(both: SideBySide) -> None:
    want, found = _theirs(both, both.retrieval), _ours(both, both.retrieval)
    assert found["task"] == "zeroshot_retrieval"
    assert 0 < want["image_retrieval_recall@1"] < want["text_retrieval_recall@10"] < 1, "nothing compared"
    assert {name: found["metrics"][name] for name in want} == pytest.approx(want, abs=1e-6)
    captions = sum(1 + i % 3 for i in range(50))
    assert found["metrics"]["samples"] == 50 and found["metrics"]["text_items"] == captions


def test_embeddings_are_those_of_open_clip(both: SideBySide) -> None:
    import open_clip

    asked = load_asked(both.model)
    architecture, weights = both.model.split(",")
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(architecture)
    from PIL import Image

    from tests import tiny

    pictures = [tiny.png("red", seed=1), tiny.png("blue", "bar", size=50, seed=2)]
    import io

    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([transform(Image.open(io.BytesIO(p))) for p in pictures]))  # type: ignore[operator]
        texts = model.encode_text(tokenizer(["a photo of a dog", "x"]))  # type: ignore[operator]
    for modality, values, want in (("image", pictures, images), ("text", ["a photo of a dog", "x"], texts)):
        torch.testing.assert_close(asked.model.encode(modality, values), torch.nn.functional.normalize(want, dim=1))
    with pytest.raises(ConfigError, match="cannot be asked|no modality 'audio'"):
        asked.model.encode("audio", ["x"])


def test_their_build_takes_our_results(both: SideBySide, monkeypatch: pytest.MonkeyPatch) -> None:
    out = both.folder / "results"
    main(["eval", both.model, str(both.classification), str(both.retrieval), "--out", str(out)])
    assert len(list(out.glob("*.json"))) == 2
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", str(out), "--output", str(both.folder / "all.csv")])
    theirs.main()
    rows = list(csv.DictReader((both.folder / "all.csv").open()))
    by_task = {row["task"]: row for row in rows}
    assert float(by_task["zeroshot_classification"]["acc1"]) == _ours(both, both.classification)["metrics"]["acc1"]
    assert by_task["zeroshot_retrieval"]["model"] == made.ARCHITECTURE
    assert by_task["zeroshot_retrieval"]["image_retrieval_recall@5"]


def test_the_layout_as_it_is(both: SideBySide, tmp_path: Path) -> None:
    source = open_data(str(both.classification))
    assert len(source) == 64 and list(source.classes) == made.CLASSES and list(source.templates) == made.TEMPLATES
    assert [source.meta(i)["label"] for i in range(8)] == [0, 1, 2, 3, 4, 5, 0, 1]
    inner = open_data(str(both.classification / "test"))
    assert list(inner.classes) == made.CLASSES, "the split's folder alone"
    pairs = open_data(str(both.retrieval))
    assert pairs.values(2, "text", "text") == ["a blue square number 2", "square 2", "blue\\nand 2"]
    assert pairs.questions == ("retrieval",) and not pairs.classes
    several = open_data(str(made.write(tmp_path / "several", "multilabel", 12)))
    assert several.meta(3)["label"] == [0, 3] and several.meta(0)["label"] == [0]
    (both.retrieval / "test" / "nshards.txt").rename(tmp_path / "kept")
    try:
        with pytest.raises(ConfigError, match="not laid out as clip_benchmark: there is no nshards.txt"):
            open_data(str(both.retrieval), layout="clip_benchmark")
    finally:
        (tmp_path / "kept").rename(both.retrieval / "test" / "nshards.txt")


def test_models_that_are_not_there(both: SideBySide, tmp_path: Path) -> None:
    for given, said in (
        ("nowhere", "there is no run folder 'nowhere', nor a folder of transformers; models of open_clip are"),
        ("ViT-B-23,x.pt", "no architecture 'ViT-B-23'; did you mean"),
        (f"{made.ARCHITECTURE},gone.pt", "'gone.pt' is neither a file nor known weights"),
        (f"ViT-B-32,{both.model.split(',')[1]}", "open_clip cannot make ViT-B-32 of"),
        (str(tmp_path), "no whole checkpoint"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_asked(given)


def test_identity_is_of_weights_and_settings(both: SideBySide, tmp_path: Path) -> None:
    first = load_asked(both.model)
    assert load_asked(both.model).identity == first.identity
    architecture, weights = both.model.split(",")
    changed: dict[str, torch.Tensor] = torch.load(weights, weights_only=True)
    changed["logit_scale"] += 1e-3
    torch.save(changed, tmp_path / "other.pt")
    assert load_asked(f"{architecture},{tmp_path / 'other.pt'}").identity != first.identity
