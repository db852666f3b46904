"""Health: what is measured equals slow loops, each rule speaks of what it is for, and a healthy run hears nothing."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, Configurable
from mmcontrast.health.measure import gradient_norms, measure
from mmcontrast.health.pulse import Beat, Pulse, RankTimes, describe_stall
from mmcontrast.health.rules import Health
from mmcontrast.objectives import InfoNCE, Symile
from mmcontrast.objectives.base import Objective
from mmcontrast.sharding import World, value_and_grad
from tests.conftest import GlooPool
from tests.shapes import Trouble, write_shapes
from tests.test_trainer import command, fit, run, settings

GOOD = {
    "loss": 1.0,
    "clip.loss": 1.0,
    "chance/clip": math.log(64),
    "clip.logit_scale": 20.0,
    "gradient/image": 1.0,
    "gradient/text": 0.1,
    "geometry/effective_rank/image": 40.0,
    "geometry/cosine/image": 0.3,
    "geometry/rank_limit/image": 511.0,
    "batch/same_sample": 0.0,
    "batch/same_text/text": 0.05,
    "batch/rows/image": 64.0,
    "batch/rows/text": 60.0,
    "batch/pairs/image-text": 60.0,
    "data_wait": 0.1,
}
"""A line of a run that is well."""
EVEN = [RankTimes(rank, "host", 0.1, 1.0) for rank in range(4)]
LATE = [*EVEN[:3], RankTimes(3, "far", 0.1, 1.6)]


def health(*, labelled: bool = False, **options: Any) -> Health:
    return Health.Config(**options).build(
        global_batch=64,
        settled=100,
        weights={"clip": 1.0, "watch": 0.0},
        limits={"clip.logit_scale": (1.0, 100.0)},
        labelled=labelled,
    )


# ------------------------------------------------------------------------------------------------ rules

BAD: dict[str, tuple[dict[str, float], int, str]] = {
    "chance/clip": ({"clip.loss": math.log(64) * 1.01}, 5, "the loss clip is 4.200, and guessing gives"),
    "limit/clip.logit_scale": ({"clip.logit_scale": 99.95}, 5, "upper limit 100 .temperature 0.01."),
    "gradient/text": ({"gradient/text": 9e-5}, 2, "the gradient of text has vanished"),
    "collapse/image": ({"geometry/cosine/image": 0.96}, 2, "the embeddings of image have collapsed"),
    "same_sample": ({"batch/same_sample": 0.02}, 2, "2% of the rows of a batch are a sample"),
    "same_text/text": ({"batch/same_text/text": 0.12}, 2, "name it in `never_negative`"),
    "pairs/image-text": ({"batch/pairs/image-text": 6.0}, 2, "only 6 of 64 rows have both image and text"),
    "data_wait": ({"data_wait": 0.31}, 5, "waits for data 31% of its time"),
}


def test_a_healthy_run_hears_nothing() -> None:
    watcher = health()
    assert all(watcher.see(step, GOOD, EVEN) == [] for step in range(1, 400, 10))


@pytest.mark.parametrize("rule", BAD)
def test_a_rule_speaks_once_it_has_held_and_again_after_it_has_ceased(rule: str) -> None:
    bad, after, text = BAD[rule]
    watcher = health()
    said = [[n.rule for n in watcher.see(200 + line, GOOD | bad, EVEN)] for line in range(10)]
    assert said == [[rule] if line == after - 1 else [] for line in range(10)]
    for _ in range(2):  # a good line comes before it has held long enough
        assert watcher.see(300, GOOD, EVEN) == []
        assert [watcher.see(301 + line, GOOD | bad, EVEN) for line in range(after - 1)] == [[]] * (after - 1)
    (notice,) = watcher.see(320, GOOD | bad, EVEN)
    assert notice.rule == rule and re.search(text, notice.text)


@pytest.mark.parametrize("rule", BAD)
def test_just_within_the_threshold_is_well(rule: str) -> None:
    near = {
        "chance/clip": {"clip.loss": math.log(64) * 0.97},
        "limit/clip.logit_scale": {"clip.logit_scale": 99.8},
        "gradient/text": {"gradient/text": 1.1e-4},
        "collapse/image": {"geometry/cosine/image": 0.94, "geometry/effective_rank/image": 11.0},
        "same_sample": {"batch/same_sample": 0.009},
        "same_text/text": {"batch/same_text/text": 0.09},
        "pairs/image-text": {"batch/pairs/image-text": 7.0},
        "data_wait": {"data_wait": 0.29},
    }
    watcher = health(patience=1)
    assert watcher.see(200, GOOD | near[rule], EVEN) == []


def rules_of(line: dict[str, float], step: int = 200, **options: Any) -> list[str]:
    return [notice.rule for notice in health(patience=1, **options).see(step, line, EVEN)]


def test_what_each_rule_leaves_alone() -> None:
    guessing = {"clip.loss": math.log(64)}
    assert rules_of(GOOD | guessing) == ["chance/clip"]
    assert rules_of(GOOD | guessing, step=100) == []  # still in the warm-up
    assert rules_of(GOOD | {"watch.loss": 2.0, "chance/watch": 2.0}) == []  # weight 0 only watches
    assert rules_of(GOOD | {"geometry/effective_rank/image": 10.0}) == ["collapse/image"]  # below 2 % of 511
    small = {"geometry/effective_rank/image": 1.0, "geometry/rank_limit/image": 50.0}
    assert rules_of(GOOD | small) == []  # of few dimensions a few are enough
    assert rules_of(GOOD | {"clip.logit_scale": 1.0}) == ["limit/clip.logit_scale"]
    assert rules_of(GOOD | {"batch/same_text/text": 0.5}, labelled=True) == []
    assert rules_of(dict.fromkeys(GOOD, math.nan)) == []  # a step that was left out
    assert rules_of({"loss": 1.0}) == []


def test_chance_is_remembered_between_measurements() -> None:
    watcher = health(patience=3)
    line = {"loss": 4.16, "clip.loss": 4.16}
    assert watcher.see(201, line) == []  # not known yet
    watcher.see(202, line | {"chance/clip": math.log(64)})
    watcher.see(203, line)
    (notice,) = watcher.see(204, line)
    assert notice.rule == "chance/clip" and "since step 202" in notice.text


def test_a_slow_rank_is_named_with_its_reason() -> None:
    watcher = health(patience=2)
    assert watcher.see(1, GOOD, LATE) == []
    (notice,) = watcher.see(2, GOOD, LATE)
    assert notice.rule == "slow/3" and "rank 3 (far)" in notice.text and "its towers take longer" in notice.text
    hungry = [*EVEN[:3], RankTimes(3, "far", 1.6, 1.0)]
    watcher = health(patience=1)
    (notice,) = watcher.see(1, GOOD, hungry)
    assert "mostly it waits for data" in notice.text
    assert health(patience=1).see(1, GOOD, LATE[3:]) == []  # an only rank keeps nobody waiting


@pytest.mark.parametrize("options", [{"every": 0}, {"patience": 0}, {"stalled_after": 0.0}])
def test_settings_that_cannot_be_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match=f"health: .*{next(iter(options))}"):
        health(**options)


# ------------------------------------------------------------------------------------------------ measurements

TEXTS = [[5, 6, 0], [6, 5, 0], [5, 6, 0], [7, 0, 0], [8, 9, 1], [7, 0, 0], [2, 0, 0]]


def made(rank: int = 0, size: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor], Batch]:
    """Eight rows, or the part of a rank; row 2 has no text, rows 1 and 4 no picture; rows 0 and 7 are one sample."""
    generator = torch.Generator().manual_seed(0)
    z = {m: nn.functional.normalize(torch.randn(8, 6, generator=generator), dim=1) for m in ("image", "text")}
    has = {"image": torch.ones(8, dtype=torch.bool), "text": torch.ones(8, dtype=torch.bool)}
    has["image"][[1, 4]] = False
    has["text"][2] = False
    ids = torch.tensor([9, 1, 2, 3, 4, 5, 6, 9])
    tokens = torch.zeros(8, 3, dtype=torch.int64)
    tokens[has["text"]] = torch.tensor(TEXTS)
    part = slice(rank * 8 // size, (rank + 1) * 8 // size)
    rows = {m: torch.nonzero(mask[part]).flatten() for m, mask in has.items()}
    batch = Batch(
        inputs={"image": torch.zeros(len(rows["image"]), 3, 4, 4), "text": tokens[part][has["text"][part]]},
        rows=rows,
        ids=ids[part],
    )
    return {m: t[part] for m, t in z.items()}, {m: mask[part] for m, mask in has.items()}, batch


def test_measurements_equal_slow_loops() -> None:
    z, has, batch = made()
    found = measure(z, has, batch, {}, World())
    assert found["batch/rows/image"] == 6 and found["batch/rows/text"] == 7 and found["batch/pairs/image-text"] == 5
    assert found["batch/same_sample"] == 2 / 8
    counts = Counter(tuple(text) for text in TEXTS)
    assert found["batch/same_text/text"] == sum(n for n in counts.values() if n > 1) / 7 == 4 / 7
    assert "batch/same_text/image" not in found
    for m in z:
        rows = [row for row, there in zip(z[m].double(), has[m].tolist(), strict=True) if there]
        pairs = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        cosine = sum(float(a @ b) for a, b in pairs) / len(pairs)
        assert found[f"geometry/cosine/{m}"] == pytest.approx(cosine, abs=1e-6)
        uniformity = math.log(sum(math.exp(-2 * float((a - b) @ (a - b))) for a, b in pairs) / len(pairs))
        assert found[f"geometry/uniformity/{m}"] == pytest.approx(uniformity, abs=1e-5)
        assert found[f"geometry/rank_limit/{m}"] == min(len(rows) - 1, 6)
        assert 1 < found[f"geometry/effective_rank/{m}"] < found[f"geometry/rank_limit/{m}"]
    both = [i for i in range(8) if has["image"][i] and has["text"][i]]
    squared = [float((z["image"][i] - z["text"][i]).square().sum()) for i in both]
    assert found["geometry/alignment/image-text"] == pytest.approx(sum(squared) / len(both), abs=1e-6)


def test_padding_and_masks_make_no_other_text() -> None:
    z, has, batch = made()
    padded = nn.functional.pad(cast(Tensor, batch.inputs["text"]), (0, 4))
    for text in (padded, {"input_ids": padded + 3, "attention_mask": (padded > 0).long()}):
        inputs = {"image": batch.inputs["image"], "text": text}
        found = measure(z, has, Batch(inputs=inputs, rows=batch.rows, ids=batch.ids), {}, World())
        assert found["batch/same_text/text"] == 4 / 7


def test_rows_that_are_not_finite_stop_no_measurement() -> None:
    z, has, batch = made()
    whole = measure(z, has, batch, {}, World())
    z["image"][0] = math.nan
    found = measure(z, has, batch, {}, World())
    assert all(math.isfinite(value) for value in found.values())
    assert found["geometry/rank_limit/image"] == whole["geometry/rank_limit/image"] - 1
    assert found["batch/rows/image"] == 6


def _measured(group: Any, size: int) -> dict[str, float]:
    world = World(group)
    return measure(*made(world.rank, size), {}, world)


def test_ranks_count_the_whole_batch(gloo: GlooPool) -> None:
    alone = measure(*made(), {}, World())
    for size in (2, 4):
        first, *others = gloo(size, _measured, size)
        assert others == [{}] * (size - 1)
        batch = {name: value for name, value in first.items() if name.startswith("batch/")}
        assert batch == {name: value for name, value in alone.items() if name.startswith("batch/")}
        assert first["geometry/cosine/text"] != alone["geometry/cosine/text"]  # of rank 0's rows alone


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (InfoNCE.Config(), 1e-6),
        (InfoNCE.Config(pairs=(("image", "text"), ("image", "sound")), pair_weights=(1.0, 3.0)), 1e-6),
        (Symile.Config(modalities=("image", "text", "sound"), negatives="all"), 1e-6),
        (Symile.Config(modalities=("image", "text", "sound"), negatives="single"), 0.02),
    ],
    ids=["infonce", "pairs", "symile-all", "symile-single"],
)
def test_chance_is_the_loss_of_equal_embeddings(config: Objective.Config, tolerance: float) -> None:
    """As the objective itself computes it."""
    term: Objective = cast(Configurable.Config, config).build()
    n = 32
    z = {m: nn.functional.normalize(torch.ones(n, 8), dim=1) for m in ("image", "text", "sound")}
    present = {m: torch.ones(n, dtype=torch.bool) for m in z}
    result = value_and_grad({"t": term}, z, present, torch.arange(n))
    chance = term.chance({m: n for m in z})
    assert chance is not None and chance > 1
    assert float(result.terms["t"]) == pytest.approx(chance, rel=tolerance)


def test_gradient_norms_are_those_of_what_trains() -> None:
    a, b, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    frozen.requires_grad_(False)
    silent = nn.Parameter(torch.zeros(2))
    found = gradient_norms({"image": [a, b, frozen], "text": [silent], "fixed": [frozen]})
    assert found == {"gradient/image": 5.0, "gradient/text": 0.0}


# ------------------------------------------------------------------------------------------------ pulse


def test_a_stall_names_who_is_behind() -> None:
    beats = [Beat(0, "a", 7, "exchange", 130.0), Beat(1, "b", 7, "data", 131.0), Beat(2, "b", 7, "exchange", 130.0)]
    assert describe_stall(beats, 3) == (
        "no progress for 131 s at step 7: rank 1 (b) waits for data; the others wait for it"
    )
    assert "no sign of 1 of 4 ranks" in describe_stall(beats, 4)
    alone = describe_stall([Beat(0, "a", 7, "data", 130.0)], 1)
    assert alone == "no progress for 130 s at step 7: rank 0 (a) waits for data"
    assert "no rank is behind" in describe_stall([beats[0], beats[2]], 2)


def test_the_watch_speaks_once_of_a_rank_that_hangs_and_not_of_an_evaluation(tmp_path: Path) -> None:
    """Two ranks as two objects: each beats into the folder, rank 1 stays at its data."""
    said: list[str] = []
    spoken = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        spoken.set()

    def pulse(rank: int, **options: Any) -> Pulse:
        return Pulse(tmp_path, rank=rank, size=2, stalled_after=0.2, device=torch.device("cpu"), **options)

    first, second = pulse(0, say=say), pulse(1)
    with second:
        second.enter("data", 3)
        with first:
            first.enter("evaluate", 2)
            assert not spoken.wait(0.6)
            first.enter("exchange", 3)
            assert spoken.wait(30)
            assert not threading.Event().wait(0.4) and len(said) == 1
    assert "rank 1" in said[0] and "waits for data; the others wait for it" in said[0]
    assert not (tmp_path / "pulse").exists()


def test_times_are_by_step_and_since_the_last_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("mmcontrast.health.pulse.time.monotonic", lambda: now)
    pulse = Pulse(tmp_path, rank=1, size=2, stalled_after=9.0, device=torch.device("cpu"))
    for step in range(2):
        for phase, seconds in (("data", 1.0), ("encode", 3.0), ("exchange", 5.0)):
            pulse.enter(cast(Any, phase), step)
            now += seconds
    pulse.enter("save", 1)
    times = pulse.times()
    assert (times.data, times.encode, times.busy) == (1.0, 3.0, 4.0)
    assert pulse.times().busy == 0


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def test_a_run_writes_what_it_measures_and_its_notices(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A scale that starts at its limit and cannot fall: said at the first line, not again after a resumed start."""
    out = tmp_path / "run"
    config = settings(
        out,
        shards,
        steps=6,
        objectives={"clip": InfoNCE.Config(scale=50.0, max_scale=50.0)},
        health=Health.Config(every=2, patience=1),
    )
    cast(Any, config.optimizer).lr = 1e-7
    fit(config)
    found = lines(out / "metrics.jsonl")
    assert [line["step"] for line in found if "geometry/cosine/image" in line] == [1, 3, 5]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert found[0]["batch/pairs/image-text"] == 8 and found[0]["chance/clip"] == pytest.approx(math.log(8))
    assert found[0]["gradient/image"] > 0 and found[0]["memory_gb"] > 0.05
    limits = [line for line in lines(out / "health.jsonl") if line["rule"] == "limit/clip.logit_scale"]
    assert [line["step"] for line in limits] == [1] and "upper limit 50" in limits[0]["notice"]
    assert "step 1: clip.logit_scale stands at its upper limit" in capsys.readouterr().err


def test_a_run_with_a_good_scale_has_no_notice_of_it(tmp_path: Path, shards: Path) -> None:
    fit(settings(tmp_path / "run", shards, steps=6, health=Health.Config(every=2, patience=1)))
    rules = {line["rule"] for line in lines(tmp_path / "run" / "health.jsonl")}
    assert not {rule for rule in rules if rule.startswith(("limit/", "gradient/", "pairs/", "same_"))}


def test_a_step_that_is_left_out_is_measured_too(tmp_path: Path, shards: Path) -> None:
    objectives: Any = {"clip": InfoNCE.Config(), "trouble": Trouble.Config(step=2)}
    config = settings(tmp_path / "run", shards, steps=4, objectives=objectives, not_finite="skip")
    config.health = Health.Config(every=1)
    fit(config)
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert found[2]["loss"] is None and found[2]["gradient/image"] is None
    assert found[2]["batch/rows/text"] == 8


def test_two_ranks_measure_as_one(tmp_path: Path, shards: Path) -> None:
    flags = ["--steps", "2", "--health.every", "1"]
    run(*command(tmp_path / "two", shards, *flags, ranks=2))
    run(*command(tmp_path / "one", shards, *flags))
    for two, one in zip(*(lines(tmp_path / name / "metrics.jsonl") for name in ("two", "one")), strict=True):
        names = [name for name in one if name.startswith(("batch/", "chance/", "gradient/"))]
        assert names and {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4)
    assert not (tmp_path / "two" / "pulse").exists()
