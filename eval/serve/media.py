"""What a sample holds, drawn anew for a browser. No stored byte is handed on: what is not a picture cannot pass as one.

Letters: H, W height and width, C channels, T samples.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.decode import Picture, Sound
from mmcontrast.eval.serve.schema import Envelope, Plot
from mmcontrast.page import wav
from mmcontrast.signals import Signal

HEARD_SECONDS = 120  # of a sound at up to 48 kHz; a player gets no more, and a plot shows the same
SEEN_VALUES = 32 << 20  # of a signal, all channels together
TEXT = 10_000  # characters of a caption
_LOSSLESS = 128 << 10  # pixels of a picture
_CHANNELS = 16
_COLUMNS = 600
_FIELDS, _ITEMS, _SAID, _DEPTH = 40, 40, 2_000, 4  # of metadata


def webp(picture: Picture, side: int) -> bytes:
    """A picture with at most `side` pixels on its longer side."""
    from PIL import Image

    drawn = Image.fromarray(picture.read().permute(1, 2, 0).numpy())
    drawn.thumbnail((side, side))
    file = io.BytesIO()
    # Small ones as they are: drawings have flat surfaces, on which losses can be seen.
    drawn.save(file, "WEBP", quality=88, lossless=drawn.width * drawn.height <= _LOSSLESS)
    return file.getvalue()


def wave(sound: Sound) -> bytes:
    """The beginning of a sound, mono, as WAV."""
    return wav(_heard(sound), sound.rate)


def _heard(sound: Sound) -> NDArray[np.float32]:
    return sound.read(0, min(sound.frames, HEARD_SECONDS * min(sound.rate, 48_000))).numpy()


def plot(value: Sound | Signal, units: Any = None) -> Plot:
    """The outline of a sound or of a signal's first channels."""
    if isinstance(value, Sound):
        samples = _heard(value)
        line = _envelope("sound", samples)
        return Plot(seconds=len(samples) / value.rate, rate=value.rate, units=None, channels=[line])
    frames = min(value.frames, max(1, SEEN_VALUES // len(value.channels)))
    values = value.read(0, frames).numpy()[:_CHANNELS]
    lines = [_envelope(text(name), line) for name, line in zip(value.channels, values, strict=False)]
    said = text(units)[:40] if isinstance(units, str) else None
    omitted = len(value.channels) - len(lines)
    return Plot(seconds=frames / value.rate, rate=value.rate, units=said, channels=lines, omitted=omitted)


def _envelope(name: str, values: NDArray[np.float32]) -> Envelope:
    """[T] -> at most `_COLUMNS` columns, so that no peak is lost however long the recording."""
    edges = np.linspace(0, len(values), min(_COLUMNS, len(values)) + 1).astype(np.int64)[:-1]
    low, high = (f.reduceat(values, edges).astype(np.float64) for f in (np.minimum, np.maximum))
    return Envelope(name=name, low=_rounded(low), high=_rounded(high))


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.5g}") for v in values.tolist()]


def text(value: str) -> str:
    """What UTF-8 can hold: names in a tar and strings in JSON may have halves of characters."""
    return value.encode("utf-8", "replace").decode("utf-8")


def metadata(found: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as any JSON reader takes them, bounded in every direction; what is cut ends in an ellipsis."""
    return cast(dict[str, Any], _shown(found, _DEPTH))


def _shown(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return text(value if len(value) <= _SAID else value[:_SAID] + "…")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 2**53 else f"{value:.6e}" if abs(value) < 1e300 else "…"
    if value is None or isinstance(value, bool):
        return value
    if not depth:
        return "…"
    if isinstance(value, Mapping):
        items = list(cast(Mapping[str, Any], value).items())
        cut = {"…": f"{len(items) - _FIELDS} more"} if len(items) > _FIELDS else {}
        return {text(k[:100]): _shown(v, depth - 1) for k, v in items[:_FIELDS]} | cut
    if isinstance(value, list):
        many = cast(list[Any], value)
        return [_shown(v, depth - 1) for v in many[:_ITEMS]] + (["…"] if len(many) > _ITEMS else [])
    return text(json.dumps(value, default=str)[:_SAID])
