"""Small samples and transforms for tests of the stream."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcontrast.batch import Batch
from mmcontrast.encoders.base import Transform

SIDE = 12


@lru_cache(maxsize=256)
def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Bytes(Transform):
    """Text -> [64] uint8."""

    kind = "text"

    def __call__(self, value: str) -> Tensor:
        data = value.encode()[:64]
        return torch.tensor(list(data.ljust(64, b"\0")), dtype=torch.uint8)

    def collate(self, values: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {
            "bytes": torch.stack(list(values)),
            "length": torch.tensor([int((v > 0).sum()) for v in values]),
        }


class Picture(Transform):
    """The picture as it is, decoded in any thread."""

    kind = "image"

    def __call__(self, value: Any) -> Tensor:
        return value.read()

    def begin(self, value: Any) -> Callable[[], Tensor]:
        return partial(self, value)

    def collate(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values))


def equal(a: Batch, b: Batch) -> bool:
    """Bit for bit: inputs, rows, ids, groups, keys and what was skipped."""

    def flat(batch: Batch) -> dict[str, Tensor]:
        found = {"ids": batch.ids}
        found |= {f"rows {m}": r for m, r in batch.rows.items()} | {f"group {g}": t for g, t in batch.groups.items()}
        for modality, value in batch.inputs.items():
            parts = value if isinstance(value, Mapping) else {"": value}
            found |= {f"input {modality} {name}": part for name, part in parts.items()}
        return found

    left, right = flat(a), flat(b)
    same = left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    return same and list(a.keys) == list(b.keys) and list(a.skipped) == list(b.skipped)
