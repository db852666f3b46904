"""Nearest neighbours: the class that most training samples near to a sample have, without any training.

Letters: n samples, D dimensions, C classes, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.eval.statistics import Floats
from mmcontrast.eval.trained import Examples, Learned, Probe, divided, worth


class KNN(Probe):
    """k nearest neighbours by cosine, with votes weighted by e^(cosine / T) (Wu et al. 2018, arXiv:1805.01978, 3.4).

    k is the best of a grid on held-out training samples, a tie goes to the smaller; the neighbours are then looked for
    among all of them. A class's score is its share of the votes. The search is exact (FAISS).
    """

    task = "knn"

    @dataclass(kw_only=True)
    class Config(Probe.Config):
        """What is classified, what is learned from, and how."""

        k: tuple[int, ...] = (1, 3, 5, 10, 20, 50, 100, 200)
        """Numbers of neighbours to choose from."""
        temperature: float = 0.07
        """T: how much nearer neighbours weigh more."""

    config: Config

    def __init__(self, config: Config) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(f"knn k is {config.k}; name numbers of at least 1")
        if config.temperature <= 0:
            raise ConfigError(f"knn temperature is {config.temperature}; it must be above 0")
        self.config = config

    def learn(self, train: Examples, classes: int) -> Learned:
        """Choose k where there are several that the training data suffice for."""
        fitted, held = divided(train, self.task)
        grid = sorted({min(k, len(train.x)) for k in self.config.k})
        facts: dict[str, float | None] = {}
        best = grid[0]
        if len(grid) > 1:
            index = _Neighbours(fitted, classes, self.config.temperature)
            near = index.search(held.x, min(grid[-1], len(fitted.x)))
            values = [worth(index.votes(near, k), held.right) for k in grid]
            best = grid[int(np.argmax(values))]
            facts["held_out_mean_average_precision" if train.right.ndim > 1 else "held_out_acc1"] = max(values)
        index = _Neighbours(train, classes, self.config.temperature)
        return Learned(
            lambda x: index.votes(index.search(x, best), best), lambda shares: shares, {"k": float(best), **facts}
        )


class _Neighbours:
    """The training samples, to be searched and to vote."""

    def __init__(self, train: Examples, classes: int, temperature: float) -> None:
        import faiss

        self.index: Any = faiss.IndexFlatIP(train.x.shape[1])
        self.index.add(np.ascontiguousarray(train.x))
        self.right, self.classes, self.temperature = train.right, classes, temperature

    def search(self, x: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and numbers of the k nearest, [n, k] each, nearest first."""
        return self.index.search(np.ascontiguousarray(x), k)

    def votes(self, near: tuple[NDArray[np.float32], NDArray[np.int64]], k: int) -> Floats:
        """[n, C]: share of the votes of the first k."""
        cosines, numbers = near[0][:, :k].astype(np.float64), near[1][:, :k]
        weights = np.exp((cosines - cosines[:, :1]) / self.temperature)  # of the nearest 1: no overflow
        weights /= weights.sum(1, keepdims=True)
        found = np.zeros((len(cosines), self.classes))
        if self.right.ndim == 1:
            rows = np.repeat(np.arange(len(cosines)), cosines.shape[1])
            np.add.at(found, (rows, self.right[numbers].ravel()), weights.ravel())
        else:
            for j in range(cosines.shape[1]):
                found += weights[:, j, None] * self.right[numbers[:, j]]
        return found
