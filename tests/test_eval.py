"""Scores: equal to what a slow loop counts, never better than they should be, and told in others' words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval import answer as answering
from mmcontrast.eval.answer import Answer
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.geometry import Geometry
from mmcontrast.eval.models import load_asked
from mmcontrast.eval.report import as_table
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.retrieval import Retrieval, clip_benchmark_names
from mmcontrast.eval.spec import override, read_spec
from mmcontrast.eval.statistics import chance_recall, mean
from mmcontrast.eval.zero_shot import ZeroShot, class_embeddings
from mmcontrast.questions import ask
from mmcontrast.shard_writer import Sample
from mmcontrast.sharding import World
from tests import tiny


@dataclass(frozen=True)
class Asked:
    """A model, samples with gaps, and what reading them gave."""

    run: Path
    model: MultiEncoder
    samples: Sequence[Sample]
    shards: str
    data: Embedded


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("eval")
    run = tiny.write_run(folder / "run")
    samples: list[Sample] = []
    for i, sample in enumerate(tiny.samples(41)):
        members = dict(sample.members)
        if i % 7 == 3 and i % 11 != 5:
            del members["txt"]
        if i % 11 == 5:
            del members["png"]
        if i % 5 == 2:
            members["json"] = {"shape": "unnamed"}  # no label
        if i % 13 == 11:
            del members["json"]
        samples.append(Sample(sample.key, members))
    shards = tiny.write_shards(folder / "shards", samples, per_shard=16)
    model = load(run)
    return Asked(run, model, samples, shards, embed(model, [shards]))


def answer(run: Path, datasets: Sequence[str], *, tasks: Sequence[str], **settings: Any) -> list[dict[str, Any]]:
    """As the command asks, but for what it prints."""
    specs = [override(read_spec(name), tasks=tasks, templates=(), **settings) for name in datasets]
    answers, _ = answering.answer([load_asked(run)], specs)
    return [a.to_json() for a in answers]


def _with_random_embeddings(data: Embedded, seed: int) -> Embedded:
    """Small whole numbers: sums are exact, so that many scores tie exactly."""
    g = torch.Generator().manual_seed(seed)
    z = {m: torch.randint(-2, 3, tuple(t.shape), generator=g).float() for m, t in data.z.items()}
    return replace(data, z=z)


def _meta(sample: Sample) -> dict[str, Any]:
    found = sample.members.get("json", {})
    assert isinstance(found, Mapping)
    return dict(found)


def _places(samples: Sequence[Sample], member: str) -> list[int]:
    return [i for i, s in enumerate(samples) if member in s.members]


# ------------------------------------------------------------------------------------------------- embedding


def test_embedding_keeps_order_and_gaps_whatever_the_batch_size(asked: Asked) -> None:
    data = asked.data
    assert list(data.keys) == [s.key for s in asked.samples] and data.positions.tolist() == list(range(41))
    assert data.rows["image"].tolist() == _places(asked.samples, "png")
    assert data.rows["text"].tolist() == _places(asked.samples, "txt")
    assert not data.skipped and [dict(m) for m in data.meta] == [s.members.get("json", {}) for s in asked.samples]
    for m, member in (("image", "png"), ("text", "txt")):
        one_by_one = [asked.model.encode(m, [s.members[member]])[0] for s in asked.samples if member in s.members]
        torch.testing.assert_close(data.z[m], torch.stack(one_by_one), rtol=1e-5, atol=1e-5)
    assert data.z["image"].std(0).min() > 1e-4, "all pictures look the same to the model: nothing is compared"
    for size, workers in ((1, 0), (7, 1)):
        again = embed(asked.model, [asked.shards], batch_size=size, workers=workers)
        assert again.keys == data.keys and again.rows["text"].tolist() == data.rows["text"].tolist()
        torch.testing.assert_close(again.z, data.z, rtol=1e-5, atol=1e-5)


def test_questions_of_one_evaluation_embed_the_same_data_once(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[MultiEncoder, str]] = []
    plain = MultiEncoder.embed

    def counted(model: MultiEncoder, modality: str, inputs: Any) -> Tensor:
        calls.append((model, modality))
        return plain(model, modality, inputs)

    monkeypatch.setattr(MultiEncoder, "embed", counted)
    other = load(asked.run)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5).add_(0.01)
    data = (asked.shards,)
    questions = {"found": Retrieval.Config(data=data).build(), "map": Geometry.Config(data=data).build()}
    alone = {
        f"{kind}/{name}/{key}": value
        for kind, model in (("eval", asked.model), ("eval_ema", other))
        for name, question in questions.items()
        for key, value in question.run(model).items()
    }
    assert alone["eval/map/alignment"] != alone["eval_ema/map/alignment"]
    assert [calls.count((asked.model, m)) for m in ("image", "text")] == [2, 2]
    calls.clear()
    assert ask(questions, {"eval": asked.model, "eval_ema": other}, World.alone()) == alone
    assert sorted(calls, key=str) == sorted(((z, m) for z in (asked.model, other) for m in ("image", "text")), key=str)


def test_damaged_samples_are_left_out_and_named(asked: Asked, tmp_path: Path) -> None:
    broken = [Sample("bad", {"png": b"no picture", "txt": "x"}), *tiny.samples(3)]
    data = embed(asked.model, [tiny.write_shards(tmp_path / "some", broken)])
    assert list(data.keys) == ["000000", "000001", "000002"] and data.positions.tolist() == [1, 2, 3]
    assert [(s[0], s[1]) for s in data.skipped] == [("00000.tar", "bad")] and "decoded" in data.skipped[0][2]
    torch.testing.assert_close(data.z["image"][0], asked.model.encode("image", [tiny.png("red")])[0])
    with pytest.raises(ConfigError, match="none of the 1 samples of .* could be read"):
        embed(asked.model, [tiny.write_shards(tmp_path / "none", broken[:1])])


# ------------------------------------------------------------------------------------------------- retrieval


def _slow_retrieval(
    samples: Sequence[Sample], data: Embedded, group: str | None, ks: Sequence[int]
) -> dict[str, float]:
    """Recall and median rank by counting, candidate by candidate."""
    pairs = [i for i, s in enumerate(samples) if "png" in s.members and "txt" in s.members]
    vectors = {
        m: dict(zip(_places(samples, member), data.z[m].tolist(), strict=True))
        for m, member in (("image", "png"), ("text", "txt"))
    }

    def right(i: int, j: int) -> bool:
        if i == j:
            return True
        if group is None:
            return samples[i].members["txt"] == samples[j].members["txt"]
        a, b = (_meta(samples[k]).get(group) for k in (i, j))
        return a is not None and a == b

    found: dict[str, float] = {"samples": len(pairs)}
    for x, y in (("image", "text"), ("text", "image")):
        ranks: list[int] = []
        for i in pairs:
            scores = {j: sum(a * b for a, b in zip(vectors[x][i], vectors[y][j], strict=True)) for j in pairs}
            best = max(s for j, s in scores.items() if right(i, j))
            ranks.append(sum(1 for j, s in scores.items() if not right(i, j) and s >= best))
        for k in ks:
            found[f"{x}_to_{y}_recall@{k}"] = sum(r < k for r in ranks) / len(ranks)
        found[f"{x}_to_{y}_median_rank"] = sorted(ranks)[(len(ranks) - 1) // 2] + 1
    return found


@pytest.mark.parametrize("group", [None, "label", "shape"])
@pytest.mark.parametrize("seed", [0, 1])
def test_retrieval_equals_counting(asked: Asked, group: str | None, seed: int) -> None:
    data = _with_random_embeddings(asked.data, seed)
    ks = (1, 3, 10)
    got = Retrieval.Config(data=(), group=group, k=ks).build().score(asked.model, data).flat()
    want = _slow_retrieval(asked.samples, data, group, ks)
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert 0 < want["image_to_text_recall@3"] < 1, "nothing is told apart"
    for way in ("image_to_text", "text_to_image"):
        low, mean, high = (got[f"{way}_recall@10{end}"] for end in ("_low", "", "_high"))
        assert low is not None and mean is not None and high is not None and low < mean < high


def test_retrieval_chance_is_what_random_orders_reach(asked: Asked) -> None:
    retrieval: Retrieval = Retrieval.Config(data=(), group="shape", k=(1, 5)).build()
    total = {1: 0.0, 5: 0.0}
    g = torch.Generator().manual_seed(0)
    rounds = 50
    got: dict[str, float | None] = {}
    for _ in range(rounds):
        z = {m: torch.randn(tuple(t.shape), generator=g) for m, t in asked.data.z.items()}
        got = retrieval.score(asked.model, replace(asked.data, z=z)).flat()
        for k in total:
            total[k] += (got[f"image_to_text_recall@{k}"] or 0) / rounds
    for k, average in total.items():
        assert average == pytest.approx(got[f"chance@{k}"], abs=0.05)
    assert total[1] > 0.2, "groups have no effect on chance"


@pytest.mark.parametrize(("n", "k", "p"), [(10, 1, 1), (10, 3, 2), (10, 10, 1), (10, 50, 3), (7, 2, 7), (9, 4, 5)])
def test_chance_of_random_orders(n: int, k: int, p: int) -> None:
    rng = np.random.default_rng(n * k)
    trials = 20_000
    hits = np.mean([(rng.permutation(n)[:p] < k).any() for _ in range(trials)])
    got = chance_recall(n, [p], k)
    assert abs(got - hits) < 4 * math.sqrt(0.25 / trials)
    assert got == pytest.approx(1 - math.comb(n - p, min(k, n)) / math.comb(n, min(k, n)), abs=1e-12)
    assert chance_recall(n, [p, 1], k) == pytest.approx((got + chance_recall(n, [1], k)) / 2)


@pytest.mark.parametrize("value", [0.5, 0.0, math.nan])
def test_embeddings_without_information_do_not_score(asked: Asked, value: float) -> None:
    """All equal, all zero or not numbers: each wrong candidate stands before the right one."""
    z = {m: torch.full_like(t, value) for m, t in asked.data.z.items()}
    data = replace(asked.data, z=z)
    got = Retrieval.Config(data=(), k=(1, 5)).build().score(asked.model, data).flat()
    assert [got[f"{w}_recall@{k}"] for w in ("image_to_text", "text_to_image") for k in (1, 5)] == [0] * 4
    scores = ZeroShot.Config(data=()).build().score(asked.model, data).flat()
    if value == 0.5:  # one class is nearest to every picture, by chance
        assert scores["mean_per_class_recall"] == pytest.approx(scores["chance"])
    else:
        assert (scores["acc1"], scores["acc5"], scores["mean_per_class_recall"]) == (0, 0, 0)


def test_retrieval_refuses_what_it_cannot_answer(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"k is \(0, 5\); name ranks of at least 1"):
        Retrieval.Config(data=(), k=(0, 5)).build()
    with pytest.raises(ConfigError, match="k is"):
        Retrieval.Config(data=(), k=()).build()
    with pytest.raises(ConfigError, match="no sample has the group 'labl' in its metadata; fields: label, shape"):
        Retrieval.Config(data=(), group="labl").build().score(asked.model, asked.data)
    apart = [Sample(s.key, {m: s.members[m]}) for s, m in zip(tiny.samples(4), ("png", "txt") * 2, strict=True)]
    folder = tiny.write_shards(tmp_path / "apart", apart)
    with pytest.raises(ConfigError, match="no sample has both image and text"):
        Retrieval.Config(data=(folder,)).build().run(asked.model)


# ------------------------------------------------------------------------------------------------- zero-shot


def _slow_zero_shot(asked: Asked, data: Embedded, label: str, templates: Sequence[str]) -> dict[str, float]:
    """acc1, acc5 and mean recall, prompt by prompt and sample by sample."""
    truths: dict[int, Any] = {i: _meta(s).get(label) for i, s in enumerate(asked.samples)}
    pictures = dict(zip(_places(asked.samples, "png"), data.z["image"].tolist(), strict=True))
    rows = [i for i in pictures if truths[i] is not None]
    classes = sorted({truths[i] for i in rows})
    prototypes: dict[str, list[float]] = {}
    for name in classes:
        total = np.zeros(8)
        for template in templates:
            total += asked.model.encode("text", [template.replace("{c}", name)])[0].double().numpy()
        prototypes[name] = (total / np.linalg.norm(total)).tolist()
    hits: dict[str, list[tuple[bool, bool]]] = {name: [] for name in classes}
    for i in rows:
        scores = {c: sum(a * b for a, b in zip(pictures[i], prototypes[c], strict=True)) for c in classes}
        ahead = sum(1 for c in classes if c != truths[i] and scores[c] >= scores[truths[i]])
        hits[truths[i]].append((ahead < 1, ahead < 5))
    every = [h for found in hits.values() for h in found]
    return {
        "acc1": sum(a for a, _ in every) / len(every),
        "acc5": sum(b for _, b in every) / len(every),
        "mean_per_class_recall": sum(sum(a for a, _ in f) / len(f) for f in hits.values()) / len(classes),
        "classes": len(classes),
        "samples": len(rows),
        "chance": 1 / len(classes),
    }


@pytest.mark.parametrize("templates", [("{c}",), ("a photo of {c}", "{c}, {c}!", "{x} {c}")])
@pytest.mark.parametrize("seed", [0, 1])
def test_zero_shot_equals_counting(asked: Asked, templates: tuple[str, ...], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    z = {m: torch.randn(tuple(t.shape), generator=g) for m, t in asked.data.z.items()}
    z["image"][::9] = 0  # all classes tie
    data = replace(asked.data, z=z)
    got = ZeroShot.Config(data=(), templates=templates).build().score(asked.model, data).flat()
    want = _slow_zero_shot(asked, data, "label", templates)
    assert {name: got[name] for name in want} == pytest.approx(want, abs=1e-12)
    assert 0 < want["acc1"] < want["acc5"] < 1 and want["samples"] < 37
    low, high = got["acc1_low"], got["acc1_high"]
    assert low is not None and high is not None and low < want["acc1"] < high


def test_top_five_of_fewer_classes_is_undefined(asked: Asked) -> None:
    got = ZeroShot.Config(data=(), label="shape").build().score(asked.model, asked.data).flat()
    assert got["classes"] == 4 and got["acc5"] is None and got["acc1"] is not None and got["chance"] == 0.25


def test_a_class_is_the_mean_of_its_prompts(asked: Asked) -> None:
    templates = ("a {c}", "the {c} {c}", "{c}")
    got = class_embeddings(asked.model, "text", [[t.replace("{c}", n) for t in templates] for n in ("red", "blue")])
    for row, name in zip(got, ("red", "blue"), strict=True):
        prompts = [asked.model.encode("text", [p])[0] for p in (f"a {name}", f"the {name} {name}", name)]
        mean = torch.stack(prompts).mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got[0], got[1], atol=1e-4)


def test_zero_shot_refuses_what_it_cannot_answer(asked: Asked) -> None:
    with pytest.raises(ConfigError, match="the template 'a photo' lacks {c}"):
        ZeroShot.Config(data=(), templates=("{c}", "a photo")).build()
    with pytest.raises(ConfigError, match="no sample has the label 'colour' in its metadata; fields: label, shape"):
        ZeroShot.Config(data=(), label="colour").build().score(asked.model, asked.data)
    with pytest.raises(ConfigError, match="no modality 'txt'; did you mean 'text'"):
        ZeroShot.Config(data=(), prompt_modality="txt").build().score(asked.model, asked.data)
    blind = replace(asked.data, z={"text": asked.data.z["text"]}, rows={"text": asked.data.rows["text"]})
    with pytest.raises(ConfigError, match="no sample has the modality 'image'"):
        ZeroShot.Config(data=()).build().score(asked.model, blind)


# ------------------------------------------------------------------------------------------------- answers


def test_answers_have_the_keys_of_clip_benchmark_and_are_strict_json(asked: Asked) -> None:
    results = answer(asked.run, [asked.shards], tasks=("zero_shot", "retrieval"), label="shape")
    back = json.loads(json.dumps(results, allow_nan=False))
    assert back == results
    assert [r["task"] for r in back] == ["zeroshot_classification", "zeroshot_retrieval"]
    for result in back:
        assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= result.keys()
        assert (result["dataset"], result["model"]) == (asked.shards, str(asked.run))
        assert result["pretrained"] == "step-000001"
    classification, retrieval = (r["metrics"] for r in back)
    assert {"acc1", "acc5", "mean_per_class_recall"} <= classification.keys() and classification["acc5"] is None
    for k in (1, 5, 10):
        assert retrieval[f"image_retrieval_recall@{k}"] == retrieval[f"text_to_image_recall@{k}"]
        assert retrieval[f"text_retrieval_recall@{k}"] == retrieval[f"image_to_text_recall@{k}"]
    assert classification == ZeroShot.Config(data=(asked.shards,), label="shape").build().run(asked.model)
    own = Retrieval.Config(data=(asked.shards,)).build().run(asked.model)
    assert own == {name: retrieval[name] for name in own}
    assert not any("image_retrieval" in name for name in own)


def test_other_pairs_get_no_image_text_names() -> None:
    assert clip_benchmark_names(Retrieval.Config(data=(), pair=("audio", "text"))) == {}
    assert clip_benchmark_names(Retrieval.Config(data=(), pair=("text", "image"), k=(3,))) == {
        "image_retrieval_recall@3": "text_to_image_recall@3",
        "text_retrieval_recall@3": "image_to_text_recall@3",
    }


def test_a_data_set_answers_what_it_can(asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds: dict[str, tuple[str, ...]] = {"pairs": ("png", "txt"), "labels": ("png", "json"), "pictures": ("png",)}
    folders = {
        name: tiny.write_shards(
            tmp_path / name, [Sample(s.key, {m: s.members[m] for m in members}) for s in tiny.samples(8)]
        )
        for name, members in kinds.items()
    }
    both = ("zero_shot", "retrieval")
    for name, task, left in (
        ("pairs", "zeroshot_retrieval", "zero_shot left out: no sample has the label 'label' in its metadata"),
        ("labels", "zeroshot_classification", "retrieval left out: no sample has both image and text"),
    ):
        main(["eval", str(asked.run), folders[name], "--json", str(tmp_path / "found.json")])
        assert [r["task"] for r in json.loads((tmp_path / "found.json").read_text())] == [task]
        assert f"{name}: {left}" in capsys.readouterr().err
    for name, tasks in (("pictures", both), ("labels", ("retrieval",)), ("pairs", ("zero_shot",))):
        with pytest.raises(ConfigError, match=f"{name}: .* left out"):
            answer(asked.run, [folders[name]], tasks=tasks)


def test_modalities_of_other_names_are_asked_alike(asked: Asked, tmp_path: Path) -> None:
    config = tiny.model_config(encoders={"photo": tiny.vit(), "caption": tiny.text_transformer()})
    run = tiny.write_run(tmp_path / "run", config)
    results = answer(run, [asked.shards], tasks=("zero_shot", "retrieval"), pair=("photo", "caption"))
    want = answer(asked.run, [asked.shards], tasks=("zero_shot", "retrieval"))
    assert results[0]["metrics"] == want[0]["metrics"]  # the same weights under other names
    assert results[1]["metrics"]["photo_to_caption_recall@1"] == want[1]["metrics"]["image_to_text_recall@1"]


def test_the_table_shows_every_metric_once(asked: Asked) -> None:
    result = Result(
        "zeroshot_classification",
        [Items(["a", "b", "c", "d"], {"acc1": mean([1, 1, 1, 1]), "x_recall@5": mean([0.25] * 4)})],
        chance={"chance": 0.125},
        counts={"samples": 1200},
        undefined=["acc5"],
        renamed={"theirs@5": "x_recall@5"},
        warnings=["look here"],
    )
    by = answering.Asked(asked.model, "runs/one", "step-1", "")
    lines = as_table([Answer("birds", by, result, result.task)]).splitlines()
    assert [line.split() for line in lines] == [
        ["birds", "zeroshot_classification", "runs/one"],
        ["acc1", "1.000", "[1.000,", "1.000]"],
        ["x_recall@5", "0.250", "[0.250,", "0.250]"],
        ["acc5", "-"],
        ["chance", "0.125"],
        ["samples", "1200"],
        ["note:", "look", "here"],
    ]


def test_metrics_are_numbers_of_python(asked: Asked) -> None:
    found: dict[str, Any] = Retrieval.Config(data=()).build().score(asked.model, asked.data).flat()
    found |= ZeroShot.Config(data=()).build().score(asked.model, asked.data).flat()
    assert all(value is None or type(value) is float for value in found.values())
    assert isinstance(asked.data.z["image"], Tensor) and asked.data.z["image"].dtype == torch.float32
