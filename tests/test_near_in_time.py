"""Two parts of one recording: where they lie, and one tower for both."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from mmcontrast.check.grads import check_grads
from mmcontrast.config import ConfigError, from_dict, to_dict
from mmcontrast.data import NearInTime, Stream
from mmcontrast.data.reader import Reader
from mmcontrast.encoders import MultiEncoder, SignalResNet, SignalTransformer
from mmcontrast.encoders.base import Transform
from mmcontrast.encoders.depth import blocks
from mmcontrast.objectives import InfoNCE
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import open_shards
from mmcontrast.trainer import Trainer

RATE = 10  # samples per second


def npy(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values, np.float32))
    return file.getvalue()


def wav(values: Any, rate: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, values, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


class Part(Transform):
    """A recording as its samples."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, value: Any) -> Tensor:
        return value.read()

    def collate(self, values: Any) -> Any:
        return values


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ramps, so that a sample tells its place: a minute, 12 seconds, 2 seconds; and a sound of three seconds."""
    folder = tmp_path_factory.mktemp("ramps")
    with ShardWriter(folder / "signals") as writer:
        for number, frames in enumerate((600, 120, 20)):
            writer.write(Sample(f"{number}", {"npy": npy(np.arange(frames)), "json": {"rate": RATE}}))
    with ShardWriter(folder / "sounds") as writer:
        writer.write(Sample("0", {"wav": wav(np.linspace(0, 0.9, 24_000, dtype=np.float32), 8000)}))
    return folder


def composed(folder: Path, kind: str = "timeseries", **changes: Any) -> NearInTime:
    settings: dict[str, Any] = {"of": "ecg", "other": "later", "seconds": 5.0, "gap": 20.0} | changes
    config = NearInTime.Config(**settings)
    transforms = {"ecg": Part(kind), "later": Part(kind)}
    return config.build(Reader(open_shards((str(folder),)), transforms, made=config.made()))


def test_the_gap_falls_off_and_the_parts_lie_evenly(recordings: Path) -> None:
    """Against the density itself: 2 (1 - t) of the gap t, and a uniform place for what is left."""
    compose = composed(recordings / "signals")
    starts: list[tuple[int, int]] = []
    for seed in range(3000):
        raw = compose.raw(0, Random(seed))
        parts = [raw[m].read()[0] for m in ("ecg", "later")]
        for part in parts:
            assert torch.equal(part, torch.arange(50.0) + part[0])  # a part is five seconds in a row
        starts.append((int(parts[0][0]), int(parts[1][0])))
    first, second = np.array(starts).T
    assert min(first.min(), second.min()) == 0 and max(first.max(), second.max()) == 550
    gaps = np.abs(second - first)
    falling = stats.triang(0, loc=0, scale=200)  # its mode at 0
    dither = np.random.default_rng(0).uniform(-0.5, 0.5, len(gaps))  # gaps are rounded to samples
    assert stats.kstest(gaps + dither, falling.cdf).pvalue > 0.01
    assert stats.kstest(gaps + dither, stats.uniform(0, 200).cdf).pvalue < 1e-9
    place = (np.minimum(first, second) + 0.5) / (550 - gaps + 1)
    assert stats.kstest(place, "uniform").pvalue > 0.01
    assert 0.45 < (second > first).mean() < 0.55


def test_short_recordings_give_what_they_have(recordings: Path) -> None:
    compose = composed(recordings / "signals")
    raws = [compose.raw(1, Random(seed)) for seed in range(200)]
    gaps = [abs(float(raw["ecg"].read()[0, 0] - raw["later"].read()[0, 0])) for raw in raws]
    assert all(raw[m].frames == 50 for raw in raws for m in raw) and max(gaps) == 70
    whole = compose.raw(2, Random(0))
    assert torch.equal(whole["ecg"].read(), whole["later"].read()) and whole["later"].frames == 20


def test_parts_of_a_sound_are_its_samples(recordings: Path) -> None:
    compose = composed(recordings / "sounds", "audio", seconds=1.0, gap=1.5)
    whole = compose.reader.raw(0, "ecg").read()
    raw = compose.raw(0, Random(1))
    for part in raw.values():
        read = part.read()
        start = int(torch.searchsorted(whole, read[0]))
        assert len(read) == 8000 and torch.equal(read, whole[start : start + 8000])
        assert torch.equal(part.read(100, 50), read[100:150])
        assert torch.equal(part.part(100, 200).read(10, 5), read[110:115])


def recipe(folder: Path) -> Trainer.Config:
    tower = SignalResNet.Config(
        channels=("0",), rate=RATE, seconds=4.0, widths=(8,), blocks=(1,), jitter=0.1, channel_dropout=0.0
    )
    return Trainer.Config(
        model=MultiEncoder.Config(encoders={"ecg": tower}, same={"later": "ecg"}, dim=6),
        data=Stream.Config(
            shards=(str(folder),), workers=0, compose=NearInTime.Config(of="ecg", other="later", seconds=5.0, gap=9.0)
        ),
        objectives={"clip": InfoNCE.Config(pairs=(("ecg", "later"),))},
        steps=3,
        global_batch=8,
        micro_batch=3,
        out=folder.parent / "run",
    )


def test_one_tower_takes_both_and_its_gradient_is_that_of_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with ShardWriter(tmp_path / "noise") as writer:
        for number in range(24):
            writer.write(Sample(f"{number:02d}", {"npy": npy(generator.normal(size=300)), "json": {"rate": RATE}}))
    config = recipe(tmp_path / "noise")
    assert from_dict(to_dict(config)) == config
    proof = check_grads(config, rows=16, ranks=(2,))
    assert proof.passed, proof
    trainer: Trainer = config.build()
    assert trainer.model.modalities == ["ecg", "later"] and list(trainer.model.encoders) == ["ecg"]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    moved = {name: bool((p != before[name]).any()) for name, p in trainer.model.named_parameters()}
    assert all(moved.values())
    x = (np.arange(60, dtype=np.float32) % 7, RATE)
    assert torch.equal(trainer.model.encode("ecg", [x]), trainer.model.encode("later", [x]))


def test_blocks_of_a_shared_tower_are_wrapped_once(tmp_path: Path) -> None:
    """Not once for each modality that goes through it, which would recompute what is recomputed."""
    with ShardWriter(tmp_path / "noise") as writer:
        for number in range(8):
            writer.write(Sample(f"{number}", {"npy": npy(np.arange(300) % (number + 2)), "json": {"rate": RATE}}))
    config = recipe(tmp_path / "noise")
    tower = SignalTransformer.Config(channels=("0",), rate=RATE, seconds=4.0, patch=10, width=8, layers=1, heads=2)
    config.model.encoders, config.checkpoint_activations = {"ecg": tower}, ("all",)
    trainer: Trainer = config.build()
    (block,) = blocks(trainer.model.encoder("ecg"))
    wrapper: Any = block.forward
    assert isinstance(wrapper, partial) and not isinstance(wrapper.args[0], partial)
    assert wrapper.args[0].__func__ is type(block).forward


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"of": "text"}, "NearInTime.of is 'text'"),
        ({"seconds": 0.0}, "NearInTime.seconds is 0.0; it must be above 0"),
        ({"gap": float("inf")}, "NearInTime.gap is inf"),
    ],
)
def test_settings_that_cannot_work_are_refused(recordings: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed(recordings / "signals", **changes)


@pytest.mark.parametrize(
    ("same", "said"),
    [
        ({"later": "egc"}, "tower of 'egc'.*ecg"),
        ({"ecg": "ecg"}, "no tower's own name"),
        ({"a b": "ecg"}, "identifier"),
    ],
)
def test_towers_that_are_not_there_are_refused(tmp_path: Path, same: dict[str, str], said: str) -> None:
    tower = recipe(tmp_path / "noise").model.encoders
    with pytest.raises(ConfigError, match=said):
        MultiEncoder.Config(encoders=tower, same=same, dim=6).build()
