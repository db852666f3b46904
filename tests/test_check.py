"""`check grads` passes what is right, on real processes, and names what is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import Encode
from mmcontrast.check.arms import DROPPED, PIECES, compare, prepared, with_missing
from mmcontrast.check.grads import check_grads
from mmcontrast.check.report import Proof
from mmcontrast.check.tracing import Trace, first_unexplained
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.encoders import CoCaText, ViT
from mmcontrast.heads import Captioning
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.base import Objective
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.trainer import Trainer
from tests.broken import Drawing, Function, Infinite, MeanOfBlock, PaddedText, recipe, write_recipe
from tests.shapes import picture, write_shapes


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards in which samples lack their picture or their caption."""
    return write_shapes(tmp_path_factory.mktemp("data") / "sparse", missing=True)


def checked(config: Trainer.Config, **settings: Any) -> Proof:
    arguments: dict[str, Any] = {"rows": 16, "ranks": (), **settings}
    return check_grads(config, **arguments)


# ------------------------------------------------------------------------------------------------- what is right


def test_the_command_proves_a_right_recipe_with_modalities_missing(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    words = ["check", "grads", write_recipe(tmp_path, sparse, "dropout"), "--rows", "16", "--json", str(out)]
    main([*words, "--out", str(tmp_path / "run"), "--model.encoders.image.color-jitter", "0.2"])
    said = capsys.readouterr()
    assert "The gradient is the same. With 1, 2 and 4 processes, micro-batches of 2 and blocks of 3" in said.out
    assert [line.split()[2] for line in said.err.splitlines()] == [f"{i}/6" for i in range(1, 7)]
    found = json.loads(out.read_text())
    assert found["passed"] is True and found["faults"] == [] and found["failed"] == {}
    assert set(found["batches"]) == {"as drawn", DROPPED}
    for batch in found["batches"].values():
        assert min(batch["present"].values()) < 16
        assert set(batch["largest"]) == {"image", "text", "clip.log_scale"}
        assert set(batch["arms"]) == {"1 process", "2 ranks", "4 ranks"}
        for arm in batch["arms"].values():
            assert abs(arm["loss"] - batch["loss"]) < 1e-9 and arm["loss_error"] < 1e-9
            assert arm["errors"].keys() == batch["largest"].keys()
            assert all(0 <= error < 1e-9 for error in arm["errors"].values())
    assert any(e > 0 for b in found["batches"].values() for a in b["arms"].values() for e in a["errors"].values())
    assert found["largest"] < 1e-9 and max(found["forward"].values()) < 1e-9
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("middle", ["right", "dropout"])
def test_a_tolerance_that_cannot_be_met_fails(shards: Path, middle: str) -> None:
    proof = checked(recipe(shards, middle))
    assert proof.passed and 0 < proof.largest < 1e-9
    strict = checked(recipe(shards, middle), tolerance=0.0)
    assert not strict.passed and "more than the tolerance 0e+00" in strict.verdict()


def test_frozen_towers_and_late_objectives(shards: Path) -> None:
    config = recipe(shards, late=InfoNCE.Config(start_step=3, weight=0.5))
    config.model.encoders["text"].freeze = ("all",)
    proof = checked(config)
    assert proof.passed, proof.verdict()
    assert "text (tower frozen)" in proof.as_table()
    assert set(proof.batches["as drawn"].largest) == {"image", "text", "clip.log_scale", "late.log_scale"}
    assert proof.batches["as drawn"].largest["late.log_scale"] > 0

    config.model.encoders["image"].freeze = ("all",)
    config.model.projection, config.model.dim = "none", 16
    proof = checked(config)
    assert proof.passed, proof.verdict()
    assert [line.split()[:2] for line in proof.as_table().splitlines()[3:5]] == [
        ["image", "frozen"],
        ["text", "frozen"],
    ]


def test_heads_are_proved_too(sparse: Path) -> None:
    config = recipe(sparse)
    config.model.encoders = {
        "image": ViT.Config(image_size=16, patch_size=8, width=16, layers=1, heads=2, patch_dropout=0.5),
        "text": CoCaText.Config(context_length=8, width=16, layers=1, heads=2),
    }
    config.model.heads = {"caption": Captioning.Config(layers=1, heads=2, weight=2.0)}
    proof = checked(config)
    assert proof.passed, proof.verdict()
    for batch in proof.batches.values():
        assert batch.largest["caption (head)"] > 1e-4
        assert 0 < batch.arms["1 process"].errors["caption (head)"] < 1e-9


def test_nothing_is_left_behind(shards: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "OMP_NUM_THREADS")
    before, python = [os.environ.get(name) for name in names], random.getstate()
    np.random.seed(0)
    numbers = np.random.random()
    np.random.seed(0)
    checked(recipe(shards))
    assert [os.environ.get(name) for name in names] == before and random.getstate() == python
    assert np.random.random() == numbers and not Path("never written").exists()


def test_dropped_modalities_are_the_same_on_any_rank() -> None:
    def batch(first: int, n: int) -> Batch:
        rows = {"a": torch.arange(n), "b": torch.arange(n)}
        return Batch({m: torch.arange(first, first + n) for m in rows}, rows, torch.arange(first, first + n))

    whole = with_missing(batch(0, 32), ["a", "b"], first_row=0, rows=32, seed=5)
    assert int(whole.rows["a"].max()) < 24 and 0 < len(whole.rows["b"]) < 32
    assert set(whole.rows["a"].tolist()) | set(whole.rows["b"].tolist()) == set(range(32))
    for m in ("a", "b"):
        assert whole.inputs[m].tolist() == whole.rows[m].tolist()
        parts = [with_missing(batch(f, 8), ["a", "b"], first_row=f, rows=32, seed=5) for f in range(0, 32, 8)]
        assert sum([(p.rows[m] + 8 * i).tolist() for i, p in enumerate(parts)], []) == whole.rows[m].tolist()
    assert "a" not in parts[3].inputs


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("middle", "cause", "says"),
    [
        ("batch norm", "mixes samples", "encoders.image.middle (BatchNorm1d) mixes samples"),
        ("minus mean", "mixes samples", "encoders.image.middle (Function) mixes samples"),
        ("parts", "mixes samples", "encoders.image.middle (Parts) mixes samples"),
        ("own noise", "randomness", "encoders.image.middle (OwnNoise) draws from a generator of its own"),
        ("python", "randomness", "encoders.image.middle (Function) draws from python's `random`"),
        ("numpy", "randomness", "encoders.image.middle (Function) draws from `numpy.random`"),
        ("skips", "randomness", "encoders.image.middle (SkipsLayer) draws from python's `random`"),
        ("counting", "state", "encoders.image.middle (Counting) changes its buffer 'calls' in every forward"),
        ("only float32", "float64", "encoders.image.middle (OnlyFloat32) cannot run in float64"),
        (
            "nan",
            "not finite",
            "encoders.image.middle (Function) makes NaN or infinity of finite inputs (float32) of image",
        ),
        ("unused", "no gradient", "no gradient reaches encoders.image.middle.spare.weight and 1 more"),
        ("no gradient", "no gradient", "no gradient reaches encoders.image.first.weight and 1 more"),
    ],
)
def test_a_broken_encoder_is_named(shards: Path, middle: str, cause: str, says: str) -> None:
    random.seed(1)
    proof = checked(recipe(shards, middle), ranks=(2,))
    assert not proof.passed
    assert [(fault.cause, says in fault.text) for fault in proof.faults] == [(cause, True)], proof.verdict()
    assert f"- {says}" in proof.verdict()
    assert proof.failed.get("2 ranks") in (None, "not run: mend what is named first")
    assert json.dumps(proof.as_json(), allow_nan=False)
    if middle == "batch norm":
        assert "training refuses this recipe" in proof.failed["1 process"]
        assert "Replace it by group or layer norm" in proof.verdict()
    if middle == "own noise":  # the numbers show it too
        assert proof.batches["as drawn"].arms["1 process"].errors["image"] > 1e-3


def test_the_command_ends_with_1_where_nothing_is_proved(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "check",
                "grads",
                write_recipe(tmp_path, shards, "own noise"),
                "--rows",
                "8",
                "--json",
                str(tmp_path / "found.json"),
            ]
        )
    assert ended.value.code == 1
    assert "NOT shown to be the same:\n- encoders.image.middle (OwnNoise)" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is False and found["faults"][0]["where"] == "encoders.image.middle"


@pytest.mark.parametrize(
    ("objective", "cause", "says"),
    [
        (MeanOfBlock.Config(), "not additive", "the objective 'wrong' (MeanOfBlock) gives another loss or gradient"),
        (Drawing.Config(), "randomness", "the objective 'wrong' (Drawing) does not repeat itself"),
        (Infinite.Config(), "not finite", "the objective 'wrong' (Infinite) gives -inf"),
        (InfoNCE.Config(pairs=(("image", "audio"),)), "fails", "'wrong' reads the modality 'audio'"),
    ],
)
def test_a_wrong_objective_is_named(shards: Path, objective: Objective.Config, cause: str, says: str) -> None:
    config = recipe(shards, wrong=objective)
    proof = checked(config)
    assert not proof.passed and cause in [fault.cause for fault in proof.faults], proof.verdict()
    assert any(says in fault.text for fault in proof.faults), proof.verdict()


def test_padding_that_is_seen_is_named(shards: Path) -> None:
    config = recipe(shards)
    config.model.encoders["text"] = PaddedText.Config()
    proof = checked(config)
    assert [fault.cause for fault in proof.faults] == ["padding"], proof.verdict()
    assert proof.forward["text"] > 1e-3 > 1e-9 > proof.forward["image"]
    assert "text comes out otherwise" in proof.verdict() and "padding must not be seen" in proof.verdict()


def test_a_modality_that_no_sample_has_is_not_called_proved(shards: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "few", max_samples=100) as writer:
        for number in range(60):
            members: dict[str, bytes | str | dict[str, str]] = {"txt": f"text {number}"}
            writer.write(Sample(f"{number:04d}", members | ({"png": picture("red", "bar")} if number == 59 else {})))
    config = recipe(tmp_path / "few")
    assert isinstance(config.data, Stream.Config)
    config.data.window = 1  # in the order of the shards: the picture comes last
    proof = checked(config, rows=8)
    assert not proof.passed
    assert "none of the drawn samples has the modality 'image': draw more of them with --rows" in proof.verdict()


def test_a_narrow_type_inside_is_named_where_it_matters(shards: Path) -> None:
    proof = checked(recipe(shards, "lowered"))
    assert proof.lowered == ["encoders.image.middle (Function)"]
    strict = checked(recipe(shards, "lowered"), tolerance=0.0)
    assert "encoders.image.middle (Function) computes in less than float64 inside" in strict.verdict()


def test_what_only_several_processes_show(shards: Path) -> None:
    proof = checked(recipe(shards, "of rank"), ranks=(2,))
    assert not proof.passed and not proof.faults and not proof.failed
    arms = proof.batches["as drawn"].arms
    assert arms["1 process"].largest < 1e-9 < 1e-8 < arms["2 ranks"].largest
    assert "(2 ranks, " in proof.verdict() and "No layer, randomness or objective was found" in proof.verdict()


def test_a_cache_that_does_not_replay_is_caught(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unseeded(encode: Encode, piece: MicroBatch, *_: object) -> Mapping[str, Tensor]:
        return encode(piece)

    monkeypatch.setattr("mmcontrast.cached._encode", unseeded)
    proof = checked(recipe(shards, "dropout"), ranks=(2,))
    assert not proof.passed and not proof.faults
    assert proof.batches["as drawn"].arms["1 process"].errors["image"] > 1e-3
    assert proof.failed == {"2 ranks": "not run: mend what is named first"}


def test_processes_that_fail_or_hang_are_ended(shards: Path) -> None:
    before = set(multiprocessing.active_children())  # such as the pool of other tests
    proof = checked(recipe(shards), ranks=(2,), timeout=0.2)
    assert "no answer from rank 0, 1 of 2 within 0.2 seconds" in proof.failed["2 ranks"]
    proof = checked(recipe(shards, "fails on rank 1"), ranks=(2,), timeout=100)
    assert proof.failed["2 ranks"].startswith("rank 1 of 2 failed:\n")
    assert proof.failed["2 ranks"].endswith("RuntimeError: out of luck")
    assert set(multiprocessing.active_children()) <= before


def test_wrong_settings_are_one_sentence(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="rows is 12; 8 micro-batches"):
        checked(recipe(shards), rows=12)
    with pytest.raises(ConfigError, match="3 processes cannot share"):
        checked(recipe(shards), ranks=(3,))
    with pytest.raises(ConfigError, match="no shards match 'nowhere'"):
        checked(recipe(Path("nowhere")))
    with pytest.raises(ConfigError, match="tolerance is nan"):
        checked(recipe(shards), tolerance=float("nan"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        checked(recipe(shards))


def test_errors_are_relative_to_each_tensor() -> None:
    want = {"loss": torch.tensor(2.0), "model.encoders.a.w": torch.tensor([1.0, 3.0])}
    want |= {"model.projections.a.w": torch.tensor([1e-7]), "objectives.clip.s": torch.tensor([0.5])}
    got: dict[str, Tensor | None] = {n: t.clone() for n, t in want.items() if n != "loss"}
    assert compare(2.0, got, want).largest == 0
    got["model.encoders.a.w"] = torch.tensor([1.0, 3.3])
    found = compare(2.2, got, want)
    assert found.loss_error == pytest.approx(0.1) and found.errors["a"] == pytest.approx(0.1)
    assert found.worst == "model.encoders.a.w" and found.errors["clip.s"] == 0
    got["model.projections.a.w"] = torch.tensor([2e-7])  # small beside its tower: relative to 1e-4 of that
    assert compare(2.0, got, want).errors["a"] == pytest.approx(0.1)
    got["objectives.clip.s"] = None  # an arm that forgot a gradient
    assert compare(2.0, got, want).errors["clip.s"] == pytest.approx(1.0)
    got["model.encoders.a.w"] = torch.tensor([1.0, float("nan")])
    assert compare(2.0, got, want).errors["a"] == float("inf")
    assert compare(float("nan"), got, want).loss_error == float("inf")


def test_a_trace_finds_rows_on_either_axis() -> None:
    """[T, B, C] and windows [B * k, C] belong to rows as well as [B, C] does."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.windows = Function(lambda x: x), Function(lambda x: x)
            self.mix = Function(lambda x: x + x.roll(1, 1))  # over B, the second axis

        def forward(self, x: Tensor) -> Tensor:
            y = self.turned(x.transpose(0, 1))
            y = self.mix(y)
            return self.windows(y.transpose(0, 1).reshape(-1, x.shape[2]))

    model = Turned()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    traces: list[Trace] = []
    for value in (x, x[[2]].expand(5, 3, 4)):
        with Trace(model, rows=5, row=2) as trace:
            model(value)
        traces.append(trace)
    found = first_unexplained(*traces)
    assert found is not None and found[0] == "mix"
    assert [t.shape for t in traces[0].calls["turned", 0].outputs] == [(3, 4)]
    assert torch.equal(traces[0].calls["windows", 0].outputs[0], (x[2] + x[1]))


def test_the_check_replaces_what_it_must(shards: Path) -> None:
    config = replace(recipe(shards), clip_norm=1.0, precision="bf16", trackers=("tensorboard",))
    config.data.lanes = 6
    changed, step = prepared(config, 32)
    assert (changed.clip_norm, changed.precision, changed.trackers, step) == (None, "fp32", (), 0)
    assert (changed.data.lanes, changed.micro_batch * PIECES, changed.global_batch) == (2, 32, 32)
    assert config.data.lanes == 6
