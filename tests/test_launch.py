"""A wrong launch, or a second one in the same folder, ends with the right command in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mmcontrast.config import ConfigError
from mmcontrast.launch import check_launch, device_of
from mmcontrast.lock import NAME, alone
from mmcontrast.trainer import Trainer
from tests.shapes import write_shapes
from tests.test_trainer import ENVIRONMENT, fit, settings

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
TORCHRUN = {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("found", "environment", "launcher", "words"),
    [
        (1, {"WORLD_SIZE": "4"}, "", r"4 processes were launched but this one sees 1.*`torchrun --nproc_per_node 4 -m"),
        (1, STEP, "", r"srun started 2 tasks.*`srun --ntasks-per-node 1 torchrun .*--nnodes \$SLURM_NNODES"),
        (1, STEP | {"SLURM_STEP_NUM_TASKS": "3"}, "", r"srun started 3 tasks"),
        (8, STEP | {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}, "", r"srun started 2 tasks but this one sees 8"),
        (1, {"OMPI_COMM_WORLD_SIZE": "2"}, "", r"mpirun started 2 processes"),
        (1, {"PMI_SIZE": "2"}, "", r"mpiexec started 2 processes"),
        (1, {}, "python accelerate launch --cpu --num_processes 2 -m mmcontrast", r"asked for 2 .*--nproc_per_node 2"),
        (1, {}, "/bin/accelerate launch --num_processes=3 x", r"asked for 3"),
    ],
)
def test_processes_that_do_not_know_each_other(
    found: int, environment: Mapping[str, str], launcher: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_launch(found, environment, launcher=launcher.split())


@pytest.mark.parametrize(
    ("found", "environment", "launcher"),
    [
        (1, {}, "bash"),
        (8, TORCHRUN, ""),
        (8, STEP | TORCHRUN, "torchrun"),  # a torchrun in each task
        (2, STEP | {"WORLD_SIZE": "2"}, "srun"),  # each task a process
        (1, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "bash"),  # the batch script itself
        (4, {"OMPI_COMM_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, ""),
        (2, {"WORLD_SIZE": "2"}, "accelerate launch --multi_gpu --num_processes 2 x"),
        (1, {}, "accelerate launch x --num_processes"),
    ],
)
def test_processes_that_do(found: int, environment: Mapping[str, str], launcher: str) -> None:
    check_launch(found, environment, launcher=launcher.split())


def test_one_process_of_many_gpus_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_launch(1, {}, gpus=8)
    assert "one process uses one of 8 GPUs; all of them: torchrun --nproc_per_node 8" in capsys.readouterr().err
    check_launch(8, TORCHRUN, gpus=8)
    assert not capsys.readouterr().err


def test_each_process_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of() == torch.device("cuda", 0) and device_of(3) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert device_of() == torch.device("cuda", 2), "of more processes than GPUs some share one"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of() == torch.device("cpu")


def test_a_task_that_thinks_it_is_alone_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="srun started 2 tasks"):
        settings(tmp_path / "run", tmp_path).build()
    assert not (tmp_path / "run").exists()


def test_accelerate_that_starts_one_process_of_two(tmp_path: Path) -> None:
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2", "-m", "mmcontrast"]
    recipe = str(Path(__file__).with_name("shapes.py"))
    done = subprocess.run(
        [sys.executable, *words, "train", recipe, "--out", str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode
    assert f"Launch with `torchrun --nproc_per_node 2 -m mmcontrast train {recipe}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_takes_one_training_at_a_time(tmp_path: Path) -> None:
    """Also while its checkpoints are of the same run; and a training that ends, or fails, lets the next one in."""
    data, out = write_shapes(tmp_path / "data"), tmp_path / "run"
    second: Trainer = settings(out, data, steps=2).build()
    with alone(out):
        found = json.loads((out / NAME).read_text())
        assert found["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=rf"is being trained by process {os.getpid()} on .* name another folder"):
            second.fit()
        assert not (out / "config.json").exists()
        assert fit(settings(tmp_path / "other", data, steps=1))
    assert second.fit() and not (out / NAME).exists()
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        fit(settings(out, data, steps=3, seed=5))
    assert not (out / NAME).exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"), alone(tmp_path / "file"):
        pass


def test_a_training_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom mmcontrast.lock import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    with pytest.raises(ConfigError, match=f"by process {process.pid}"), alone(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / NAME).exists()
    with alone(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()
