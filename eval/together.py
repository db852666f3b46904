"""Ranks that answer together: every rank asks the same questions, and of the long work each does a part.

    with sharing(World()):
        task.answer(model)      # on every rank; all of them know the answer

What is shared are pieces whose content depends on no rank: batches of samples and prompts, blocks of queries. So what
comes out is, bit for bit, what one process computes. What is quick is done on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, RunError
from mmcontrast.sharding import World

T = TypeVar("T")
R = TypeVar("R")

_world: ContextVar[World | None] = ContextVar("world", default=None)


class Elsewhere(ConfigError):
    """Another rank cannot go on; it or rank 0 says why."""


def world() -> World:
    """The ranks that share the work; this process alone outside of `sharing`."""
    return _world.get() or World.alone()


@contextmanager
def sharing(ranks: World) -> Generator[None]:
    """Everything within is called on all of these ranks, with equal arguments."""
    token = _world.set(ranks)
    try:
        yield
    finally:
        _world.reset(token)


def agree(problem: Exception | None) -> None:
    """Raise what any rank has run into on all of them: one that went on alone would wait for the others in vain.

    Raises:
        Exception: this rank's own problem.
        Elsewhere: another's, on ranks other than 0.
        ConfigError: another's, on rank 0.
        RunError: another's, on rank 0, where it is no ConfigError.
    """
    ranks = world()
    said = None if problem is None else (isinstance(problem, ConfigError), f"{problem}", type(problem).__name__)
    everywhere = ranks.gather_objects(said)
    first = next((number for number, of_rank in enumerate(everywhere) if of_rank is not None), None)
    if first is None:
        return
    if ranks.size == 1 or (problem is not None and ranks.rank == 0):
        assert problem is not None
        raise problem
    ours, text, name = everywhere[first]
    if ranks.rank:
        raise Elsewhere(text) from problem
    raise ConfigError(f"on rank {first}: {text}") if ours else RunError(f"on rank {first}: {name}: {text}")


def in_parts(work: Callable[[T], Tensor], pieces: Sequence[T]) -> list[Tensor]:
    """[n_i, D] float32 of every piece, each worked out on one rank and known on all.

    Raises:
        Exception: as `agree`.
    """
    ranks = world()
    found = _own(work, pieces)
    shapes: dict[int, Sequence[int]] = {}
    for of_rank in ranks.gather_objects({number: tuple(t.shape) for number, t in found.items()}):
        shapes |= of_rank
    everywhere: list[Tensor] = []
    for number in range(len(pieces)):
        part = found.get(number)
        everywhere.append(torch.empty(*shapes[number]) if part is None else part.contiguous())
        ranks.broadcast(everywhere[-1], number % ranks.size)
    return everywhere


def values_in_parts(work: Callable[[T], R], pieces: Sequence[T]) -> list[R]:
    """The same of small plain values, such as texts.

    Raises:
        Exception: as `agree`.
    """
    found: dict[int, R] = {}
    for of_rank in world().gather_objects(_own(work, pieces)):
        found |= of_rank
    return [found[number] for number in range(len(pieces))]


def _own(work: Callable[[T], R], pieces: Sequence[T]) -> dict[int, R]:
    """Number of a piece -> what this rank makes of it; the same problem on all ranks."""
    ranks = world()
    found: dict[int, R] = {}
    problem: Exception | None = None
    try:
        found = {number: work(pieces[number]) for number in range(ranks.rank, len(pieces), ranks.size)}
    except Exception as error:
        problem = error
    agree(problem)
    return found
