"""A plan: FLOPs as counted by hand, memory and traffic as measured, and flags that make a run fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import harness
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.encoders import Encoder, MultiEncoder, TextTransformer, ViT
from mmcontrast.plan.accelerators import NAMES, Accelerator, accelerator
from mmcontrast.plan.count import Model, count
from mmcontrast.plan.predict import Machine, predict, remedies
from mmcontrast.trainer import Trainer
from tests import fleet, shapes
from tests.shapes import write_shapes

RECIPE = str(Path(__file__).with_name("shapes.py"))
FACTOR = 1.3
"""Between memory that is predicted and measured."""


def recipe(**changes: Any) -> Trainer.Config:
    """The towers of CLIP ViT-B/16, without patch dropout."""
    encoders: dict[str, Encoder.Config] = {
        "image": ViT.Config(image_size=224, patch_size=16, width=768, layers=12, heads=12),
        "text": TextTransformer.Config(context_length=77, width=512, layers=12, heads=8),
    }
    return replace(
        shapes.recipe(), model=MultiEncoder.Config(encoders=encoders, dim=512), tower_micro_batch={}, **changes
    )


@pytest.fixture(scope="module")
def clip() -> Model:
    return count(recipe())


def test_flops_are_those_of_a_hand_count(clip: Model) -> None:
    """ViT-B/16 at 224: 17.6 G multiplications and additions, as its authors' successors count (timm: 17.58)."""
    image, text = clip.towers
    assert not clip.real, "it was built with memory"

    def transformer(tokens: int, width: int, layers: int) -> float:
        projections = tokens * (4 + 8) * width**2  # of attention; of a perceptron four times as wide
        return layers * (projections + 2 * tokens**2 * width)

    patches = 196 * (16 * 16 * 3) * 768
    by_hand = transformer(197, 768, 12) + patches + 768 * 512
    assert 17.4e9 < by_hand < 17.7e9
    assert image.plain.forward == pytest.approx(2 * by_hand, rel=0.002)
    assert image.plain.backward == pytest.approx(4 * by_hand, rel=0.02)  # no gradient for the pixels
    assert text.plain.forward == pytest.approx(2 * transformer(77, 512, 12), rel=0.01)
    assert image.recomputed is not None
    needed = transformer(197, 768, 12) - 12 * 197 * 4 * 768**2  # the last product of a block is not made again
    assert image.recomputed.backward - image.plain.backward == pytest.approx(2 * needed, rel=0.002)
    assert image.parameters == pytest.approx(86e6, rel=0.01) and image.blocks == 12
    assert image.in_blocks == pytest.approx(12 * 12 * 768**2, rel=0.01)


def test_bfloat16_keeps_less_and_copies_of_the_weights() -> None:
    (exact, _), (half, _) = (count(middling(precision=p)).towers for p in ("fp32", "bf16"))
    assert 0.4 * exact.plain.kept < half.plain.kept < 0.8 * exact.plain.kept
    assert exact.fixed < 0.01 * half.fixed and half.fixed == pytest.approx(2 * exact.in_blocks, rel=0.1)


# ------------------------------------------------------------------------------------------------ memory


def middling(**changes: Any) -> Trainer.Config:
    """Large enough for memory to be that of tensors, small enough for a test."""
    encoders: dict[str, Encoder.Config] = {
        "image": ViT.Config(image_size=96, patch_size=8, width=128, layers=4, heads=4),
        "text": TextTransformer.Config(context_length=16, width=128, layers=2, heads=4),
    }
    changes = {
        "global_batch": 64,
        "micro_batch": 32,
        "tower_micro_batch": {},
        "keep_graphs": 1,
        "block": None,
    } | changes
    return replace(shapes.recipe(), model=MultiEncoder.Config(encoders=encoders, dim=64), **changes)


class Steps:
    """Two steps of a real trainer."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.changes = folder, changes

    def __call__(self, rows: int) -> harness.Work:
        config = middling(out=self.folder / f"run-{rows}", **self.changes)
        assert isinstance(config.data, Stream.Config)
        config.data.shards, config.data.lanes = (str(self.folder / "data"),), 1
        trainer: Trainer = config.build()
        batch = trainer.stream.batch(0)

        def work() -> None:
            for step in range(2):
                trainer.step(step, batch)

        return work


@pytest.mark.parametrize(
    "changes", [{"keep_graphs": 2}, {"keep_graphs": 1, "checkpoint_activations": ("all",)}], ids=["kept", "recomputed"]
)
def test_memory_is_that_of_a_real_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Beyond the weights, which stand before the first step."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is let go of goes back at once, as on a GPU
    write_shapes(tmp_path / "data")
    config = middling(**changes)
    device = Accelerator("none", 0, 1e12, 1e9, 1e10, 1e9, context=0)
    predicted = predict(config, count(config), Machine(1, device)).memory
    expected = sum(b for what, b in predicted.items() if what not in ("weights", "inputs"))
    measured = harness.peak(Steps(tmp_path, **changes), 64, threads=1).peak_mb * 1e6
    assert measured / FACTOR < expected < measured * FACTOR, (measured / 1e6, expected / 1e6)


# ------------------------------------------------------------------------------------------------ traffic


def test_traffic_is_that_of_real_ranks(tmp_path: Path) -> None:
    """Bytes that the kernel says a rank has sent in a step, beside those of the formulas."""
    write_shapes(tmp_path / "data")
    kinds = {"whole": "traffic:ddp:whole", "parts": "traffic:fsdp:parts", "lean": "traffic:lean:lean"}
    fleet.launch(tmp_path, 2, *kinds.values())
    predicted: dict[str, Mapping[str, float]] = {}
    for name, run in kinds.items():
        kind, layout, _ = run.split(":")
        config = fleet.settings(kind, layout, tmp_path, name)
        predicted[name] = sent = predict(config, count(config), Machine(2, accelerator("h100"))).sent
        measured = float((tmp_path / f"{name}.sent").read_text())
        # gloo's reduce-scatter moves twice what a ring does.
        expected = sum(sent.values()) + (sent["gradients"] if layout != "ddp" else 0)
        assert expected == pytest.approx(measured, rel=0.03), (name, measured, sent)
    lean = predicted["lean"]
    assert lean["weights"] > 3 * lean["gradients"], "every block was to be gathered for every micro-batch"


# ------------------------------------------------------------------------------------------------ whole plans


def test_more_of_each_setting_does_what_it_says(clip: Model) -> None:
    config = recipe(global_batch=4096, micro_batch=256, precision="bf16", keep_graphs=1)

    def on(gpus: int = 8, **changes: Any) -> Any:
        return predict(replace(config, **changes), clip, Machine(gpus, accelerator("h100")))

    base = on()
    assert on(micro_batch=64).memory["graphs"] < 0.4 * base.memory["graphs"]
    assert on(keep_graphs=3).memory["graphs"] > 1.8 * base.memory["graphs"]
    assert on(keep_graphs=3).compute < base.compute
    assert on(checkpoint_activations=("image", "text")).memory["graphs"] < 0.4 * base.memory["graphs"]
    assert on(parallel="fsdp").memory["optimizer"] == pytest.approx(base.memory["optimizer"] / 8)
    assert on(parallel="fsdp", reshard=True).memory["weights"] < on(parallel="fsdp").memory["weights"]
    assert on(parallel="fsdp", reshard=True).exchange > on(parallel="fsdp").exchange
    assert on(gpus=16).exchange > base.exchange  # on two machines
    assert on(gpus=1).exchange == 0 and "weights" not in on(gpus=1, parallel="fsdp").sent


def test_flags_that_make_it_fit_do(clip: Model) -> None:
    config = recipe(global_batch=4096, micro_batch=512, keep_graphs=4)
    small = Machine(8, replace(accelerator("l4"), memory=14e9))
    assert predict(config, clip, small).bytes > 14e9
    found = remedies(config, clip, small)
    flags, taken = found[-1]
    assert taken <= 14e9 < found[-2][1] and "--keep-graphs 1" in flags
    assert all(a >= b for (_, a), (_, b) in zip(found, found[1:], strict=False))
    assert remedies(config, clip, Machine(8, replace(small.device, memory=1e9)))[-1][1] > 1e9


def test_the_command_prints_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_shapes(tmp_path / "data")
    words = ["plan", RECIPE, "--gpus", "2", "--gpu", "a100", "--data.shards", str(data), "--steps", "20"]
    main([*words, "--json", str(tmp_path / "plan.json")])
    text = capsys.readouterr().out
    assert "20 steps of 8 samples on 2 x A100" in text and "fits into 80 GB" in text and "assumed: 40%" in text
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["samples"] == 160 and found["text_tokens"] == 160 * 8
    size = sum(p.stat().st_size for p in data.glob("*.tar")) / 24
    assert found["read_bytes_per_second"] == pytest.approx(size * found["samples_per_second"])
    main([*words, "--gpus", "1", "--micro-batch", "8", "--data.shards", "nowhere"])
    assert "MB/s from the shards" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: accelerator("h10"), "gpu 'h10' is not known; did you mean 'h100'"),
        (lambda: Machine(0, accelerator("l4")), "gpus 0"),
        (lambda: Machine(1, accelerator("l4"), mfu=1.5), "mfu 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_every_device_is_a_device() -> None:
    for name in NAMES:
        device = accelerator(name)
        assert device.fp32 > 1e9 and device.memory > 1e9 and (device.bf16 > 0 or name == "v100")
