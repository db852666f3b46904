"""Runs with a captioning head: one result on any number of ranks, resumed, loaded, and written with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from mmcontrast import load
from mmcontrast.batch import Batch
from mmcontrast.checkpoint import list_checkpoints, read_tensors
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.objectives import InfoNCE
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.trainer import Trainer
from tests import coca, shapes
from tests.coca import head_of

RECIPE = str(Path(__file__).with_name("coca.py"))
NAMES = [(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def write_few_captions(folder: Path) -> Path:
    """24 shapes of which 8 have a caption and most a picture: many a rank gets no pair."""
    with ShardWriter(folder, max_samples=7) as writer:
        for number, (color, shape) in enumerate(NAMES):
            members: dict[str, bytes | str | dict[str, str]] = {"json": {"label": shape}}
            if number % 3 == 0:
                members["txt"] = f"a {color} {shape}" if number % 2 else f"this is a very {color} {shape}"
            if number % 4 != 1:
                members["png"] = shapes.picture(color, shape)
            writer.write(Sample(f"{number:04d}", members))
    return folder


def run(out: Path, data: Path, *flags: str, ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [sys.executable, *launcher, "-m", "mmcontrast", "train", RECIPE, "--out", str(out)]
    done = subprocess.run(
        [*words, "--data.shards", str(data), *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(folder: Path, step: int = -1) -> dict[str, Tensor]:
    path = list_checkpoints(folder)[step][1]
    return read_tensors(path, "model") | read_tensors(path, "objectives")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["caption.loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_give_the_weights_of_one_where_a_rank_has_no_captions(tmp_path: Path) -> None:
    data = write_few_captions(tmp_path / "data")
    config = replace(coca.recipe(), out=tmp_path / "one", steps=4)
    assert isinstance(config.data, Stream.Config)
    config.data.shards = (str(data),)
    trainer: Trainer = config.build()
    head = head_of(trainer.model)
    counts: list[tuple[int, int]] = []
    for batch in trainer.stream.batches(0, 4):
        halves = [
            Batch(inputs=p.inputs, rows={m: r - p.start for m, r in p.rows.items()}, ids=batch.ids[:4])
            for p in batch.split(4)
        ]
        counts.append(cast(tuple[int, int], tuple(int(head.count(half)) for half in halves)))
    assert any(sum(pair) and not all(pair) for pair in counts), f"every rank has captions: {counts}"
    trainer.fit()
    run(tmp_path / "two", data, "--steps", "4", ranks=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    start = weights(tmp_path / "one", 0)
    assert (one["heads.caption.vocabulary.weight"] - start["heads.caption.vocabulary.weight"]).abs().max() > 1e-4
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [loss == 0 for loss in losses(tmp_path / "one")] == [not sum(pair) for pair in counts]


def test_a_run_resumes_and_what_is_loaded_writes_the_same(tmp_path: Path) -> None:
    """It learns to name the shapes, goes on after a loss of its last steps, and is loaded with the same words."""
    data = shapes.write_shapes(tmp_path / "data")
    config = replace(coca.recipe(), out=tmp_path / "run", steps=60, global_batch=24, micro_batch=12, block=None)
    assert isinstance(config.data, Stream.Config)
    config.data.shards, config.checkpoint.every = (str(data),), 50
    config.optimizer.lr, config.optimizer.weight_decay = 1e-2, 0.0
    trainer: Trainer = config.build()
    values = trainer.fit()
    assert values["loss"] == pytest.approx(values["clip.loss"] + 2 * values["caption.loss"], rel=1e-5)
    assert values["caption.loss"] < 0.4 < 9 < losses(tmp_path / "run")[0]
    whole = weights(tmp_path / "run")
    pictures = [shapes.picture(c, s) for c, s in NAMES]
    texts = trainer.model.caption(pictures)
    right = sum(texts[i] == f"a {c} {s}" for i, (c, s) in enumerate(NAMES))
    assert right > 12, texts  # of 24; colours and shapes by chance would be 1
    assert load(tmp_path / "run").caption(pictures) == texts

    shutil.rmtree(tmp_path / "run" / "step-000060")
    again: Trainer = config.build()
    again.fit()
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, whole[name]), name
    assert load(tmp_path / "run").caption(pictures, method="beam") == trainer.model.caption(pictures, method="beam")


def test_a_head_and_an_objective_of_one_name_are_refused(tmp_path: Path) -> None:
    config = replace(coca.recipe(), out=tmp_path / "run", objectives={"caption": InfoNCE.Config()})
    assert isinstance(config.data, Stream.Config)
    config.data.shards = (str(shapes.write_shapes(tmp_path / "data")),)
    with pytest.raises(ConfigError, match="both called 'caption'"):
        config.build()
