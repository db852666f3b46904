"""Bytes of a shard member -> a decoded value, per kind. Formats are allow-listed and sizes bounded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.shards import BadSample

MAX_PIXELS = 64 << 20
MAX_AUDIO_SECONDS = 3600
_ORIENTATION = 0x0112  # EXIF tag
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # never "every format Pillow knows": EPS would call Ghostscript
_AUDIO_RATES = range(1_000, 192_001)  # samples per second
_AUDIO_CHANNELS = 8


def image(data: bytes) -> Tensor:
    """JPEG, PNG or WebP -> uint8 [3, H, W] RGB, upright; transparent parts become white.

    Raises:
        BadSample: not such a picture, cut off, or above `MAX_PIXELS`, which is checked before decoding.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BadSample(f"image above {MAX_PIXELS >> 20} megapixels")
            # A telephone stores pictures as its sensor lay.
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = ImageOps.exif_transpose(opened) if turned else opened
            if picture.mode.startswith("I"):
                # Pillow would clip 16 bits to 8: all above 255 would become white.
                deep = np.asarray(picture, dtype=np.int64).clip(0, 65535)
                rgb = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
            elif picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                flat = Image.new("RGBA", layer.size, "white")
                flat.alpha_composite(layer)
                rgb = flat.convert("RGB")
            else:
                rgb = picture.convert("RGB")
    except BadSample:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files; none may stop a run
        raise BadSample(f"image cannot be decoded ({type(error).__name__})") from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


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

    def read(self, start: int = 0, frames: int | None = None) -> Tensor:
        """Mono float32 [frames] from `start`; to the end by default.

        Raises:
            BadSample: the file ends before, cannot be decoded, or holds values that are not finite.
        """
        wanted = self.frames - start if frames is None else frames
        found = self._part(start, wanted)  # [frames, channels]
        if len(found) < wanted:
            raise BadSample("audio is cut off")
        mono = found.mean(1)
        if not bool(torch.isfinite(mono).all()):
            raise BadSample("audio has values that are not finite")
        return mono


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
            with soundfile.SoundFile(io.BytesIO(data)) as opened:
                opened.seek(start)
                return torch.from_numpy(opened.read(frames, dtype="float32", always_2d=True))
        except (soundfile.SoundFileError, ValueError) as error:
            raise BadSample(f"audio cannot be decoded ({type(error).__name__})") from None

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            rate, frames, channels = opened.samplerate, opened.frames, opened.channels
    except (soundfile.SoundFileError, ValueError) as error:
        raise BadSample(f"audio cannot be decoded ({type(error).__name__})") from None
    if rate not in _AUDIO_RATES or not 1 <= channels <= _AUDIO_CHANNELS:
        raise BadSample("audio has an absurd rate or number of channels")
    if frames > MAX_AUDIO_SECONDS * rate:  # a header that does not know says 2^63 - 1
        raise BadSample(f"audio above {MAX_AUDIO_SECONDS} seconds, or of unknown length")
    if frames < 1:
        raise BadSample("audio is empty")
    return Sound(rate, frames, part)


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


def image_from(value: Any) -> Tensor:
    """A file's path, a file's bytes, a PIL image or a uint8 array [H, W, 3] -> uint8 [3, H, W]; tensors pass.

    Raises:
        BadSample: not a picture.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (str, Path)):
        value = _file(value)
    if isinstance(value, bytes):
        return image(value)
    array = np.array(value.convert("RGB") if hasattr(value, "convert") else value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadSample(f"a picture must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


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


DECODERS: Mapping[str, Callable[[bytes], Any]] = {"image": image, "text": text, "audio": audio}
"""kind of modality -> decoder."""
