"""One member of a shard -> what is measured of it: numbers, words, flags, and marks by which copies are found.

Numbers are rounded to three digits, so that counting them takes bounded memory however many samples there are.

Letters: H, W height and width of a picture, C channels of a signal.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmcontrast import decode
from mmcontrast.shards import BadSample

SILENT = 1e-4
"""A recording whose loudest sample is below this (-80 dB of full scale) is silent."""
CLIPPED = (0.999, 0.001)
"""A recording is clipped if more than the second share of its samples reach the first part of full scale."""
_PLAIN = 2.0  # grey levels between the darkest and the lightest of 32 x 32 parts
_CHUNK = 1 << 20  # samples of a recording that are in memory at once
_MAX_SIDE = 1024  # larger pictures are thinned before they are brought to 32 x 32


@dataclass
class Measured:
    """What one member says of itself.

    Attributes:
        values: name -> number.
        words: name -> one of few words, such as a format.
        flags: what is remarkable.
        marks: name -> 64 bits that are equal for equal content, never 0.
    """

    values: dict[str, float] = field(default_factory=dict[str, float])
    words: dict[str, str] = field(default_factory=dict[str, str])
    flags: list[str] = field(default_factory=list[str])
    marks: dict[str, int] = field(default_factory=dict[str, int])


def mark(data: bytes) -> int:
    """64 bits of a content, never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") or 1


def image(data: bytes) -> Measured:
    """Sizes as shown, the file's format and mode, content and look.

    Raises:
        BadSample: as `decode.image`.
    """
    from PIL import Image

    pixels = decode.image(data)  # [3, H, W]
    with Image.open(io.BytesIO(data)) as opened:  # the format is one of those that were just decoded
        words = {"format": str(opened.format), "mode": opened.mode}
    height, width = pixels.shape[1:]
    found = Measured(
        {
            "width": width,
            "height": height,
            "shorter side": min(width, height),
            "megapixels": rounded(width * height / 1e6),
            "width / height": rounded(width / height),
            "bytes": rounded(len(data)),
        },
        words,
        marks={"content": mark(data)},
    )
    look = perceptual_hash(pixels)
    if look:
        found.marks["look"] = look
    else:
        found.flags.append("one colour")
    return found


def perceptual_hash(pixels: Tensor) -> int:
    """uint8 [3, H, W] -> the signs of 63 low frequencies about their median (pHash); 0 for a picture of one colour.

    The picture is brought to 32 x 32 grey parts; of its cosine transform the 8 x 8 lowest frequencies count, without
    the mean. Copies that were scaled, recoloured a little or compressed again differ in few bits.
    """
    thin = max(1, max(pixels.shape[1:]) // _MAX_SIDE)
    small = nn.functional.interpolate(
        pixels[None, :, ::thin, ::thin].float(), size=(32, 32), mode="bilinear", antialias=True
    )[0]
    grey = 0.299 * small[0] + 0.587 * small[1] + 0.114 * small[2]
    if float(grey.max() - grey.min()) < _PLAIN:
        return 0
    low = (_COSINES @ grey.double() @ _COSINES.T).flatten()[1:]
    return int.from_bytes(np.packbits(np.append((low > low.median()).numpy(), False)).tobytes(), "big")


_COSINES = torch.cos(torch.arange(8).double()[:, None] * (torch.arange(32).double() + 0.5) * math.pi / 32)  # [8, 32]


def audio(data: bytes) -> Measured:
    """Length, rate, channels, format, mean power (dBFS); whether it is silent or clipped. Every sample is decoded.

    Raises:
        BadSample: as `decode.audio` and `Sound.read`.
    """
    sound = decode.audio(data)
    import soundfile

    info = soundfile.info(io.BytesIO(data))
    peak = square = 0.0
    full = 0
    for start in range(0, sound.frames, _CHUNK):
        part = sound.read(start, min(_CHUNK, sound.frames - start))
        size = part.abs()
        peak = max(peak, float(size.max()))
        square += float(part.double().square().sum())
        full += int((size >= CLIPPED[0]).sum())
    found = Measured(
        {"seconds": rounded(sound.frames / sound.rate), "bytes": rounded(len(data))},
        {"rate": str(sound.rate), "channels": str(info.channels), "format": f"{info.format} {info.subtype}"},
        marks={"content": mark(data)},
    )
    if peak < SILENT:
        found.flags.append("silent")
    else:
        found.values["loudness"] = round(10 * math.log10(square / sound.frames))
    if full > CLIPPED[1] * sound.frames:
        found.flags.append("clipped")
    return found


def text(data: bytes) -> Measured:
    """Length in characters; content without regard to case and space.

    Raises:
        BadSample: as `decode.text`.
    """
    value = decode.text(data)
    flags = ["several lines"] if "\n" in value else []
    return Measured({"characters": len(value)}, {}, flags, {"content": mark(normal(value).encode())})


def normal(value: str) -> str:
    """A text by which it is compared: one case, single spaces."""
    return " ".join(value.casefold().split())


def timeseries(data: bytes) -> Measured:
    """Channels, length, layout and type of an array; whether a channel never changes.

    Raises:
        BadSample: as `series`.
    """
    values = series(data)
    long, channels = (0, values.shape[1]) if values.shape[0] > values.shape[1] else (1, values.shape[0])
    layout = "length first" if long == 0 else "channels first"
    found = Measured(
        {"length": values.shape[long], "bytes": rounded(len(data))},
        {"channels": str(channels), "layout": layout, "type": str(values.dtype)},
        marks={"content": mark(data)},
    )
    if bool((values.max(long) == values.min(long)).any()):
        found.flags.append("a channel without change")
    return found


def series(data: bytes) -> NDArray[Any]:
    """A NumPy file of numbers -> [C, T] or [T, C]; one axis becomes a single channel.

    Raises:
        BadSample: not such a file, other than one or two axes, empty, or values that are not finite.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
        # Looked at before anything is made: a header may claim a petabyte, or objects that would be unpickled.
        if kind.hasobject or kind.kind not in "iuf":
            raise BadSample("npy does not hold real numbers")
        if math.prod(shape) * kind.itemsize > len(data) - file.tell():
            raise BadSample("npy is cut off")
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise BadSample(f"npy cannot be decoded ({type(error).__name__})") from None
    if values.ndim not in (1, 2) or not values.size:
        raise BadSample(f"npy has {values.ndim} axes" if values.size else "npy is empty")
    if not bool(np.isfinite(values).all()):
        raise BadSample("npy has values that are not finite")
    return values[None] if values.ndim == 1 else values


def rounded(value: float) -> float:
    """Three digits of a number."""
    return float(f"{value:.3g}")


MEASURES: Mapping[str, Callable[[bytes], Measured]] = {
    "image": image,
    "text": text,
    "audio": audio,
    "timeseries": timeseries,
}
"""kind of modality -> what is measured of a member."""
UNITS: Mapping[str, str] = {
    "width": "pixels",
    "height": "pixels",
    "shorter side": "pixels",
    "seconds": "s",
    "loudness": "dBFS",
    "length": "samples",
}
"""Of the numbers that need one."""
