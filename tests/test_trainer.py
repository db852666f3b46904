"""Runs: exact on any number of ranks, exact after a kill, careful with what lies on disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from mmcontrast.checkpoint import (
    Checkpoints,
    damage,
    list_checkpoints,
    load,
    model_hash,
    read_tensors,
)
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW
from mmcontrast.recipe import load_recipe
from mmcontrast.trainer import Trainer
from tests.shapes import Trouble, recipe, write_shapes

RECIPE = str(Path(__file__).with_name("shapes.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def settings(out: Path, shards: Path, **changes: object) -> Trainer.Config:
    config = replace(recipe(), out=out, **changes)
    assert isinstance(config.data, Stream.Config)
    config.data.shards = (str(shards),)
    return config


def fit(config: Trainer.Config) -> dict[str, float]:
    return config.build().fit()


def command(out: Path, shards: Path, *flags: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    words = ["mmcontrast", "train", RECIPE, "--out", str(out), "--data.shards", str(shards), *flags]
    return launcher + words


def run(*words: str) -> None:
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(run_folder: Path) -> dict[str, Tensor]:
    _, newest = list_checkpoints(run_folder)[-1]
    return read_tensors(newest, "model") | read_tensors(newest, "objectives")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a and a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Eight steps in one process of its own, as `mmcontrast train` runs them."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(*command(out, shards))
    return out


def test_a_run_learns_and_writes_what_it_did(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    last = fit(settings(out, shards, steps=60, global_batch=24, micro_batch=24, checkpoint=Checkpoints.Config()))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert lines[0]["loss"] > 2.5 and last["loss"] == lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[0]["lr"] < lines[5]["lr"] and lines[-1]["lr"] < 0.01 * lines[6]["lr"]
    assert {"samples_per_second", "data_wait", "grad_norm", "clip.logit_scale"} <= lines[0].keys()
    model = load(out)
    z = model.encode("text", ["a red circle", "a blue bar"])
    assert z.shape == (2, 16) and torch.allclose(z.norm(dim=1), torch.ones(2))
    assert len(list_checkpoints(out)) == 1


def test_evaluators_run_in_the_loop_and_touch_nothing(tmp_path: Path, shards: Path, uninterrupted: Path) -> None:
    names = ZeroShot.Config(data=(str(shards),))
    evaluators = {"names": names, "pairs": Retrieval.Config(data=(str(shards),), k=(1, 5))}
    fit(settings(tmp_path / "run", shards, evaluators=evaluators, eval_every=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/names/acc1" in line]
    assert [line["step"] for line in evaluated] == [3, 6, 8]
    assert all(0 <= line["eval/pairs/image_to_text_recall@5"] <= 1 for line in evaluated)
    assert evaluated[-1]["eval/names/acc1"] == ZeroShot(names).run(load(tmp_path / "run"))["acc1"]
    assert_equal(weights(tmp_path / "run"), weights(uninterrupted))


def test_config_json_is_a_recipe_that_repeats_the_run(tmp_path: Path, shards: Path, uninterrupted: Path) -> None:
    config = load_recipe(str(uninterrupted / "config.json"))
    fit(replace(config, out=tmp_path / "again"))
    assert_equal(weights(tmp_path / "again"), weights(uninterrupted))


def test_a_killed_run_ends_with_the_weights_of_the_uninterrupted_one(
    tmp_path: Path, shards: Path, uninterrupted: Path
) -> None:
    """SIGKILL after some checkpoint; workers, patch dropout and augmentation are on, and an epoch ends on the way."""
    out = tmp_path / "killed"
    words = command(out, shards, "--data.workers", "2")
    process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list_checkpoints(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reached = [step for step, _ in list_checkpoints(out)]
    assert reached and reached[-1] < 8, f"killed too late to mean anything: {reached}"
    run(*words)
    assert_equal(weights(out), weights(uninterrupted))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
def test_two_ranks_give_the_weights_of_one(tmp_path: Path, missing: bool) -> None:
    """Also where a modality is missing on some rows, and where the run changes its number of ranks half-way."""
    data = write_shapes(tmp_path / "data", missing=missing)
    # Dropout is drawn per micro-batch, so equal micro-batches at equal rows see equal masks on any rank.
    run(*command(tmp_path / "two", data, ranks=2))
    one = settings(tmp_path / "one", data)
    fit(one)
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
    start = read_tensors(tmp_path / "one" / "step-000002", "model")
    moved = max(float((start[k] - t).abs().max()) for k, t in weights(tmp_path / "one").items() if k in start)
    assert moved > 1e-3, "nothing was trained: the comparison would be empty"

    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "assets", "step-000004"):
        (tmp_path / "one" / name).rename(half / name)
    run(*command(half, data, ranks=2))
    assert_equal(weights(half), weights(tmp_path / "one"), 1e-5)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, shards: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    fit(settings(out, shards))
    for step in (6, 8):
        file = out / f"step-{step:06d}" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        assert damage(file.parent) == "model.safetensors has changed"
    with pytest.raises(ConfigError, match="damaged: model.safetensors has changed"):
        load(out / "step-000008")
    assert load(out).config.dim == 16  # takes step 4 without touching the folder
    assert (out / "step-000008").exists()
    fit(settings(out, shards))
    assert (out / "step-000008.corrupt").exists() and (out / "step-000006.corrupt").exists()
    assert "set aside" in capsys.readouterr().err
    assert_equal(weights(out), weights(uninterrupted))


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    fit(settings(out, shards, steps=4))
    (out / "step-000009.tmp").mkdir()
    (out / "step-000010").mkdir()
    (out / "step-000010" / "model.safetensors").write_bytes(b"cut off")
    trainer: Trainer = settings(out, shards, steps=4).build()
    assert trainer.folder.checkpoints.newest() == out / "step-000004"


def test_another_run_in_the_folder_is_refused_by_field(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    fit(settings(out, shards, steps=2))
    with pytest.raises(ConfigError, match=r"seed: 0 there, 5 now.*another --out"):
        fit(settings(out, shards, steps=2, seed=5))
    other = settings(out, shards, steps=2)
    other.model.dim = 8
    with pytest.raises(ConfigError, match=r"model.dim: 16 there, 8 now"):
        fit(other)
    fit(settings(out, shards, steps=2, log_every=3, micro_batch=8, block=None))  # change no result


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data")
    fit(settings(tmp_path / "run", data, steps=2))
    for path in data.iterdir():
        path.unlink()
    write_shapes(data, missing=True)
    with pytest.raises(ConfigError, match="was trained with data"):
        fit(settings(tmp_path / "run", data, steps=2))


def test_data_that_moved_are_the_same_data(tmp_path: Path, uninterrupted: Path) -> None:
    here, there = write_shapes(tmp_path / "here"), tmp_path / "there"
    fit(settings(tmp_path / "run", here, steps=8))
    shutil.rmtree(tmp_path / "run" / "step-000008")
    here.rename(there)
    fit(settings(tmp_path / "run", there, steps=8))
    assert_equal(weights(tmp_path / "run"), weights(uninterrupted))


def test_a_run_that_failed_before_its_first_checkpoint_can_be_corrected(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    wrong = settings(out, shards, steps=2, objectives={"clip": InfoNCE.Config(never_negative=("color",))})
    with pytest.raises(ConfigError, match="'color', which the data do not carry"):
        fit(wrong)
    wrong.data.groups = ("color",)
    fit(wrong)
    assert [step for step, _ in list_checkpoints(out)] == [2]
    assert json.loads((out / "config.json").read_text())["data"]["groups"] == ["color"]


def test_an_evaluation_that_fails_costs_no_training(tmp_path: Path, shards: Path) -> None:
    config = settings(tmp_path / "run", shards, evaluators={"v": Retrieval.Config(data=("nowhere",))})
    config.checkpoint = Checkpoints.Config()
    with pytest.raises(ConfigError, match="no shards match 'nowhere'"):
        fit(config)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [8]
    config.evaluators = {"v": Retrieval.Config(data=(str(shards),), k=())}
    with pytest.raises(ConfigError, match="k is"):
        config.build()  # before any step


def test_metrics_survive_a_line_that_was_cut_short(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    fit(settings(out, shards, steps=4))
    shutil.rmtree(out / "step-000004")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('5\n{"step": 4, "lo')
    fit(settings(out, shards, steps=4))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["epoch"] for line in lines] == pytest.approx([8 / 24, 16 / 24, 1, 32 / 24])


def test_two_ranks_may_train_the_objective_alone(tmp_path: Path, shards: Path) -> None:
    flags = ["--model.encoders.image.freeze", "all", "--model.encoders.text.freeze", "all", "--steps", "3"]
    flags += ["--model.projection", "none", "--model.dim", "32", "--checkpoint.every", "1"]
    run(*command(tmp_path / "two", shards, *flags, ranks=2))
    scale = [read_tensors(p, "objectives")["clip.log_scale"] for _, p in list_checkpoints(tmp_path / "two")]
    assert len({float(s) for s in scale}) == 3
    run(*command(tmp_path / "one", shards, *flags))
    assert_equal(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-6)


def test_a_finished_run_is_left_alone(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    fit(settings(out, shards, steps=2))
    before = {p: p.stat().st_mtime_ns for p in (out / "step-000002").iterdir()}
    identity = model_hash(out / "step-000002")
    assert fit(settings(out, shards, steps=2)) == {}
    assert before == {p: p.stat().st_mtime_ns for p in (out / "step-000002").iterdir()}
    assert identity == model_hash(out / "step-000002")


def test_a_tracker_gets_what_metrics_get(tmp_path: Path, shards: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(*command(tmp_path / "run", shards, "--trackers", "tensorboard", "--steps", "4"))
    files = [EventAccumulator(str(p)).Reload() for p in (tmp_path / "run").rglob("events.out.tfevents.*")]
    (found,) = [
        file for file in files if "loss" in cast(list[str], file.Tags()["scalars"])
    ]  # another one holds the settings
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4]
    assert [e.value for e in found.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


def test_bfloat16_trains(tmp_path: Path, shards: Path) -> None:
    flags = [
        "--precision",
        "bf16",
        "--steps",
        "20",
        "--global-batch",
        "24",
        "--micro-batch",
        "24",
        "--checkpoint.every",
        "None",
    ]
    run(*command(tmp_path / "run", shards, *flags))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "run").values())


def test_too_many_damaged_samples_stop_the_run(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data")
    for path in data.glob("*.tar"):
        content = bytearray(path.read_bytes())
        for at in range(600, len(content), 1024):
            content[at] ^= 255
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged"):
        fit(settings(tmp_path / "run", data, steps=50, global_batch=24, micro_batch=24))


def test_settings_that_cannot_work_are_refused(tmp_path: Path, shards: Path) -> None:
    for change, words in (
        ({"steps": 0}, "steps is 0"),
        ({"block": 0}, "block is 0"),
        ({"objectives": {}}, "no objectives"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer": AdamW.Config(betas=(1.0, 0.9))}, "betas are"),
        ({"optimizer": AdamW.Config(weight_decay=-1.0)}, "weight_decay -1.0"),
        ({"trackers": ("tensorbord",)}, "'tensorbord' is not installed or not known"),
        ({"objectives": {"a.b": InfoNCE.Config()}}, "objective name 'a.b'"),
        ({"objectives": {"keys": InfoNCE.Config()}}, "objective name 'keys'"),
        ({"objectives": {"nan": Trouble.Config()}}, "no objective reads the modality 'text'"),
        ({"objectives": {"clip": InfoNCE.Config(pairs=(("image", "audio"),))}}, "reads the modality 'audio'"),
    ):
        with pytest.raises(ConfigError, match=words):
            settings(tmp_path / "run", shards, **change).build()
    assert not (tmp_path / "run").exists()
