"""Sets of hard negatives: as plain loops and CLIP_benchmark count them, what chance reaches, Winoground's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import image_caption_selection

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.compositional import Compositional
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.layouts import open_data
from tests import tiny
from tests.embedded import embedded

NOBODY: Any = None  # without wrong texts nothing is encoded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiEncoder:
    return load(tiny.write_run(tmp_path_factory.mktemp("run")))


def _data(sizes: Sequence[int], *, seed: int = 0, wrong: bool = False) -> Embedded:
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    x = rng.normal(size=(n, 8))
    meta: list[dict[str, Any]] = [{"set": f"s{k}"} for k, size in enumerate(sizes) for _ in range(size)]
    if wrong:
        for i, m in enumerate(meta):
            m["bad"] = [f"wrong {i} {j}" for j in range(i % 3)] if i % 3 != 1 else f"wrong {i}"
    order = rng.permutation(n)  # members of a set lie anywhere
    return embedded({"image": x[order], "text": (x + 3 * rng.normal(size=x.shape))[order]}, [meta[i] for i in order])


def _slow(data: Embedded, model: Any = None) -> dict[str, list[bool]]:
    """Of each set, in the order in which they come."""
    sets: dict[str, list[int]] = {}
    for row, m in enumerate(data.meta):
        sets.setdefault(m["set"], []).append(row)
    found: dict[str, list[bool]] = {"text_score": [], "image_score": [], "group_score": []}
    images, texts = data.z["image"].double(), data.z["text"].double()
    for members in sets.values():
        text = image = True
        for i in members:
            own = float(images[i] @ texts[i])
            for j in members:
                text &= i == j or own > float(images[i] @ texts[j])
                image &= i == j or own > float(images[j] @ texts[i])
            bad = data.meta[i].get("bad", [])
            for said in [bad] if isinstance(bad, str) else bad:
                text &= own > float(images[i] @ model.encode("text", [said])[0].double())
        found["text_score"].append(text)
        found["image_score"].append(image)
        found["group_score"].append(text and image)
    return found


@pytest.mark.parametrize("sizes", [[2] * 40, [2, 3, 1, 4] * 12])
def test_scores_equal_counting(sizes: list[int]) -> None:
    data = _data([s for s in sizes if s > 1] + [1] * sizes.count(1))
    found = Compositional.Config(data=()).build().score(NOBODY, data)
    kept = [row for row, m in enumerate(data.meta) if sum(o["set"] == m["set"] for o in data.meta) > 1]
    want = _slow(embedded({m: data.z[m][kept].numpy() for m in data.z}, [data.meta[r] for r in kept]))
    assert {name: found.metrics[name].value for name in want} == {n: np.mean(v) for n, v in want.items()}
    scores = [float(np.mean(v)) for v in want.values()]
    assert 0 < scores[2] < min(scores[:2]) < 0.9, f"little is told apart: {scores}"
    assert found.counts["sets"] == len([s for s in sizes if s > 1])
    assert len(found.details["failed"]) == want["group_score"].count(False)
    assert found.renamed == {"image_acc": "image_score", "text_acc": "text_score", "acc": "group_score"}


def test_scores_are_those_of_clip_benchmark() -> None:
    data = _data([2] * 30, seed=3)
    rows: dict[str, list[int]] = {}
    for row, m in enumerate(data.meta):
        rows.setdefault(m["set"], []).append(row)

    class Lookup:
        def encode_image(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, 0, 0]

        def encode_text(self, numbers: torch.Tensor) -> torch.Tensor:
            return data.z["text"][numbers]

    def tokenize(texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([int(t) for t in texts])

    pairs = torch.tensor(list(rows.values()))
    loader = [(data.z["image"][pairs][..., None, None], [[str(r) for r in pair] for pair in rows.values()])]
    theirs = image_caption_selection.evaluate(Lookup(), loader, tokenize, "cpu", amp=False)
    found = Compositional.Config(data=()).build().score(NOBODY, data)
    ours = {name: found.metrics[metric].value for name, metric in found.renamed.items()}
    assert ours == pytest.approx(theirs, abs=1e-6) and 0 < theirs["acc"] < 1
    assert found.task == "image_caption_selection"


def test_wrong_texts_of_a_sample(model: MultiEncoder) -> None:
    """As SugarCrepe has them: alone, and beside a set."""
    data = _data([2] * 20, wrong=True)
    plain, found = (Compositional.Config(data=(), negatives=n).build().score(model, data) for n in (None, "bad"))
    want = _slow(data, model)
    assert {name: found.metrics[name].value for name in want} == {n: np.mean(v) for n, v in want.items()}
    assert found.metrics["text_score"].value != plain.metrics["text_score"].value
    assert found.metrics["image_score"].value == plain.metrics["image_score"].value
    alone = _data([1] * 40, wrong=True)
    found = Compositional.Config(data=(), negatives="bad").build().score(model, alone)
    kept = [bool(m["bad"]) for m in alone.meta]
    want_text = [hit for hit, k in zip(_slow(alone, model)["text_score"], kept, strict=True) if k]
    assert found.metrics["text_score"].value == np.mean(want_text) and 0 < np.mean(want_text) < 1
    assert found.metrics["image_score"].value is None and found.metrics["group_score"].value is None
    assert found.counts["sets"] == sum(kept) < 40


@pytest.mark.parametrize(("size", "wrong"), [(2, False), (3, False), (2, True)])
def test_chance_is_what_random_scores_reach(size: int, wrong: bool, model: MultiEncoder) -> None:
    """Independent scores: each sample's embeddings point along random directions of a large space."""
    rng = np.random.default_rng(0)
    trials = 40_000
    extra = [i % 3 if wrong else 0 for i in range(size)]
    extra = [1 if e == 1 else e for e in extra]
    scores = rng.random((trials, size, size))
    own = np.diagonal(scores, axis1=1, axis2=2)
    off = np.where(np.eye(size, dtype=bool), -1, scores)
    bad = np.stack([rng.random((trials, e)).max(1) if e else np.full(trials, -1.0) for e in extra], axis=1)
    text = (own > np.maximum(off.max(2), bad)).all(1)
    image = (own > off.max(1)).all(1)
    data = embedded(
        {"image": rng.normal(size=(size, 8)), "text": rng.normal(size=(size, 8))},
        [{"set": 1, "bad": [f"x{j}" for j in range(e)]} for e in extra],
    )
    chance = Compositional.Config(data=(), negatives="bad" if wrong else None).build().score(model, data).chance
    for name, hits in (("text_score", text), ("image_score", image), ("group_score", text & image)):
        assert chance[f"{name}_chance"] == pytest.approx(hits.mean(), abs=4 * np.sqrt(hits.mean() / trials))
    if size == 2 and not wrong:
        assert chance == pytest.approx(
            {"text_score_chance": 1 / 4, "image_score_chance": 1 / 4, "group_score_chance": 1 / 6}
        )


def test_equal_embeddings_do_not_score() -> None:
    data = embedded({"image": np.ones((4, 8)), "text": np.ones((4, 8))}, [{"set": i // 2} for i in range(4)])
    found = Compositional.Config(data=()).build().score(NOBODY, data)
    assert [m.value for m in found.metrics.values()] == [0, 0, 0]


def test_what_cannot_be_asked_is_refused() -> None:
    data = _data([1] * 5)
    with pytest.raises(ConfigError, match="no two samples have the same 'set', and none has wrong texts.*fields: set"):
        Compositional.Config(data=()).build().score(NOBODY, data)
    with pytest.raises(ConfigError, match="no sample has both image and audio"):
        Compositional.Config(data=(), pair=("image", "audio")).build().score(NOBODY, data)


def test_winoground_as_it_lies(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    lines: list[str] = []
    for i, (a, b) in enumerate((("red", "blue"), ("green", "white"), ("black", "yellow"))):
        row: dict[str, Any] = {"id": i, "collapsed_tag": "Object"}
        for j, (colour, shape) in enumerate(((a, "square"), (b, "bar"))):
            name = f"ex_{i}_img_{j}"
            (tmp_path / "wino" / "images").mkdir(parents=True, exist_ok=True)
            (tmp_path / "wino" / "images" / f"{name}.png").write_bytes(tiny.png(colour, shape, seed=i))
            row |= {f"image_{j}": name, f"caption_{j}": f"a {colour} {shape}"}
        lines.append(json.dumps(row))
    (tmp_path / "wino" / "examples.jsonl").write_text("\n".join(lines) + "\n")
    source = open_data(str(tmp_path / "wino"))
    assert len(source) == 6 and source.questions == ("compositional",)
    assert source.values(3, "text", "text") == ["a white bar"] and source.meta(3) == {"set": 1, "tag": "Object"}
    main(["eval", str(run), str(tmp_path / "wino"), "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["task"] == "image_caption_selection" and found["metrics"]["sets"] == 3
    assert found["metrics"]["acc"] == found["metrics"]["group_score"]
    assert found["metrics"]["group_score_chance"] == pytest.approx(1 / 6)
