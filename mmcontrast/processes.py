"""Work on pieces in several processes, in order: what is long to do to data and independent from piece to piece."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mmcontrast.config import RunError

S = TypeVar("S")
P = TypeVar("P")
R = TypeVar("R")

_HEAVY = ("open_clip", "transformers", "soundfile", "PIL.Image")  # what tokenizers and decoders import
_AHEAD = 4  # pieces per process that are under way, so that memory is bounded


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[S, P], R], shared: S, pieces: Iterable[P], *, workers: int) -> Iterator[R]:
    """`function(shared, piece)` of every piece, in the pieces' order; 0 workers do it in this process.

    Args:
        function: of a module, so that other processes find it.
        shared: sent to each process once.
        pieces: taken as they are worked on, a few ahead.
        workers: processes.

    Raises:
        RunError: a process was killed. What `function` raises is raised here, too.
    """
    if not workers:
        yield from (function(shared, piece) for piece in pieces)
        return
    pool = ProcessPoolExecutor(workers, _context(function), initializer=_start, initargs=(function, shared))
    waiting: deque[Future[R]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("a worker process was killed, mostly because no memory was left: lower --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _context(function: Callable[..., Any]) -> Any:
    """Processes that are forked off a server which has imported what they need, and computed nothing.

    A fork of this process would copy the locks of torch's threads as they are, and could wait for them for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *(name for name in _HEAVY if name in sys.modules)])
    return context


_function: Callable[[Any, Any], Any]
_shared: Any


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    """First thing in a process of the pool."""
    global _function, _shared
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _function, _shared = function, shared


def _work(piece: Any) -> Any:
    return _function(_shared, piece)
