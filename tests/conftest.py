"""What several files of tests start: four gloo processes, once per session; a server of shards, and their cache."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mmcontrast.shard_cache import Cache
    from tests.web import Site

# Nothing above loads torch. In this process and in all that tests start: the work is tiny, and sums in one order are
# equal bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

SIZES = (1, 2, 4)


class GlooPool:
    """`pool(size, function, *args)` runs `function(group, *args)` on `size` ranks and returns their results."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")  # fork after torch's threads have started hangs
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(max(SIZES)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes[:size]:
            pipe.send((size, function, args))
        answers = [pipe.recv() for pipe in self._pipes[:size]]
        for rank, (ok, value) in enumerate(answers):
            assert ok, f"rank {rank} of {size}:\n{value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    from datetime import timedelta

    import torch.distributed as dist

    world = max(SIZES)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    while (job := pipe.recv()) is not None:
        size, function, args = job
        try:
            pipe.send((True, function(groups[size], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GlooPool]:
    pool = GlooPool(tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.close()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server of shards on this machine, that misbehaves as it is told."""
    from tests.web import serving

    with serving(monkeypatch) as found:
        yield found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty cache of remote shards, which is the environment's too."""
    from tests.web import empty_cache

    return empty_cache(tmp_path, monkeypatch)
