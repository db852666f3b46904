"""Linear probe and nearest neighbours: as scikit-learn and plain loops find them, chosen without a look at the test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.curves import Curves
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.knn import KNN
from mmcontrast.eval.linear_probe import LinearProbe
from mmcontrast.eval.statistics import resampled, value
from mmcontrast.eval.trained import Examples, divided, tower
from mmcontrast.shard_writer import Sample
from tests import tiny
from tests.embedded import clusters, embedded

MODEL: Any = None  # probes look at embeddings alone
CLASSES: tuple[str, ...] = ("ant", "bee", "cat", "dog", "eel", "fox")


def _single() -> tuple[Embedded, Embedded]:
    x, names = clusters(150, seed=0)
    y, others = clusters(80, seed=1)
    train = embedded({"image": x}, [{"label": n, "patient": i // 3} for i, n in enumerate(names)], name="train")
    return train, embedded({"image": y}, [{"label": n, "patient": 900 + i} for i, n in enumerate(others)])


def _of_lists(count: int, seed: int, name: str) -> Embedded:
    """Each class is a direction; a sample has those that it lies along, often none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 8))
    return embedded(
        {"image": x},
        [
            {"label": [c for c, v in zip("abcd", row, strict=False) if v > 0.8]}
            for row in x + rng.normal(size=x.shape) / 2
        ],
        name=name,
    )


def _labels(data: Embedded) -> np.ndarray[Any, Any]:
    return np.array([m["label"] for m in data.meta])


def _flags(data: Embedded) -> np.ndarray[Any, Any]:
    return np.array([[c in m["label"] for c in "abcd"] for m in data.meta])


# ---------------------------------------------------------------------------------------------- linear probe


def test_linear_probe_equals_scikit_learn() -> None:
    train, test = _single()
    found = LinearProbe.Config(data=()).build().score(MODEL, test, train)
    x, y = train.z["image"].double().numpy(), _labels(train)
    fitted, held = divided(Examples(train.z["image"].numpy(), np.arange(150)), "linear_probe")
    assert len(held.x) == 30 and not set(held.right) & set(fitted.right)
    values: dict[float, float] = {}
    for c in LinearProbe.Config(data=()).c:
        scaler = StandardScaler().fit(x[fitted.right])
        probe = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(scaler.transform(x[fitted.right]), y[fitted.right])
        values[c] = probe.score(scaler.transform(x[held.right]), y[held.right])
    best = max(values, key=lambda c: (values[c], -c))
    assert len(set(values.values())) > 1, "all strengths do alike: nothing is chosen"
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(C=best, max_iter=5000, tol=1e-8).fit(scaler.transform(x), y)
    named = probe.predict(scaler.transform(test.z["image"].double().numpy()))
    truth = _labels(test)
    assert found.facts == {"C": best, "held_out_acc1": values[best]}
    assert found.metrics["acc1"].value == (named == truth).mean() and 0.5 < (named == truth).mean() < 1
    assert found.metrics["mean_per_class_recall"].value == pytest.approx(balanced_accuracy_score(truth, named))
    low, high = found.metrics["acc1"].low, found.metrics["acc1"].high
    assert low is not None and high is not None and low < (named == truth).mean() < high
    common = max(CLASSES, key=y.tolist().count)
    assert found.chance == {"chance": 1 / 6, "majority": (truth == common).mean()}
    assert found.counts == {"classes": 6, "samples": 80, "training_samples": 150}
    assert found.renamed == {f"lp_{n}": n for n in ("acc1", "acc5", "mean_per_class_recall")}
    confusion = {(CLASSES[t], CLASSES[p]): n for t, p, n in found.details["confusion"]}
    assert confusion == {
        pair: list(zip(truth, named, strict=True)).count(pair) for pair in zip(truth, named, strict=True)
    }
    mistakes = found.details["mistakes"]
    assert len(mistakes) == (named != truth).sum() and all(m["score"] > m["right_score"] for m in mistakes)
    assert [named[m["position"]] for m in mistakes] == [m["predicted"] for m in mistakes]


def test_two_classes_and_a_class_without_training_samples() -> None:
    x, names = clusters(60, seed=2, classes=("no", "yes"))
    train = embedded({"image": x}, [{"label": n} for n in names], name="train")
    y, others = clusters(40, seed=3, classes=("no", "yes"))
    others[:4] = ["maybe"] * 4
    test = embedded({"image": y}, [{"label": n} for n in others])
    for task in (LinearProbe.Config(data=(), c=(1.0,)), KNN.Config(data=(), k=(3,))):
        found = task.build().score(MODEL, test, train)
        wrong = [m for m in found.details["mistakes"] if m["label"] == "maybe"]
        assert len(wrong) == 4 and all(m["predicted"] != "maybe" for m in found.details["mistakes"])
        assert "4 samples are of classes without training samples: they count as wrong" in found.warnings
        assert found.metrics["acc5"].value is None and (found.metrics["acc1"].value or 0) > 0.6
    probe = LogisticRegression(C=1.0).fit(StandardScaler().fit_transform(train.z["image"].double().numpy()), names)
    scaler = StandardScaler().fit(train.z["image"].double().numpy())
    named = probe.predict(scaler.transform(test.z["image"].double().numpy()))
    found = LinearProbe.Config(data=(), c=(1.0,)).build().score(MODEL, test, train)
    assert found.metrics["acc1"].value == (named == np.array(others)).mean()


def test_several_labels_equal_one_regression_each() -> None:
    train, test = _of_lists(200, 0, "train"), _of_lists(120, 1, "test")
    found = LinearProbe.Config(data=(), c=(0.1,)).build().score(MODEL, test, train)
    scaler = StandardScaler().fit(train.z["image"].double().numpy())
    parts = [scaler.transform(d.z["image"].double().numpy()) for d in (train, test)]
    right = _flags(test)
    scores = np.stack(
        [LogisticRegression(C=0.1).fit(parts[0], y).decision_function(parts[1]) for y in _flags(train).T], axis=1
    )
    metrics = {n: m.value for n, m in found.metrics.items()}
    assert metrics["macro_auroc"] == pytest.approx(roc_auc_score(right, scores, average="macro"), abs=1e-9)
    want = average_precision_score(right, scores, average="macro")
    assert metrics["mean_average_precision"] == pytest.approx(want, abs=1e-9) and 0.3 < want < 0.95
    best = [max(f1_score(y, s >= t) for t in s) for y, s in zip(right.T, scores.T, strict=True)]
    assert metrics["macro_max_f1"] == pytest.approx(np.mean(best), abs=1e-9)
    assert (~right.any(1)).sum() > 10, "every sample has a class: none shows that lists may be empty"
    chosen = LinearProbe.Config(data=()).build().score(MODEL, test, train)
    assert (
        0 < (chosen.facts["held_out_mean_average_precision"] or 0) < 1
        and chosen.facts["C"] in LinearProbe.Config(data=()).c
    )


# ---------------------------------------------------------------------------------------- nearest neighbours


def _slow_votes(x: Any, train: Any, labels: Any, k: int, t: float) -> dict[str, float]:
    cosines = [(sum(float(a) * float(b) for a, b in zip(x, row, strict=True)), i) for i, row in enumerate(train)]
    nearest = sorted(cosines, reverse=True)[:k]
    found = dict.fromkeys(CLASSES, 0.0)
    for cosine, i in nearest:
        found[labels[i]] += math.exp(cosine / t)
    return found


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (20, 1.0), (500, 0.3)])
def test_neighbours_equal_counting(k: int, temperature: float) -> None:
    train, test = _single()
    found = KNN.Config(data=(), k=(k,), temperature=temperature).build().score(MODEL, test, train)
    truth = _labels(test)
    votes = [_slow_votes(x, train.z["image"], _labels(train), k, temperature) for x in test.z["image"]]
    right = [v[t] > max(w for c, w in v.items() if c != t) for v, t in zip(votes, truth, strict=True)]
    assert found.metrics["acc1"].value == pytest.approx(np.mean(right)) and 0.2 < np.mean(right) < 1
    assert found.facts == {"k": min(k, 150)}


def test_the_number_of_neighbours_is_chosen_on_training_samples() -> None:
    train, test = _single()
    found = KNN.Config(data=()).build().score(MODEL, test, train)
    fitted, held = divided(Examples(train.z["image"].numpy(), np.arange(150)), "knn")
    labels = _labels(train)
    values: dict[int, float] = {}
    for k in (1, 3, 5, 10, 20, 50, 100, 150):
        votes = [_slow_votes(x, fitted.x, labels[fitted.right], k, 0.07) for x in held.x]
        values[k] = float(
            np.mean([max(v, key=lambda c: v[c]) == t for v, t in zip(votes, labels[held.right], strict=True)])
        )
    best = max(values, key=lambda k: (values[k], -k))
    assert len(set(values.values())) > 1 and found.facts == {"k": best, "held_out_acc1": values[best]}
    # Labels of what is asked change nothing that is chosen.
    blind = embedded({"image": test.z["image"].numpy()}, [{"label": "ant"}] * 80)
    assert KNN.Config(data=()).build().score(MODEL, blind, train).facts == found.facts


def test_neighbours_vote_for_lists() -> None:
    train, test = _of_lists(200, 0, "train"), _of_lists(60, 1, "test")
    found = KNN.Config(data=(), k=(9,), temperature=0.5).build().score(MODEL, test, train)
    flags = _flags(train)
    scores = np.zeros((60, 4))
    for i, x in enumerate(test.z["image"].double().numpy()):
        cosines = train.z["image"].double().numpy() @ x
        for j in np.argsort(-cosines)[:9]:
            scores[i] += math.exp(cosines[j] / 0.5) * flags[j]
        scores[i] /= sum(math.exp(c / 0.5) for c in np.sort(cosines)[-9:])
    want = roc_auc_score(_flags(test), scores, average="macro")
    assert found.metrics["macro_auroc"].value == pytest.approx(want, abs=1e-6) and 0.5 < want < 1


# ------------------------------------------------------------------------------------------------- division


def test_groups_are_never_divided() -> None:
    groups = np.repeat(np.arange(40), 5)
    x = np.zeros((200, 2), dtype=np.float32)
    fitted, held = divided(Examples(x, np.arange(200), groups), "it")
    assert len(held.x) == 40 and set(held.right) | set(fitted.right) == set(range(200))
    assert fitted.groups is not None and held.groups is not None and not set(fitted.groups) & set(held.groups)
    with pytest.raises(ConfigError, match="the training data are 1 group"):
        divided(Examples(x, np.arange(200), np.zeros(200, dtype=np.int64)), "it")


def test_what_is_learned_from_and_what_is_asked_are_kept_apart() -> None:
    train, test = _single()
    task: KNN = KNN.Config(data=(), bootstrap_by="patient").build()
    assert not [w for w in task.score(MODEL, test, train).warnings if "patient" in w]
    again = embedded({"image": test.z["image"].numpy()}, [{**m, "patient": i} for i, m in enumerate(test.meta)])
    assert "50 samples have a patient that is in the training data too" in task.score(MODEL, again, train).warnings
    with pytest.raises(ConfigError, match="the training data are those that are asked about"):
        task.score(MODEL, test, test)
    with pytest.raises(ConfigError, match="there are no training data to learn from; name them with train"):
        task.score(MODEL, test)


def test_settings_that_cannot_be_used() -> None:
    for config, said in (
        (LinearProbe.Config(data=(), c=(0.0, 1.0)), "c is .*; name inverse strengths above 0"),
        (KNN.Config(data=(), k=(0,)), r"k is \(0,\); name numbers of at least 1"),
        (KNN.Config(data=(), temperature=0.0), "temperature is 0.0; it must be above 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            config.build()
    train, test = _single()
    same = embedded({"image": train.z["image"].numpy()}, [{"label": "ant"}] * 150, name="train")
    with pytest.raises(ConfigError, match="all training samples have the same class"):
        LinearProbe.Config(data=(), c=(1.0,)).build().score(MODEL, test, same)


# --------------------------------------------------------------------------------------------------- curves


def test_curves_are_repetitions() -> None:
    """With whole weights they are scikit-learn's of the items written so many times; also with ties."""
    rng = np.random.default_rng(0)
    right = rng.random((60, 3)) < [0.3, 0.6, 0.1]
    scores = np.round(rng.normal(size=(60, 3)) + right, 1)  # many ties
    weights = rng.integers(0, 3, (4, 60)).astype(np.float64)
    weights[3, right[:, 2]] = 0  # a class that a resample does not have
    curves = Curves(scores, right)
    for row, w in enumerate(weights.astype(int)):
        y, s = np.repeat(right, w, axis=0), np.repeat(scores, w, axis=0)
        known = [c for c in range(3) if y[:, c].any()]
        assert known == ([0, 1] if row == 3 else [0, 1, 2])
        got = {name: of(weights)[row] for name, of in curves.statistics().items()}
        assert got["macro_auroc"] == pytest.approx(np.mean([roc_auc_score(y[:, c], s[:, c]) for c in known]))
        want = np.mean([average_precision_score(y[:, c], s[:, c]) for c in known])
        assert got["mean_average_precision"] == pytest.approx(want)
        f1 = [max((f1_score(y[:, c], s[:, c] >= t), t) for t in s[:, c]) for c in known]
        assert got["macro_max_f1"] == pytest.approx(np.mean([f for f, _ in f1]))
        for c, (f, t) in zip(known, f1, strict=True):
            curve = curves.of(c, weights[row : row + 1])
            assert curve.f1[0] == pytest.approx(f) and f1_score(
                y[:, c], s[:, c] >= curve.threshold[0]
            ) == pytest.approx(f), t
    nowhere = Curves(scores, np.hstack([right[:, :1], np.zeros((60, 2), dtype=bool)]))
    assert nowhere.known == [0]
    want = roc_auc_score(right[:, 0], scores[:, 0])
    assert value(nowhere.statistics()["macro_auroc"], 60) == pytest.approx(want), "empty classes are in the mean"
    assert np.isfinite(resampled(curves.statistics(), 60)["macro_auroc"]).all()


# -------------------------------------------------------------------------------------------------- towers


def test_features_before_the_projection(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    model: MultiEncoder = load(run)
    parts = [tiny.write_shards(tmp_path / n, tiny.samples(36, seed=s)) for n, s in (("train", 0), ("test", 99))]
    train, test = (embed(model, [p], modalities=["image"]) for p in parts)
    model.train()
    inside = embed(tower(model), test.source, modalities=["image"]).z["image"]
    assert model.training and model.encoder("image").training, "embedding has left the model in another mode"
    model.eval()
    transform = model.encoder("image").transform(train=False)
    x = transform.collate([transform(s.members["png"]) for s in tiny.samples(36, seed=99)])
    with torch.no_grad():
        pooled = model.encoder("image")(x)[0]
        torch.testing.assert_close(inside, torch.nn.functional.normalize(pooled, dim=1), rtol=1e-5, atol=1e-6)
        z = torch.nn.functional.normalize(model.projections["image"](pooled), dim=1)
    torch.testing.assert_close(test.z["image"], z, rtol=1e-5, atol=1e-6)
    assert inside.shape[1] == 16 and z.shape[1] == 8
    of_towers = LinearProbe.Config(data=(), features="tower").build().score(model, test, train)
    direct = LinearProbe.Config(data=()).build()
    inner = [embed(tower(model), d.source, modalities=["image"]) for d in (test, train)]
    assert of_towers.flat() == direct.score(model, *inner).flat()


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_learns_from_the_training_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny.write_run(tmp_path / "run")
    for split, seed in (("train", 0), ("test", 99)):
        samples = [Sample(s.key, dict(s.members)) for s in tiny.samples(36, seed=seed)]
        tiny.write_shards(tmp_path / "data" / split, samples)
    tasks = ["--tasks", "linear_probe", "knn", "--json", str(tmp_path / "found.json")]
    main(["eval", str(run), str(tmp_path / "data"), *tasks])
    probe, near = json.loads((tmp_path / "found.json").read_text())
    assert (probe["task"], near["task"]) == ("linear_probe", "knn")
    assert probe["metrics"]["lp_acc1"] == probe["metrics"]["acc1"] > probe["metrics"]["chance"]
    assert probe["metrics"]["training_samples"] == near["metrics"]["samples"] == 36
    spec = tmp_path / "colours.yaml"
    spec.write_text("data: data/test\ntrain: data/train\ntasks: {linear_probe: {}, knn: {}}\n")
    for said in (
        [str(spec)],
        [str(tmp_path / "data" / "test"), "--train", str(tmp_path / "data" / "train"), *tasks[:3]],
    ):
        main(["eval", str(run), *said, "--json", str(tmp_path / "again.json")])
        assert [a["metrics"] for a in json.loads((tmp_path / "again.json").read_text())] == [
            a["metrics"] for a in (probe, near)
        ]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", str(run), str(tmp_path / "data" / "test"), *tasks])
    assert "the training data are those that are asked about" in capsys.readouterr().err


def test_a_recipe_asks_it(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    train, test = (tiny.write_shards(tmp_path / n, tiny.samples(36, seed=s)) for n, s in (("train", 0), ("test", 99)))
    found = LinearProbe.Config(data=(test,), train=(train,)).build().run(load(run))
    assert found["samples"] == 36 and (found["acc1"] or 0) > (found["chance"] or 0)
