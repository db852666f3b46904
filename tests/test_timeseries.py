"""Signals: read safely, resampled, put in order by their channels' names; what is absent changes nothing."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Reader
from mmcontrast.encoders import BagOfWords, Encoder, MultiEncoder, SignalResNet, SignalTransformer, Warp
from mmcontrast.encoders.timeseries import SignalTransform, resampled
from mmcontrast.encoders.warp import take
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, open_shards
from mmcontrast.signals import Signal, signal, signal_from

RATE = 50.0
CHANNELS = ("I", "II", "V1")


def npy(values: Any, dtype: str = "<f4", **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=dtype, **options), allow_pickle=dtype == "O")
    return file.getvalue()


def facts(**more: Any) -> Mapping[str, Any]:
    return {"rate": RATE, "channels": list(CHANNELS)} | more


def waves(seconds: float = 2.0, rate: float = RATE, channels: int = 3, seed: int = 0) -> np.ndarray:
    """[T, channels] of slow waves, each of an amplitude of its own."""
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    columns = [
        (k + 1) * np.sin(2 * np.pi * draw.uniform(1, 4) * time + draw.uniform(0, 6)) + draw.uniform(-1, 1)
        for k in range(channels)
    ]
    return np.stack(columns, 1).astype(np.float32)


# -------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "<i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_part_is_what_was_stored_times_its_scale(dtype: str, order: Any) -> None:
    values = (100 * waves()).round()
    found = signal(npy(values, dtype, order=order), lambda: facts(scale=0.01))
    assert (found.rate, found.frames, found.channels) == (RATE, 100, CHANNELS)
    part = found.read(10, 20)
    assert part.dtype == torch.float32 and part.shape == (3, 20)
    for c in range(3):
        for t in range(20):
            assert abs(float(part[c, t]) - float(values[10 + t, c]) / 100) < 1e-3
    assert found.read().shape == (3, 100)


def test_one_channel_needs_no_names() -> None:
    found = signal(npy(waves(channels=1)[:, 0]), lambda: {"rate": 10})
    assert found.channels == ("0",) and found.read().shape == (1, 100)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').write('ran')",))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    trap = Trap(tmp_path / "ran")
    data = npy(np.array([trap], dtype=object), "O")
    with pytest.raises(BadSample, match="not of float32"):
        signal(data, facts)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "ran").exists()  # the trap works


@pytest.mark.parametrize(
    ("data", "meta", "reason"),
    [
        (b"", facts(), "no .npy"),
        (b"\x93NUMPY\x01\x00\xff\xff{", facts(), "no .npy"),
        (npy(waves())[:-1], facts(), "cut off"),
        (npy(waves()) + b"\0", facts(), "cut off"),
        (npy(np.zeros((0, 3))), facts(), "empty"),
        (npy(np.zeros((2, 2, 2))), facts(), "time by channels"),
        (npy(np.zeros((1, 2000))), facts(), "more than 1024"),
        (npy(waves(), "<c8"), facts(), "not of float32"),
        (npy(waves()), {"channels": list(CHANNELS)}, "no rate"),
        (npy(waves()), facts(rate="50"), "absurd rate"),
        (npy(waves()), facts(rate=True), "absurd rate"),
        (npy(waves()), facts(rate=math.inf), "absurd rate"),
        (npy(waves()), facts(rate=0), "absurd rate"),
        (npy(waves()), facts(scale=0), "scale"),
        (npy(waves()), facts(channels=["I", "II"]), "other channels"),
        (npy(waves()), facts(channels=["I", "I", "V1"]), "other channels"),
        (npy(waves()), facts(channels=[1, 2, 3]), "list of names"),
        (npy(waves()), facts(channels="I"), "list of names"),
    ],
)
def test_what_is_no_usable_signal_is_refused(data: bytes, meta: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        signal(data, lambda: meta)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_where_they_are(value: float) -> None:
    values = waves()
    values[60, 1] = value
    found = signal(npy(values), facts)
    found.read(0, 60)
    with pytest.raises(BadSample, match="not finite"):
        found.read(0, 61)


def test_a_signal_can_be_given_in_many_ways() -> None:
    values = waves()
    want = signal(npy(values), facts).read()
    for given in ((values, RATE), (torch.from_numpy(values), RATE, CHANNELS), (values.astype("f8"), 50)):
        assert torch.equal(signal_from(given).read(), want)
    for wrong in (values, (values,), (values, "50"), (values.astype(str), 50), "a.npy", None):
        with pytest.raises(BadSample):
            signal_from(wrong)


def test_each_modality_of_a_sample_has_facts_of_its_own(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(3):
            meta = {"rate": 100, "channels": ["x", "y"], "ecg": facts(rate=500)}
            writer.write(Sample(f"{i}", {"npy": npy(waves(channels=2 if i else 3)), "json": meta}))
    made = Reader(open_shards([str(tmp_path)]), {"wrist": SignalTransform(config(("x",)), train=False)})
    raw: Signal = made.raw(1, "wrist")
    assert raw.rate == 100 and raw.channels == ("x", "y")
    with pytest.raises(BadSample, match="other channels"):
        made.raw(0, "wrist")
    ecg = Reader(open_shards([str(tmp_path)]), {"ecg": SignalTransform(config(), train=False)})
    raw = ecg.raw(0, "ecg")
    assert raw.rate == 500 and raw.channels == CHANNELS


# -------------------------------------------------------------------------------------------- transform


def config(channels: tuple[str, ...] = CHANNELS, **settings: Any) -> Any:
    shared: dict[str, Any] = {"channels": channels, "rate": RATE, "seconds": 1.0}
    return SignalResNet.Config(**(shared | settings))


def prepared(value: Any, *, train: bool = False, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return SignalTransform(config(**settings), train=train)(value)


def test_channels_are_found_by_name_and_centred_with_their_amplitude() -> None:
    values = waves()
    found = prepared((values, RATE, ("V1", "aVF", "I")), unit=2.0)
    assert found["has"].tolist() == [True, False, True] and int(found["length"]) == 50
    window = values[25:75]
    for row, column in ((0, 2), (2, 0)):
        want = (window[:, column] - window[:, column].mean()) / 2
        assert np.abs(found["samples"][row].numpy() - want).max() < 1e-5
    assert not found["samples"][1].any()
    with pytest.raises(BadSample, match="none of the channels I, II, V1"):
        prepared((values, RATE, ("a", "b", "c")))


def test_one_factor_for_all_channels_keeps_their_proportions() -> None:
    values = waves()
    quiet, loud = (prepared((g * values, RATE, CHANNELS), normalize="sample")["samples"] for g in (1.0, 30.0))
    assert torch.allclose(quiet, loud, atol=1e-4) and abs(float(quiet.square().mean()) - 1) < 1e-3
    plain = prepared((values, RATE, CHANNELS))["samples"]
    assert torch.allclose(quiet / quiet.std(), plain / plain.std(), atol=1e-4)


@pytest.mark.parametrize("rate", [25.0, 100.0, 500.0, 51.2])
def test_other_rates_are_resampled(rate: float) -> None:
    def at(rate: float) -> np.ndarray:
        time = np.arange(round(4 * rate)) / rate
        return np.stack([np.sin(2 * np.pi * f * time) for f in (1.0, 2.0, 3.0)], 1).astype(np.float32)

    want = torch.from_numpy(at(RATE)).T
    got = resampled(torch.from_numpy(at(rate)).T, rate, RATE)
    assert abs(got.shape[1] - want.shape[1]) <= 1
    inner = slice(20, min(got.shape[1], want.shape[1]) - 20)
    assert (got[:, inner] - want[:, inner]).abs().max() < 0.03


def test_no_alias_and_no_step_at_the_ends() -> None:
    time = np.arange(2000) / 500
    fast = torch.from_numpy(np.sin(2 * np.pi * 90 * time)[None].astype(np.float32))
    assert resampled(fast, 500, 50)[:, 10:-10].abs().max() < 0.05  # 90 Hz cannot be told at 50 Hz
    assert (resampled(torch.full((1, 2000), 7.0), 500, 50) - 7).abs().max() < 1e-3


def test_the_window_is_random_in_training_and_the_middle_otherwise() -> None:
    ramp = (np.arange(200, dtype=np.float32)[:, None] % 97 * np.ones((1, 3), np.float32), RATE, CHANNELS)
    middle = prepared(ramp)["samples"]
    assert torch.equal(prepared(ramp, seed=5)["samples"], middle)
    drawn = {float(prepared(ramp, train=True, seed=s)["samples"][0, 0]) for s in range(20)}
    assert len(drawn) > 6
    short = prepared((waves(0.4), RATE, CHANNELS), train=True)
    assert int(short["length"]) == 20 and not short["samples"][:, 20:].any()


def test_each_augmentation_does_what_it_says_in_training_alone() -> None:
    value = (waves(1.0), RATE, CHANNELS)
    plain = prepared(value)["samples"]
    every: dict[str, Any] = {
        "jitter": 0.5, "scaling": 0.3, "cutout": 0.5, "channel_dropout": 0.5, "warp": Warp.Config(time=0.3)
    }  # fmt: skip
    assert torch.equal(prepared(value, **every)["samples"], plain)
    for name, setting in every.items():
        made = [prepared(value, train=True, seed=s, **{name: setting})["samples"] for s in range(30)]
        assert torch.equal(prepared(value, train=True, seed=3, **{name: setting})["samples"], made[3])
        assert any(not torch.equal(a, made[0]) for a in made)
        if name == "jitter":
            added = torch.stack(made) - plain
            assert abs(float(added.std()) - 0.5) < 0.02 and abs(float(added.mean())) < 0.03
        elif name == "scaling":
            gains = torch.stack([(a * plain).sum(1) / plain.square().sum(1) for a in made])
            assert torch.allclose(made[0], gains[0][:, None] * plain, atol=1e-5)
            assert 0.2 < float(gains.log().std()) < 0.4
        elif name == "cutout":
            for a in made:
                lost = ((a == 0) & (plain != 0)).all(0).nonzero()[:, 0].tolist()
                assert lost == list(range(lost[0], lost[-1] + 1)) if lost else True
                assert len(lost) <= 26 and torch.equal(a[:, [t for t in range(50) if t not in lost]],
                                                       plain[:, [t for t in range(50) if t not in lost]])  # fmt: skip
        elif name == "channel_dropout":
            kept = torch.stack([a.any(1) for a in made])
            assert kept.any(1).all() and 0.3 < float(kept.double().mean()) < 0.8
        else:
            assert all(abs(float(a.abs().max() - plain.abs().max())) < 0.5 for a in made)


@pytest.mark.parametrize(
    "settings", [{"time": 0.5}, {"slice": 0.6}, {"window": 1.0}, {"time": 0.2, "slice": 0.3, "window": 0.5}]
)
def test_places_rise_within_the_signal(settings: dict[str, float]) -> None:
    warp: Warp = Warp.Config(**settings).build()
    different: set[float] = set()
    for seed in range(20):
        torch.manual_seed(seed)
        places = warp.draw(101)
        assert places is not None and len(places) == 101
        assert (places.diff() > 0).all() and places[0] >= 0 and places[-1] <= 1 + 1e-6
        different.add(round(float(places[50]), 4))
        if "slice" not in settings:
            assert abs(float(places[0])) < 1e-6 and abs(float(places[-1]) - 1) < 1e-6
        else:
            assert float(places[-1] - places[0]) >= 1 - settings["slice"] - 1e-6
    assert len(different) > 6 and Warp.Config().build().draw(9) is None


def test_taking_places_is_linear_interpolation() -> None:
    x = torch.tensor([[0.0, 1.0, 4.0], [5.0, 5.0, 6.0]])
    got = take(x, torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]))
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.5, 1.0, 3.4, 4.0], [5.0, 5.0, 5.0, 5.8, 6.0]]))


# -------------------------------------------------------------------------------------------- towers

TOWERS: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
    "resnet": (SignalResNet, {"widths": (8, 12), "blocks": (1, 1)}),
    "resnet of patches": (SignalResNet, {"widths": (8, 12), "blocks": (0, 1), "patch": 5}),
    "transformer": (SignalTransformer, {"patch": 5, "width": 12, "layers": 2, "heads": 2}),
}


def tower(name: str, seconds: float = 2.0, **settings: Any) -> Encoder:
    torch.manual_seed(0)
    kind, own = TOWERS[name]
    shared: dict[str, Any] = {"channels": CHANNELS, "rate": RATE, "seconds": seconds}
    return kind.Config(**(shared | own | settings)).build().eval()


def inputs(net: Encoder, *signals: Any) -> dict[str, Tensor]:
    made = net.transform(train=False)
    return made.collate([made(s) for s in signals])


SIGNALS = (
    (waves(1.7), RATE, CHANNELS),
    (waves(0.5, seed=1), RATE, CHANNELS),
    (waves(2.0, channels=2, seed=2), RATE, ("V1", "I")),
)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_padding_neighbours_and_absent_channels_change_nothing(name: str) -> None:
    net, long = tower(name), tower(name, 3.0)
    want, tokens = net(inputs(net, *SIGNALS))
    assert want.shape == (3, net.dim) == (3, 12) and tokens is not None and tokens.shape[::2] == (3, 12)
    assert torch.allclose(long(inputs(long, *SIGNALS))[0], want, atol=1e-5)
    for row, value in enumerate(SIGNALS):
        assert torch.allclose(net(inputs(net, value))[0][0], want[row], atol=1e-5)
    # Not because nothing matters: told that zeros are signal, or that a missing channel is there, it differs.
    for key, value in (("length", torch.full((3,), 100)), ("has", torch.ones(3, 3, dtype=torch.bool))):
        told = inputs(net, *SIGNALS) | {key: value}
        assert (net(told)[0] - want).abs().amax(1).max() > 1e-3
    assert want.std(0).max() > 1e-3
    example, _ = net(net.example())
    assert example.shape == (1, 12) and bool(torch.isfinite(example).all())


@pytest.mark.parametrize("name", TOWERS)
def test_every_weight_gets_a_gradient(name: str) -> None:
    net = tower(name).train()
    weights = torch.randn(3, 12)
    (net(inputs(net, *SIGNALS))[0] * weights).sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and bool(p.grad.any()), key


def test_a_model_encodes_signals(tmp_path: Path) -> None:
    model: MultiEncoder = MultiEncoder.Config(
        encoders={"wrist": SignalResNet.Config(channels=("x",), rate=50, seconds=1), "text": BagOfWords.Config()}, dim=6
    ).build()
    z = model.encode("wrist", [(waves(channels=1)[:, 0], 50, ("x",)), (waves(channels=1, seed=1), 50, ("x",))])
    assert z.shape == (2, 6) and torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"channels": ()}, "channels"),
        ({"channels": ("I", "I")}, "channels"),
        ({"rate": 0.0}, "rate"),
        ({"seconds": 0.001}, "seconds"),
        ({"unit": 0.0}, "unit"),
        ({"jitter": -1.0}, "jitter"),
        ({"cutout": 1.5}, "cutout"),
        ({"channel_dropout": 1.0}, "channel_dropout"),
        ({"warp": Warp.Config(slice=1.0)}, "slice"),
        ({"widths": (8,), "blocks": (1, 2)}, "widths"),
        ({"patch": 0}, "patch"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(**settings).build().transform(train=True)
