"""Towers and objectives that break the promise of one gradient, each in one way, and a small recipe to put them in."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcontrast.data import Stream
from mmcontrast.encoders import MultiEncoder
from mmcontrast.encoders.base import Encoder, Transform
from mmcontrast.encoders.image import CLIP_MEAN, CLIP_STD, ImageEncoder
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.trainer import Trainer


class Function(nn.Module):
    """A module that is one function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OwnNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x


class OnlyFloat32(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(16))

    def forward(self, x: Tensor) -> Tensor:
        return x.float() @ self.weight


class SkipsLayer(nn.Module):
    """Stochastic depth by python's generator: the layer inside is called or not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if random.random() < 0.5 else x + 0 * self.inner.weight.sum() + 0 * self.inner.bias.sum()


class Parts(nn.Module):
    """Mixes rows in its own forward; the layers before and after it are innocent."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x - x.mean(0))


def _of_rank(x: Tensor) -> Tensor:
    return x * (1 + 1e-6 * int(os.environ.get("RANK", "0")))


def _fails_on_rank_1(x: Tensor) -> Tensor:
    if os.environ.get("RANK") == "1":
        raise RuntimeError("out of luck")
    return x


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "right": nn.Identity,
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(16),
    "minus mean": lambda: Function(lambda x: x - x.mean(0)),
    "parts": Parts,
    "own noise": OwnNoise,
    "python": lambda: Function(lambda x: x * (1 + random.random())),
    "numpy": lambda: Function(lambda x: x + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).to(x)),
    "skips": SkipsLayer,
    "counting": Counting,
    "unused": Unused,
    "only float32": OnlyFloat32,
    "lowered": lambda: Function(lambda x: x.float().to(x.dtype)),
    "nan": lambda: Function(lambda x: torch.where(x >= x.max(), torch.nan, x)),
    "of rank": lambda: Function(_of_rank),
    "fails on rank 1": lambda: Function(_fails_on_rank_1),
    "no gradient": lambda: Function(torch.Tensor.detach),
}


class Small(ImageEncoder):
    """Three layers, the middle one by name; batch norm stays in training mode, as in a tower of someone else."""

    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        middle: str = "right"

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config, size=8, mean=CLIP_MEAN, std=CLIP_STD)
        self.first, self.middle = nn.Linear(192, 16), MIDDLES[config.middle]()
        self.last = nn.Linear(16, 16)
        self.dim = 16
        self.finish(config, pretrained=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.last(self.middle(self.first(self.normalise(x).flatten(1)).tanh())), None

    def train(self, mode: bool = True) -> Small:
        nn.Module.train(self, mode)
        return self


class Letters(Transform):
    kind = "text"

    def __call__(self, value: Any) -> Tensor:
        return torch.tensor([ord(letter) % 32 for letter in str(value).ljust(8)[-8:]])


class Text(Encoder):
    """A text as the mean of its last letters."""

    kind = "text"

    @dataclass(kw_only=True)
    class Config(Encoder.Config):
        pass

    def __init__(self, config: Config, restore: Path | None = None) -> None:
        super().__init__(config)
        self.letters, self.dim = nn.Embedding(32, 16), 16
        self.finish(config, pretrained=True)

    def transform(self, *, train: bool) -> Letters:
        return Letters()

    def example(self) -> Tensor:
        return Letters()("")[None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.letters(x).mean(1), None


class PaddedLetters(Letters):
    def __call__(self, value: Any) -> Tensor:
        return torch.tensor([ord(letter) % 32 for letter in str(value)] or [0])

    def collate(self, values: Sequence[Any]) -> dict[str, Tensor]:
        return {"ids": nn.utils.rnn.pad_sequence(list(values), batch_first=True)}


class PaddedText(Text):
    """Wrong: the mean includes the padding, of which there is as much as the longest text of a batch asks for."""

    def transform(self, *, train: bool) -> PaddedLetters:
        return PaddedLetters()

    def example(self) -> Any:
        return {"ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, x: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(x["ids"])


class MeanOfBlock(Objective):
    """Wrong: a mean over the block's anchors does not add up."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        pass

    modalities = ("image", "text")
    candidates = ("text",)

    def partial(self, block: Block) -> Totals:
        return Totals({"loss": (block.anchors["image"] @ block.z["text"].T).exp().mean()})

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        return totals.sums["loss"]


class Drawing(MeanOfBlock):
    """Wrong: draws in `partial`."""

    def partial(self, block: Block) -> Totals:
        return Totals({"loss": (block.anchors["image"] * torch.rand(8, dtype=torch.float64)).sum()})


class Infinite(MeanOfBlock):
    """Wrong: the logarithm of zero."""

    def partial(self, block: Block) -> Totals:
        return Totals({"loss": (block.anchors["image"].sum() * 0).log()})


def recipe(shards: Path, middle: str = "right", **objectives: Objective.Config) -> Trainer.Config:
    return Trainer.Config(
        model=MultiEncoder.Config(encoders={"image": Small.Config(middle=middle), "text": Text.Config()}, dim=8),
        data=Stream.Config(shards=(str(shards),), workers=0),
        objectives={"clip": InfoNCE.Config(), **objectives},
        steps=1,
        global_batch=8,
        out=Path("never written"),
    )


def write_recipe(folder: Path, shards: Path, middle: str) -> str:
    """A recipe as a person has it, in a file."""
    file = folder / f"recipe_{middle.replace(' ', '_')}.py"
    file.write_text(
        "from pathlib import Path\nfrom tests.broken import recipe as make\n"
        f"def recipe():\n    return make(Path({str(shards)!r}), {middle!r})\n"
    )
    return str(file)
