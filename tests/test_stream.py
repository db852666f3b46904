"""The stream: which samples a step sees depends on seed and step alone, whatever reads them and wherever it starts."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import random
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.data.order import Order
from mmcontrast.data.reader import Reader
from mmcontrast.encoders.image import ViT
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import open_shards
from tests.samples import SIDE, Bytes, Picture, equal, png


def augmented() -> Any:
    """ViT's own training transform, with all of its randomness."""
    settings = ViT.Config(
        image_size=8,
        patch_size=4,
        width=8,
        layers=1,
        heads=2,
        crop_scale=(0.2, 1.0),
        color_jitter=0.4,
        grayscale=0.3,
    )
    return settings.build().transform(train=True)


def members(number: int) -> dict[str, Any]:
    """Each sample has a picture, a caption or both; every third one a patient."""
    found: dict[str, Any] = {"json": {"patient": f"p{number // 6}"} if number % 3 else {"number": number}}
    if number % 4 != 1:
        found["png"] = png(number)
    if number % 4 != 2:
        found["txt"] = f"caption {number}"
    return found


def write(
    out: Path, count: int, *, per_shard: int = 10, damaged: Mapping[int, Mapping[str, Any]] | None = None
) -> Path:
    with ShardWriter(out, max_samples=per_shard) as writer:
        for i in range(count):
            writer.write(Sample(f"{i:06d}", members(i) | dict((damaged or {}).get(i, {}))))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples in shards of 10, 10, 10, 10 and 8."""
    return write(tmp_path_factory.mktemp("data") / "shards", 48)


def stream(data: Path, transforms: Any = None, *, seed: int = 7, global_batch: int = 8, **options: Any) -> Stream:
    place = {name: options.pop(name) for name in ("rank", "world") if name in options}
    config = Stream.Config(
        shards=(str(data),), workers=options.pop("workers", 0), window=options.pop("window", 16), **options
    )
    transforms = transforms or {"image": Picture(), "text": Bytes()}
    return config.build(transforms, seed=seed, global_batch=global_batch, **place)


# -------------------------------------------------------------------------------------------- order

COUNTS = [10, 0, 7, 13, 1, 9]  # 40 samples


def steps(order: Order, first: int, last: int, batch: int) -> list[list[int]]:
    return [[order.sample(step, slot) for slot in range(batch)] for step in range(first, last)]


def test_the_order_is_a_pure_function() -> None:
    def order(seed: int = 3) -> Order:
        return Order(COUNTS, seed=seed, global_batch=8, window=6, lanes=2)

    straight = steps(order(), 0, 20, 8)
    assert steps(order(), 0, 20, 8) == straight
    places = [(step, slot) for step in range(20) for slot in range(8)]
    random.Random(0).shuffle(places)
    asked = order()
    assert all(asked.sample(step, slot) == straight[step][slot] for step, slot in places)
    assert steps(order(4), 0, 20, 8) != straight


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_an_epoch_has_every_sample_once(lanes: int, window: int) -> None:
    order = Order(COUNTS, seed=0, global_batch=12, window=window, lanes=lanes)
    epochs: list[list[int]] = []
    for epoch in range(4):
        turns = range(epoch * order.lane_length, (epoch + 1) * order.lane_length)
        epochs.append([order.at(lane, turn) for lane in range(lanes) for turn in turns])
    for found in epochs:
        assert len(set(found)) == len(found) == order.per_epoch and set(found) <= set(range(40))
        assert 40 - len(found) < lanes and (40 % lanes or len(found) == 40)
    assert len({tuple(found) for found in epochs}) == 4
    if 40 % lanes:  # what is left out is not always the same
        assert len({frozenset(range(40)) - frozenset(found) for found in epochs}) > 1


def test_a_step_may_span_two_epochs() -> None:
    order = Order([10], seed=0, global_batch=4)
    found = [sample for step in steps(order, 0, 5, 4) for sample in step]
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10] != found[10:]
    order = Order([3], seed=0, global_batch=8)  # a batch of more than two epochs
    assert Counter(steps(order, 0, 3, 8)[1]).keys() == {0, 1, 2}


@pytest.mark.parametrize(("window", "lanes"), [(1, 1), (7, 1), (6, 2), (50, 2), (5, 3), (999, 3)])
def test_the_shards_of_a_window_are_those_of_its_samples(window: int, lanes: int) -> None:
    counts = [4, 0, 9, 1, 0, 0, 17, 3, 2, 0]
    order = Order(counts, seed=2, global_batch=lanes, window=window, lanes=lanes)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    for lane in range(lanes):
        turn = 0
        while turn < 3 * order.lane_length:
            end = order.window_end(turn)
            assert 0 < end - turn <= window and {order.window_end(t) for t in range(turn, end)} == {end}
            want = {int(shard_of[order.at(lane, t)]) for t in range(turn, end)}
            for t in (turn, end - 1):
                found = order.window_shards(lane, t)
                assert set(found) == want and len(found) == len(want)
            turn = end
        assert turn == 3 * order.lane_length


@pytest.mark.parametrize("window", [1, 4, 16])
def test_the_window_bounds_how_far_a_sample_travels(window: int) -> None:
    order = Order([50, 50, 50], seed=1, global_batch=10, window=window)
    found = [order.at(0, turn) for turn in range(150)]
    shards = [sample // 50 for sample in found]
    first = list(dict.fromkeys(s for s in shards))
    # In the order of the line, a shard's k-th sample stands at 50 * its turn + k.
    travelled = [abs(turn - (50 * first.index(s // 50) + s % 50)) for turn, s in enumerate(found)]
    assert max(travelled) < window
    assert window == 1 or max(travelled) >= window // 2
    # As far as in a shuffle of the window as a whole: two places drawn at random are a third of it apart.
    full = travelled[: 150 // window * window]
    assert np.mean(full) == pytest.approx((window - 1 / window) / 3, rel=0.25)
    assert sorted(found) == list(range(150))


def test_lanes_windows_and_epochs_are_shuffled_each_in_its_own_way() -> None:
    order = Order([1000], seed=1, global_batch=4, window=50, lanes=4)
    shuffles: set[tuple[int, ...]] = set()
    for lane in range(4):
        for first in range(0, 750, 50):  # five windows in each of three epochs
            found = [order.at(lane, turn) for turn in range(first, first + 50)]
            assert max(found) - min(found) == 49
            shuffles.add(tuple(sample - min(found) for sample in found))
    assert len(shuffles) == 4 * 15


def test_ranks_that_own_lanes_read_disjoint_shards() -> None:
    """12 shards of 10, four lanes: a lane reads three whole shards in an epoch, and others in the next."""
    order = Order([10] * 12, seed=5, global_batch=8, window=20, lanes=4)
    epochs: list[list[set[int]]] = []
    for epoch in range(3):
        read: list[set[int]] = [set() for _ in range(4)]
        for step in range(epoch * 15, (epoch + 1) * 15):
            for slot in range(8):
                read[slot // 2].add(order.sample(step, slot) // 10)
        assert [len(r) for r in read] == [3] * 4 and set.union(*read) == set(range(12))
        epochs.append(read)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("counts", "options", "text"),
    [
        ([10], {"global_batch": 8, "lanes": 3}, "must divide"),
        ([10], {"global_batch": 8, "lanes": 0}, "lanes"),
        ([10], {"global_batch": 8, "window": 0}, "window"),
        ([10], {"global_batch": 0}, "global batch is 0"),
        ([3], {"global_batch": 8, "lanes": 4}, "fewer than the 4 lanes"),
        ([], {"global_batch": 8}, "0 samples"),
    ],
)
def test_an_order_that_cannot_be_is_refused(counts: list[int], options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Order(counts, seed=0, **options)


# -------------------------------------------------------------------------------------------- batches


def whole(data: Path, world: int, first: int, last: int, **options: Any) -> list[list[str]]:
    """Keys of each step's global batch, the ranks' in turn."""
    ranks = [
        [list(b.keys) for b in stream(data, rank=rank, world=world, **options).batches(first, last)]
        for rank in range(world)
    ]
    return [[key for rank in ranks for key in rank[step]] for step in range(last - first)]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_ranks_and_workers_do_not_change_a_step(data: Path, lanes: int) -> None:
    """14 steps of 8 from 48 samples: more than two epochs."""
    want = whole(data, 1, 0, 14, lanes=lanes)
    assert all(len(step) == 8 for step in want) and len({key for step in want for key in step}) == 48
    for world in (2, 4):
        assert whole(data, world, 0, 14, lanes=lanes) == want
    assert whole(data, 2, 0, 14, lanes=lanes, workers=2) == want
    assert whole(data, 1, 0, 14, lanes=lanes, seed=8) != want


def test_a_step_has_the_same_number_from_each_lane_whatever_the_lanes(data: Path) -> None:
    """Per epoch, any number of lanes that divides the samples sees the same multiset: every sample once."""
    for lanes in (1, 2, 4, 8):
        found = whole(data, 1, 0, 6, lanes=lanes)
        assert Counter(key for step in found for key in step) == Counter(f"{i:06d}" for i in range(48))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_equals_the_uninterrupted_stream(data: Path, workers: int) -> None:
    """Keys, groups and augmented pixels, bit for bit, over the end of an epoch and for every number of workers."""
    transforms = {"image": augmented(), "text": Bytes()}
    straight = list(stream(data, transforms, groups=("patient",)).batches(0, 12))
    resumed = list(stream(data, transforms, groups=("patient",), workers=workers).batches(5, 12))
    assert len(resumed) == 7
    assert all(equal(a, b) for a, b in zip(straight[5:], resumed, strict=True))
    assert not equal(straight[4], straight[5])


def test_augmentation_is_of_the_sample_not_of_the_rank(data: Path) -> None:
    transforms = {"image": augmented(), "text": Bytes()}
    one = next(stream(data, transforms).batches(3, 4))
    two = [next(stream(data, transforms, rank=rank, world=2).batches(3, 4)) for rank in range(2)]
    pixels = torch.cat([b.inputs["image"] for b in two])
    assert torch.equal(pixels, one.inputs["image"])
    # And it is random: the same sample looks otherwise in the next epoch, and under another seed.
    seen: dict[str, list[Tensor]] = {}
    for seed in (7, 8):
        for batch in stream(data, transforms, seed=seed).batches(0, 12):
            for row, picture in zip(batch.rows["image"].tolist(), batch.inputs["image"], strict=True):
                seen.setdefault(str(batch.keys[row]), []).append(picture)
    assert len(seen) == 36 and all(len(pictures) == 4 for pictures in seen.values())
    distinct = sum(not torch.equal(p[a], p[b]) for p in seen.values() for a in range(4) for b in range(a))
    assert distinct == 36 * 6


@pytest.mark.parametrize("workers", [0, 2])
def test_global_randomness_is_left_alone(data: Path, workers: int) -> None:
    made = stream(data, {"image": augmented(), "text": Bytes()}, workers=workers)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)

    def states() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()

    before = states()
    batches = list(made.batches(0, 3))
    assert len(batches) == 3 and states() == before
    torch.manual_seed(6)  # nor does it matter
    assert equal(next(made.batches(2, 3)), batches[2])


def test_rows_and_inputs_say_what_each_sample_has(data: Path) -> None:
    seen = 0
    for batch in stream(data, global_batch=12).batches(0, 4):
        numbers = [int(key) for key in batch.keys]
        assert batch.ids.tolist() == numbers and len(batch) == 12
        assert batch.rows["image"].tolist() == [i for i, n in enumerate(numbers) if n % 4 != 1]
        assert batch.rows["text"].tolist() == [i for i, n in enumerate(numbers) if n % 4 != 2]
        for row, picture in zip(batch.rows["image"].tolist(), batch.inputs["image"], strict=True):
            want = np.array(Image.open(io.BytesIO(png(numbers[row]))))
            assert torch.equal(picture, torch.from_numpy(want).permute(2, 0, 1))
        for row, text, length in zip(
            batch.rows["text"].tolist(),
            batch.inputs["text"]["bytes"],
            batch.inputs["text"]["length"],
            strict=True,
        ):
            assert bytes(text.tolist())[: int(length)].decode() == f"caption {numbers[row]}"
        assert batch.present("text").tolist() == [n % 4 != 2 for n in numbers]
        seen += len(batch)
    assert seen == 48


def test_a_modality_without_a_row_in_the_batch_has_no_inputs(data: Path) -> None:
    found: set[tuple[str, ...]] = set()
    for batch in stream(data, global_batch=1).batches(0, 48):
        assert {m for m, rows in batch.rows.items() if len(rows)} == set(batch.inputs)
        assert batch.rows.keys() == {"image", "text"} and batch.rows["image"].dtype == torch.int64
        found.add(tuple(sorted(batch.inputs)))
    assert found == {("image",), ("text",), ("image", "text")}


def test_groups_are_equal_where_the_metadata_are(data: Path) -> None:
    batches = list(stream(data, global_batch=24, groups=("patient", "number", "absent")).batches(0, 2))
    numbers = [int(key) for batch in batches for key in batch.keys]
    labels = {g: [v for b in batches for v in b.groups[g].tolist()] for g in ("patient", "number", "absent")}
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            same = i == j or (bool(a % 3) and bool(b % 3) and a // 6 == b // 6)
            assert (labels["patient"][i] == labels["patient"][j]) == same, (a, b)
    assert len(set(labels["number"])) == len(set(labels["absent"])) == 48
    assert all(t.dtype == torch.int64 for b in batches for t in b.groups.values())
    again = next(stream(data, global_batch=24, groups=("patient",), seed=9).batches(0, 1))
    known = dict(zip(numbers, labels["patient"], strict=True))
    assert [known[int(k)] for k in again.keys] == again.groups["patient"].tolist()


# -------------------------------------------------------------------------------------------- damage


def test_damaged_samples_are_replaced_and_named(tmp_path: Path, data: Path) -> None:
    damaged: dict[int, Mapping[str, Any]] = {
        3: {"png": b"no picture"},
        20: {"txt": b"\xff\xfe"},
        21: {"txt": "  "},
        40: {"json": b"[]"},
    }
    reasons = {
        3: "image cannot be decoded",
        20: "text is not UTF-8",
        21: "text is empty",
        40: "json is not an object",
    }
    broken = write(tmp_path, 48, damaged=damaged)
    skipped: list[tuple[str, str, str]] = []
    options: dict[str, Any] = {"groups": ("patient",)}
    for good, bad in zip(stream(data, **options).batches(0, 6), stream(broken, **options).batches(0, 6), strict=True):
        assert len(bad) == len(good) == 8
        replaced = [i for i, key in enumerate(good.keys) if int(key) in damaged]
        assert len(bad.skipped) == len(replaced)
        skipped += bad.skipped
        for row in range(8):
            if row not in replaced:
                assert good.keys[row] == bad.keys[row]
                assert good.groups["patient"][row] == bad.groups["patient"][row]
                for name in ("image", "text"):
                    assert torch.equal(input_of(good, name, row), input_of(bad, name, row))
            else:
                assert int(bad.keys[row]) not in damaged and bad.keys[row] not in good.keys
        if not replaced:
            assert equal(good, bad)
    assert sorted((shard, key) for shard, key, _ in skipped) == [
        (f"{i // 10:05d}.tar", f"{i:06d}") for i in sorted(damaged)
    ]
    for _, key, reason in skipped:
        assert reason.startswith(reasons[int(key)])


def input_of(batch: Batch, modality: str, row: int) -> Tensor:
    """The input of a row; empty where it has none."""
    place = batch.rows[modality].tolist().index(row) if row in batch.rows[modality] else None
    value = batch.inputs.get(modality)
    if place is None or value is None:
        return torch.zeros(0)
    return (value["bytes"] if isinstance(value, Mapping) else value)[place]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_damage_stops_with_the_reason(tmp_path: Path, workers: int) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(20):
            writer.write(Sample(f"{i:06d}", {"png": b"no picture", "txt": "caption"}))
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="image cannot be decoded") as caught:
        next(stream(tmp_path, workers=workers).batches(0, 4))
    text = str(caught.value)
    assert "00000.tar" in text and "Traceback" not in text and len(text) < 300
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_without_any_of_the_modalities_is_replaced(data: Path) -> None:
    """A run on texts alone: samples that have a picture only count as skipped."""
    batches = list(stream(data, {"text": Bytes()}).batches(0, 6))
    assert all(len(b) == len(b.rows["text"]) == 8 for b in batches)
    skipped = [entry for b in batches for entry in b.skipped]
    assert {int(key) % 4 for _, key, _ in skipped} == {2}
    assert {int(key) for _, key, _ in skipped} == {i for i in range(48) if i % 4 == 2}
    assert {reason for *_, reason in skipped} == {"has none of text"}


def test_what_a_scan_left_out_is_told(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_tar = (data / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole_tar[: len(whole_tar) // 2])
    assert len(next(stream(tmp_path, global_batch=2).batches(0, 1))) == 2
    assert "cut.tar: left out 1 samples" in capsys.readouterr().err
    stream(tmp_path, global_batch=2, rank=1, world=2)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------- wrong settings


class Sounds(Picture):
    kind = "smell"


@pytest.mark.parametrize(
    ("transforms", "options", "text"),
    [
        (None, {"members": {"imgae": ("png",)}}, "imgae.*did you mean 'image'"),
        (None, {"members": {"image": ("webp", "jpg")}}, "no sample has the modality 'image'.*webp, jpg.*png"),
        ({"image": Picture(), "sound": Sounds()}, {}, "'sound' is of kind 'smell'"),
        (None, {"lanes": 3}, "must divide"),
        (None, {"lanes": 64, "global_batch": 64}, "fewer than the 64 lanes"),
        (None, {"world": 3, "global_batch": 8}, "multiple of the ranks"),
        (None, {"workers": -1}, "workers -1"),
        (None, {"timeout": -1.0}, "timeout -1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: Path, transforms: Any, options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        stream(data, transforms, **options)


def test_keys_with_dots_do_not_flood_the_message(tmp_path: Path) -> None:
    """Each member of img.0001.png, img.0002.png … is an extension of its own."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(500):
            info = tarfile.TarInfo(f"img.{i:04d}.png")
            info.size = len(png(i % 5))
            tar.addfile(info, io.BytesIO(png(i % 5)))
    with pytest.raises(ConfigError, match="0000.png.* and 492 more") as caught:
        stream(tmp_path, {"image": Picture()})
    assert len(str(caught.value)) < 300


def test_members_choose_among_extensions_in_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(Sample("both", {"png": png(1), "webp": b"damaged"}))
        writer.write(Sample("one", {"png": png(2)}))
    shards = open_shards([str(tmp_path)])
    read = Reader(shards, {"image": Picture()}, {"image": ("png", "webp")}).raw(0, "image").read()
    assert read.shape == (3, SIDE, SIDE)
    first = Reader(shards, {"image": Picture()}, {"image": ("webp", "png")})
    assert first.raw(1, "image").read().shape == (3, SIDE, SIDE)
    with pytest.raises(Exception, match="cannot be decoded"):
        first.raw(0, "image")


def test_the_state_tells_what_must_not_change(data: Path, tmp_path: Path) -> None:
    want = stream(data).state()
    assert stream(data, workers=2, rank=1, world=2).state() == want
    assert json.loads(json.dumps(want)) == want
    other = write(tmp_path, 47)
    for changed in (
        stream(data, seed=8),
        stream(data, global_batch=16),
        stream(data, window=17),
        stream(data, lanes=2),
        stream(other),
    ):
        assert sum(changed.state()[name] != want[name] for name in want) == 1


# -------------------------------------------------------------------------------------------- workers


class Killed(Picture):
    """Ends the worker, as the kernel does when memory runs out."""

    def __call__(self, value: Tensor) -> Tensor:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), 9)
        return value


class Hung(Picture):
    """Never answers, as a network disk that went away; or at one picture alone, by the sum of its pixels."""

    def __init__(self, only: int | None = None) -> None:
        self.only = only

    def __call__(self, value: Any) -> Tensor:
        found = value.read()
        if multiprocessing.parent_process() is not None and self.only in (None, int(found.sum())):
            multiprocessing.Event().wait(60)
        return found


@pytest.mark.timeout(30)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("transform", "text"), [(Killed(), "exited unexpectedly|killed"), (Hung(), "timed out")])
def test_a_worker_that_dies_or_hangs_ends_the_run(data: Path, transform: Any, text: str, threads: int) -> None:
    batches = stream(data, {"image": transform}, workers=1, timeout=1.0, threads=threads).batches(4, 9)
    with pytest.raises(RuntimeError, match=text) as caught:
        next(batches)
    assert "reading step 4 failed" in str(caught.value) and "data.workers" in str(caught.value)


@pytest.mark.timeout(30)
def test_of_several_threads_the_one_that_hangs_names_its_sample(data: Path) -> None:
    plain = stream(data)
    fourth = plain.batch(4)
    shard, place = plain.sources[0].shards.locate(int(fourth.ids[fourth.rows["image"][2]]))
    hung = Hung(only=int(fourth.inputs["image"][2].sum()))
    with pytest.raises(RuntimeError) as caught:
        next(stream(data, {"image": hung}, workers=1, timeout=1.0, threads=3).batches(4, 9))
    assert f"at sample {place} of {plain.sources[0].shards.shards[shard].path}: " in str(caught.value)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_change_a_batch(data: Path, threads: int) -> None:
    """Draws of the crop, damage and what replaces it included; and torch keeps its own number of threads."""
    before = torch.get_num_threads()
    for transforms in (None, {"image": augmented(), "text": Bytes()}):
        one, several = stream(data, transforms, threads=1), stream(data, transforms, threads=threads)
        assert all(equal(one.batch(step), several.batch(step)) for step in range(6))
    assert torch.get_num_threads() == before


# -------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("seed", range(20))
def test_split_equals_a_slow_reference(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = int(draw.integers(1, 14))
    has = {m: draw.random(n) < share for m, share in (("image", 0.7), ("text", 0.3), ("audio", 0.0))}
    rows = {m: torch.from_numpy(np.flatnonzero(mask)) for m, mask in has.items()}
    inputs: dict[str, Any] = {}
    if len(rows["image"]):
        inputs["image"] = rows["image"][:, None] * 10.0 + torch.arange(3)
    if len(rows["text"]):
        inputs["text"] = {"a": rows["text"] * 100, "b": {"c": rows["text"][:, None].repeat(1, 2)}}
    batch = Batch(inputs, rows, torch.arange(n))
    for micro in (1, 2, 3, 5, n, n + 3):
        pieces = list(batch.split(micro))
        assert [p.start for p in pieces] == list(range(0, n, micro))
        for piece in pieces:
            mine = range(piece.start, min(piece.start + micro, n))
            for modality, mask in has.items():
                want = [row for row in mine if mask[row]]
                assert piece.rows[modality].tolist() == want
                assert (modality in piece.inputs) == bool(want)
                if not want:
                    continue
                index = torch.tensor([rows[modality].tolist().index(row) for row in want])

                def take(t: Tensor, index: Tensor = index) -> Tensor:
                    return t[index]

                slow = map_tensors(inputs[modality], take)
                if modality == "image":
                    assert torch.equal(piece.inputs["image"], slow)
                else:
                    assert torch.equal(piece.inputs["text"]["a"], slow["a"])
                    assert torch.equal(piece.inputs["text"]["b"]["c"], slow["b"]["c"])
