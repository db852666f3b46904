"""What objectives over pairs of modalities share: which pairs, at which temperature, and who is no negative.

Letters: n rows of a block, N rows of the global batch, D dimensions, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.objectives.scores import ScoreObjective, Scores, Statistic, Statistics, labels_of

Pairs = tuple[tuple[str, str], ...]


def all_pairs(*modalities: str) -> Pairs:
    """Every two of the modalities."""
    return tuple(combinations(modalities, 2))


def pairs_with(anchor: str, *others: str) -> Pairs:
    """One modality with each of the others, as ImageBind does (Girdhar et al. 2023, arXiv:2305.05665)."""
    return tuple((other, anchor) for other in others)


def check_pairs(objective: str, pairs: Pairs) -> tuple[str, ...]:
    """The modalities of the pairs, in order.

    Raises:
        ConfigError: no pair, a pair twice, or a modality paired with itself.
    """
    if not pairs:
        raise ConfigError(f"{objective} needs at least one pair of modalities; `pairs` is empty")
    for x, y in pairs:
        if x == y:
            raise ConfigError(f"{objective} contrasts two modalities, got the pair ({x!r}, {y!r})")
        if pairs.count((x, y)) + pairs.count((y, x)) > 1:
            raise ConfigError(f"{objective} has the pair ({x!r}, {y!r}) more than once; use `pair_weights`")
    return tuple(dict.fromkeys(m for pair in pairs for m in pair))


def check_weights(objective: str, pairs: Pairs, weights: tuple[float, ...]) -> tuple[float, ...]:
    """Shares of the pairs, which add up to 1; equal where no weights are given.

    Raises:
        ConfigError: another number of weights than pairs, or weights that are negative or all zero.
    """
    weights = weights or (1.0,) * len(pairs)
    if len(weights) != len(pairs) or min(weights) < 0 or not sum(weights):
        raise ConfigError(
            f"{objective} has {len(pairs)} pairs and pair_weights {weights}; give one weight of 0 or more for each"
        )
    return tuple(weight / sum(weights) for weight in weights)


class ScaledPairs(Objective):
    """Base of objectives over pairs of modalities whose scores have a learned scale.

    Attributes:
        pair_shares: pair -> its share of the loss.
    """

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        """Which pairs, and at which scale."""

        pairs: Pairs = (("image", "text"),)
        """Pairs of modalities to contrast."""
        pair_weights: tuple[float, ...] = ()
        """Relative weight of each pair; none makes them equal. The loss is the weighted mean."""
        scale: float = 1 / 0.07
        """Start of the logit scale, the inverse temperature."""
        max_scale: float = 100.0
        """The learned scale is kept within 1 and this."""
        learn_scale: bool = True
        """Learn the scale, or keep its start."""

    def __init__(self, config: Config, scales: int = 1) -> None:
        super().__init__(config)
        name = type(self).__name__
        self.modalities = self.candidates = check_pairs(name, config.pairs)
        if not 1 <= config.scale <= config.max_scale:
            raise ConfigError(f"{name} scale {config.scale} is outside 1..max_scale ({config.max_scale})")
        shares = check_weights(name, config.pairs, config.pair_weights)
        self.pair_shares = dict(zip(config.pairs, shares, strict=True))
        self.max_scale = config.max_scale
        # [1] at least, not a scalar: fully_shard refuses 0-d parameters.
        self.log_scale = nn.Parameter(torch.full([scales], math.log(config.scale)), requires_grad=config.learn_scale)

    def clamp(self) -> None:
        """Keep the scale within 1..max_scale, as CLIP does."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(self.max_scale))

    def scale_between(self, x: str, y: str) -> float | None:
        """What scores of x against candidates of y are multiplied by; None where they are not contrasted."""
        contrasted = (x, y) in self.pair_shares or (y, x) in self.pair_shares
        return float(self.log_scale.detach()[0].exp()) if contrasted else None

    def metrics(self) -> Mapping[str, float]:
        """The logit scale."""
        return {"logit_scale": float(self.log_scale.detach().exp())}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Of the scales, if they learn."""
        return {
            name: (1.0, self.max_scale) for name in self.metrics() if "scale" in name and self.log_scale.requires_grad
        }


@dataclass(frozen=True)
class View:
    """One score matrix: rows of x against candidates of y, its share of the loss, and which scale it has."""

    x: str
    y: str
    share: float
    scale: int = 0


class PairObjective(ScaledPairs, ScoreObjective):
    """Base of objectives over pairs of modalities whose scores are looked at in tiles.

    For a pair (x, y) a row is an anchor if it has x, a candidate if it has y, and counts in the loss if it has both.
    So a row without text is still a negative image for the texts of others.
    """

    @dataclass(kw_only=True)
    class Config(ScaledPairs.Config, ScoreObjective.Config):
        """Which pairs, at which scale. The second modality of each pair is gathered over ranks."""

        never_negative: tuple[str, ...] = ()
        """Groups (such as patient or caption) whose equal labels are never negatives of each other."""

    def __init__(self, config: Config, views: Mapping[str, View] | None = None) -> None:
        super().__init__(config, scales=1 + max((view.scale for view in (views or {}).values()), default=0))
        self.pair_config = config
        self.views = views or {f"{x},{y}": View(x, y, share) for (x, y), share in self.pair_shares.items()}
        self.candidates = tuple(dict.fromkeys(view.y for view in self.views.values()))

    def scale_between(self, x: str, y: str) -> float | None:
        """The view's own; where there is none of this direction, that of the other."""
        of = {(view.x, view.y): view.scale for view in self.views.values()}
        number = of.get((x, y), of.get((y, x)))
        return None if number is None else float(self.log_scale.detach()[number].exp())

    def wants(self) -> frozenset[Statistic]:
        """What the objective needs to know of each matrix."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """What is added to every score, [1]."""
        return None

    def scores(self, block: Block) -> Iterator[Scores]:
        """One matrix for each view."""
        labels = labels_of(block, self.pair_config.never_negative, f"{type(self).__name__}.never_negative")
        for name, view in self.views.items():
            yield Scores(
                name=name,
                anchors=block.anchors[view.x],
                candidates=block.z[view.y],
                positives=block.anchors[view.y],
                scale=self.log_scale[view.scale : view.scale + 1].exp(),
                bias=self.bias(),
                has_row=block.present[view.x][block.rows],
                has_column=block.present[view.y],
                labels=labels,
                wants=self.wants(),
            )

    def observe(self, totals: Totals, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """How many pairs of rows were left out as negatives, because their ids or labels are equal."""
        masked = [
            totals.sums[f"{name}/masked"] - (present[view.x] & present[view.y]).sum()
            for name, view in self.views.items()
        ]
        return {"masked_negatives": torch.stack(masked).sum()}

    def metrics(self) -> Mapping[str, float]:
        """The logit scale; of several, each by the name of its matrix."""
        scales = self.log_scale.detach().exp()
        if len(scales) == 1:
            return {"logit_scale": float(scales)}
        return {f"logit_scale.{name}": float(scales[view.scale]) for name, view in self.views.items()}


@dataclass(frozen=True)
class Direction:
    """One direction of a pair: [N] each, of which only the rows in `paired` count."""

    off: Tensor  # log-sum-exp over the negatives
    positive: Tensor
    sums: Tensor | None  # over the negatives
    counts: Tensor | None
    paired: Tensor  # bool
    scale: Tensor  # scalar


class DirectedPairs(PairObjective):
    """Base of losses of a row's softmax, taken from each side of a pair: from x to y and from y to x.

    Attributes:
        separable: where the directions are two matrices (their scales differ) or there is only one.
    """

    @dataclass(kw_only=True)
    class Config(PairObjective.Config):
        """Directions and their temperatures."""

        temperature: Literal["shared", "per_pair", "per_direction"] = "shared"
        """One scale for all, one for each pair, or one for each direction of each pair."""
        symmetric: bool = True
        """Both directions of a pair, half the loss each; else only from its first modality to its second."""

    def __init__(self, config: Config) -> None:
        pairs = config.pairs
        check_pairs(type(self).__name__, pairs)
        shares = check_weights(type(self).__name__, pairs, config.pair_weights)
        apart = config.symmetric and config.temperature == "per_direction"
        views: dict[str, View] = {}
        for (x, y), share in zip(pairs, shares, strict=True):
            for a, b in ((x, y), (y, x)) if apart else ((x, y),):
                scale = 0 if config.temperature == "shared" else len(views)
                views[f"{a},{b}"] = View(a, b, share / 2 if apart else share, scale)
        super().__init__(config, views)
        self.both = config.symmetric and not apart
        self.separable = not self.both

    def wants(self) -> frozenset[Statistic]:
        """Normalisers of rows, and of columns where one matrix serves both directions."""
        return frozenset({"rows", "columns"} if self.both else {"rows"})

    def row_loss(self, rows: Direction) -> Tensor:
        """[N] loss of each row."""
        raise NotImplementedError

    def term(self, name: str, statistics: Statistics, present: Mapping[str, Tensor]) -> Tensor:
        """Share of the pair times the mean over the rows that have both modalities, and over directions."""
        view, s = self.views[name], statistics
        assert s.rows is not None and s.positives is not None
        paired = present[view.x] & present[view.y]
        scale = self.log_scale.detach()[view.scale].exp()
        losses = self.row_loss(Direction(s.rows, s.positives, s.row_sums, s.row_counts, paired, scale))
        if self.both:
            assert s.columns is not None
            columns = Direction(s.columns, s.positives, s.column_sums, s.column_counts, paired, scale)
            losses = (losses + self.row_loss(columns)) / 2
        # Also the gradient of what is left out must be 0: where, not multiplication, for it may be infinite.
        return view.share * torch.where(paired, losses, 0).sum() / paired.sum().clamp(min=1)
