"""The moving average of the weights: what its formula says, kept over a kill, evaluated, and loaded like a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.checkpoint import Checkpoints, list_checkpoints, load, read_tensors
from mmcontrast.config import ConfigError
from mmcontrast.ema import EMA
from mmcontrast.trainer import Trainer
from tests.shapes import write_shapes
from tests.test_trainer import assert_equal, command, fit, run, settings
from tests.tiny import Sum, checksum

STEPS = 5


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def averaged(out: Path, shards: Path, **changes: Any) -> Trainer.Config:
    changes = {"checkpoint": Checkpoints.Config(every=1, keep=10), "steps": STEPS} | changes
    return settings(out, shards, ema=EMA.Config(decay=0.5), evaluators={"w": Sum.Config()}, eval_every=3, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(averaged(out, shards))
    return out


def saved(out: Path, step: int, name: str) -> dict[str, Tensor]:
    return read_tensors(out / f"step-{step:06d}", name)


def test_each_step_moves_the_average_as_the_formula_says(whole: Path) -> None:
    """Against a loop over the weights that each checkpoint holds; the first steps are warm-up, the last are not."""
    decays = [0.0, *(min(0.5, 1 - (1 + step) ** (-2 / 3)) for step in range(1, STEPS))]
    assert 0 < decays[1] < 0.5 == decays[-1]
    average = {name: t.double() for name, t in saved(whole, 1, "model").items()}
    for step, decay in enumerate(decays, start=1):
        weights = saved(whole, step, "model")
        average = {name: decay * t + (1 - decay) * weights[name].double() for name, t in average.items()}
        found = saved(whole, step, "ema")
        assert_equal({n: t.double() for n, t in found.items()}, average, 1e-6)
    last = saved(whole, STEPS, "model")
    apart = max(float((t - saved(whole, STEPS, "ema")[n]).abs().max()) for n, t in last.items())
    assert apart > 1e-4, "average and weights are one: the comparison would be empty"


def test_a_run_that_goes_on_has_the_average_of_the_uninterrupted_one(tmp_path: Path, shards: Path, whole: Path) -> None:
    out = tmp_path / "half"
    shutil.copytree(whole, out)
    for step, path in list_checkpoints(out):
        if step > 2:
            shutil.rmtree(path)
    shutil.rmtree(out / "ema")
    fit(averaged(out, shards))
    for name in ("ema", "model"):
        assert_equal(saved(out, STEPS, name), saved(whole, STEPS, name))
    assert_equal(load(out / "ema").state_dict(), load(whole / "ema").state_dict())


def test_the_average_changes_no_weight_and_is_the_same_on_two_ranks(tmp_path: Path, shards: Path, whole: Path) -> None:
    plain = tmp_path / "plain"
    fit(settings(plain, shards, steps=STEPS, checkpoint=Checkpoints.Config()))
    assert_equal(saved(plain, STEPS, "model"), saved(whole, STEPS, "model"))
    assert not (plain / "ema").exists() and not (plain / f"step-{STEPS:06d}" / "ema.safetensors").exists()
    flags = ["--ema.decay", "0.5", "--steps", str(STEPS)]
    run(*command(tmp_path / "two", shards, *flags, ranks=2))
    assert_equal(saved(tmp_path / "two", STEPS, "ema"), saved(whole, STEPS, "ema"), 1e-5)


def test_it_is_evaluated_beside_the_weights(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {line["step"]: line for line in lines if "eval/w/sum" in line}
    assert list(found) == [3, 5]
    for step, line in found.items():
        for prefix, name in (("eval", "model"), ("eval_ema", "ema")):
            assert line[f"{prefix}/w/sum"] == pytest.approx(checksum(saved(whole, step, name)), rel=1e-12)
        assert line["eval/w/sum"] != line["eval_ema/w/sum"]


def test_run_ema_is_a_run_and_a_run_made_anew_replaces_it(tmp_path: Path, shards: Path, whole: Path) -> None:
    model = load(whole / "ema")
    assert_equal(model.state_dict(), saved(whole, STEPS, "ema"))
    assert not model.training
    z = model.encode("text", ["a red circle", "a blue bar"])
    assert z.shape == (2, 16) and not torch.equal(z, load(whole).encode("text", ["a red circle", "a blue bar"]))

    out = tmp_path / "run"
    fit(averaged(out, shards, steps=2))
    for _, path in list_checkpoints(out):
        shutil.rmtree(path)
    fit(averaged(out, shards, steps=2, seed=1))
    assert_equal(load(out / "ema").state_dict(), saved(out, 2, "ema"))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_a_decay_that_keeps_nothing_or_all_is_refused(tmp_path: Path, shards: Path, decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema.decay is .*; it must be above 0 and below 1, or None"):
        settings(tmp_path / "run", shards, ema=EMA.Config(decay=decay)).build()
