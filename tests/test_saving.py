"""Checkpoints: whatever happens while one is written, the newest whole one is there; and runs that must end."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast import checkpoint
from mmcontrast.batch import Batch
from mmcontrast.checkpoint import (
    Checkpoints,
    damage,
    find_checkpoint,
    list_checkpoints,
    read_best,
    read_state,
    read_tensors,
)
from mmcontrast.config import ConfigError
from mmcontrast.interrupts import Interrupted
from mmcontrast.not_finite import FILE, describe
from mmcontrast.objectives import InfoNCE
from mmcontrast.trainer import Trainer
from tests.shapes import Scripted, Trouble, write_shapes
from tests.test_trainer import ENVIRONMENT, assert_equal, fit, settings, weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def build(folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints.Config(**options).build(folder)


def content(value: float, size: int = 3) -> Mapping[str, Mapping[str, Tensor]]:
    return {"model": {"w": torch.full((size,), value)}, "optimizer": {"m": torch.full((size,), -value)}}


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("background", [False, True])
def test_old_checkpoints_go_only_after_the_new_one_stands(tmp_path: Path, background: bool) -> None:
    checkpoints = build(tmp_path, keep=2, background=background)
    for step in (1, 2, 3):
        checkpoints.save(step, content(float(step)), {"note": step})
    checkpoints.finish()
    assert steps_of(tmp_path) == [2, 3]
    assert read_state(tmp_path / "step-000003") == {"step": 3, "note": 3}
    assert torch.equal(read_tensors(tmp_path / "step-000003", "optimizer")["m"], torch.full((3,), -3.0))
    with pytest.raises(FileExistsError):  # what stands is never replaced
        checkpoints.save(3, content(0.0), {})
    assert steps_of(tmp_path) == [2, 3] and not list(tmp_path.glob("*.tmp"))


def test_the_run_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, at_the_gate = threading.Event(), threading.Event()
    sync = checkpoint.sync

    def wait(path: Path) -> None:
        at_the_gate.set()
        assert gate.wait(30)
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", wait)
    checkpoints = build(tmp_path)
    weights = torch.zeros(5)
    checkpoints.save(1, {"model": {"w": weights}}, {})
    assert at_the_gate.wait(30) and steps_of(tmp_path) == []
    weights += 7  # the run goes on
    gate.set()
    checkpoints.save(2, {"model": {"w": weights}}, {})  # waits for the first: it alone may be under way
    assert steps_of(tmp_path)[:1] == [1]
    checkpoints.finish()
    for step, value in ((1, 0.0), (2, 7.0)):
        assert torch.equal(read_tensors(tmp_path / f"step-{step:06d}", "model")["w"], torch.full((5,), value))


def test_killed_at_any_moment_a_save_leaves_the_newest_whole_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", str(tmp_path)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *killed, whole = json.loads(done.stdout)
    assert whole == {"code": 0, "newest": 3.0, "best": 3, "whole": True}
    assert all(found["code"] == -signal.SIGKILL and found["whole"] for found in killed)
    # Both sides of the moment at which a step begins to count were met, and then of that at which it is the best.
    states = [(found["newest"], found["best"]) for found in killed]
    assert states == sorted(states)
    assert states.count((2.0, 1)) > 5 and states.count((3.0, 1)) > 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from mmcontrast.checkpoint import Checkpoints, list_checkpoints
checkpoints = Checkpoints.Config(keep=1).build(Path(sys.argv[1]))
checkpoints.save(1, {"model": {"w": torch.zeros(10)}}, {})
checkpoints.finish()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(2, {"model": {"w": torch.zeros(100_000)}}, {})
try:
    checkpoints.save(3, {"model": {"w": torch.zeros(10)}}, {})
except OSError as error:
    print("refused", [step for step, _ in list_checkpoints(Path(sys.argv[1]))])
"""


def test_a_full_disk_costs_no_checkpoint_and_is_told_at_the_next(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "refused [1]", done.stderr[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001"]
    assert damage(tmp_path / "step-000001") is None
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


# ------------------------------------------------------------------------------------------------ when, and which


def test_minutes_are_counted_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    checkpoints = build(tmp_path, minutes=5)
    assert not checkpoints.overdue()
    now += 299
    assert not checkpoints.overdue()
    now += 1
    assert checkpoints.overdue()
    checkpoints.save(1, content(1.0), {})
    assert not checkpoints.overdue() and not build(tmp_path).overdue()


def test_a_run_saves_by_the_clock(tmp_path: Path, shards: Path) -> None:
    fit(settings(tmp_path / "run", shards, steps=3, checkpoint=Checkpoints.Config(minutes=1e-9, keep=10)))
    assert steps_of(tmp_path / "run") == [1, 2, 3]


@pytest.mark.parametrize("lowest", [False, True])
def test_the_best_stays(tmp_path: Path, shards: Path, lowest: bool) -> None:
    scores = (0.2, 0.6, 0.6, 0.5, 0.4)
    config = settings(
        tmp_path / "run",
        shards,
        steps=5,
        eval_every=1,
        evaluators={"x": Scripted.Config(values=tuple(1 - s if lowest else s for s in scores))},
        checkpoint=Checkpoints.Config(every=2, keep=1, best="eval/x/score", lowest=lowest),
    )
    fit(config)
    assert steps_of(tmp_path / "run") == [2, 5]
    assert find_checkpoint(tmp_path / "run" / "best").name == "step-000002"
    assert find_checkpoint(tmp_path / "run").name == "step-000005"
    checkpoints = config.checkpoint.build(tmp_path / "run")
    assert not checkpoints.improves({"eval/x/score": float("nan")}) and not checkpoints.improves({})
    assert read_best(tmp_path / "run") == {"step": 2, "measure": "eval/x/score", "value": 1 - 0.6 if lowest else 0.6}


def test_a_measure_that_is_not_there_is_told(tmp_path: Path, shards: Path) -> None:
    config = settings(
        tmp_path / "run",
        shards,
        steps=2,
        evaluators={"x": Scripted.Config(values=(0.1,))},
        checkpoint=Checkpoints.Config(best="eval/x/scor"),
    )
    with pytest.raises(ConfigError, match=r"'eval/x/scor', which nothing measures; did you mean 'eval/x/score'"):
        fit(config)
    assert steps_of(tmp_path / "run") == [2], "what was trained must be saved nevertheless"


@pytest.mark.parametrize(
    ("options", "text"),
    [({"minutes": 0.0}, "minutes is 0.0"), ({"every": 0}, "every is 0"), ({"keep": 0}, "keep is 0")],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(tmp_path, **options)


# ------------------------------------------------------------------------------------------------ signals

RECIPE = """
from mmcontrast.checkpoint import Checkpoints
from tests.shapes import Trouble, recipe as plain

def recipe():
    config = plain()
    config.checkpoint = Checkpoints.Config(keep=10)
    config.objectives["trouble"] = Trouble.Config({options})
    return config
"""


def launch(folder: Path, shards: Path, options: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """`mmcontrast train` of a recipe with trouble on two ranks; they stop each other when one fails."""
    (folder / "recipe.py").write_text(RECIPE.format(options=options))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mmcontrast"]
    words += ["train", str(folder / "recipe.py"), "--out", str(folder / "run"), "--data.shards", str(shards), *flags]
    return subprocess.run(words, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=120)


def trouble(out: Path, shards: Path, config: Trouble.Config, **changes: Any) -> Trainer.Config:
    changes = {"checkpoint": Checkpoints.Config(keep=10)} | changes
    return settings(out, shards, objectives={"clip": InfoNCE.Config(), "trouble": config}, **changes)


def test_sigterm_saves_and_ends_and_the_run_goes_on(tmp_path: Path, shards: Path) -> None:
    config = trouble(tmp_path / "run", shards, Trouble.Config(what="SIGTERM", step=2))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="saved at step 3; start again to go on"):
        fit(config)
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_of(tmp_path / "run") == [3]
    fit(config)
    fit(trouble(tmp_path / "whole", shards, Trouble.Config(what="SIGTERM", step=99)))
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_sigusr1_saves_and_the_run_goes_on(tmp_path: Path, shards: Path) -> None:
    fit(trouble(tmp_path / "run", shards, Trouble.Config(what="SIGUSR1", step=2), steps=5))
    assert steps_of(tmp_path / "run") == [3, 5]


def test_a_signal_to_one_rank_saves_and_ends_both_at_one_step(tmp_path: Path, shards: Path) -> None:
    done = launch(tmp_path, shards, "what='SIGTERM', step=2, rank=1")
    assert steps_of(tmp_path / "run") == [3], done.stderr[-3000:]
    assert done.stderr.count("saved at step 3; start again to go on") == 2 and "exitcode  : 143" in done.stderr


TWICE = """
import os, signal, sys, time
from mmcontrast.interrupts import Interrupts
with Interrupts() as asked:
    ready, tell = os.pipe()
    worker = os.fork()
    if not worker:
        os.write(tell, b".")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)  # a signal that comes before the fork is ready is lost
    os.kill(worker, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), asked.stop)
    os.kill(os.getpid(), signal.SIGTERM)
    print(asked.stop, asked.save, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_sigterm_ends_the_process_and_forks_do_as_they_are_told() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("-15 False\nTrue False\n", -signal.SIGTERM), done.stderr


# ------------------------------------------------------------------------------------------------ not finite


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path, shards: Path) -> None:
    config = trouble(tmp_path / "run", shards, Trouble.Config(), checkpoint=Checkpoints.Config(every=2, keep=10))
    trainer: Trainer = config.build()
    with pytest.raises(FloatingPointError, match="step 2: loss nan.*are in .*not_finite.jsonl"):
        trainer.fit()
    saved = read_tensors(tmp_path / "run" / "step-000002", "model")
    assert_equal({k: t.cpu() for k, t in trainer.model.state_dict().items()}, saved)
    objectives = read_tensors(tmp_path / "run" / "step-000002", "objectives")
    assert_equal({k: t.cpu() for k, t in trainer.objectives.state_dict().items()}, objectives)
    assert objectives["trouble.seen"] == 2
    (line,) = lines(tmp_path / "run" / FILE)
    assert line["step"] == 2 and line["ranks"][0]["keys"] == list(trainer.stream.batch(2).keys)


def test_a_step_may_be_left_out(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "run"
    config = trouble(
        out, shards, Trouble.Config(), not_finite="skip", checkpoint=Checkpoints.Config(every=1, keep=10), steps=5
    )
    fit(config)
    after = {step: read_tensors(out / f"step-{step:06d}", "model") for step in (2, 3, 4)}
    assert_equal(after[3], after[2])
    assert any(not torch.equal(t, after[3][k]) for k, t in after[4].items())
    found = lines(out / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert found[2]["loss"] is None and found[2]["skipped_steps"] == 1 and found[3]["loss"] > 0
    assert read_state(out / "step-000005")["skipped_steps"] == 1
    trainer: Trainer = config.build()
    trainer.fit()  # the count is part of the run
    assert trainer.skipped_steps == 1


def test_not_too_many_steps_may_be_left_out(tmp_path: Path, shards: Path) -> None:
    config = trouble(tmp_path / "run", shards, Trouble.Config(), not_finite="skip", max_not_finite=0)
    with pytest.raises(FloatingPointError, match="step 1 of this kind; max_not_finite allows 0"):
        fit(config)


def test_ranks_agree_on_a_loss_that_is_not_finite_on_one(tmp_path: Path, shards: Path) -> None:
    done = launch(tmp_path, shards, "step=2, rank=1", "--not-finite", "skip", "--steps", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = lines(tmp_path / "run" / FILE)
    assert [len(rank["keys"]) for rank in line["ranks"]] == [4, 4] and [r["rank"] for r in line["ranks"]] == [0, 1]
    assert lines(tmp_path / "run" / "metrics.jsonl")[2]["skipped_steps"] == 1
    assert all(torch.isfinite(t).all() for t in weights(tmp_path / "run").values())


def test_the_samples_that_a_tower_makes_not_finite_are_named() -> None:
    z = {"image": torch.ones(3, 2), "text": torch.ones(3, 2)}
    z["image"][1, 0] = torch.nan
    z["text"][2] = torch.inf
    batch = Batch(inputs={}, rows={}, ids=torch.arange(3), keys=["a", "b", "c"], skipped=[("s", "k", "cut off")])
    assert describe(batch, z, 5) == {
        "rank": 5,
        "keys": ["a", "b", "c"],
        "not_finite": {"image": ["b"], "text": ["c"]},
        "skipped": [["s", "k", "cut off"]],
    }
