"""Small objectives that use every part of the protocol, each beside its loop-written formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, Embeddings
from mmcontrast.objectives.base import Block, Objective, Totals, masked_logsumexp
from tests.formulas import infonce_formula as infonce_formula  # also for those who ask here


class Spread(Objective):
    """log mean over i != j of exp(-2 |zi - zj|^2): a loss that is no sum over rows."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        pass

    modalities = candidates = ("text",)

    def partial(self, block: Block) -> Totals:
        here, there = block.present["text"][block.rows], block.present["text"]
        own = block.rows[:, None] == torch.arange(len(block.ids))
        scores = 4 * block.anchors["text"] @ block.z["text"].T - 4
        masked = own | ~here[:, None] | ~there
        return Totals(
            {"pairs": (~masked).sum().double()},
            {"all": masked_logsumexp(scores.flatten(), masked.flatten(), 0)},
        )

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        return totals.logsumexps["all"] - totals.sums["pairs"].log()


def spread_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    terms = [
        torch.exp(-2 * (z["text"][i] - z["text"][j]).square().sum())
        for i in range(len(batch))
        for j in range(len(batch))
        if i != j and present["text"][i] and present["text"][j]
    ]
    return torch.log(torch.stack(terms).mean())


class Drift(Objective):
    """Squared distance of images to a running mean of texts: state, and a parameter read in both places."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        pass

    modalities = ("image", "text")
    candidates = ("text",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gain = nn.Parameter(torch.tensor([0.7]))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(6))

    def partial(self, block: Block) -> Totals:
        here = block.present["image"][block.rows]
        distance = (block.anchors["image"] - self.mean).square().sum(1)
        return Totals({"distance": (self.gain * distance * here).sum(), "count": torch.tensor(len(block.rows))})

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        return totals.sums["distance"] / present["image"].sum() + (self.gain.square() * 3).sum()

    def update(self, z: Embeddings, ids: Tensor) -> None:
        self.mean.mul_(0.5).add_(0.5 * z["text"].sum(0) + 0.001 * ids.double().mean())


def drift_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, Drift)
    terms = [o.gain * (z["image"][i] - o.mean).square().sum() for i in range(len(batch)) if present["image"][i]]
    return torch.stack(terms).mean() + 3 * o.gain.square().sum()


class Shuffled(Objective):
    """Hinge against a partner drawn once per step for all ranks: randomness that belongs to the loss."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        pass

    modalities = ("audio", "image")
    candidates = ("image",)

    def prepare(self, z: Embeddings, present: Mapping[str, Tensor], ids: Tensor, step: int) -> Mapping[str, Tensor]:
        return {"partner": torch.randperm(len(ids), generator=torch.Generator().manual_seed(step))}

    def partial(self, block: Block) -> Totals:
        partner = block.aux["partner"][block.rows]
        use = block.present["audio"][block.rows] & block.present["image"][partner]
        score = (block.anchors["audio"] * block.z["image"][partner]).sum(1)
        return Totals({"loss": (torch.relu(1 + score) * use).sum()})

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        return totals.sums["loss"] / present["audio"].sum().clamp(min=1)


def shuffled_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    partner = torch.randperm(len(batch), generator=torch.Generator().manual_seed(step))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        j = int(partner[i])
        if present["audio"][i] and present["image"][j]:
            loss = loss + torch.relu(1 + (z["audio"][i] * z["image"][j]).sum())
    return loss / present["audio"].sum()


class Decorrelate(Objective):
    """Off-diagonal cross-correlation of the whole batch: the escape hatch for formulas that do not split."""

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        pass

    whole = True
    modalities = candidates = ("image", "text")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.target = nn.Parameter(torch.tensor([0.1]))

    def partial(self, block: Block) -> Totals:
        both = (block.present["image"] & block.present["text"])[:, None]
        c = (block.anchors["image"] * both).T @ block.anchors["text"]
        return Totals({"loss": (c - self.target).square().sum() - c.diagonal().square().sum()})

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        return totals.sums["loss"] / 10


def decorrelate_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, Decorrelate)
    loss = torch.zeros((), dtype=torch.float64)
    for a in range(6):
        for b in range(6):
            c = torch.zeros((), dtype=torch.float64)
            for i in range(len(batch)):
                if present["image"][i] and present["text"][i]:
                    c = c + z["image"][i, a] * z["text"][i, b]
            loss = loss + ((c - o.target) ** 2).sum() - (c * c if a == b else 0)
    return loss / 10
