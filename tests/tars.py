"""Tars to break: their contents name their key and extension over and over, so that every piece tells whose it is."""

from __future__ import annotations

import io
import re
import struct
import tarfile
import tempfile
import wave
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.shards import BadSample, ShardSet, open_shards
from mmcontrast.tar import ShardIndex, scan, split_name

BLOCK = 512


def content(key: str, extension: str, size: int) -> bytes:
    return (f"<{key}/{extension}>".encode() * size)[:size]


def owners(data: bytes) -> Counter[tuple[str, str]]:
    """Whose content it is, by every place that names a sample."""
    found = re.findall(rb"<(\d{6})/(jpg|txt)>", data)
    return Counter((key.decode(), extension.decode()) for key, extension in found)


def mostly(data: bytes) -> tuple[str, str] | None:
    """The sample that it names most often, which single flipped bits do not change."""
    found = owners(data).most_common(1)
    return found[0][0] if found else None


def add(tar: tarfile.TarFile, name: str, data: bytes, **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(data))


@cache
def plain() -> bytes:
    """Twelve samples of several sizes, of which some lack a picture or a caption."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(12):
            for extension in ("jpg", "txt") if i % 3 else (("jpg",) if i % 2 else ("txt",)):
                add(tar, f"{i:06d}.{extension}", content(f"{i:06d}", extension, 200 + 170 * i))
    return buffer.getvalue()


def read_everything(shards: ShardSet) -> dict[tuple[str, str], bytes]:
    """(key, extension) -> content, of what can be read."""
    found: dict[tuple[str, str], bytes] = {}
    for position in range(len(shards)):
        for extension in shards.extensions(position):
            try:
                found[shards.name(position)[1], extension] = shards.read(position, extension)
            except BadSample as error:
                assert str(error), "a reason that says nothing"
        try:
            shards.read(position, "none")
            raise AssertionError("a member that is not there")
        except KeyError:
            pass
    return found


def opened(data: bytes) -> tuple[ShardIndex, dict[tuple[str, str], bytes]]:
    """A tar's index and its readable members; none where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(data)
        index = scan(path)
        try:
            return index, read_everything(open_shards([str(path)]))
        except ConfigError:
            assert not index.keys
            return index, {}


@cache
def whole_members() -> dict[tuple[str, str], tuple[range, bytes]]:
    """(key, extension) -> the blocks of its header and body in the whole tar, and its content."""
    found: dict[tuple[str, str], tuple[range, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(plain())) as tar:
        for info in tar:
            file = tar.extractfile(info)
            assert file is not None
            stop = -(-(info.offset_data + info.size) // BLOCK)
            found[split_name(info.name)] = (range(info.offset // BLOCK, stop), file.read())
    return found


def header(name: bytes, size: bytes, kind: bytes, link: bytes = b"", prefix: bytes = b"") -> bytes:
    """A header with whatever fields, its checksum right."""
    head = bytearray(BLOCK)
    for place, value, width in (
        (0, name, 100),
        (100, b"0000644\0", 8),
        (124, size, 12),
        (156, kind, 1),
        (157, link, 100),
        (257, b"ustar\x0000", 8),
        (345, prefix, 155),
    ):
        head[place : place + width] = value[:width].ljust(width, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


def wav(frames: int, claims: int | None = None, channels: int = 1) -> bytes:
    """Sixteen bits, 16 kHz; `claims` lies in the header about the number of frames."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(np.arange(frames * channels, dtype=np.int16).tobytes())
    data = bytearray(buffer.getvalue())
    if claims is not None:
        data[40:44] = struct.pack("<I", claims * 2 * channels)
        data[4:8] = struct.pack("<I", claims * 2 * channels + 36)
    return bytes(data)
