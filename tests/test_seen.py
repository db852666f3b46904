"""Test items that were trained on are told, with the scores without them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.eval.embed import embed
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.seen import seen, training_shards
from mmcontrast.shard_writer import Sample
from tests import tiny


def run_on(folder: Path, *shards: str) -> Path:
    """A run folder that says what it was trained on."""
    run = tiny.write_run(folder)
    config = json.loads((run / "config.json").read_text())
    config["data"] = {"sources": {str(i): {"shards": [name], "weight": 1.0} for i, name in enumerate(shards)}}
    (run / "config.json").write_text(json.dumps(config))
    return run


def renamed(samples: list[Sample]) -> list[Sample]:
    return [Sample(f"new{i}", {**s.members, "txt": f"text {i}"}) for i, s in enumerate(samples)]


def asked(run: Path, data: str, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    main(["eval", str(run), data, "--tasks", "zero_shot", "retrieval", "--json", str(out)])
    return json.loads(out.read_text()), capsys.readouterr().err


def test_samples_of_the_training_shards_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, others = tiny.samples(18), tiny.samples(40, seed=500)
    test = tiny.write_shards(tmp_path / "test", ours, per_shard=7)
    # Five of them under other names and with other texts, in the second of two sources.
    mixed = tiny.write_shards(tmp_path / "b", others[20:] + renamed(ours[3:8]), per_shard=9)
    run = run_on(tmp_path / "run", tiny.write_shards(tmp_path / "a", others[:20]), mixed)
    found, said = asked(run, test, tmp_path / "found.json", capsys)
    assert "5 of 18 samples were trained on, as their files are among the run's training shards" in said
    data = embed(load(run), [test])
    task = Retrieval.Config(data=())
    result = task.build().score(load(run), data)
    for answer in found:
        metrics = answer["metrics"]
        assert (
            metrics["seen_in_training"] == 5
            and "5 of 18 samples were trained on: without them" in answer["warnings"][-1]
        )
    for items in result.items:
        kept = np.array([i for i in range(18) if not 3 <= i < 8])
        for name, statistic in items.statistics.items():
            weights = np.zeros((1, 18))
            weights[0, kept] = 1
            assert found[1]["metrics"][f"{name}_unseen"] == statistic(weights)[0]
    assert any(found[1]["metrics"][f"{n}_unseen"] != found[1]["metrics"][n] for i in result.items for n in i.statistics)


def test_where_all_were_trained_on_there_is_no_score_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tiny.write_shards(tmp_path / "test", tiny.samples(18))
    found, _ = asked(run_on(tmp_path / "run", test), test, tmp_path / "found.json", capsys)
    for answer in found:
        assert answer["warnings"][-1] == "18 of 18 samples were trained on: the scores say nothing about others"
        assert answer["metrics"]["seen_in_training"] == 18 and not any("unseen" in name for name in answer["metrics"])


def test_nothing_is_said_where_nothing_is_shared_or_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = tiny.write_shards(tmp_path / "test", tiny.samples(18))
    other = tiny.write_shards(tmp_path / "other", tiny.samples(18, seed=500))  # the same texts
    for number, shards in enumerate((other, str(tmp_path / "gone"))):
        found, said = asked(run_on(tmp_path / str(number), shards), test, tmp_path / "found.json", capsys)
        assert "trained on" not in said and not any("unseen" in name for name in found[0]["metrics"])


def test_files_and_foreign_shards_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    samples = tiny.samples(12)
    train = tiny.write_shards(tmp_path / "train", samples[:4])
    model = load(tiny.write_run(tmp_path / "run"))
    folder = tmp_path / "pictures"
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for i, sample in enumerate(samples):
            place = folder / ("red" if i % 2 else "blue")
            place.mkdir(parents=True, exist_ok=True)
            png = sample.members["png"]
            assert isinstance(png, bytes)
            (place / f"{i:02d}.png").write_bytes(png)
            tar.add(place / f"{i:02d}.png", f"{i:02d}.png")
    files = embed(model, [str(folder)], modalities=["image"])
    assert [files.keys[p] for p in seen(files, [train])] == [k for k in files.keys if int(Path(k).stem) < 4]
    assert len(seen(files, [train])) == 4
    foreign = embed(model, [str(tmp_path / "foreign.tar")], modalities=["image"])
    assert seen(foreign, [train]) == [0, 1, 2, 3]
    assert seen(foreign, []) == [] and seen(embed(model, [train], modalities=["text"]), [train]) == []


def test_shards_of_every_source_of_a_run() -> None:
    sources = {"a": {"shards": ["x", "https://far/y"]}, "b": {"inner": {"shards": ("z",)}}}
    assert training_shards({"sources": sources, "seed": 3}) == ["x", "z"]
