"""Intervals and comparisons: as theory says for known cases, over groups, and sharper where items are shared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmcontrast.checkpoint import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.embed import embed
from mmcontrast.eval.result import Items, Metric, Result, compare
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.statistics import (
    Statistic,
    interval,
    mean,
    mean_of_classes,
    median,
    resampled,
    value,
)
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.shard_writer import Sample
from tests import tiny


def ends(statistic: Statistic, n: int, groups: Any = None) -> tuple[float, float]:
    found = interval(resampled({"it": statistic}, n, groups)["it"])
    assert found is not None
    return found


def test_weights_are_repetitions() -> None:
    """A statistic of whole weights is that of the items written so many times."""
    rng = np.random.default_rng(0)
    values, classes = rng.normal(size=30), rng.integers(0, 4, 30)
    weights = rng.integers(0, 4, (5, 30))
    weights[:, classes == 2] = 0  # a class that a resample does not have
    for row in weights:
        again, kinds = np.repeat(values, row), np.repeat(classes, row)
        w = row[None].astype(np.float64)
        assert mean(values)(w)[0] == pytest.approx(again.mean())
        assert median(values)(w)[0] == np.sort(again)[(len(again) - 1) // 2]
        by_class = [again[kinds == k].mean() for k in (0, 1, 3) if (kinds == k).any()]
        assert mean_of_classes(values, classes)(w)[0] == pytest.approx(sum(by_class) / len(by_class))
    with_gap = np.where(np.arange(30) < 10, np.nan, values)
    assert value(mean(with_gap), 30) == pytest.approx(values[10:].mean())
    assert value(mean(np.full(3, np.nan)), 3) is None and interval(np.full(5, np.nan)) is None


def test_intervals_of_a_known_case() -> None:
    assert ends(mean([0.25] * 7), 7) == (0.25, 0.25)
    values = [1.0] * 100 + [0.0] * 300
    low, high = ends(mean(values), 400)
    sigma = math.sqrt(0.25 * 0.75 / 400)  # of the mean of 400 draws; 400 is large enough for the normal law
    assert low == pytest.approx(0.25 - 1.96 * sigma, abs=0.2 * sigma)
    assert high == pytest.approx(0.25 + 1.96 * sigma, abs=0.2 * sigma)
    assert ends(mean(values), 400) == (low, high), "an interval must be the same on every call"
    # Ten equal items of each of 40 patients say as much as 40 items.
    patients = np.repeat(np.arange(40), 10)
    grouped = ends(mean(np.repeat([1.0] * 10 + [0.0] * 30, 10)), 400, patients)
    assert grouped[1] - grouped[0] == pytest.approx((high - low) * math.sqrt(10), rel=0.15)
    single = ends(mean([1.0] * 10 + [0.0] * 30), 40)
    assert grouped == pytest.approx(single)


def _result(values: Any, keys: Any = None, groups: Any = None) -> Result:
    names = [str(i) for i in range(len(values))] if keys is None else keys
    return Result("t", [Items(names, {"acc1": mean(values), "only": mean(values)}, groups)], undefined=["acc5"])


def test_two_models_are_compared_item_by_item() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(500)
    ours, theirs = (hard < 0.52).astype(float), (hard < 0.50).astype(float)  # right on nearly the same items
    a, b = _result(ours), _result(theirs)
    difference = compare(a, b)["acc1"]
    assert difference.value == pytest.approx(ours.mean() - theirs.mean()) and difference.value > 0
    n = 500
    sigma = math.sqrt((ours - theirs).var() / n)
    assert difference.low == pytest.approx(difference.value - 1.96 * sigma, abs=0.3 * sigma)
    assert difference.low > 0, "the items bear the difference out"
    low, high = (getattr(a.metrics["acc1"], end) for end in ("low", "high"))
    assert low < theirs.mean() < high, "compared by their own intervals, the models could not be told apart"
    assert compare(a, a)["acc1"] == (0, 0, 0) and compare(b, a)["acc1"].value == -difference.value
    with pytest.raises(ConfigError, match="500 and 499 items, of which 499 are common"):
        compare(a, _result(theirs[:499]))


def test_a_result_as_numbers() -> None:
    found = Result(
        "t",
        [Items(["a", "b"], {"acc1": mean([0, 1])})],
        facts={"rank": 3.5},
        chance={"chance": 0.1},
        counts={"samples": 2},
        undefined=["acc5"],
    )
    assert found.metrics["acc1"] == Metric(0.5, 0.0, 1.0)
    assert found.flat() == {
        "acc1": 0.5,
        "acc1_low": 0.0,
        "acc1_high": 1.0,
        "rank": 3.5,
        "acc5": None,
        "chance": 0.1,
        "samples": 2.0,
    }
    assert json.loads(json.dumps(found.flat(), allow_nan=False)) == found.flat()


def _patients(folder: Path) -> str:
    """Nine patients with four pictures each."""
    samples = [
        Sample(s.key, dict(s.members) | {"json": {"label": "red" if i % 2 else "blue", "patient": f"p{i // 4}"}})
        for i, s in enumerate(tiny.samples(36))
    ]
    return tiny.write_shards(folder, samples)


def test_intervals_over_patients(tmp_path: Path) -> None:
    run, shards = tiny.write_run(tmp_path / "run"), _patients(tmp_path / "shards")
    model = load(run)
    data = embed(model, [shards])
    for kind in (ZeroShot, Retrieval):
        single = kind.Config(data=()).build().score(model, data)
        grouped = kind.Config(data=(), bootstrap_by="patient").build().score(model, data)
        assert [np.unique(part.groups).tolist() for part in grouped.items] == [list(range(9))] * len(grouped.items)
        assert all(part.groups is None for part in single.items)
        for name, metric in single.metrics.items():
            assert metric.value == grouped.metrics[name].value
        with pytest.raises(ConfigError, match="no sample has 'person' in its metadata to resample by; fields: label"):
            kind.Config(data=(), bootstrap_by="person").build().score(model, data)


def test_the_command_compares_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = _patients(tmp_path / "shards")
    runs = [str(tiny.write_run(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"))]
    file = tmp_path / "found.json"
    main(["eval", runs[0], shards, "--against", runs[1], "--bootstrap-by", "patient", "--json", str(file)])
    found = json.loads(file.read_text())
    assert [(r["model"], r["task"]) for r in found] == [
        (run, task) for run in runs for task in ("zeroshot_classification", "zeroshot_retrieval")
    ]
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        against = ours["against"]
        assert against["model"] == runs[1] and "against" not in theirs
        name = "acc1" if "acc1" in ours["metrics"] else "image_to_text_recall@5"
        difference = ours["metrics"][name] - theirs["metrics"][name]
        assert against["metrics"][name] == pytest.approx(difference)
        assert against["metrics"][f"{name}_low"] <= difference <= against["metrics"][f"{name}_high"]
    assert any(a["against"]["metrics"][k] for a in found[:2] for k in a["against"]["metrics"]), "the models are equal"
    assert f"against {runs[1]}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", runs[0], "--against", runs[1]])
    assert "--against needs data" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- what may mislead


def test_classes_are_numbers_or_names(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    names = list(tiny.COLOURS)
    by_number = [
        Sample(s.key, dict(s.members) | {"json": {"label": names.index(dict(s.members["json"])["label"])}})  # type: ignore[arg-type, call-overload]
        for s in tiny.samples(18)
    ]
    model = load(run)
    want = ZeroShot.Config(data=(tiny.write_shards(tmp_path / "a", tiny.samples(18)),), classes=tuple(names))
    got = ZeroShot.Config(data=(tiny.write_shards(tmp_path / "b", by_number),), classes=tuple(names))
    assert got.build().run(model) == want.build().run(model)
    with pytest.raises(ConfigError, match="label 2; there are 2 classes"):
        ZeroShot.Config(data=got.data, classes=("red", "green")).build().run(model)
    with pytest.raises(ConfigError, match="label 'red', which is no class; did you mean 'rod'"):
        ZeroShot.Config(data=want.data, classes=("rod", "green")).build().run(model)


def test_classes_that_mislead_are_named(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    shards = tiny.write_shards(tmp_path / "shards", tiny.samples(18))
    model = load(run)
    classes = (*tiny.COLOURS, "Red ", "purple")
    asked = ZeroShot.Config(data=(shards,), classes=classes, prompts={"blue": ("a sea", "a sky")})
    found = asked.build().answer(model)
    assert found.counts["classes"] == 8
    assert found.warnings == [
        "2 classes have the same prompts ('red', 'Red '): nothing tells them apart",
        "2 of 8 classes have no sample: 'Red ', 'purple'",
    ]
    z = model.encode("text", ["a sea", "a sky"]).mean(0)
    torch.testing.assert_close(z / z.norm(), _prototype(asked, model), atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match="the class 'blue' has an empty list"):
        ZeroShot.Config(data=(), prompts={"blue": ()}).build()
    with pytest.raises(ConfigError, match="prompts are given for 'bleu', which is no class; did you mean 'blue'"):
        ZeroShot.Config(data=(), classes=("blue",), prompts={"bleu": ("x",)}).build()


def _prototype(asked: ZeroShot.Config, model: Any) -> torch.Tensor:
    from mmcontrast.eval.zero_shot import class_embeddings

    return class_embeddings(model, "text", [asked.prompts["blue"], ("another",)])[0]
