"""Recordings of several channels over time (ECG, accelerometers, any sensors): a NumPy file and what its metadata say.

A member is a `.npy` of shape [T, channels], or [T] for one channel, in float32, float64, float16 or int16. The sample's
metadata tell the rest: `rate` in samples per second, `channels` (their names), and optionally `scale`, by which stored
numbers become physical ones, and `units`. Where a sample has several such modalities, a metadata field with the
modality's name holds an object with these for it alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from mmcontrast.shards import BadSample

_RATES = (0.01, 1_000_000.0)  # samples per second
_CHANNELS = 1024
_DTYPES = ("<f4", "<f8", "<f2", "<i2")


@dataclass(frozen=True)
class Signal:
    """A recording whose parts become floats when they are read, so that a day costs what its window costs.

    Attributes:
        rate: samples per second.
        frames: T, length in samples.
        channels: their names, in the order of the columns.
    """

    rate: float
    frames: int
    channels: Sequence[str]
    _values: NDArray[Any]  # [T, channels], as stored
    _scale: float = 1.0

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """Float32 [channels, frames] from `start`, in physical units; to the end by default.

        Raises:
            BadSample: a value is not finite.
        """
        stop = self.frames if frames is None else start + frames
        part = torch.from_numpy(self._values[start:stop].T.astype(np.float32, order="C"))
        if self._scale != 1.0:
            part *= self._scale
        if not bool(part.sum().isfinite()):
            raise BadSample("signal has values that are not finite")
        return part

    def part(self, start: int, frames: int) -> Signal:
        """The `frames` from `start` as a recording of its own."""
        return replace(self, frames=frames, _values=self._values[start : start + frames])


def signal(data: bytes, meta: Callable[[], Mapping[str, Any]]) -> Signal:
    """A `.npy` file and its sample's metadata -> Signal. Nothing is unpickled; values stay as they are stored.

    Raises:
        BadSample: no such file, of another type or shape, empty, or without a usable `rate` or `channels`.
    """
    values = _array(data)
    facts = meta()
    rate, scale = facts.get("rate"), facts.get("scale", 1.0)
    if not _is_number(rate) or not _RATES[0] <= rate <= _RATES[1]:
        raise BadSample("signal has no rate in its metadata" if rate is None else "signal has an absurd rate")
    if not _is_number(scale) or scale == 0:
        raise BadSample("signal has a scale that is no number")
    names = facts.get("channels")
    if names is None:
        names = [str(number) for number in range(values.shape[1])]
    if not isinstance(names, list) or [str(n) for n in cast(list[Any], names)] != names:
        raise BadSample("signal has channels that are no list of names")
    if len(names) != values.shape[1] or len(set(names)) != len(names):
        raise BadSample("signal has other channels than its metadata say")
    return Signal(float(rate), len(values), tuple(cast(list[str], names)), values, float(scale))


def signal_from(value: Any) -> Signal:
    """(values [T] or [T, channels], rate) or (values, rate, names of channels) -> Signal; a Signal passes.

    Raises:
        BadSample: something else.
    """
    if isinstance(value, Signal):
        return value
    parts: list[Any] = [*cast(tuple[Any, ...], value)] if isinstance(value, tuple) else []
    if len(parts) not in (2, 3) or not _is_number(parts[1]):
        raise BadSample(f"a signal must be (values, rate) or (values, rate, channels); got {type(value).__name__}")
    array = np.ascontiguousarray(parts[0])
    if array.dtype.kind not in "fi":
        raise BadSample(f"a signal's values must be numbers, got {array.dtype}")
    file = io.BytesIO()
    np.save(file, array.astype("<f4"), allow_pickle=False)
    facts: dict[str, Any] = {"rate": parts[1]}
    if len(parts) == 3:
        facts["channels"] = [str(name) for name in parts[2]]
    return signal(file.getvalue(), lambda: facts)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _array(data: bytes) -> NDArray[Any]:
    """The array of a `.npy` file, [T, channels], without a copy."""
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, by_column, dtype = read(file)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadSample("signal is no .npy file") from None
    if dtype.str not in _DTYPES or dtype.hasobject:
        raise BadSample("signal is not of float32, float64, float16 or int16")
    if len(shape) not in (1, 2) or 0 in shape:
        raise BadSample("signal is empty, or not of time by channels")
    columns = shape[1] if len(shape) == 2 else 1
    if columns > _CHANNELS:
        raise BadSample(f"signal has more than {_CHANNELS} channels")
    if len(data) - file.tell() != shape[0] * columns * dtype.itemsize:
        raise BadSample("signal is cut off")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(columns, shape[0]).T if by_column and len(shape) == 2 else flat.reshape(shape[0], columns)
