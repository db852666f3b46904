"""Few-shot: what a handful of labelled examples of each class suffices for, with and without the class names.

Letters: n samples, D dimensions, C classes, K examples of each class.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.statistics import Floats, Statistic, mean
from mmcontrast.eval.trained import Posed, TrainedTask, unseen
from mmcontrast.eval.zero_shot import class_embeddings, prompts_of
from mmcontrast.randomness import permutation

_BLOCK = 4096  # samples scored at once


class FewShot(TrainedTask):
    """Nearest class mean of K examples (prototypes, Snell et al. 2017, arXiv:1703.05175), and blended with the prompts.

    A prototype is the mean of a class's K embeddings, at unit norm; a sample is of the class whose prototype has the
    largest cosine. Blended, the score is `blend` times the cosine with the class's prompts, as zero-shot classification
    has it, plus 1 - `blend` times that with the prototype: no labels are left to choose the weight by, so it is given.
    """

    @dataclass(kw_only=True)
    class Config(TrainedTask.Config):
        """What is classified, what is learned from, and how."""

        shots: tuple[int, ...] = (1, 2, 4, 8, 16)
        """K, examples of each class."""
        draws: int = 5
        """How often examples are drawn; always the same ones, and those of a smaller K are among those of a larger."""
        blend: float = 0.5
        """Weight of the prompts."""
        prompt_modality: str | None = "text"
        """What the class names are encoded as; None asks with prototypes alone."""
        templates: tuple[str, ...] = ()
        """Prompts, each with {c} for the class name; without any, those of the data, or the bare name."""
        prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts, instead of the templates."""
        names: dict[str, str] = field(default_factory=dict[str, str])
        """Class, as the labels have it -> what prompts call it; by default the same."""

    config: Config

    def __init__(self, config: Config) -> None:
        if not config.shots or min(config.shots) < 1:
            raise ConfigError(f"few_shot shots is {config.shots}; name numbers of at least 1")
        if config.draws < 1:
            raise ConfigError(f"few_shot draws is {config.draws}; it must be at least 1")
        if not 0 <= config.blend <= 1:
            raise ConfigError(f"few_shot blend is {config.blend}; it must be in 0..1")
        self.config = config

    def score(self, model: MultiEncoder, data: Embedded, train: Embedded | None = None) -> Result:
        """Means over draws, with intervals over samples, for each K; see below.

        - acc1@Kshot: the right class has the nearest prototype. Its spread over draws is acc1@Kshot_std (n - 1).
        - blend_acc1@Kshot: the same with the prompts.
        - zero_shot_acc1: the prompts alone, of the same samples.

        A class that ties with the right one stands before it; one without training samples cannot be found.

        Raises:
            ConfigError: as `pose`, or labels that are lists.
        """
        c = self.config
        p = self.pose(model, data, train)
        if p.right.ndim > 1:
            raise ConfigError("few_shot takes one class for each sample; these labels are lists of classes")
        heads: Floats | None = None
        if c.prompt_modality is not None and c.features == "projected":
            prompts = prompts_of(p.classes, c.prompts, c.templates or data.source.templates, c.names)
            heads = class_embeddings(model, c.prompt_modality, prompts).double().numpy()
        statistics: dict[str, Statistic] = {}
        facts: dict[str, float | None] = {}
        for shots in c.shots:
            hits: dict[str, list[Floats]] = {}
            for draw in range(c.draws):
                means, there = self._prototypes(p, shots, draw)
                hits.setdefault("acc1", []).append(_hits(p, means, there))
                if heads is not None:
                    blended = c.blend * heads + (1 - c.blend) * means
                    hits.setdefault("blend_acc1", []).append(_hits(p, blended, there))
            for name, of_draws in hits.items():
                statistics[f"{name}@{shots}shot"] = mean(np.mean(of_draws, axis=0))
                if c.draws > 1:
                    facts[f"{name}@{shots}shot_std"] = float(np.std(np.mean(of_draws, axis=1), ddof=1))
        if heads is not None:
            statistics["zero_shot_acc1"] = mean(_hits(p, heads, np.ones(len(p.classes), dtype=bool)))
        counts = np.bincount(p.examples.right, minlength=len(p.classes))
        few = {k: int(((counts > 0) & (counts < k)).sum()) for k in c.shots}
        return Result(
            "few_shot",
            [Items(p.names, statistics, p.groups)],
            facts=facts,
            chance={"chance": 1 / len(p.classes)},
            counts={"classes": len(p.classes), "samples": len(p.x), "training_samples": len(p.examples.x)},
            warnings=[
                *p.warnings,
                *unseen(p),
                *(
                    f"{n} of {len(p.classes)} classes have less than {k} training samples: all are taken"
                    for k, n in few.items()
                    if n
                ),
            ],
        )

    def _prototypes(self, p: Posed, shots: int, draw: int) -> tuple[Floats, NDArray[np.bool_]]:
        """Class means of K drawn examples [C, D], 0 where there is none; and where there is one [C]."""
        means = np.zeros((len(p.classes), p.x.shape[1]))
        for k in np.unique(p.examples.right).tolist():
            of_class = np.flatnonzero(p.examples.right == k)
            taken = of_class[permutation(len(of_class), "few shots", draw, k)[:shots]]
            means[k] = p.examples.x[taken].astype(np.float64).mean(0)
        length = np.linalg.norm(means, axis=1, keepdims=True)
        return np.divide(means, length, out=np.zeros_like(means), where=length > 0), length[:, 0] > 0


def _hits(p: Posed, heads: Floats, there: NDArray[np.bool_]) -> Floats:
    """[n]: whether no other class scores as high as the right one; a class that is not there never does."""
    found: list[NDArray[np.bool_]] = []
    for start in range(0, len(p.x), _BLOCK):
        scores = p.x[start : start + _BLOCK].astype(np.float64) @ heads.T
        scores[:, ~there] = -np.inf
        right = p.right[start : start + _BLOCK]
        found.append((~(scores < scores[np.arange(len(right)), right][:, None])).sum(1) == 1)
    return np.concatenate(found).astype(np.float64)
