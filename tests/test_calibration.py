"""How sure a model is: calibration error and reliability as plain loops count them, at the scale that was learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmcontrast import load
from mmcontrast.checkpoint import Checkpoints
from mmcontrast.cli import main
from mmcontrast.config import to_dict
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.knn import KNN
from mmcontrast.eval.linear_probe import LinearProbe
from mmcontrast.eval.models import load_asked
from mmcontrast.eval.statistics import bin_of, calibration_error
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.objectives import InfoNCE, Symile
from tests import tiny
from tests.clip_benchmark_data import open_clip_weights
from tests.embedded import clusters, embedded

NAMES = list(tiny.COLOURS)


def _slow_error(confidence: Any, right: Any, bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [
            (c, r)
            for c, r in zip(confidence, right, strict=True)
            if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)
        ]
        if inside:
            gap = sum(r for _, r in inside) / len(inside) - sum(c for c, _ in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_equals_counting(bins: int) -> None:
    rng = np.random.default_rng(bins)
    confidence = np.append(rng.random(60), [0.0, 0.2, 1.0])
    right = (rng.random(63) < 0.2).astype(float)
    weights = rng.integers(0, 3, (4, 63))
    for row in weights:
        want = _slow_error(np.repeat(confidence, row), np.repeat(right, row), bins)
        assert calibration_error(confidence, right, bins)(row[None].astype(np.float64))[0] == pytest.approx(want)
        assert want > 0.01
    assert bin_of(np.array([0.0, 0.2, 0.2001, 1.0]), 5).tolist() == [0, 0, 1, 4]


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_zero_shot_is_as_sure_as_its_scale_says(tmp_path: Path, scale: float) -> None:
    model = load(tiny.write_run(tmp_path))
    x, names = clusters(90, seed=0, classes=tuple(NAMES))
    data = embedded({"image": x}, [{"label": n} for n in names], classes=NAMES)
    found = ZeroShot.Config(data=(), scale=scale).build().score(model, data)
    z, heads = data.z["image"].double(), model.encode("text", NAMES).double()
    confidence, right = [], []
    for row, name in zip(z, names, strict=True):
        powers = [math.exp(scale * float(row @ h)) for h in heads]
        best = max(range(6), key=lambda c: powers[c])  # noqa: B023
        confidence.append(powers[best] / sum(powers))
        right.append(NAMES[best] == name)
    assert found.metrics["ece"].value == pytest.approx(_slow_error(confidence, right, 15), abs=1e-6)
    low, high = found.metrics["ece"].low, found.metrics["ece"].high
    assert low is not None and high is not None and low < high
    bins = found.details["reliability"]
    assert sum(b["count"] for b in bins) == 90 and (len(bins) > 1 or scale == 1.0)
    for b in bins:
        inside = [i for i, c in enumerate(confidence) if b["low"] < c <= b["high"]]
        assert b["count"] == len(inside)
        assert b["confidence"] == pytest.approx(np.mean([confidence[i] for i in inside]))
        assert b["accuracy"] == np.mean([right[i] for i in inside])
    for mistake in found.details["mistakes"]:
        assert mistake["confidence"] == pytest.approx(confidence[mistake["position"]])
    plain = ZeroShot.Config(data=()).build().score(model, data)
    assert "ece" not in plain.metrics and "reliability" not in plain.details
    assert plain.metrics["acc1"] == found.metrics["acc1"]


def test_probes_are_as_sure_as_their_probabilities() -> None:
    """scikit-learn's own probabilities, and the share of the neighbours' votes."""
    (x, names), (y, others) = clusters(150, seed=0), clusters(80, seed=1)
    train = embedded({"image": x}, [{"label": n} for n in names], name="train")
    test = embedded({"image": y}, [{"label": n} for n in others])
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000, tol=1e-8))
    chances = probe.fit(train.z["image"].double().numpy(), names).predict_proba(test.z["image"].double().numpy())
    right = probe.predict(test.z["image"].double().numpy()) == np.array(others)
    found = LinearProbe.Config(data=(), c=(1.0,)).build().score(Any, test, train)
    assert found.metrics["ece"].value == pytest.approx(_slow_error(chances.max(1), right, 15), abs=2e-3)
    near = KNN.Config(data=(), k=(1,)).build().score(Any, test, train)
    assert near.metrics["ece"].value == pytest.approx(1 - (near.metrics["acc1"].value or 0)), "one vote is all votes"


# --------------------------------------------------------------------------------------------- learned scales


def _run(folder: Path, objectives: dict[str, Any]) -> Path:
    """A run folder with objectives, each of whose scales is another."""
    config = tiny.model_config()
    torch.manual_seed(0)
    model: MultiEncoder = config.build()
    terms = nn.ModuleDict({name: o.build() for name, o in objectives.items()})
    with torch.no_grad():
        for number, (name, parameter) in enumerate(terms.named_parameters()):
            if name.endswith("log_scale"):
                parameter.copy_(torch.arange(len(parameter)) * 0.5 + number + 1)
    folder.mkdir()
    said = {"model": to_dict(config), "objectives": {n: to_dict(o) for n, o in objectives.items()}}
    (folder / "config.json").write_text(json.dumps(said))
    model.save_assets(folder / "assets")
    Checkpoints.Config(background=False).build(folder).save(
        1, {"model": model.state_dict(), "objectives": terms.state_dict()}, {}
    )
    return folder


def test_the_scale_is_the_one_that_was_learned(tmp_path: Path) -> None:
    objectives = {
        "all": Symile.Config(modalities=("image", "text")),
        "clip": InfoNCE.Config(pairs=(("image", "text"),)),
        "other": InfoNCE.Config(pairs=(("audio", "text"),)),
        "ways": InfoNCE.Config(pairs=(("ecg", "text"),), temperature="per_direction"),
    }
    training = load_asked(_run(tmp_path / "run", objectives)).training
    scale_of = training.scale_of
    assert training.products == [frozenset({"image", "text"})]
    assert scale_of("image", "text") == scale_of("text", "image") == pytest.approx(math.exp(2))
    assert [scale_of("ecg", "text"), scale_of("text", "ecg")] == pytest.approx([math.exp(4), math.exp(4.5)])
    assert scale_of("audio", "text") == pytest.approx(math.exp(3)) and scale_of("image", "audio") is None
    assert load_asked(tiny.write_run(tmp_path / "bare")).training.scale_of("image", "text") is None
    model = open_clip_weights(tmp_path)
    weights = torch.load(model.partition(",")[2], weights_only=True)
    assert load_asked(model).training.scale_of("image", "text") == pytest.approx(float(weights["logit_scale"].exp()))


def test_the_command_takes_the_learned_scale(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", {"clip": InfoNCE.Config(pairs=(("image", "text"),))})
    shards = tiny.write_shards(tmp_path / "shards", tiny.samples(36))
    main(["eval", str(run), shards, "--tasks", "zero_shot", "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    want = ZeroShot.Config(data=(shards,), scale=math.e).build().run(load(run))
    assert found["metrics"]["ece"] == pytest.approx(want["ece"], abs=1e-6) and want["ece"] is not None
    other = ZeroShot.Config(data=(shards,), scale=50.0).build().run(load(run))
    assert abs((other["ece"] or 0) - want["ece"]) > 1e-3, "the scale changes nothing"
