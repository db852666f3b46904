"""Hostile and odd input: what cannot be used is refused with a reason, in bounded memory, and nothing is executed."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmcontrast.data.reader import Reader
from mmcontrast.decode import image, metadata, picture_from, text
from mmcontrast.encoders.base import Transform
from mmcontrast.encoders.image import ImageTransform
from mmcontrast.shards import BadSample, open_shards


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A valid black PNG of side x side pixels in few bytes."""
    row = bytes(1 + -(-side // 8))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packed = zlib.compress(row * side, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# -------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("form", "tolerance"), [("PNG", 0), ("WEBP", 0), ("JPEG", 40)])
def test_a_picture_comes_out_as_it_went_in(form: str, tolerance: int) -> None:
    rows = np.linspace(0, 255, 24, dtype=np.uint8)[:, None, None]
    want = np.concatenate([rows + np.zeros((24, 17, 1), np.uint8)] * 3, axis=2)
    want[:, :, 1] = want[::-1, :, 1]
    options = {"lossless": True} if form == "WEBP" else {}
    got = image(encoded(Image.fromarray(want), form, **options))
    assert got.dtype == torch.uint8 and got.shape == (3, 24, 17) and got.is_contiguous()
    assert (got.permute(1, 2, 0).int() - torch.from_numpy(want).int()).abs().max() <= tolerance


def test_transparent_parts_become_white() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2, :, 0], rgba[:2, :, 3] = 204, 255  # above: opaque red; below: transparent black
    half = rgba.copy()
    half[:2, :, 3] = 128
    palette = Image.fromarray(rgba[:, :, :3]).convert("P")
    black = palette.getpixel((0, 3))
    keyed = encoded(Image.fromarray(rgba[:, :, :3]), transparency=(0, 0, 0))
    red, white = torch.tensor([204, 0, 0]), torch.tensor([255, 255, 255])
    for data in (
        encoded(Image.fromarray(rgba)),
        encoded(Image.fromarray(rgba), "WEBP", lossless=True),
        encoded(palette, transparency=black),
        keyed,
    ):
        got = image(data)
        assert got.dtype == torch.uint8 and got.shape == (3, 4, 4)
        assert (got[:, :2].int() == red[:, None, None]).all()
        assert (got[:, 2:].int() == white[:, None, None]).all()
    mixed = image(encoded(Image.fromarray(half)))[:, 0, 0].int()
    assert (mixed - (red + white) // 2).abs().max() <= 30 and (mixed != red).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_every_mode_of_png_becomes_rgb(mode: str) -> None:
    source = Image.fromarray(noise(9, 7, 3)).convert(mode)
    got = image(encoded(source))
    assert got.dtype == torch.uint8 and got.shape == (3, 9, 7)
    want = torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(got, want) and want.float().std() > 10


def test_sixteen_bits_keep_their_range() -> None:
    """Clipped to 8 bits, all but the darkest 256 of 65536 levels would be white."""
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    got = image(encoded(Image.fromarray(levels)))
    assert got.dtype == torch.uint8 and got.shape == (3, 64, 64)
    want = torch.from_numpy((levels >> 8).astype(np.uint8))
    assert all(torch.equal(channel, want) for channel in got)


def test_cmyk_and_grey_jpeg_become_rgb() -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :, 0] = 255
    got = image(encoded(Image.fromarray(red).convert("CMYK"), "JPEG", quality=95))
    assert got.dtype == torch.uint8 and got.shape == (3, 16, 16)
    assert (got[0] > 240).all() and (got[1:] < 15).all()
    grey = image(encoded(Image.new("L", (5, 3), 77), "JPEG"))
    assert grey.shape == (3, 3, 5) and (grey.int() - 77).abs().max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_that_lies_on_its_side_is_turned_upright(orientation: int) -> None:
    """EXIF's eight orientations: the corner that is stored first, seen upright."""
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:4, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = image(encoded(Image.fromarray(stored), "PNG", exif=exif))
    assert got.shape == ((3, 8, 16) if orientation < 5 else (3, 16, 8))
    bright = got[0].nonzero().double().mean(0) / torch.tensor(got.shape[1:])
    top, left = (bool(v) for v in bright < 0.5)
    corner = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}
    assert (top, left) == corner[orientation]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\nshowpage\n%%EOF\n"


def test_only_three_formats_are_opened(tmp_path: Path) -> None:
    """Pillow itself takes all of these for pictures, EPS by way of Ghostscript."""
    picture = Image.fromarray(noise(8, 8, 3))
    for data in (EPS, *(encoded(picture, form) for form in ("GIF", "BMP", "TIFF", "PPM", "ICO"))):
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format not in ("JPEG", "PNG", "WEBP")
        with pytest.raises(BadSample, match="cannot be decoded"):
            image(data)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_that_is_cut_off_is_refused(form: str, share: float) -> None:
    data = encoded(Image.fromarray(noise(64, 64, 3)), form)
    assert image(data).shape == (3, 64, 64)
    with pytest.raises(BadSample, match="cannot be decoded"):
        image(data[: int(len(data) * share)])


def test_random_bytes_never_raise_anything_else() -> None:
    data = {form: encoded(Image.fromarray(noise(24, 24, 3)), form) for form in ("JPEG", "PNG", "WEBP")}
    draw = np.random.default_rng(0)
    refused = 0
    for whole in data.values():
        for _ in range(60):
            changed = bytearray(whole)
            for place in draw.integers(0, min(len(whole), 200), 3):
                changed[place] = draw.integers(256)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    got = image(bytes(changed))
            except BadSample:
                refused += 1
                continue
            assert got.dtype == torch.uint8 and got.shape[0] == 3
    assert refused > 60


BOMB_CHILD = """
import re, sys
from PIL import Image
from mmcontrast import decode

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def grown(data):
    before = peak()
    try:
        answer = list(decode.image(data).shape)
    except decode.BadSample as error:
        answer = str(error)
    print(peak() - before, answer)

small, below, above = (sys.stdin.buffer.read(int(size)) for size in sys.argv[1:])
decode.image(small)  # all libraries are loaded now
grown(below)
grown(above)
decode.MAX_PIXELS, Image.MAX_IMAGE_PIXELS = 1 << 40, None
grown(below)
"""


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    # Below and above Pillow's own limit.
    pictures = [encoded(Image.new("RGB", (8, 8))), bomb(13_000), bomb(14_000)]
    assert max(map(len, pictures)) < 200_000
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOMB_CHILD, *(str(len(p)) for p in pictures)],
        input=b"".join(pictures),
        capture_output=True,
        check=True,
        timeout=60,
    )
    grown = [line.partition(" ") for line in answer.stdout.decode().splitlines()]
    assert len(grown) == 3
    for kilobytes, _, reason in grown[:2]:
        assert int(kilobytes) < 30 << 10 and reason.startswith("image"), answer.stdout
    kilobytes, _, shape = grown[2]
    assert int(kilobytes) > 500 << 10 and shape == "[3, 13000, 13000]"  # what the refusal has spared us


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_header_alone_tells_how_many_pixels() -> None:
    with pytest.raises(BadSample, match="above 64 megapixels"):
        image(bomb(13_000)[:100])


def test_a_large_picture_within_the_limit_is_decoded() -> None:
    assert image(bomb(3_000)).shape == (3, 3_000, 3_000)


def test_a_picture_may_come_as_file_bytes_array_or_tensor(tmp_path: Path) -> None:
    array = noise(6, 5, 3)
    data = encoded(Image.fromarray(array))
    (tmp_path / "a.png").write_bytes(data)
    want = torch.from_numpy(array).permute(2, 0, 1)
    for value in (tmp_path / "a.png", str(tmp_path / "a.png"), data, array, Image.fromarray(array), want):
        assert torch.equal(picture_from(value).read(), want)
    for value in (tmp_path / "none.png", tmp_path, "a\0b", b"", array[:, :, 0], array.astype(np.float32)):
        with pytest.raises(BadSample):
            picture_from(value)


# -------------------------------------------------------------------------------------------- text and metadata


def test_text_is_utf8_without_space_around() -> None:
    assert text("  ein Käse, 猫\n".encode()) == "ein Käse, 猫"
    assert text(b"\xef\xbb\xbfwith a byte order mark\r\n") == "with a byte order mark"
    assert text(b"two\nlines") == "two\nlines"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Käse".encode("latin-1"), "not UTF-8"),
        ("caption".encode("utf-16"), "not UTF-8"),
        (b"\xed\xa0\x80", "not UTF-8"),
        (b"", "empty"),
        (b" \n\t", "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
)
def test_text_that_says_nothing_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        text(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[1, 2]", "not an object"),
        (b'"a"', "not an object"),
        (b"null", "not an object"),
        (b"", "cannot be decoded"),
        (b"{'a': 1}", "cannot be decoded"),
        (b'{"a": "\xff"}', "cannot be decoded"),
        (b"[" * 100_000, "cannot be decoded"),
        (b'{"a":' * 100_000, "cannot be decoded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be decoded"),
    ],
)
def test_metadata_must_be_a_json_object(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        metadata(data)
    assert metadata('{"label": "Käse", "n": 1}'.encode()) == {"label": "Käse", "n": 1}


# -------------------------------------------------------------------------------------------- code in shards


class _Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.path)!r}, 'w').write('ran')",))


class TextAsIs(Transform):
    kind = "text"

    def __call__(self, value: str) -> str:
        return value

    def collate(self, values: Any) -> list[str]:
        return list(values)


def test_nothing_in_a_shard_is_ever_executed(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = pickle.dumps(_Payload(mark))
    trap = io.BytesIO()
    torch.save(_Payload(mark), trap)
    traps = {name: payload for name in ("pyd", "pkl", "pickle", "pyd.gz", "npy", "cls", "ten")} | {
        name: trap.getvalue() for name in ("pth", "pt")
    }
    pickle.loads(payload)
    assert mark.read_text() == "ran"  # the trap works
    mark.unlink()
    torch.load(io.BytesIO(trap.getvalue()), weights_only=False)
    assert mark.read_text() == "ran"
    mark.unlink()

    good = {
        "jpg": encoded(Image.fromarray(noise(8, 8, 3)), "JPEG"),
        "txt": b"a caption",
        "json": json.dumps({"label": "x"}).encode(),
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, members in {
            "000000": good | traps,
            "000001": dict.fromkeys(("jpg", "txt", "json"), payload),
            "000002": dict.fromkeys(("jpg", "txt", "json"), trap.getvalue()),
        }.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    shards = open_shards([str(tmp_path)])
    reader = Reader(shards, {"image": ImageTransform(8, None), "text": TextAsIs()})
    example = reader.example(0)
    assert set(example.inputs) == {"image", "text"} and example.meta == {"label": "x"}
    for position in (1, 2):
        for read in (reader.example, reader.meta):
            with pytest.raises(BadSample):
                read(position)
    for position in range(3):
        for extension in shards.extensions(position):
            assert shards.read(position, extension)
    # Not even where a modality is told to live in such a member.
    told = Reader(shards, {"image": ImageTransform(8, None), "text": TextAsIs()}, {"image": ("pyd",), "text": ("pth",)})
    with pytest.raises(BadSample):
        told.example(0)
    assert not mark.exists()
