"""docs/own_tower.md, run as it is written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs_as_it_is_written(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "own_tower.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```\n(mmcontrast .*?)```", page, re.DOTALL)
    (tmp_path / "colours.py").write_text(code, "utf-8")
    for split, seed in (("train", 0), ("test", 500)):
        tiny.write_shards(tmp_path / "data" / "emoji" / split, tiny.samples(72, seed=seed))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands.splitlines():
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    (found,) = json.loads((tmp_path / "found.json").read_text("utf-8"))
    metrics = found["metrics"]
    assert metrics["text_to_image_recall@5"] > 0.8 > metrics["chance@5"] + 0.2
