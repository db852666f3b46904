"""Bytes of a shard member -> a decoded value, per kind. Formats are allow-listed and sizes bounded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.shards import BadSample

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

T = TypeVar("T")
Pixels = NDArray[np.uint8]
"""[H, W, 3]."""
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""

MAX_PIXELS = 64 << 20
MAX_AUDIO_SECONDS = 3600
_ORIENTATION = 0x0112  # EXIF tag
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # never "every format Pillow knows": EPS would call Ghostscript
_AUDIO_RATES = range(1_000, 192_001)  # samples per second
_AUDIO_CHANNELS = 8
_AUDIO_VALUES = MAX_AUDIO_SECONDS * 48_000 * 2  # what is read takes 4 bytes for each


@dataclass(frozen=True)
class Picture:
    """A picture whose pixels are decoded when they are read; its size is known before.

    Attributes:
        height: H in pixels, upright.
        width: W.
    """

    height: int
    width: int
    _decode: Callable[[bool], Pixels]  # whether half the resolution would do, which only some files offer

    def read(self) -> Tensor:
        """The whole picture, uint8 [3, H, W].

        Raises:
            BadSample: the file is damaged.
        """
        return torch.from_numpy(self._decode(False)).permute(2, 0, 1).contiguous()

    def decoded(self) -> Picture:
        """The same with its pixels in memory, for one that is read many times.

        Raises:
            BadSample: the file is damaged.
        """
        return _from_pixels(self._decode(False))

    def crop(self, box: Box, size: tuple[int, int], *, half_scale: bool = False) -> Tensor:
        """A part of the picture, brought to `size` (height, width): uint8 [3, *size], channels last in memory.

        Antialiased bicubic on integers: within one level of the same in floating point, and several times faster than
        Pillow's.

        Args:
            box: the part; it must lie within the picture.
            size: of the result.
            half_scale: decode a JPEG at half its resolution where the part is at least twice `size`. The box then
                moves to even pixels, by one at most. About 42 dB from what is exact for that box.

        Raises:
            BadSample: the file is damaged.
        """
        top, left, height, width = box
        # Even edges: half a pixel of shift would cost more than the halving.
        even = (top // 2, left // 2, (top + height) // 2 - top // 2, (left + width) // 2 - left // 2)
        pixels = self._decode(half_scale and even[2] >= size[0] and even[3] >= size[1])
        if len(pixels) < self.height:
            top, left, height, width = even
        # A copy: torch's would be slower. The strides must tell that channels come last, which they do not in a batch
        # of one, and the result would be rearranged at the price of the resize itself.
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        batch = torch.from_numpy(part).as_strided((1, 3, height, width), (part.size, 1, 3 * width, 3))
        return torch.nn.functional.interpolate(batch, size, mode="bicubic", antialias=True)[0]


def picture(data: bytes) -> Picture:
    """JPEG, PNG or WebP -> Picture: RGB, upright, on white where it is transparent. Its header is read here.

    Raises:
        BadSample: not such a picture, or above `MAX_PIXELS`; that its pixels are damaged is found when they are read.
    """
    found = _plain_jpeg(data) or _with_pillow(data, _header)
    if found.height * found.width > MAX_PIXELS:
        raise BadSample(f"image above {MAX_PIXELS >> 20} megapixels")
    decode = _jpeg_pixels if found.plain_jpeg else _any_pixels
    return Picture(found.height, found.width, partial(decode, data))


def image(data: bytes) -> Tensor:
    """The whole of a picture, uint8 [3, H, W].

    Raises:
        BadSample: not a picture, damaged or cut off, or above `MAX_PIXELS`, which is checked before decoding.
    """
    return picture(data).read()


class _Header(NamedTuple):
    """Size, upright, and whether it is a JPEG whose pixels need neither turning nor another colour space."""

    height: int
    width: int
    plain_jpeg: bool


def _plain_jpeg(data: bytes) -> _Header | None:
    """The header of most JPEGs, in a tenth of the time that Pillow takes; None leaves it to Pillow."""
    if not data.startswith(b"\xff\xd8\xff") or _has_application_data(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return _Header(int(height), int(width), True) if colours in ("YCbCr", "RGB", "Gray") else None


def _has_application_data(data: bytes) -> bool:
    """Whether a JPEG may hold EXIF or XMP, which say how a picture lies."""
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == b"\xda":  # the pixels
            return False
        if marker == b"\xe1":
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return True  # not as most files are


def _jpeg_pixels(data: bytes, half: bool) -> Pixels:
    try:
        if not half:
            return simplejpeg.decode_jpeg(data, "RGB")
        height, width = (-(-int(side) // 2) for side in simplejpeg.decode_jpeg_header(data)[:2])
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=2)
    except ValueError:
        # Not flawless: Pillow decides whether it can be used, and gives the same pixels.
        return _any_pixels(data, half)


def _any_pixels(data: bytes, half: bool) -> Pixels:
    """By Pillow, in full."""
    return _with_pillow(data, _upright_rgb)


def _with_pillow(data: bytes, read: Callable[[ImageFile], T]) -> T:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSample(f"image above {MAX_PIXELS >> 20} megapixels")
            return read(opened)
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files; none may stop a run
        raise BadSample(f"image cannot be decoded ({type(error).__name__})") from None


def _header(opened: ImageFile) -> _Header:
    orientation = opened.getexif().get(_ORIENTATION, 1)
    plain = orientation == 1 and opened.format in ("JPEG", "MPO") and opened.mode in ("RGB", "L")
    lying = orientation in (5, 6, 7, 8)
    return _Header(*((opened.width, opened.height) if lying else (opened.height, opened.width)), plain)


def _upright_rgb(opened: ImageFile) -> Pixels:
    from PIL import Image, ImageOps

    # A telephone stores pictures as its sensor lay.
    turned = opened.getexif().get(_ORIENTATION, 1) != 1
    upright = ImageOps.exif_transpose(opened) if turned else opened
    if upright.mode.startswith("I"):
        # Pillow would clip 16 bits to 8: all above 255 would become white.
        deep = np.asarray(upright, dtype=np.int64).clip(0, 65535)
        rgb = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        flat = Image.new("RGBA", layer.size, "white")
        flat.alpha_composite(layer)
        rgb = flat.convert("RGB")
    else:
        rgb = upright.convert("RGB")
    return np.array(rgb)


@dataclass(frozen=True)
class Sound:
    """A recording whose parts are decoded when they are read, so that an hour costs what its crop costs.

    Attributes:
        rate: samples per second.
        frames: length in samples of one channel.
    """

    rate: int
    frames: int
    _part: Callable[[int, int], Tensor]
    _integers: bool = False  # in the file, so that none can be infinite

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """Mono float32 [frames] from `start`; to the end by default.

        Raises:
            BadSample: the file ends before, cannot be decoded, or holds values that are not finite.
        """
        wanted = self.frames - start if frames is None else frames
        found = self._part(start, wanted)  # [frames, channels]
        if len(found) < wanted:
            raise BadSample("audio is cut off")
        first, *others = found.unbind(1)  # torch's mean over so few would take longer than decoding them
        mono = sum(others, first) / found.shape[1] if others else first
        if not self._integers and not bool(mono.sum().isfinite()):  # one pass, and no mask
            raise BadSample("audio has values that are not finite")
        return mono

    def part(self, start: int, frames: int) -> Sound:
        """The `frames` from `start` as a recording of its own."""

        def part(first: int, wanted: int) -> Tensor:
            return self._part(start + first, wanted)

        return replace(self, frames=frames, _part=part)


def audio(data: bytes) -> Sound:
    """WAV, FLAC, Ogg or MP3 -> Sound; its header is read here, its samples when they are asked for.

    Raises:
        BadSample: not such a recording, empty, longer than `MAX_AUDIO_SECONDS`, or of an absurd rate or number of
            channels, which bound what a second of it can cost.
        ConfigError: the extra [audio] is not installed.
    """
    try:
        import soundfile
    except ImportError:
        raise ConfigError("sounds are read by soundfile: pip install 'mmcontrast[audio]'") from None
    # By content and before libsndfile opens it: some of the thirty formats that it knows have no header at all.
    wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    mp3 = data[:3] == b"ID3" or (data[:1] == b"\xff" and data[1:2] >= b"\xe0")
    if not (wav or mp3 or data[:4] in (b"fLaC", b"OggS")):
        raise BadSample("audio is not WAV, FLAC, Ogg or MP3")

    def part(start: int, frames: int) -> Tensor:
        try:
            with ready.pop() if ready else soundfile.SoundFile(io.BytesIO(data)) as opened:
                if start:  # not for nothing: compressed formats search
                    opened.seek(start)
                return torch.from_numpy(opened.read(frames, dtype="float32", always_2d=True))
        except (soundfile.SoundFileError, ValueError) as error:
            raise BadSample(f"audio cannot be decoded ({type(error).__name__})") from None

    try:
        opened = soundfile.SoundFile(io.BytesIO(data))
        rate, frames, channels = opened.samplerate, opened.frames, opened.channels
    except (soundfile.SoundFileError, ValueError) as error:
        raise BadSample(f"audio cannot be decoded ({type(error).__name__})") from None
    if rate not in _AUDIO_RATES or not 1 <= channels <= _AUDIO_CHANNELS:
        raise BadSample("audio has an absurd rate or number of channels")
    if frames > MAX_AUDIO_SECONDS * rate or frames * channels > _AUDIO_VALUES:  # unknown is said to be 2^63 - 1
        raise BadSample(f"audio above {MAX_AUDIO_SECONDS} seconds, or of unknown length")
    if frames < 1:
        raise BadSample("audio is empty")
    ready = [opened]  # for the first reading; Ogg finds its length by a search that would be done twice
    return Sound(rate, frames, part, opened.subtype in ("PCM_16", "PCM_24", "PCM_32", "PCM_S8", "PCM_U8"))


def text(data: bytes) -> str:
    """UTF-8, with or without byte order mark -> str without surrounding space.

    Raises:
        BadSample: not UTF-8, or empty.
    """
    try:
        value = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadSample("text is not UTF-8") from None
    if not value:
        raise BadSample("text is empty")
    return value


def metadata(data: bytes) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        BadSample: something else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSample("json cannot be decoded") from None
    if not isinstance(value, dict):
        raise BadSample("json is not an object")
    return cast(Mapping[str, Any], value)


def picture_from(value: Any) -> Picture:
    """A file's path, a file's bytes, a PIL image, a uint8 array [H, W, 3] or tensor [3, H, W]; a Picture passes.

    Raises:
        BadSample: not a picture.
    """
    if isinstance(value, Picture):
        return value
    if isinstance(value, (str, Path)):
        value = _file(value)
    if isinstance(value, bytes):
        return picture(value)
    if isinstance(value, Tensor):
        array = value.movedim(0, -1).numpy() if value.ndim == 3 else value.numpy()
    else:
        array = np.array(value.convert("RGB") if hasattr(value, "convert") else value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadSample(f"a picture must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return _from_pixels(array)


def _from_pixels(pixels: Pixels) -> Picture:
    def same(_half: bool) -> Pixels:
        return pixels

    return Picture(len(pixels), pixels.shape[1], same)


def audio_from(value: Any) -> Sound:
    """A file's path, a file's bytes, or (samples [T] or [T, channels], rate) -> Sound; a Sound passes.

    Raises:
        BadSample: not a recording.
    """
    if isinstance(value, Sound):
        return value
    if isinstance(value, (str, Path)):
        value = _file(value)
    if isinstance(value, bytes):
        return audio(value)
    if not isinstance(value, tuple) or len(cast(tuple[Any, ...], value)) != 2:
        raise BadSample(f"a sound must be a file, its bytes, or (samples, rate); got {type(value).__name__}")
    given, rate = cast(tuple[Any, Any], value)
    samples = torch.as_tensor(given)
    if samples.ndim not in (1, 2) or not samples.is_floating_point() or not samples.numel():
        raise BadSample(f"samples must be floats [T] or [T, channels], got {samples.dtype} {list(samples.shape)}")
    columns = samples.float().reshape(len(samples), -1)
    return Sound(int(rate), len(columns), lambda start, frames: columns[start : start + frames])


def _file(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


DECODERS: Mapping[str, Callable[[bytes], Any]] = {"image": picture, "text": text, "audio": audio}
"""kind of modality -> decoder."""
