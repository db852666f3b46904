"""Which candidate belongs to several known modalities: against loops, with ties, gaps and chance."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmcontrast.checkpoint import find_checkpoint, load, read_state
from mmcontrast.cli import main
from mmcontrast.config import ConfigError, to_dict
from mmcontrast.data import Stream
from mmcontrast.encoders import BagOfWords, MelConvNet, MultiEncoder
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.joint import Joint
from mmcontrast.objectives import Symile
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import open_shards
from mmcontrast.trainer import Trainer
from tests import tiny
from tests.test_compose import LANGUAGES, config, data
from tests.tiny import vit, write_run

__all__ = ["data"]  # the fixture


def embedded(n: int, rows: dict[str, list[int]], *, dim: int = 7, seed: int = 0, labels: Any = None) -> Embedded:
    """Random embeddings, as `embed` would give them."""
    draw = torch.Generator().manual_seed(seed)
    z = {m: torch.nn.functional.normalize(torch.randn(len(r), dim, generator=draw), dim=1) for m, r in rows.items()}
    meta = [{} if labels is None or labels[i] is None else {"kind": labels[i]} for i in range(n)]
    nothing: Any = None
    return Embedded(
        z=z,
        rows={m: torch.tensor(r) for m, r in rows.items()},
        keys=[f"k{i}" for i in range(n)],
        positions=torch.arange(n) * 3,
        meta=meta,
        skipped=[],
        fingerprint="",
        source=nothing,
        kinds={},
        facts={"bound": 0.25},
    )


def slow(candidates: Embedded, queries: list[Embedded], known: list[str], score: str, k: int) -> tuple[float, float]:
    """Accuracy and chance at k, query by query and candidate by candidate; draws are averaged per sample first."""

    def label(e: Embedded, row: int) -> str:
        value = e.meta[row].get("kind")
        return f"own {row}" if value is None else str(value)

    hits: dict[int, list[float]] = {}
    chances: list[float] = []
    rows = candidates.rows["image"].tolist()
    for e in queries:
        for row in range(len(e.keys)):
            if not all(row in e.rows[m].tolist() for m in known):
                continue
            right = [label(candidates, r) == label(e, row) for r in rows]
            if not any(right):
                continue
            parts = [e.z[m][e.rows[m].tolist().index(row)].tolist() for m in known]
            scores: list[float] = []
            for i in range(len(rows)):
                c = candidates.z["image"][i].tolist()
                if score == "product":
                    terms = [c[d] for d in range(len(c))]
                    for part in parts:
                        terms = [t * part[d] for d, t in enumerate(terms)]
                    scores.append(sum(terms))
                else:
                    scores.append(sum(sum(c[d] * part[d] for d in range(len(c))) for part in parts))
            best = max(s for s, r in zip(scores, right, strict=True) if r)
            before = sum(s >= best and not r for s, r in zip(scores, right, strict=True))
            hits.setdefault(row, []).append(float(before < k))
            miss = 1.0
            for i in range(k):
                miss *= max(0.0, (len(rows) - sum(right) - i) / (len(rows) - i))
            chances.append(1 - miss)
    per_sample = [sum(h) / len(h) for h in hits.values()]
    return sum(per_sample) / len(per_sample), sum(chances) / len(chances)


@pytest.mark.parametrize("score", ["product", "sum"])
@pytest.mark.parametrize("labelled", [False, True])
def test_scores_equal_a_slow_reference(score: Any, labelled: bool) -> None:
    n = 40
    labels = [None if i % 7 == 3 else f"c{i % 9}" for i in range(n)] if labelled else None
    images = [i for i in range(n) if i % 5 != 2]
    candidates = embedded(n, {"image": images}, labels=labels)
    audio, text = [i for i in range(n) if i % 6 != 1], [i for i in range(n) if i % 4 != 3]
    queries = [embedded(n, {"audio": audio, "text": text}, seed=s, labels=labels) for s in (1, 2, 3)]
    # Random embeddings find little: half of the queries are moved towards what they look for.
    for e in queries:
        for place, row in enumerate(text):
            if row in images and row % 2:
                e.z["text"][place] = candidates.z["image"][images.index(row)]
    asked = Joint(Joint.Config(data=("nowhere",), score=score, label="kind" if labelled else None))
    found = asked.between(candidates, queries).flat()
    for k in (1, 5):
        accuracy, chance = slow(candidates, queries, ["audio", "text"], score, k)
        assert found[f"acc{k}"] == pytest.approx(accuracy) and found[f"chance@{k}"] == pytest.approx(chance)
        low, high = found[f"acc{k}_low"], found[f"acc{k}_high"]
        assert low is not None and high is not None and low < accuracy < high
    acc1, acc5 = found["acc1"], found["acc5"]
    assert acc1 is not None and acc5 is not None and 0 < acc1 < acc5 < 1
    assert found["bound"] == 0.25 and found["candidates"] == len(images)


def test_the_other_numbers_equal_counting() -> None:
    """Ranks of single queries, with several right candidates each."""
    n = 150
    labels = [f"c{i % 60}" for i in range(n)]
    everywhere = {m: list(range(n)) for m in ("image", "audio", "text")}
    e = embedded(n, everywhere, labels=labels)
    e.z["text"][::2] = e.z["image"][::2]
    asked = Joint(Joint.Config(data=("x",), score="sum", label="kind", k=(1, 3)))
    found = asked.score(None, e).flat()  # type: ignore[arg-type]
    scores = ((e.z["audio"] + e.z["text"]).double() @ e.z["image"].double().T).tolist()
    ranks: list[int] = []
    precisions: list[float] = []
    for i, name in enumerate(labels):
        order = np.argsort([-s for s in scores[i]]).tolist()
        right = [labels[j] == name for j in order]
        ranks.append(right.index(True))
        at = [sum(right[: j + 1]) / (j + 1) for j in range(10) if right[j]]
        precisions.append(sum(at) / min(10, sum(right)))
    assert found["acc3"] == sum(r < 3 for r in ranks) / n and found["acc1%"] == sum(r < 2 for r in ranks) / n
    assert found["acc1"] != found["acc1%"] != found["acc3"] and "acc5" not in found
    assert found["median_rank"] == sorted(ranks)[(n - 1) // 2] + 1 > 1
    assert found["map@10"] == pytest.approx(sum(precisions) / n) and 0.05 < (found["map@10"] or 0) < 0.9
    drawn = asked.between(e, [e, embedded(n, everywhere, seed=5, labels=labels)]).flat()
    assert drawn["samples"] == n and drawn["queries"] == 2 * n and drawn["median_rank"] != found["median_rank"]
    with pytest.raises(ConfigError, match="evaluators of a recipe only"):
        Joint(Joint.Config(data=("x",), draws=2)).score(None, e)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"k is \(0,\)"):
        Joint.Config(data=("x",), k=(0,)).build()


def test_equal_embeddings_do_not_score() -> None:
    candidates = embedded(8, {"image": list(range(8))})
    queries = embedded(8, {"audio": list(range(8)), "text": list(range(8))})
    for broken in (torch.ones(8, 7), torch.full((8, 7), torch.nan)):
        same = replace(candidates, z={"image": broken})
        assert Joint(Joint.Config(data=("x",))).between(same, [queries]).flat()["acc1"] == 0


def test_what_cannot_be_asked_is_refused() -> None:
    candidates = embedded(4, {"image": [0, 1, 2, 3]}, labels=["a", "b", "c", "d"])
    queries = embedded(4, {"audio": [0, 1], "text": [2, 3]}, labels=["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="no sample has all of audio, text"):
        Joint(Joint.Config(data=("x",))).between(candidates, [queries])
    with pytest.raises(ConfigError, match="modality 'sound'"):
        Joint(Joint.Config(data=("x",), candidate="sound")).between(candidates, [queries])
    with pytest.raises(ConfigError, match="label 'colour'.*fields: kind"):
        Joint(Joint.Config(data=("x",), label="colour")).between(candidates, [queries])
    wrong: list[dict[str, Any]] = [{"draws": 0}, {"known": ()}, {"known": ("image", "text")}]
    for settings in wrong:
        with pytest.raises(ConfigError, match="draws|known"):
            Joint.Config(data=("x",), **settings).build()


# -------------------------------------------------------------------------------------------- on composed shards


def model_config() -> MultiEncoder.Config:
    return MultiEncoder.Config(
        encoders={
            "image": vit(),
            "audio": MelConvNet.Config(sample_rate=8000, seconds=0.1, mels=8, width=8, layers=1),
            "text": BagOfWords.Config(buckets=64, width=8),
        },
        dim=8,
    )


def tone(pitch: int) -> bytes:
    """A tenth of a second of WAV."""
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes((20000 * np.sin(np.arange(800) * (pitch + 1) / 20)).astype("<i2").tobytes())
    return file.getvalue()


def question(data: Path, **settings: Any) -> Joint.Config:
    defaults: dict[str, Any] = {"compose": config(data), "label": "class", "draws": 3}
    return Joint.Config(data=(str(data / "pictures"),), **(defaults | settings))


def test_the_same_question_has_the_same_answer(data: Path) -> None:
    torch.manual_seed(0)
    model: MultiEncoder = model_config().build()
    first = question(data).build().run(model)
    torch.manual_seed(1)
    assert question(data).build().run(model) == first
    assert first["queries"] == 36 and first["samples"] == 12 and first["classes"] == 12
    assert first["pairwise_bound"] == pytest.approx(1 / len(LANGUAGES))
    assert first["chance@1"] == pytest.approx(1 / 12)


def test_draws_differ_and_what_is_embedded_belongs_together(data: Path) -> None:
    model: MultiEncoder = model_config().build()
    shards = open_shards([str(data / "pictures")])
    draws = [embed(model, shards, compose=config(data), draw=d) for d in (0, 1)]
    assert torch.equal(draws[0].z["image"][1:], draws[1].z["image"][1:])  # the first class has two pictures
    assert not torch.equal(draws[0].z["text"], draws[1].z["text"])
    parts = [embed(model, shards, modalities=[m], compose=config(data)) for m in ("image", "audio", "text")]
    for part in parts:
        (modality,) = part.z
        assert torch.allclose(part.z[modality], draws[0].z[modality], atol=1e-6)
    assert draws[0].positions.tolist() == list(range(12)) and draws[0].meta[0]["class"] == "0"


def test_eval_without_data_asks_what_the_recipe_asks(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", model_config())
    with pytest.raises(SystemExit):
        main(["eval", str(run)])
    assert "asks no questions" in capsys.readouterr().err
    settings = json.loads((run / "config.json").read_text())
    asked = {"one": to_dict(question(data)), "two": to_dict(question(data, score="sum", draws=1))}
    (run / "config.json").write_text(json.dumps(settings | {"evaluators": asked}))
    main(["eval", str(run), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["task"] for r in found] == ["one", "two"]
    assert [r["metrics"]["queries"] for r in found] == [36, 12]
    assert found[0]["dataset"] == str(data / "pictures") and found[0]["metrics"]["acc1_low"] is not None
    out = capsys.readouterr().out
    assert "pairwise_bound" in out and "acc1" in out


def test_a_run_on_composed_examples_trains_resumes_and_is_asked(tmp_path: Path, data: Path) -> None:
    def trainer(out: Path, *, save_every: int | None = None) -> Trainer:
        config_of_run = Trainer.Config(
            model=model_config(),
            data=Stream.Config(shards=(str(data / "pictures"),), compose=config(data), groups=("class",), workers=0),
            objectives={"symile": Symile.Config(modalities=("image", "audio", "text"), never_negative=("class",))},
            evaluators={"test": question(data, draws=1)},
            steps=4,
            global_batch=8,
            out=out,
        )
        config_of_run.checkpoint.every = save_every
        return config_of_run.build()

    straight = trainer(tmp_path / "a")
    straight.fit()
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/test/queries"] == 12 and lines[-1]["eval/test/pairwise_bound"] == pytest.approx(1 / 3)
    first = trainer(tmp_path / "b", save_every=2)
    first.fit()
    shutil.rmtree(find_checkpoint(tmp_path / "b"))  # of step 4; that of step 2 is left
    resumed = trainer(tmp_path / "b", save_every=2)
    resumed.fit()
    pairs = zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    assert lines[-1]["step"] == 4 and read_state(find_checkpoint(tmp_path / "b"))["step"] == 4


def test_the_command_asks_from_all_others(tmp_path: Path, data: Path) -> None:
    """The product where it was trained, and the sum of pairwise scores elsewhere."""
    shards = str(data / "pictures")
    model = write_run(tmp_path / "run", model_config())
    embeddings = embed(load(model), [shards], compose=config(data))
    assert len(embeddings.z) == 3
    three = tmp_path / "three"
    with ShardWriter(three) as writer:
        for i in range(12):
            members = {"png": tiny.png("red", seed=i), "wav": tone(i), "txt": f"number {i}"}
            writer.write(Sample(f"{i:02d}", {**members, "json": {"kind": i // 2}}))
    found: list[dict[str, Any]] = []
    for name in ("product", "sum"):
        settings = json.loads((model / "config.json").read_text())
        trained = Symile.Config(modalities=("image", "audio", "text")) if name == "product" else None
        objectives = {"symile": to_dict(trained)} if trained else {}
        (model / "config.json").write_text(json.dumps(settings | {"objectives": objectives}))
        main(["eval", str(model), str(three), "--tasks", "joint", "--json", str(tmp_path / "found.json")])
        found += json.loads((tmp_path / "found.json").read_text())
        want = Joint.Config(data=(str(three),), known=("audio", "text"), score=name)  # type: ignore[arg-type]
        assert found[-1]["task"] == "joint_retrieval"
        flat = want.build().run(load(model))
        assert flat == {n: v for n, v in found[-1]["metrics"].items() if n in flat}
    assert found[0]["metrics"]["map@10"] != found[1]["metrics"]["map@10"], "the product is the sum"
    main(
        ["eval", str(model), str(three), "--tasks", "joint", "--group", "kind", "--json", str(tmp_path / "found.json")]
    )
    (grouped,) = json.loads((tmp_path / "found.json").read_text())
    assert grouped["metrics"]["classes"] == 6 and grouped["metrics"]["candidates"] == 12
