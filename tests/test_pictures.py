"""The fast path of pictures gives the pixels of the plain one: all of it decoded by Pillow, then cut, then resized."""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from mmcontrast.decode import Box, Picture, image, picture, picture_from
from mmcontrast.encoders.image import ImageTransform, random_box
from mmcontrast.shards import BadSample
from tests import tiny

Array = NDArray[np.uint8]


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Slopes, hard edges and noise: what a resize rounds, rings on and averages."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(20 * x + c) * np.cos(13 * y - c) for c in range(3)], -1)
    pixels = 128 + 90 * waves + draw.normal(0, 12, waves.shape)
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (255, 255, 0)
    pixels[height // 2 :: 7, ::5] = 0
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(source: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    source.save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def plain(data: bytes) -> Array:
    """All of the picture by Pillow, [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as opened:
        return np.array(ImageOps.exif_transpose(opened).convert("RGB"))


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2, Pillow's."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def slow_rows(pixels: Array, count: int) -> Array:
    """Antialiased bicubic along the first axis in float64, rounded to levels."""
    step = len(pixels) / count
    wide = max(step, 1.0)  # the kernel grows with the reduction, or else it would alias
    out: list[NDArray[np.float64]] = []
    for i in range(count):
        centre = (i + 0.5) * step
        total, weights = np.zeros(pixels.shape[1:]), 0.0
        for j in range(max(0, math.floor(centre - 2 * wide)), min(len(pixels), math.ceil(centre + 2 * wide) + 1)):
            weight = cubic((j + 0.5 - centre) / wide)
            total, weights = total + weight * pixels[j], weights + weight
        out.append(total / weights)
    return np.stack(out).round().clip(0, 255).astype(np.uint8)


def slow(pixels: Array, box: Box, size: tuple[int, int]) -> Tensor:
    """The reference: the part, resized along its width and then along its height, levels in between."""
    top, left, height, width = box
    part = pixels[top : top + height, left : left + width]
    across = slow_rows(part.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return torch.from_numpy(slow_rows(across, size[0]).transpose(2, 0, 1).copy())


def by_pillow(pixels: Array, box: Box, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic along the width and then along the height; left alone, it may take the other order."""
    top, left, height, width = box
    part = Image.fromarray(pixels[top : top + height, left : left + width])
    across = part.resize((size[1], height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(across.resize((size[1], size[0]), Image.Resampling.BICUBIC)).transpose(2, 0, 1))


def levels(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True},
    "coarse": {"quality": 8},
}


def kinds(source: Image.Image) -> Iterator[tuple[str, bytes]]:
    for name, options in KINDS.items():
        yield name, jpeg(source, **options)
    yield "grey", jpeg(source.convert("L"))


def boxes(height: int, width: int) -> list[Box]:
    """All of it, at every border, in the middle, a line, a pixel."""
    h, w = max(1, height * 2 // 3), max(1, width * 3 // 5)
    corners = [(t, left, h, w) for t in (0, height - h) for left in (0, width - w)]
    return [(0, 0, height, width), *corners, (height // 5, width // 7, h, w), (height - 1, 0, 1, width), (0, 0, 1, 1)]


@pytest.mark.parametrize("size", [(97, 131), (64, 48), (33, 250), (16, 16), (1, 5)])
def test_pixels_of_a_whole_picture_are_pillows(size: tuple[int, int]) -> None:
    for name, data in kinds(photo(*size)):
        found = picture(data)
        assert (found.height, found.width) == size
        assert torch.equal(found.read(), torch.from_numpy(plain(data).transpose(2, 0, 1))), name
        assert torch.equal(found.decoded().read(), found.read())


@pytest.mark.parametrize("size", [(97, 131), (64, 48), (120, 33)])
def test_a_crop_is_the_plain_paths_within_a_level(size: tuple[int, int]) -> None:
    worst, changed = 0, 0
    for name, data in kinds(photo(*size)):
        pixels, found = plain(data), picture(data)
        for box in boxes(*size):
            for side in ((16, 16), (24, 9)) if name == "4:2:0" else ((16, 16),):
                got = found.crop(box, side)
                worst = max(worst, levels(got, slow(pixels, box, side)))
                assert levels(got, by_pillow(pixels, box, side)) <= 1, (name, box, side)
                changed += int(levels(got, by_pillow(pixels, (0, 0, *size), side)) > 8)
    assert worst <= 1
    assert changed > 10  # a crop of another place would have been seen


@pytest.mark.parametrize("side", [(224, 224), (40, 300), (1, 1)])
def test_up_and_down_and_far_down(side: tuple[int, int]) -> None:
    for size in ((50, 70), (211, 317), (900, 1200)):
        data = jpeg(photo(*size))
        for box in ((0, 0, *size), (3, 5, size[0] - 10, size[1] - 21)):
            got, want = picture(data).crop(box, side), by_pillow(plain(data), box, side)
            # Enlarging sharpens: a level's difference after the first pass may become two, in few places.
            assert levels(got, want) <= (1 if side[0] <= box[2] and side[1] <= box[3] else 2)
            assert ((got.int() - want.int()).abs() > 1).double().mean() < 1e-4


def test_the_slow_reference_is_pillows_and_can_fail() -> None:
    pixels = np.array(photo(60, 80))
    want = slow(pixels, (2, 3, 50, 70), (20, 30))
    assert levels(want, by_pillow(pixels, (2, 3, 50, 70), (20, 30))) <= 1
    assert levels(want, by_pillow(pixels, (3, 3, 50, 70), (20, 30))) > 20
    part = torch.from_numpy(pixels)[2:52, 3:73].permute(2, 0, 1)[None].float()
    aliased = torch.nn.functional.interpolate(part, (20, 30), mode="bicubic")[0].round().clamp(0, 255).byte()
    assert levels(want, aliased) > 20


def test_crops_lie_channels_last_and_so_do_batches() -> None:
    """Torch would rearrange a batch of one otherwise, which costs as much as the resize."""
    data = jpeg(photo(90, 120))
    crop = picture(data).crop((1, 2, 80, 100), (16, 16))
    assert crop.permute(1, 2, 0).is_contiguous()
    transform = ImageTransform(16, None)
    batch = transform.collate([crop, crop + 1])
    assert torch.equal(batch, torch.stack([crop, crop + 1])) and batch.is_contiguous(memory_format=torch.channels_last)
    encoder = tiny.vit(image_size=16).build()
    want = (batch.float() - encoder.mean) / encoder.std
    for layout in (torch.contiguous_format, torch.channels_last):
        got = encoder.normalise(batch, layout)
        assert torch.equal(got, want) and got.is_contiguous(memory_format=layout)
    assert torch.equal(encoder.normalise(batch.contiguous()), want)


# -------------------------------------------------------------------------------------------- damage


def verdict(data: bytes) -> Array | None:
    """Pillow's pixels, or None where it refuses."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plain(data)
    except Exception:
        return None


def test_a_jpeg_that_is_cut_off_is_refused_wherever() -> None:
    for _, data in kinds(photo(40, 56)):
        for cut in (0, 1, 2, 3, 20, 100, 200, 400, len(data) // 2, len(data) * 9 // 10, len(data) - 40):
            assert verdict(data[:cut]) is None
            with pytest.raises(BadSample, match="image cannot be decoded"):
                picture(data[:cut]).crop((0, 0, 40, 56), (8, 8))
        for cut in (1, 2, 3, 4):  # the end marker, and the last bits: as Pillow has it
            want = verdict(data[:-cut])
            if want is None:
                with pytest.raises(BadSample, match="image cannot be decoded"):
                    image(data[:-cut])
            else:
                assert np.array_equal(image(data[:-cut]).permute(1, 2, 0).numpy(), want)


def test_flipped_bytes_are_refused_or_read_as_pillow_reads_them() -> None:
    draw = np.random.default_rng(0)
    refused = flawed = 0
    for _, data in kinds(photo(32, 40)):
        for place in draw.integers(2, len(data), 40):
            changed = bytearray(data)
            changed[place] ^= 1 << draw.integers(8)
            want = verdict(bytes(changed))
            try:
                got = image(bytes(changed)).permute(1, 2, 0).numpy()
            except BadSample:
                assert want is None or want.size > 64 << 20
                refused += 1
                continue
            assert want is not None and np.array_equal(got, want)
            try:
                simplejpeg.decode_jpeg(bytes(changed))
            except ValueError:
                flawed += 1  # read all the same: Pillow has decided
    assert refused > 10 and flawed > 10


def test_without_libjpeg_turbo_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(photo(60, 50))
    fast = picture(data).crop((1, 1, 50, 40), (16, 16), half_scale=True)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", fail)
    assert levels(picture(data).crop((1, 1, 50, 40), (16, 16)), by_pillow(plain(data), (1, 1, 50, 40), (16, 16))) <= 1
    assert levels(picture(data).crop((1, 1, 50, 40), (16, 16), half_scale=True), fast) > 1  # in full, then


def test_a_jpeg_that_says_it_is_huge_is_refused_by_its_header() -> None:
    data = bytearray(jpeg(photo(16, 16)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(BadSample, match="above 64 megapixels"):
        picture(bytes(data))
    data[frame + 5 : frame + 9] = struct.pack(">HH", 0, 16)
    with pytest.raises(BadSample, match="cannot be decoded"):
        picture(bytes(data))


# -------------------------------------------------------------------------------------------- lying on its side


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_cropped_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    photo(48, 72).save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    found, pixels = picture(buffer.getvalue()), plain(buffer.getvalue())
    assert (found.height, found.width) == pixels.shape[:2] == ((72, 48) if orientation > 4 else (48, 72))
    assert levels(found.crop((3, 5, 40, 30), (16, 16)), by_pillow(pixels, (3, 5, 40, 30), (16, 16))) <= 1


def test_xmp_turns_a_picture_too() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = jpeg(photo(48, 72), xmp=xmp)
    assert plain(data).shape == (72, 48, 3)
    assert np.array_equal(image(data).permute(1, 2, 0).numpy(), plain(data))


# -------------------------------------------------------------------------------------------- half the resolution


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def real_photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def test_half_the_resolution_is_near_and_only_where_it_is_enough() -> None:
    found: list[float] = []
    for source in real_photos():
        data = jpeg(source.resize((641, 481), Image.Resampling.LANCZOS))
        whole = picture(data)
        for box in ((0, 0, 480, 640), (10, 4, 448, 448), (30, 100, 450, 512)):
            half = whole.crop(box, (224, 224), half_scale=True)
            found.append(psnr(half, whole.crop(box, (224, 224))))
            odd = (box[0] + 1, box[1] + 1, box[2], box[3])
            if odd[0] + odd[2] <= 481 and odd[1] + odd[3] <= 641:
                assert torch.equal(whole.crop(odd, (224, 224), half_scale=True), half)  # moved by one, not distorted
        for box, size in (((0, 0, 447, 640), (224, 224)), ((0, 0, 448, 447), (224, 224)), ((0, 0, 99, 99), (50, 49))):
            assert torch.equal(whole.crop(box, size, half_scale=True), whole.crop(box, size)), "not large enough"
    assert sorted(found)[len(found) // 2] >= 39 and min(found) > 33, found
    assert max(found) < 60  # it was half indeed


def test_only_jpegs_have_half_a_resolution() -> None:
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "PNG")
    for value in (buffer.getvalue(), np.array(photo(64, 64))):
        found = picture_from(value)
        box = (1, 1, 61, 61)
        assert torch.equal(found.crop(box, (16, 16), half_scale=True), found.crop(box, (16, 16)))


def test_training_may_decode_half_and_evaluation_never() -> None:
    data = jpeg(real_photos()[0].resize((640, 480)))
    half, full = (tiny.vit(image_size=64, patch_size=16, half_scale=h).build() for h in (True, False))
    assert torch.equal(half.transform(train=False)(data), full.transform(train=False)(data))
    torch.manual_seed(0)
    a = half.transform(train=True)(data)
    torch.manual_seed(0)
    b = full.transform(train=True)(data)
    assert not torch.equal(a, b) and psnr(a, b) > 25  # the same crop, but for a pixel


# -------------------------------------------------------------------------------------------- the draw


def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    from torchvision.transforms import v2

    different: set[Box] = set()
    for scale in ((0.9, 1.0), (0.08, 1.0), (1.0, 1.0)):
        theirs = v2.RandomResizedCrop(224, scale=scale)
        for height, width in ((360, 480), (427, 640), (30, 500), (500, 20), (1, 5)):
            for seed in range(20):
                torch.manual_seed(seed)
                want = theirs.make_params([torch.empty(1).expand(3, height, width)])
                after = torch.rand(())
                torch.manual_seed(seed)
                got = random_box(height, width, scale)
                assert got == tuple(want[k] for k in ("top", "left", "height", "width"))
                assert torch.rand(()) == after, "the draw after would be another"
                different.add(got)
    assert len(different) > 50


def test_a_transform_takes_all_its_randomness_from_torch() -> None:
    data = jpeg(photo(90, 120))
    transform = tiny.vit(crop_scale=(0.2, 0.9), color_jitter=0.4, grayscale=0.3).build().transform(train=True)
    for seed in range(5):
        torch.manual_seed(seed)
        a = transform(data)
        torch.manual_seed(seed)
        assert torch.equal(a, transform(picture_from(data)))
        assert not torch.equal(a, transform(data))


def test_a_picture_may_be_given_in_any_form() -> None:
    pixels = np.array(photo(20, 30))
    want = torch.from_numpy(pixels).permute(2, 0, 1)
    for value in (pixels, want, want.contiguous(), Image.fromarray(pixels), picture_from(pixels)):
        found = picture_from(value)
        assert isinstance(found, Picture) and (found.height, found.width) == (20, 30)
        assert torch.equal(found.read(), want) and found.read().is_contiguous()
        assert levels(found.crop((2, 3, 15, 20), (8, 8)), by_pillow(pixels, (2, 3, 15, 20), (8, 8))) <= 1
    for value in (want.float(), want[:2], want[0], pixels.astype(np.int64)):
        with pytest.raises(BadSample, match="a picture must be uint8"):
            picture_from(value)
