"""Zero-shot with lists of labels: as scikit-learn finds it, with prompts for absence, and PTB-XL's sets of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.shard_writer import Sample
from tests import tiny
from tests.embedded import embedded

NAMES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MultiEncoder:
    return load(tiny.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def data() -> Embedded:
    """60 samples, of which each fourth has no class, and none is yellow."""
    rng = np.random.default_rng(0)
    flags = rng.random((60, 3)) < [0.3, 0.6, 0.1]
    flags[::4] = False
    meta = [
        {"label": [n for n, f in zip(NAMES, row, strict=False) if f], "patient": i // 3} for i, row in enumerate(flags)
    ]
    return embedded({"image": rng.normal(size=(60, 8))}, meta)


def _flags(data: Embedded) -> Any:
    return np.array([[n in m["label"] for n in NAMES] for m in data.meta])


def _cosines(model: MultiEncoder, data: Embedded, template: str) -> Any:
    z = model.encode("text", [template.replace("{c}", n) for n in NAMES]).double().numpy()
    return data.z["image"].double().numpy() @ z.T


@pytest.mark.parametrize("negative", [(), ("no {c}",)])
@pytest.mark.parametrize("drop_empty", [False, True])
def test_lists_of_labels_equal_scikit_learn(
    model: MultiEncoder, data: Embedded, negative: tuple[str, ...], drop_empty: bool
) -> None:
    config = ZeroShot.Config(
        data=(), classes=NAMES, templates=("a {c} thing",), negative_templates=negative, drop_empty=drop_empty
    )
    found = config.build().score(model, data)
    right, scores = _flags(data), _cosines(model, data, "a {c} thing")
    if negative:
        scores = scores - _cosines(model, data, "no {c}")
    if drop_empty:
        right, scores = right[right.any(1)], scores[right.any(1)]
    right, scores = right[:, :3], scores[:, :3]  # of the fourth there is no sample
    metrics = {n: m.value for n, m in found.metrics.items()}
    want = {
        "macro_auroc": roc_auc_score(right, scores, average="macro"),
        "mean_average_precision": average_precision_score(right, scores, average="macro"),
        "macro_max_f1": np.mean([max(f1_score(y, s >= t) for t in s) for y, s in zip(right.T, scores.T, strict=True)]),
    }
    assert metrics == pytest.approx(want, abs=1e-7)
    assert not all(m["label"] for m in data.meta)
    assert found.counts == {
        "classes": 4,
        "classes_with_samples": 3,
        "samples": 45 - int((~_flags(data)[np.arange(60) % 4 > 0].any(1)).sum()) if drop_empty else 60,
        "labels": int(right.sum()),
    }
    assert found.warnings == ["1 of 4 classes have no sample: 'yellow'"]
    assert [c["class"] for c in found.details["per_class"]] == ["red", "green", "blue"]
    for c, of_class in enumerate(found.details["per_class"]):
        assert of_class["samples"] == right[:, c].sum()
        assert of_class["auroc"] == pytest.approx(roc_auc_score(right[:, c], scores[:, c]))
        said = scores[:, c] >= of_class["threshold"] - 1e-7  # heads are float32
        assert f1_score(right[:, c], said) == pytest.approx(of_class["max_f1"])
    assert found.chance["mean_average_precision_chance"] == pytest.approx(right.mean(0).mean())
    always = np.mean([f1_score(y, np.ones(len(y))) for y in right.T])
    assert found.chance["macro_max_f1_chance"] == pytest.approx(always)
    low, value, high = found.metrics["macro_auroc"][1], want["macro_auroc"], found.metrics["macro_auroc"][2]
    assert low is not None and high is not None and low < value < high


def test_a_softmax_over_both_prompts_orders_alike(model: MultiEncoder, data: Embedded) -> None:
    """CheXzero's probability of presence, at any temperature."""
    config = ZeroShot.Config(data=(), classes=NAMES, templates=("{c}",), negative_templates=("no {c}",))
    found = config.build().score(model, data).metrics["macro_auroc"].value
    pairs = torch.tensor(np.stack([_cosines(model, data, t) for t in ("{c}", "no {c}")]))
    probability = (pairs / 0.07).softmax(0)[0].numpy()
    assert found == pytest.approx(roc_auc_score(_flags(data)[:, :3], probability[:, :3], average="macro"))
    plain = ZeroShot.Config(data=(), classes=NAMES).build().score(model, data).metrics["macro_auroc"].value
    assert plain != found, "negative prompts change nothing"


def test_one_class_with_negative_prompts(model: MultiEncoder) -> None:
    """The score of each class alone decides, also for one class per sample."""
    rng = np.random.default_rng(1)
    one = embedded({"image": rng.normal(size=(40, 8))}, [{"label": NAMES[i % 4]} for i in range(40)])
    config = ZeroShot.Config(data=(), classes=NAMES, negative_prompts={n: (f"not {n}",) for n in NAMES})
    found = config.build().score(model, one)
    scores = _cosines(model, one, "{c}") - _cosines(model, one, "not {c}")
    assert found.metrics["acc1"].value == (scores.argmax(1) == np.arange(40) % 4).mean()


def test_prompts_for_absence_that_cannot_be_used(model: MultiEncoder, data: Embedded) -> None:
    with pytest.raises(ConfigError, match="the template 'nothing' lacks {c}"):
        ZeroShot.Config(data=(), negative_templates=("nothing",)).build()
    some = ZeroShot.Config(data=(), classes=NAMES, negative_prompts={"red": ("no red",)}).build()
    with pytest.raises(ConfigError, match="the class 'green' has no negative prompts, but others have"):
        some.score(model, data)
    with pytest.raises(ConfigError, match="prompts are given for 'rod', which is no class"):
        ZeroShot.Config(data=(), classes=NAMES, negative_prompts={"rod": ("no rod",)}).build()


def test_ptbxl_s_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `prep ptbxl` writes, with pictures for recordings; intervals are over patients."""
    run = tiny.write_run(tmp_path / "run")
    kinds: list[dict[str, list[str]]] = [
        {"super": ["normal ECG"], "sub": ["normal ECG"], "form": [], "rhythm": ["sinus rhythm"]},
        {
            "super": ["hypertrophy", "ST/T change"],
            "sub": ["septal hypertrophy"],
            "form": ["high QRS voltage"],
            "rhythm": [],
        },
        {"super": ["ST/T change"], "sub": ["ST-T changes"], "form": ["abnormal QRS"], "rhythm": ["sinus rhythm"]},
        {"super": ["myocardial infarction"], "sub": [], "form": [], "rhythm": ["atrial flutter"]},
    ]
    for split, seed in (("train", 0), ("test", 50)):
        samples = [
            Sample(s.key, {"png": s.members["png"], "txt": "x", "json": {**kinds[i % 4], "patient": i // 4}})
            for i, s in enumerate(tiny.samples(24, seed=seed))
        ]
        tiny.write_shards(tmp_path / "ptbxl" / split, samples)
    sets = [f"ptbxl_{name}:{tmp_path / 'ptbxl'}" for name in ("super", "sub", "form", "rhythm")]
    main(["eval", str(run), *sets, "--tasks", "zero_shot", "linear_probe", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(f["dataset"], f["task"]) for f in found] == [
        (f"ptbxl_{name}", task)
        for name in ("super", "sub", "form", "rhythm")
        for task in ("zeroshot_classification", "linear_probe")
    ]
    sizes = [(f["metrics"]["classes"], f["metrics"]["samples"]) for f in found[::2]]
    assert sizes == [(4, 24), (3, 18), (2, 12), (2, 18)], "samples without any class of the set are left out"
    assert all(f["metrics"]["macro_auroc_low"] < f["metrics"]["macro_auroc_high"] for f in found)
    assert "macro_auroc" in capsys.readouterr().out
