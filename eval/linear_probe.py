"""Linear probe: what a linear classifier can tell by the embeddings, learned from labelled training data.

Letters: n samples, D dimensions, C classes, G strengths of regularisation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.eval.classified import softmax
from mmcontrast.eval.statistics import Floats
from mmcontrast.eval.trained import Examples, Learned, Probe, divided, worth


class LinearProbe(Probe):
    """A logistic regression on frozen embeddings (CLIP, Radford et al. 2021, arXiv:2103.00020, app. A.3).

    Softmax for one class per sample, one yes-or-no regression per class where labels are lists; L2 regularisation,
    L-BFGS. As there, its strength is the best of a grid on held-out training samples, and the classifier is then
    trained on all of them; a tie goes to the stronger. Unlike there, features have unit norm and are then
    standardised: each dimension is centred and scaled to variance 1 on the training samples, so that one grid suits
    every D.
    """

    task = "linear_probe"
    renamed = ("acc1", "acc5", "mean_per_class_recall")

    @dataclass(kw_only=True)
    class Config(Probe.Config):
        """What is classified, what is learned from, and how."""

        c: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
        """Inverse strengths of regularisation to choose from, as scikit-learn's C: the weight of the summed losses."""
        max_iterations: int = 1000
        """Steps of L-BFGS after which a fit stops."""

    config: Config

    def __init__(self, config: Config) -> None:
        if not config.c or min(config.c) <= 0:
            raise ConfigError(f"linear_probe c is {config.c}; name inverse strengths above 0")
        self.config = config

    def learn(self, train: Examples, classes: int) -> Learned:
        """Choose C where there are several, then train on all samples."""
        from tqdm import tqdm

        grid = sorted(self.config.c)
        facts: dict[str, float | None] = {}
        warnings: list[str] = []
        best = grid[0]
        if len(grid) > 1:
            fitted, held = divided(train, self.task)
            probe = _Regression(fitted, classes, self.config.max_iterations)
            values: list[float] = []
            for c in tqdm(grid, desc=self.task, unit="fit", disable=not sys.stderr.isatty()):
                probe.fit(c)
                values.append(worth(probe.scores(held.x), held.right))
            best = grid[int(np.argmax(values))]
            facts["held_out_mean_average_precision" if train.right.ndim > 1 else "held_out_acc1"] = max(values)
            if best == grid[-1]:
                warnings.append(f"C = {best:g} is the largest of the grid: a weaker regularisation may be better still")
        probe = _Regression(train, classes, self.config.max_iterations)
        probe.fit(best)
        if probe.stopped:
            warnings.append(f"the fit stopped after {self.config.max_iterations} steps; raise max_iterations")
        return Learned(probe.scores, softmax(1.0), {"C": best, **facts}, warnings)


class _Regression:
    """Standardisation, and a regression that goes on from the last one's weights."""

    def __init__(self, train: Examples, classes: int, max_iterations: int) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        self.scaler = StandardScaler()
        self.x: Floats = self.scaler.fit_transform(train.x.astype(np.float64))
        self.classes = classes
        self.stopped = False
        columns: list[NDArray[Any]] = [train.right] if train.right.ndim == 1 else list(train.right.T)
        # A class that all samples have, or none, cannot be told by anything.
        self.targets = {k: y for k, y in enumerate(columns) if len(np.unique(y)) > 1}
        self.several = train.right.ndim > 1
        if not self.targets:
            raise ConfigError("all training samples have the same class: there is nothing to learn")
        self.models = {k: LogisticRegression(max_iter=max_iterations, warm_start=True) for k in self.targets}

    def fit(self, c: float) -> None:
        """Train with an inverse strength of regularisation."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ConvergenceWarning)
            for k, model in self.models.items():
                model.set_params(C=c).fit(self.x, self.targets[k])
        self.stopped = any(issubclass(w.category, ConvergenceWarning) for w in said)

    def scores(self, x: NDArray[np.float32]) -> Floats:
        """Logits [n, C]; -inf of a class that no training sample has, 0 of a yes-or-no class that was not learned."""
        prepared = self.scaler.transform(x.astype(np.float64))
        if self.several:
            found = np.zeros((len(x), self.classes))
            for k, model in self.models.items():
                found[:, k] = model.decision_function(prepared)
            return found
        (model,) = self.models.values()
        logits = model.decision_function(prepared)
        found = np.full((len(x), self.classes), -np.inf)
        found[:, model.classes_] = logits if logits.ndim > 1 else np.stack([np.zeros(len(x)), logits], axis=1)
        return found
