"""Watches every module of a model while it runs, to name the first one whose output cannot be explained.

A module explains its output if equal inputs gave equal outputs. The innermost that does not is the cause: modules
after it have other inputs, modules around it finish later.

Letters: B rows of a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SAME = 1e-9  # of float64 values, relative to the largest one: rounding is far below, every cause far above


@dataclass(frozen=True)
class Call:
    """One call of one module: what went in and what came out, or a row of it."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Trace:
    """Records the calls of all modules of a model, in the order in which they finish.

    With `rows`, only what belongs to `row` among that many rows is kept: by the first axis that has as many entries,
    or by equal parts of the first one (windows of a picture). Tensors of other shapes are left out.

    Attributes:
        calls: (module name, how many calls of it came before) -> call.
        open: modules that have started and not finished; after an exception, the last is where it came from.
    """

    def __init__(self, model: nn.Module, *, rows: int | None = None, row: int = 0) -> None:
        self.model, self.rows, self.row = model, rows, row
        self.calls: dict[tuple[str, int], Call] = {}
        self.open: list[tuple[str, list[Tensor]]] = []
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._start(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._finish, with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def innermost(self) -> str:
        """Name of the module that runs now, or in which an exception rose."""
        return self.open[-1][0] if self.open else ""

    def _start(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.open.append((name, self._kept((args, kwargs))))  # before: a module may work in place

        return hook

    def _finish(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name, inputs = self.open.pop()
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        self.calls[name, count] = Call(name, inputs, self._kept(output))

    def _kept(self, value: Any) -> list[Tensor]:
        found = [self._of_row(t.detach()) for t in tensors_in(value)]
        return [t.clone() for t in found if t is not None]

    def _of_row(self, t: Tensor) -> Tensor | None:
        if self.rows is None:
            return t
        if t.ndim and t.shape[0] == self.rows:
            return t[self.row]
        if t.ndim > 1 and t.shape[1] == self.rows:
            return t[:, self.row]
        if t.numel() and t.ndim and t.shape[0] % self.rows == 0:
            return t.reshape(self.rows, -1, *t.shape[1:])[self.row]
        return None


class Lowered(TorchDispatchMode):
    """Notes the modules of a trace that turn float64 into a narrower type, as some norms do."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        wide = any(t.dtype == torch.float64 for t in tensors_in((args, kwargs)))
        if wide and any(t.is_floating_point() and t.dtype != torch.float64 for t in tensors_in(found)):
            self.names.append(self.trace.innermost)
        return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in cast(list[Any], value):
            yield from tensors_in(item)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference relative to the largest entry; infinite where shapes differ or something is not a number."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return torch.inf
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if torch.equal(x, y):
            continue
        x, y = x.to(torch.float64), y.to(torch.float64)
        # Not below 1e-3: where all entries are rounding noise around zero, they differ by as much as they are.
        found = float((x - y).abs().max() / torch.maximum(x.abs().max(), y.abs().max()).clamp(min=1e-3))
        worst = max(worst, found if found == found else torch.inf)
    return worst


def first_unexplained(a: Trace, b: Trace) -> tuple[str, float] | None:
    """The first module that made different outputs of equal inputs, and how different; None if all agree."""
    for key, call in a.calls.items():
        other = b.calls.get(key)
        if other is not None and difference(call.inputs, other.inputs) <= SAME:
            found = difference(call.outputs, other.outputs)
            if found > SAME:
                return call.name, found
    return None


def first_not_finite(trace: Trace) -> str | None:
    """The first module that made NaN or infinity of finite inputs."""
    for call in trace.calls.values():
        if _finite(call.inputs) and not _finite(call.outputs):
            return call.name
    return None


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
