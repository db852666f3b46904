"""What the stream benchmark reads: shards of real photographs with captions, and sounds, made from fixed seeds.

The photographs are five of much detail that scikit-learn and scikit-image bring. Each picture is a random part of one,
perhaps mirrored, brought to its size by Lanczos and encoded by Pillow as JPEG of quality 90, 4:2:0: about 2.4 bits per
pixel (the arms say), not far from what photographs of that quality have on the web. Sounds are 48 kHz, one channel:
gliding tones, and noise that the codecs must carry.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mmcontrast.shard_writer import Sample, ShardWriter

SIZES = {480: (360, 480), 640: (480, 640)}
"""Width -> height and width of the pictures."""
SOUND_RATE = 48_000
CODECS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"), "mp3": ("MP3", None)}
"""Extension -> libsndfile's format and subtype."""


def photographs(count: int, width: int) -> list[bytes]:
    """JPEGs of `SIZES[width]`."""
    from PIL import Image

    sources = [Image.open(path).convert("RGB") for path in _photograph_files()]
    draw = np.random.default_rng(width)
    found: list[bytes] = []
    for number in range(count):
        source = sources[number % len(sources)]
        h = draw.uniform(0.8, 1) * min(source.height, source.width * 3 / 4)
        w = h * 4 / 3
        left, top = draw.uniform(0, source.width - w), draw.uniform(0, source.height - h)
        picture = source.resize((width, SIZES[width][0]), Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
        if draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def _photograph_files() -> list[Path]:
    import skimage
    import sklearn

    ours, theirs = (Path(str(module.__file__)).parent for module in (sklearn, skimage))
    names = ("astronaut.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png")
    return [ours / "datasets" / "images" / "china.jpg", *(theirs / "data" / name for name in names)]


_WORDS = (
    "a an the old red white small large wooden stone temple flower garden roof lake sky with near under before of and "
    "in bright morning evening petals leaves gate people street view photograph detail quiet green yellow blue"
).split()


def shards(folder: Path, *, pictures: int, distinct: int, width: int, count: int) -> float:
    """Write `count` shards of so many pictures in all, with captions; some come several times. Their bits per pixel."""
    made = photographs(distinct, width)
    draw = np.random.default_rng(0)
    with ShardWriter(folder, max_samples=-(-pictures // count), overwrite=True) as writer:
        for number in range(pictures):
            caption = " ".join(draw.choice(_WORDS, int(draw.integers(6, 16))))
            writer.write(Sample(f"{number:06d}", {"jpg": made[number % distinct], "txt": caption}))
    height, _ = SIZES[width]
    return 8 * sum(map(len, made)) / (distinct * height * width)


def sound(seconds: float, extension: str) -> bytes:
    """A recording in one of the formats of `CODECS`."""
    import soundfile

    t = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    tones = sum(np.sin(2 * np.pi * f * t + 8 * np.sin(t * n)) / n for n, f in enumerate((220, 450, 910, 1800, 3700), 1))
    samples = (0.2 * tones + np.random.default_rng(0).normal(0, 0.02, len(t))).astype(np.float32)
    form, subtype = CODECS[extension]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", SOUND_RATE, 1, subtype, format=form) as opened:
        for start in range(0, len(samples), 4096):  # libvorbis takes a whole recording onto the stack
            opened.write(samples[start : start + 4096])
    return file.getvalue()


def plain_crop(data: bytes, box: tuple[int, int, int, int], size: tuple[int, int]) -> torch.Tensor:
    """The reference: all of it decoded by Pillow, cut, resized by Pillow's bicubic in floats: uint8 [3, *size].

    Along the width, then along the height, each limited to 0..255, and rounded once. In bytes, Pillow rounds in between
    too; two such results may be two levels apart where neither is more than one from this one.
    """
    from PIL import Image

    def along(planes: list[NDArray[np.float32]], width: int, height: int) -> list[NDArray[np.float32]]:
        resized = (Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC) for p in planes)
        return [np.asarray(p, dtype=np.float32).clip(0, 255) for p in resized]

    top, left, height, width = box
    with Image.open(io.BytesIO(data)) as opened:
        part = np.array(opened.convert("RGB").crop((left, top, left + width, top + height)), dtype=np.float32)
    planes = [np.ascontiguousarray(part[:, :, channel]) for channel in range(3)]
    found = along(along(planes, size[1], height), size[1], size[0])
    return torch.from_numpy(np.stack(found).round().astype(np.uint8))
