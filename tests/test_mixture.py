"""Several sources in one stream: their shares, order and limits, and what an example keeps of its sample."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import ConfigError, RunError
from mmcontrast.data import Captions, Compose, Mixture, Source, Stream
from mmcontrast.data.schedule import Schedule
from mmcontrast.objectives import InfoNCE
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.trainer import Trainer
from tests import tiny
from tests.samples import Bytes, Picture, equal, png

TRANSFORMS: dict[str, Any] = {"image": Picture(), "text": Bytes()}


def write(out: Path, prefix: str, samples: Sequence[dict[str, Any]]) -> Path:
    with ShardWriter(out, max_samples=7) as writer:
        for i, members in enumerate(samples):
            writer.write(Sample(f"{prefix}{i:03d}", members))
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """60 pairs, 20 pictures without text, 9 texts without pictures."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "web": write(root / "web", "w", [{"png": png(i), "txt": f"web {i}"} for i in range(60)]),
        "pictures": write(root / "pictures", "p", [{"png": png(100 + i)} for i in range(20)]),
        "texts": write(root / "texts", "t", [{"txt": f"text {i}"} for i in range(9)]),
    }


def mixture(data: dict[str, Path], *, rank: int = 0, world: int = 1, global_batch: int = 8, **options: Any) -> Mixture:
    sources = {name: Source.Config(shards=(str(path),), window=16) for name, path in data.items()}
    config = Mixture.Config(sources=sources, workers=options.pop("workers", 0), **options)
    return config.build(TRANSFORMS, seed=3, global_batch=global_batch, rank=rank, world=world)


def keys(made: Mixture, first: int, last: int) -> list[list[str]]:
    return [list(batch.keys) for batch in made.batches(first, last)]


# ---------------------------------------------------------------------------------------------- whose turn it is


def slow(weights: Sequence[float], limits: Sequence[int | None], turns: int) -> list[tuple[int, int]]:
    """Every turn one by one: how often each source has come up is counted, not computed."""
    schedule = Schedule(weights, limits)
    had: Counter[int] = Counter()
    found: list[tuple[int, int]] = []
    for turn in range(turns):
        assert schedule.counts(turn) == [had[k] for k in range(len(weights))]
        source, before = schedule.at(turn)
        assert before == had[source]
        had[source] += 1
        found.append((source, before))
    return found


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 2.0, 1.0), (0.7, 0.2, 0.07, 0.03), (5e6, 1.0)])
def test_a_schedule_gives_each_source_its_share_at_any_time(weights: tuple[float, ...]) -> None:
    found = slow(weights, [None] * len(weights), 1000)
    had: Counter[int] = Counter()
    for turn, (source, _) in enumerate(found, start=1):
        had[source] += 1
        for k, weight in enumerate(weights):
            assert abs(had[k] - turn * weight / sum(weights)) <= len(weights)
    if weights == (3.0, 2.0, 1.0):
        assert [had[k] for k in range(3)] == [500, 333, 167]


def test_a_source_that_is_used_up_leaves_its_share_to_the_others() -> None:
    found = slow((2.0, 1.0, 1.0), [10, None, 4], 60)
    counts = Counter(source for source, _ in found)
    assert counts[0] == 10 and counts[2] == 4 and counts[1] == 46
    assert all(source == 1 for source, _ in found[20:])
    # Before any of them is used up, the shares are as the weights say.
    assert Counter(source for source, _ in found[:16]) == {0: 8, 1: 4, 2: 4}
    ending = Schedule((1.0, 1.0), [3, 5])
    assert ending.turns == 8 and ending.counts(8) == [3, 5]
    with pytest.raises(ConfigError, match="used up"):
        ending.at(9)


# ---------------------------------------------------------------------------------------------- batches


def test_every_batch_has_the_mixture_and_every_source_its_own_order(data: dict[str, Path]) -> None:
    made = mixture(data, weights={"web": 2, "pictures": 1, "texts": 1})
    steps = keys(made, 0, 40)
    for step in steps:
        assert Counter(key[0] for key in step) == {"w": 4, "p": 2, "t": 2}
    for letter, size in (("w", 60), ("p", 20), ("t", 9)):
        line = [key for step in steps for key in step if key[0] == letter]
        for epoch in range(len(line) // size):
            assert len(set(line[epoch * size : (epoch + 1) * size])) == size  # each once per epoch of its own
        assert line[:size] != line[size : 2 * size]
    assert made.seen(40) == {"web": 160, "pictures": 80, "texts": 80}
    assert made.per_epoch == 89
    assert made.describe(40)[2] == "texts: 9 samples in 2 shards (text); 40 steps see it 8.89 times"


def test_samples_of_all_sources_have_ids_of_their_own_and_name_their_source(data: dict[str, Path]) -> None:
    seen: dict[int, str] = {}
    for batch in mixture(data).batches(0, 60):
        for identity, key, source, image, text in zip(
            batch.ids.tolist(), batch.keys, batch.sources, batch.present("image"), batch.present("text"), strict=True
        ):
            assert seen.setdefault(identity, str(key)) == key
            assert source == {"w": "web", "p": "pictures", "t": "texts"}[str(key)[0]]
            assert (bool(image), bool(text)) == {"w": (True, True), "p": (True, False), "t": (False, True)}[str(key)[0]]
    assert sorted(seen) == list(range(89)) and len(set(seen.values())) == 89


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("lanes", [1, 4])
def test_ranks_workers_and_restarts_do_not_change_a_mixture(data: dict[str, Path], pure: bool, lanes: int) -> None:
    weights = dict.fromkeys(data, 1.0)
    options: dict[str, Any] = {"pure": pure, "lanes": lanes, "weights": weights, "epochs": {"texts": 3.0}}
    options["groups"] = ("none",)
    straight = list(mixture(data, **options).batches(0, 30))
    for world in (2, 4):
        for step in range(0, 30, 7):
            parts = [mixture(data, rank=r, world=world, **options).batch(step) for r in range(world)]
            assert [k for part in parts for k in part.keys] == list(straight[step].keys)
    resumed = list(mixture(data, workers=2, **options).batches(11, 20))
    assert all(equal(a, b) for a, b in zip(straight[11:20], resumed, strict=True))
    assert not equal(straight[11], straight[12])
    if pure:
        assert all(len(set(batch.sources)) == 1 for batch in straight)
        assert len({batch.sources[0] for batch in straight}) == 3
    # The source with a limit is seen so often and no more: whole turns of it, so that no lane is cut.
    each = 8 // lanes if pure else 1
    assert sum(k[0] == "t" for b in straight for k in map(str, b.keys)) == int(3 * (9 // lanes)) // each * each * lanes


def test_a_run_that_outlasts_its_sources_is_refused_before_it_starts(data: dict[str, Path]) -> None:
    made = mixture({"web": data["web"]}, epochs={"web": 1.5})
    assert made.steps == 11
    assert len(list(made.batches(0, 11))) == 11
    with pytest.raises(ConfigError, match="last for 11 steps, the run has 12"):
        made.batches(0, 12)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": {"web": 1}}, "none for 'pictures'"),
        ({"weights": {"web": 1, "pictures": 1, "text": 1}}, "names 'text'; did you mean 'texts'"),
        ({"weights": {"web": 1, "pictures": 0, "texts": 1}}, "0 for 'pictures' must be above 0"),
        ({"epochs": {"webb": 1}}, "names 'webb'"),
        ({"epochs": {"web": float("nan")}}, "nan for 'web' must be above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: dict[str, Path], options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        mixture(data, **options)


def test_a_modality_that_no_source_has_is_refused(data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no source has the modality 'image'; they have texts: text"):
        mixture({"texts": data["texts"]})
    with pytest.raises(ConfigError, match=r"names at least one|name at least one"):
        mixture({})


def test_a_source_leaves_out_what_it_is_told_to(data: dict[str, Path]) -> None:
    web = (str(data["web"]),)
    sources = {"pictures": Source.Config(shards=web, members={"text": ()}), "texts": Source.Config(shards=web)}
    config = Mixture.Config(sources=sources, workers=0)
    made = config.build(TRANSFORMS, seed=3, global_batch=8, rank=0, world=1)
    assert [s.modalities for s in made.sources] == [("image",), ("image", "text")]
    (batch,) = made.batches(0, 1)
    assert len(batch.rows["image"]) == 8 and len(batch.rows["text"]) == 4
    with pytest.raises(ConfigError, match="no source has the modality 'text'"):
        Mixture.Config(sources={"pictures": sources["pictures"]}, workers=0).build(
            TRANSFORMS, seed=3, global_batch=8, rank=0, world=1
        )
    with pytest.raises(ConfigError, match="no sample has the modality 'text'"):
        Stream.Config(shards=web, members={"text": ()}, workers=0).build(
            TRANSFORMS, seed=3, global_batch=8, rank=0, world=1
        )


def test_the_state_names_every_source(data: dict[str, Path]) -> None:
    state = mixture(data, weights={"web": 2, "pictures": 1, "texts": 1}).state()
    other = mixture(data | {"texts": data["pictures"]}, weights={"web": 2, "pictures": 1, "texts": 1}).state()
    assert {k for k in state if state[k] != other[k]} == {"texts.data"}
    assert state["weights"] == {"web": 2, "pictures": 1, "texts": 1}


def test_damage_is_counted_by_source(tmp_path: Path, data: dict[str, Path]) -> None:
    bad = write(tmp_path / "bad", "b", [{"png": png(i) if i % 5 else b"no picture", "txt": "x"} for i in range(20)])
    made = mixture({"web": data["web"], "bad": bad}, weights={"web": 1, "bad": 1})
    skipped = [s for batch in made.batches(0, 10) for s in batch.skipped]
    assert {shard.partition("/")[0] for shard, _, _ in skipped} == {"bad"}
    assert {key for _, key, _ in skipped} == {f"b{i:03d}" for i in (0, 5, 10, 15)}


def test_a_run_tells_what_it_saw_of_each_source_also_after_a_restart(tmp_path: Path, data: dict[str, Path]) -> None:
    bad = write(tmp_path / "bad", "b", [{"png": png(i) if i else b"no picture", "txt": "x"} for i in range(6)])
    sources = {name: Source.Config(shards=(str(path),)) for name, path in (data | {"bad": bad}).items()}
    config = Trainer.Config(
        out=tmp_path / "run",
        model=tiny.model_config(),
        data=Mixture.Config(sources=sources, weights=dict.fromkeys(sources, 1.0), workers=0),
        objectives={"clip": InfoNCE.Config()},
        checkpoint=Checkpoints.Config(every=4, keep=3),
        steps=8,
        global_batch=8,
        micro_batch=8,
    )

    def counts() -> dict[str, float]:
        config.build().fit()
        last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        return {name.removeprefix("data/"): n for name, n in last.items() if name.startswith("data/")}

    found = counts()
    assert {name: found[f"{name}/seen"] for name in sources} == dict.fromkeys(sources, 16)
    assert found["texts/repeated"] == 7 and found["web/repeated"] == 0 and found["bad/repeated"] == 10
    assert found["web/image"] == found["web/text"] == found["pictures/image"] == found["texts/text"] == 16
    assert "pictures/text" not in found and "texts/image" not in found
    assert 2 <= found["bad/skipped"] <= 3 and found["web/skipped"] == 0
    shutil.rmtree(tmp_path / "run" / "step-000008")
    assert counts() == found


# ---------------------------------------------------------------------------------------------- what is kept


def test_a_worker_that_dies_is_named_with_what_it_read(data: dict[str, Path]) -> None:
    class Deadly(Bytes):
        def __call__(self, value: str) -> Any:
            import os

            if value == "web 33":
                os._exit(3)
            return super().__call__(value)

    made = Stream.Config(shards=(str(data["web"]),), workers=2, timeout=60.0).build(
        {"image": Picture(), "text": Deadly()}, seed=3, global_batch=4
    )
    with pytest.raises(RunError, match=r"rank 0, worker [01]: .* at sample 5 of .*00004\.tar"):
        list(made.batches(0, 15))


def test_modalities_are_dropped_at_random_and_never_all(data: dict[str, Path]) -> None:
    def counts(**drop: float) -> Counter[tuple[str, ...]]:
        made = Stream.Config(shards=(str(data["web"]),), workers=0, compose=Compose.Config(drop=drop)).build(
            TRANSFORMS, seed=3, global_batch=60
        )
        found: Counter[tuple[str, ...]] = Counter()
        for batch in made.batches(0, 40):
            for row in range(60):
                found[tuple(m for m in batch.rows if batch.present(m)[row])] += 1
        return found

    some = counts(text=0.3)
    assert some.keys() == {("image", "text"), ("image",)} and abs(some["image",] / 2400 - 0.3) < 0.03
    both = counts(text=1.0, image=1.0)
    assert both.keys() == {("text",), ("image",)} and abs(both["image",] / 2400 - 0.5) < 0.04
    assert counts() == {("image", "text"): 2400}
    with pytest.raises(ConfigError, match=r"drop names 'texts'; did you mean 'text'"):
        counts(texts=0.5)
    with pytest.raises(ConfigError, match="drop is 1.5 for 'text'"):
        counts(text=1.5)


def test_captions_are_drawn_by_their_shares(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"png": png(0), "txt": "alt", "syn.txt": "made", "json": {"caption": ["one", "two"]}},
        {"png": png(1), "json": {"caption": "three"}},
        {"png": png(2), "json": {"other": 1}},
    ]
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        for i, members in enumerate(samples):
            for extension, content in members.items():
                data = content if isinstance(content, bytes) else str(content).replace("'", '"').encode()
                entry = tarfile.TarInfo(f"c{i}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    shards = tmp_path / "c.tar"
    config = Captions.Config(choices={"txt": 2.0, "syn.txt": 1.0, "json:caption": 1.0})
    made = Stream.Config(shards=(str(shards),), workers=0, compose=config).build(TRANSFORMS, seed=0, global_batch=1)
    compose = made.sources[0].compose
    draw = Random(1)
    found = Counter(compose.raw(0, draw)["text"] for _ in range(4000))
    want = {"alt": 0.5, "made": 0.25, "one": 0.125, "two": 0.125}
    assert found.keys() == want.keys()
    assert all(abs(found[text] / 4000 - share) < 0.03 for text, share in want.items())
    assert {compose.raw(1, draw)["text"] for _ in range(9)} == {"three"}
    assert "text" not in compose.raw(2, draw)
    assert made.state()["captions"] == config.choices
    wrong: dict[str, dict[str, float]] = {
        "at least one": {},
        "did you mean 'txt'": {"tx": 1},
        "no field json:NAME": {"json": 1},
    }
    for text, choices in wrong.items():
        with pytest.raises(ConfigError, match=text):
            Stream.Config(shards=(str(shards),), compose=Captions.Config(choices=choices)).build(
                TRANSFORMS, seed=0, global_batch=1
            )
