"""Bytes of a shard member -> a decoded value, per kind. Formats are allow-listed and sizes bounded."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmcontrast.shards import BadSample

MAX_PIXELS = 64 << 20
_ORIENTATION = 0x0112  # EXIF tag
_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # never "every format Pillow knows": EPS would call Ghostscript


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
        try:
            value = Path(value).read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample(f"{value} cannot be read: {getattr(error, 'strerror', error)}") from None
    if isinstance(value, bytes):
        return image(value)
    array = np.array(value.convert("RGB") if hasattr(value, "convert") else value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise BadSample(f"a picture must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


DECODERS: Mapping[str, Callable[[bytes], Any]] = {"image": image, "text": text}
"""kind of modality -> decoder."""
