"""How two modalities lie in the shared space: the gap between them, and how evenly each is spread.

Letters: n pairs, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.shown import plane
from mmcontrast.eval.statistics import mean
from mmcontrast.eval.task import EmbeddedTask, groups_of
from mmcontrast.geometry import centroid_distance, effective_rank, spread


class Geometry(EmbeddedTask):
    """The modality gap (Liang et al. 2022, arXiv:2203.02053), measured as by Fahim et al. 2024 (arXiv:2405.18570)."""

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """Where to look."""

        pair: tuple[str, str] = ("image", "text")
        """The two modalities."""
        t: float = 2.0
        """Sharpness of uniformity."""

    config: Config

    def __init__(self, config: Config) -> None:
        if config.t <= 0:
            raise ConfigError(f"geometry t is {config.t}; it must be above 0")
        self.config = config

    def modalities(self) -> Sequence[str]:
        """Both of the pair."""
        return self.config.pair

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Measures of the n pairs, each pair once.

        - centroid_distance: |mean x - mean y|, 0 without a gap, at most 2.
        - linear_separability: accuracy, on pairs held out, of a logistic regression that tells the modalities apart;
          0.5 without a gap, 1 where a plane divides them. None below ten pairs.
        - matched_cosine, mismatched_cosine: mean over pairs, and over all others.
        - alignment: mean squared distance of pairs; uniformity_x: log mean e^{-t |a - b|^2} within a modality;
          cross_uniformity: between rows of the two that are no pair. Lower is more even.
        - effective_rank_x: e^entropy of the normalised singular values (Roy and Vetterli 2007), up to D.

        Raises:
            ConfigError: fewer than two samples have both modalities.
        """
        x, y = self.config.pair
        rows, zx, zy = data.paired(x, y)
        if len(rows) < 2:
            raise ConfigError(f"{len(rows)} samples have both {x} and {y}; geometry needs at least 2")
        zx, zy = zx.double(), zy.double()
        matched = (zx * zy).sum(1)
        across, mismatched = spread(zx, zy, self.config.t)
        found: dict[str, float | None] = {
            "centroid_distance": centroid_distance(zx, zy),
            "linear_separability": _separability(zx, zy),
            "mismatched_cosine": mismatched,
            "cross_uniformity": across,
        }
        for name, z in ((x, zx), (y, zy)):
            found[f"uniformity_{name}"], found[f"cosine_within_{name}"] = spread(z, z, self.config.t)
            found[f"effective_rank_{name}"] = effective_rank(z)
        items = Items(
            data.names_of(rows),
            {"matched_cosine": mean(matched.numpy()), "alignment": mean((2 - 2 * matched).numpy())},
            groups_of(data.meta, rows.tolist(), self.config.bootstrap_by),
        )
        details = {"pair": [x, y], "plane": plane(data, x, y)}
        return Result("geometry", [items], facts=found, counts={"samples": len(rows)}, details=details)


def _separability(x: Tensor, y: Tensor) -> float | None:
    """Held-out accuracy of a linear classifier, both sides of a pair in one part; one pair in five is held out."""
    if len(x) < 10:
        return None
    from sklearn.linear_model import LogisticRegression

    held = torch.arange(len(x)) % 5 == 0
    parts = [torch.cat([x[keep], y[keep]]).numpy() for keep in (~held, held)]
    labels = [np.repeat([0, 1], int(keep.sum())) for keep in (~held, held)]
    classifier = LogisticRegression(max_iter=1000).fit(parts[0], labels[0])
    return float(classifier.score(parts[1], labels[1]))
