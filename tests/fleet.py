"""Trainings for tests of several ranks: one launch runs many of them, one after the other.

A run is KIND:LAYOUT:NAME[:FROM] and is written to FOLDER/NAME. With FROM it goes on from the middle of FOLDER/FROM.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcontrast.check.ranks import make_ready, rank_environment
from mmcontrast.checkpoint import Checkpoints
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.ema import EMA
from mmcontrast.encoders import MultiEncoder, TextTransformer, ViT
from mmcontrast.encoders.lora import Lora
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.optim import Timm
from mmcontrast.trainer import Trainer
from tests import coca, shapes, tiny

STEPS = 4


def adapted() -> Trainer.Config:
    """Adapters in one tower whose first block is frozen, the other tower frozen as a whole, and no row without it."""
    config = shapes.recipe()
    image, text = config.model.encoders.values()
    config.model.encoders = {
        "image": replace(image, layers=2, lora=Lora.Config(rank=2), freeze=("tower.transformer.resblocks.0",)),
        "text": replace(text, freeze=("all",)),
    }
    return config


def wide() -> MultiEncoder.Config:
    """Towers and embeddings whose bytes are many more than those of messages about them."""
    return MultiEncoder.Config(
        encoders={
            "image": ViT.Config(image_size=16, patch_size=8, width=128, layers=4, heads=2),
            "text": TextTransformer.Config(context_length=8, width=128, layers=4, heads=2),
        },
        dim=4096,
    )


def averaged() -> Trainer.Config:
    return replace(
        shapes.recipe(), ema=EMA.Config(decay=0.5), evaluators={"w": tiny.Sum.Config()}, eval_every=STEPS // 2
    )


KINDS: dict[str, Callable[[], Trainer.Config]] = {
    "shapes": shapes.recipe,
    "captions": coca.recipe,
    "adapted": adapted,
    "averaged": averaged,
    "lars": lambda: replace(shapes.recipe(), optimizer=Timm.Config(name="lars", lr=1.0)),
    "lamb": lambda: replace(shapes.recipe(), optimizer=Timm.Config(name="lamb", lr=1e-3)),
    "traffic": lambda: replace(shapes.recipe(), model=wide(), global_batch=32, micro_batch=4, tower_micro_batch={}),
    "bf16": lambda: replace(shapes.recipe(), precision="bf16"),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "lean": {"parallel": "fsdp", "reshard": True, "checkpoint_activations": ("all",)},
    "compiled": {"parallel": "fsdp", "compile": True},
}


def settings(kind: str, layout: str, folder: Path, name: str) -> Trainer.Config:
    """A few steps on the shapes of which some lack a modality, so that some micro-batches have no row of a tower."""
    config = replace(KINDS[kind](), **LAYOUTS[layout], out=folder / name, steps=STEPS)
    config.checkpoint = Checkpoints.Config(every=STEPS // 2, keep=10)
    assert isinstance(config.data, Stream.Config)
    config.data.shards = (str(folder / "data"),)
    if kind == "averaged":
        config.evaluators["pairs"] = Retrieval.Config(data=config.data.shards, k=(1, 5))
    return config


def launch(folder: Path, ranks: int, *runs: str) -> None:
    """Run them on so many real processes, which are forked off one that has imported what they need."""
    make_ready()
    context: Any = multiprocessing.get_context("forkserver")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = int(found.getsockname()[1])
    processes = [context.Process(target=_rank, args=(folder, rank, ranks, port, runs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(500)
        process.kill()
    for rank, process in enumerate(processes):
        assert process.exitcode == 0, (folder / f"rank-{rank}-of-{ranks}.log").read_text()[-5000:]


def _rank(folder: Path, rank: int, ranks: int, port: int, runs: tuple[str, ...]) -> None:
    import torch

    log = os.open(folder / f"rank-{rank}-of-{ranks}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    with rank_environment(rank, ranks, port):
        for run in runs:
            _train(folder, run)
        torch.distributed.destroy_process_group()


def _train(folder: Path, run: str) -> None:
    from torch.distributed.tensor import DTensor

    try:
        trainer = start(folder, run)
    except ConfigError as error:
        (folder / f"{run.split(':')[2]}.txt").write_text(str(error))
        return
    if run.startswith("traffic:"):
        _measure_traffic(trainer, folder / f"{trainer.config.out.name}.sent")
        return
    spread = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
    share = sum(p.to_local().numel() for p in spread) / max(1, sum(p.numel() for p in spread))
    trainer.fit()
    if trainer.is_main:
        (trainer.config.out / "share.txt").write_text(f"{len(spread)} {share}")


def _measure_traffic(trainer: Trainer, file: Path) -> None:
    from benchmarks.counters import tcp_bytes_sent

    batch = trainer.stream.batch(0)
    trainer.step(0, batch)  # connections are made, and the health of step 0 is measured
    before = tcp_bytes_sent()
    trainer.step(1, batch)
    sent = tcp_bytes_sent() - before
    trainer.world.gather_objects(0)
    if trainer.is_main:
        file.write_text(str(sent))


def start(folder: Path, run: str) -> Trainer:
    """Build one of them; every rank calls it."""
    from accelerate.state import AcceleratorState

    kind, layout, name, *before = run.split(":")
    config = settings(kind, layout, folder, name)
    if before and os.environ.get("RANK", "0") == "0":
        for part in ("config.json", "assets", f"step-{STEPS // 2:06d}"):
            source = folder / before[0] / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            config.out.mkdir(exist_ok=True)
            copy(source, config.out / part)
    AcceleratorState._reset_state()  # the precision; the process group stays  # pyright: ignore[reportPrivateUsage]
    return config.build()
