"""Work that several threads share, its outcomes in the order of the work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_AHEAD = 8  # pieces per thread that wait: enough to keep it busy, and few enough that their bytes do not pile up


def processors() -> int:
    """Processors that this process may use, its part of them where a launcher started several on this machine."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, here // ranks_here())


def ranks_here() -> int:
    """Ranks that a launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def in_threads(work: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """What each piece of work returns, in order.

    The iterable itself is walked here, one piece after the other: what must not run side by side, such as draws from
    torch's random numbers, belongs there. One thread is this one.
    """
    if threads == 1:
        for piece in work:
            yield piece()
        return
    ours = torch.get_num_threads()
    # Each thread does its own piece alone: torch's helpers of several threads would fight for the same processors.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[T]] = deque()
        for piece in work:
            waiting.append(pool.submit(piece))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    torch.set_num_threads(ours)  # or else threads that are started later would believe in 1, too
