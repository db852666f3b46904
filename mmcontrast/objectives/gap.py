"""Terms that close the gap between modalities: alignment, uniformity, uniformity across modalities.

Each is an objective of its own, with its own weight and first step. Added to CLIP at weight 1 they are the CUA and
CUAXU of Fahim et al. 2024 (arXiv:2405.18570), who fine-tuned with batches of 64 at a fixed temperature of 0.01;
elsewhere smaller weights may serve better.

Letters: B rows of a block, N rows of the global batch, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.objectives.pairs import Pairs, check_pairs, check_weights
from mmcontrast.objectives.scores import ScoreObjective, Scores, Statistics, labels_of


class Alignment(Objective):
    """Mean squared distance of matched rows (Wang & Isola 2020, arXiv:2005.10242, with alpha = 2)."""

    linear = True

    @dataclass(kw_only=True)
    class Config(Objective.Config):
        """Which pairs."""

        pairs: Pairs = (("image", "text"),)
        """Pairs of modalities to align."""
        pair_weights: tuple[float, ...] = ()
        """Relative weight of each pair; none makes them equal. The loss is the weighted mean."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.modalities = check_pairs("Alignment", config.pairs)
        self.shares = check_weights("Alignment", config.pairs, config.pair_weights)
        self.candidates = ()
        self.config = config

    def partial(self, block: Block) -> Totals:
        """Per pair, the sum of squared distances."""
        sums: dict[str, Tensor] = {}
        for x, y in self.config.pairs:
            paired = (block.present[x] & block.present[y])[block.rows]
            distances = (block.anchors[x] - block.anchors[y]).square().sum(1)
            sums[f"{x},{y}"] = torch.where(paired, distances, 0).sum()
        return Totals(sums)

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        """Weighted mean over pairs of the mean over the rows that have both modalities."""
        means = [
            share * totals.sums[f"{x},{y}"] / (present[x] & present[y]).sum().clamp(min=1)
            for (x, y), share in zip(self.config.pairs, self.shares, strict=True)
        ]
        return torch.stack(means).sum()


class _Spread(ScoreObjective):
    """log of the mean of e^{-t |a - b|^2} over all pairs that are no match; on the sphere |a - b|^2 = 2 - 2 <a, b>.

    The mean is over the global batch: a mean of the ranks' logarithms would be another loss.
    """

    @dataclass(kw_only=True)
    class Config(ScoreObjective.Config):
        """How far the terms reach."""

        t: float = 2.0
        """Sharpness: larger values look at nearer neighbours only."""

    def __init__(self, config: Config, views: Mapping[str, tuple[str, str, float]]) -> None:
        super().__init__(config)
        if config.t <= 0:
            raise ConfigError(f"{type(self).__name__} t is {config.t}; it must be above 0")
        self.t, self.views = config.t, views
        self.modalities = tuple(dict.fromkeys(m for x, y, _ in views.values() for m in (x, y)))
        self.candidates = tuple(dict.fromkeys(y for _, y, _ in views.values()))

    def scores(self, block: Block) -> Iterator[Scores]:
        """2 t <a, b>."""
        for name, (x, y, _) in self.views.items():
            yield Scores(
                name=name,
                anchors=block.anchors[x],
                candidates=block.z[y],
                positives=None,
                scale=block.anchors[x].new_full([1], 2 * self.t),
                has_row=block.present[x][block.rows],
                has_column=block.present[y],
                labels=labels_of(block, (), ""),
                wants=frozenset({"rows", "row_counts"}),
            )

    def term(self, name: str, statistics: Statistics, present: Mapping[str, Tensor]) -> Tensor:
        """0 where no two rows can be compared."""
        rows, counts = statistics.rows, statistics.row_counts
        assert rows is not None and counts is not None
        count = counts.sum()
        spread = torch.logsumexp(rows, 0) - count.clamp(min=1).log() - 2 * self.t
        return self.views[name][2] * torch.where(count > 0, spread, 0)


class Uniformity(_Spread):
    """Uniformity within each modality (Wang & Isola 2020, arXiv:2005.10242, eq. 4), mean over modalities.

    Rows with equal ids are the same sample and are not pushed apart.
    """

    @dataclass(kw_only=True)
    class Config(_Spread.Config):
        """Which modalities."""

        modalities: tuple[str, ...] = ("image", "text")
        """Each is spread by itself."""

    def __init__(self, config: Config) -> None:
        names = tuple(dict.fromkeys(config.modalities))
        if not names:
            raise ConfigError("Uniformity needs at least one modality; `modalities` is empty")
        super().__init__(config, {m: (m, m, 1 / len(names)) for m in names})
        self.config = config


class CrossUniformity(_Spread):
    """Uniformity between the rows of one modality and the unmatched rows of another (arXiv:2405.18570, L_XUniform)."""

    @dataclass(kw_only=True)
    class Config(_Spread.Config):
        """Which pairs."""

        pairs: Pairs = (("image", "text"),)
        """Pairs of modalities whose unmatched rows are pushed apart."""
        pair_weights: tuple[float, ...] = ()
        """Relative weight of each pair; none makes them equal. The loss is the weighted mean."""

    def __init__(self, config: Config) -> None:
        check_pairs("CrossUniformity", config.pairs)
        shares = check_weights("CrossUniformity", config.pairs, config.pair_weights)
        views = {f"{x},{y}": (x, y, share) for (x, y), share in zip(config.pairs, shares, strict=True)}
        super().__init__(config, views)
        self.config = config
