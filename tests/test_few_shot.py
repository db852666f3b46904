"""Few labelled examples: prototypes and their blend with the prompts, as plain loops find them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.few_shot import FewShot
from mmcontrast.randomness import permutation
from tests import tiny
from tests.embedded import clusters, embedded

NAMES = tuple(sorted(tiny.COLOURS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiEncoder:
    return load(tiny.write_run(tmp_path_factory.mktemp("run")))


def _sides(noise: float = 1.5) -> tuple[Any, Any]:
    (x, names), (y, others) = (clusters(n, seed=s, classes=NAMES, noise=noise) for n, s in ((120, 0), (90, 1)))
    train = embedded({"image": x}, [{"label": n} for n in names], name="train")
    return train, embedded({"image": y}, [{"label": n} for n in others])


def _unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def _slow(train: Any, test: Any, shots: int, draw: int, weight: float, heads: Any) -> list[float]:
    """Hits, sample by sample and class by class."""
    labels = [m["label"] for m in train.meta]
    classes: dict[str, list[float]] = {}
    for k, name in enumerate(NAMES):
        of_class = [i for i, label in enumerate(labels) if label == name]
        taken = [of_class[j] for j in permutation(len(of_class), "few shots", draw, k)[:shots]]
        assert len(taken) == shots
        prototype = _unit([sum(float(train.z["image"][i][d]) for i in taken) for d in range(8)])
        classes[name] = [weight * float(h) + (1 - weight) * p for h, p in zip(heads[k], prototype, strict=True)]
    hits: list[float] = []
    for x, m in zip(test.z["image"].tolist(), test.meta, strict=True):
        scores = {n: sum(a * b for a, b in zip(x, head, strict=True)) for n, head in classes.items()}
        hits.append(float(scores[m["label"]] > max(s for n, s in scores.items() if n != m["label"])))
    return hits


def test_prototypes_and_their_blend_equal_counting(model: MultiEncoder) -> None:
    train, test = _sides()
    config = FewShot.Config(data=(), shots=(1, 3), draws=3, blend=0.7, templates=("the {c} one",))
    found = config.build().score(model, test, train)
    heads = model.encode("text", [f"the {n} one" for n in NAMES]).double().numpy()
    for name, weight in (("acc1", 0.0), ("blend_acc1", 0.7)):
        for shots in (1, 3):
            of_draws = [_slow(train, test, shots, draw, weight, heads) for draw in range(3)]
            metric = found.metrics[f"{name}@{shots}shot"]
            assert metric.value == pytest.approx(np.mean(of_draws))
            assert metric.low is not None and metric.value is not None and metric.high is not None
            assert metric.low < metric.value < metric.high
            std = float(np.std([float(np.mean(d)) for d in of_draws], ddof=1))
            assert found.facts[f"{name}@{shots}shot_std"] == pytest.approx(std) and std > 0
    zero = _slow(train, test, 1, 0, 1.0, heads)
    assert found.metrics["zero_shot_acc1"].value == np.mean(zero)
    one, three = (found.metrics[f"acc1@{k}shot"].value or 0 for k in (1, 3))
    assert 1 / 6 < one < three < 1, "more examples say no more"
    assert found.metrics["blend_acc1@3shot"].value not in (three, np.mean(zero))
    assert found.counts == {"classes": 6, "samples": 90, "training_samples": 120} and not found.warnings


def test_without_prompts_prototypes_alone_are_asked(model: MultiEncoder) -> None:
    train, test = _sides()
    found = FewShot.Config(data=(), shots=(2,), draws=1, prompt_modality=None).build().score(model, test, train)
    assert list(found.metrics) == ["acc1@2shot"], "nothing spreads over one draw"


def test_classes_with_few_examples_or_none(model: MultiEncoder) -> None:
    x, names = clusters(40, seed=0, classes=NAMES)
    kept = [i for i, n in enumerate(names) if n not in ("red", "blue")] + [names.index("blue")]
    train = embedded({"image": x[kept]}, [{"label": names[i]} for i in kept], name="train")
    _, test = _sides()
    found = FewShot.Config(data=(), shots=(1, 2), draws=2, blend=1.0).build().score(model, test, train)
    red = sum(m["label"] == "red" for m in test.meta)
    assert f"{red} samples are of classes without training samples: they count as wrong" in found.warnings
    assert "1 of 6 classes have less than 2 training samples: all are taken" in found.warnings
    alone, without = found.metrics["zero_shot_acc1"].value, found.metrics["blend_acc1@1shot"].value
    assert alone != without, "a class without examples is found all the same"


def test_what_cannot_be_asked_is_refused(model: MultiEncoder) -> None:
    wrong: list[dict[str, Any]] = [{"shots": (0,)}, {"draws": 0}, {"blend": 1.5}]
    for settings in wrong:
        with pytest.raises(ConfigError, match=f"few_shot {next(iter(settings))} is"):
            FewShot.Config(data=(), **settings).build()
    train, test = _sides()
    lists = embedded({"image": test.z["image"].numpy()}, [{"label": [m["label"]]} for m in test.meta])
    with pytest.raises(ConfigError, match="one class for each sample"):
        FewShot.Config(data=()).build().score(model, lists, train)


def test_the_command(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    for split, seed in (("train", 0), ("test", 99)):
        tiny.write_shards(tmp_path / "data" / split, tiny.samples(36, seed=seed))
    spec = tmp_path / "colours.yaml"
    spec.write_text(
        'data: data\ntemplates: ["a {c} thing"]\ntasks: {few_shot: {shots: [1, 4], draws: 2}, zero_shot: {}}\n'
    )
    main(["eval", str(run), str(spec), "--json", str(tmp_path / "found.json")])
    few, zero = (f["metrics"] for f in json.loads((tmp_path / "found.json").read_text()))
    assert few["zero_shot_acc1"] == zero["acc1"] and few["acc1@4shot"] > few["chance"]
