"""Trainings for tests of several ranks: one launch runs many of them, one after the other.

    torchrun --nproc_per_node W tests/fleet.py FOLDER KIND:LAYOUT:NAME[:FROM]…

Each is written to FOLDER/NAME. With FROM it goes on from the checkpoint of step 4 of the run FOLDER/FROM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.ema import EMA
from mmcontrast.encoders.lora import Lora
from mmcontrast.optim import Timm
from mmcontrast.trainer import Trainer
from tests import coca, shapes, tiny

ROOT = Path(__file__).parents[1]


def adapted() -> Trainer.Config:
    """Adapters in one tower whose first block is frozen, the other tower frozen as a whole, and no row without it."""
    config = shapes.recipe()
    image, text = config.model.encoders.values()
    config.model.encoders = {
        "image": replace(image, layers=2, lora=Lora.Config(rank=2), freeze=("tower.transformer.resblocks.0",)),
        "text": replace(text, freeze=("all",)),
    }
    return config


def averaged() -> Trainer.Config:
    return replace(shapes.recipe(), ema=EMA.Config(decay=0.5), evaluators={"w": tiny.Sum.Config()}, eval_every=4)


KINDS: dict[str, Callable[[], Trainer.Config]] = {
    "shapes": shapes.recipe,
    "captions": coca.recipe,
    "adapted": adapted,
    "averaged": averaged,
    "lion": lambda: replace(shapes.recipe(), optimizer=Timm.Config(name="lion", lr=1e-4)),
    "lamb": lambda: replace(shapes.recipe(), optimizer=Timm.Config(name="lamb", lr=1e-3)),
    "bf16": lambda: replace(shapes.recipe(), precision="bf16"),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "resharded": {"parallel": "fsdp", "reshard": True},
}


def settings(kind: str, layout: str, folder: Path, name: str) -> Trainer.Config:
    """Eight steps on the shapes of which some lack a modality, so that some micro-batches have no row of a tower."""
    config = replace(KINDS[kind](), **LAYOUTS[layout], out=folder / name)
    config.checkpoint = Checkpoints.Config(every=4, keep=10)
    assert isinstance(config.data, Stream.Config)
    config.data.shards = (str(folder / "data"),)
    return config


def launch(folder: Path, ranks: int, *runs: str) -> None:
    """Run them on so many real processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, __file__, str(folder), *runs], env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-5000:]


def start(folder: Path, run: str) -> Trainer:
    """Build one of them; every rank calls it."""
    from accelerate.state import AcceleratorState

    kind, layout, name, *before = run.split(":")
    config = settings(kind, layout, folder, name)
    if before and os.environ.get("RANK", "0") == "0":
        for part in ("config.json", "assets", "step-000004"):
            source = folder / before[0] / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            config.out.mkdir(exist_ok=True)
            copy(source, config.out / part)
    AcceleratorState._reset_state()  # of precision; the process group stays
    return config.build()


def main() -> None:
    from torch.distributed.tensor import DTensor

    folder = Path(sys.argv[1])
    for run in sys.argv[2:]:
        try:
            trainer = start(folder, run)
        except ConfigError as error:
            if os.environ["RANK"] == "0":
                (folder / f"{run.split(':')[2]}.txt").write_text(str(error))
            continue
        spread = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
        share = sum(p.to_local().numel() for p in spread) / max(1, sum(p.numel() for p in spread))
        trainer.fit()
        if trainer.is_main:
            (trainer.config.out / "share.txt").write_text(f"{len(spread)} {share}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
