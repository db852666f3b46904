"""docs/launch.md and docs/slurm.sh: their flags exist, and the script goes on after its time limit."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro

from mmcontrast.checkpoint import list_checkpoints
from mmcontrast.plan.cli import plan_usage
from mmcontrast.recipe import load_recipe
from mmcontrast.trainer import Trainer
from tests.shapes import write_shapes

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "slurm.sh"
RECIPE = str(Path(__file__).with_name("shapes.py"))

# Two tasks with a torchrun each, as on two machines; a signal to srun goes to all of them.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2
for task in 0 1; do SLURM_PROCID=$task "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    wait "$task"; found=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task"; found=$?; done
    [ "$found" = 0 ] || code=$found
done
exit $code
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""
TORCHRUN = f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "$@"
"""


def documented(word: str) -> list[list[str]]:
    """The commands of the page that begin with a word."""
    text = (ROOT / "docs" / "launch.md").read_text("utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{word} ")]


def trains(words: list[str]) -> Trainer.Config:
    """The settings of `train RECIPE --overrides`."""
    assert words[0] == "train"
    recipe = load_recipe(words[1])
    return tyro.cli(type(recipe), default=recipe, args=words[2:])


def test_the_script_is_bash_and_its_words_are_words_of_torchrun() -> None:
    from torch.distributed.run import get_args_parser

    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text("utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^srun .* (torchrun .*) &$", text, re.MULTILINE)
    words = shlex.split(line.replace("$SLURM_NNODES", "4").replace("$GPUS", "8").replace('"$@"', "clip_vit_b16"))
    asked = get_args_parser().parse_args(words[1:])
    assert (asked.nnodes, asked.nproc_per_node, asked.module, asked.training_script) == ("4", "8", True, "mmcontrast")
    assert trains(asked.training_script_args).global_batch


def test_commands_of_the_page_exist() -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    started = documented("torchrun")
    assert len(started) == 2
    for words in started:
        asked = get_args_parser().parse_args(words)
        assert asked.module and trains(asked.training_script_args).data
    ((first, *words),) = documented("accelerate")
    asked = launch_command_parser().parse_args(words)
    assert first == "launch" and asked.num_processes == 8 and asked.module and asked.training_script == "mmcontrast"
    assert trains(asked.training_script_args).data
    ((first, *words),) = documented("mmcontrast")
    assert first == "plan" and tyro.cli(plan_usage, args=words)["gpus"] == 32
    ((first, *words),) = documented("sbatch")
    assert first == "docs/slurm.sh" and trains(["train", *words]).parallel == "fsdp"


def test_settings_of_the_page_are_settings() -> None:
    text = (ROOT / "docs" / "launch.md").read_text("utf-8")
    table = text[text.index("## Memory and speed") : text.index("None of them")]
    flags = [shlex.split(flag) for flag in re.findall(r"^\| `(--.*?)` \|", table, re.MULTILINE)]
    assert len(flags) == 7
    for flag in flags:
        assert trains(["train", "clip_vit_b16", *flag, "--checkpoint.minutes", "30", "--health.stalled-after", "60"])


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which the script's commands are there."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "REQUEUED": str(tmp_path / "requeued"),
    }


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    data, run = write_shapes(tmp_path / "data"), tmp_path / "run"
    words = ["bash", str(SCRIPT), RECIPE, "--out", str(run), "--data.shards", str(data), "--checkpoint.every", "None"]
    words += ["--steps", "60", "--parallel", "fsdp"]
    process = subprocess.Popen(words, env=cluster, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(steps_of(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert steps_of(run), process.communicate()[1]
    process.send_signal(signal.SIGUSR1)  # of SLURM's, to the batch script
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and (tmp_path / "requeued").read_text() == "7\n"
    ((saved, _),) = list_checkpoints(run)
    assert 2 <= saved < 60 and f"saved at step {saved}" in said

    again = subprocess.run([*words, "--checkpoint.keep", "5"], env=cluster, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"goes on at step {saved} of 60" in again.stderr
    assert steps_of(run) == list(range(1, 61)) and [step for step, _ in list_checkpoints(run)] == [saved, 60]
    assert (tmp_path / "requeued").read_text() == "7\n", "it was queued again though it was done"
