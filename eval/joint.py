"""Which candidate belongs to several known modalities together, such as the picture to a prompt and a text.

Letters: q queries, n candidates, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.data.compose import Compose
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.ranks import rank
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.shown import gallery, items_of
from mmcontrast.eval.statistics import chance_recall, mean, median
from mmcontrast.eval.task import EmbeddedTask, fields_of, groups_of


class Joint(EmbeddedTask):
    """Accuracy of the nearest candidates, given all other modalities (Saporta et al. 2024, arXiv:2411.01053, sec. 5).

    The score "product" is Symile's: the inner product of a candidate with the elementwise product of the known
    embeddings. "sum" is that of pairwise models: the sum of the candidate's cosines with them.
    """

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is asked, of which data."""

        compose: Compose.Config = field(default_factory=Compose.Config)
        """How an example is made of samples."""
        candidate: str = "image"
        """The modality that is looked for."""
        known: tuple[str, ...] = ("audio", "text")
        """The modalities that are given; a query needs all of them."""
        score: Literal["product", "sum"] = "product"
        """How the known embeddings are brought together."""
        label: str | None = None
        """Metadata field: candidates with the query's value are right; None takes the query's own sample alone."""
        draws: int = 1
        """Queries per sample, where examples are composed: each another draw, the same ones whenever asked."""
        k: tuple[int, ...] = (1, 5)
        """Ranks at which accuracy is counted."""

    config: Config

    def __init__(self, config: Config) -> None:
        if config.draws < 1:
            raise ConfigError(f"joint draws is {config.draws}; it must be at least 1")
        if not config.known or config.candidate in config.known:
            raise ConfigError(f"joint known is {config.known}; name modalities other than {config.candidate!r}")
        if not config.k or min(config.k) < 1:
            raise ConfigError(f"joint k is {config.k}; name ranks of at least 1")
        self.config = config

    def modalities(self) -> Sequence[str]:
        """What is looked for, and what is given."""
        return [self.config.candidate, *self.config.known]

    def answer(self, model: MultiEncoder) -> Result:
        """Embed the candidates once and the queries `draws` times; the result of `between`."""
        c = self.config
        candidates = embed(model, c.data, modalities=[c.candidate], compose=c.compose)
        draws = [embed(model, c.data, modalities=c.known, compose=c.compose, draw=d) for d in range(c.draws)]
        kinds = {**candidates.kinds, **draws[0].kinds}
        return self.located(self.between(candidates, draws), replace(candidates, kinds=kinds))

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Samples as they are: each is a query for the candidates of all.

        Raises:
            ConfigError: examples are to be composed, which `answer` does.
        """
        if not self._as_they_are():
            raise ConfigError("joint: examples can be composed by the evaluators of a recipe only")
        return self.between(data, [data])

    def _as_they_are(self) -> bool:
        return self.config.draws == 1 and self.config.compose == Compose.Config()

    def between(self, candidates: Embedded, queries: Sequence[Embedded]) -> Result:
        """Over samples, see below; what chance reaches; and what is known of the data.

        - acc1, acc5: a right candidate is among so many nearest; acc1%: among the nearest hundredth.
        - median_rank of the best right candidate, from 1; map@10: mean average precision at 10.

        Of a sample that is drawn several times all are means over its draws. Of a modality that a sample has several
        times, such as captions, a query takes the first. A wrong candidate that ties with the best right one stands
        before it, so equal embeddings do not score.

        Details, of samples as they are: `galleries`, one of queries with their answers (`mmcontrast.eval.shown`).

        Raises:
            ConfigError: no candidate, no sample with all that is known, or none with the label.
        """
        c = self.config
        if c.candidate not in candidates.rows:
            raise ConfigError(f"no sample has the modality {c.candidate!r}: there is nothing to find")
        wanted = _labels(candidates, candidates.rows[c.candidate], c.label)
        numbers = {name: k for k, name in enumerate(sorted(set(wanted)))}
        right = torch.tensor([numbers[name] for name in wanted])  # [n]
        counts = np.bincount(right.numpy())
        ranks: dict[str, list[int]] = {}  # a sample -> of each of its draws
        precisions: dict[str, list[float]] = {}
        named: dict[str, Mapping[str, Any]] = {}
        positives: list[int] = []
        galleries: list[dict[str, Any]] = []
        for draw in queries:
            rows, z = _together(draw, c.known)
            names = _labels(draw, rows, c.label)
            asked = [i for i, name in enumerate(names) if name in numbers]
            labels = torch.tensor([numbers[names[i]] for i in asked], dtype=torch.int64)
            if not asked:
                continue
            brought, z_candidates = _bring_together(z, c.score)[asked], candidates.z[c.candidate]
            found = rank(brought, z_candidates, labels, right)
            if self._as_they_are():
                y = items_of(candidates, c.candidate, torch.arange(len(z_candidates)))
                x = torch.stack([draw.positions[rows[asked]], torch.zeros_like(labels)], 1)
                shown = gallery(brought, z_candidates, labels, right, found, x, y)
                galleries.append({"from": list(c.known), "to": c.candidate} | shown)
            positives += counts[labels.numpy()].tolist()
            for i, place, precision in zip(asked, found.best.tolist(), found.average_precision.tolist(), strict=True):
                row = int(rows[i])
                (name,) = draw.names_of(rows[i : i + 1])
                named[name] = draw.meta[row]
                ranks.setdefault(name, []).append(place)
                precisions.setdefault(name, []).append(precision)
        if not ranks:
            raise ConfigError(f"no sample has all of {', '.join(c.known)} and a right candidate: nothing is asked")
        # By sample: the draws of one sample are not independent questions.
        levels = {**{str(k): k for k in c.k}, "1%": math.ceil(len(right) / 100)}
        statistics = {
            f"acc{name}": mean([float(np.mean([place < k for place in of_sample])) for of_sample in ranks.values()])
            for name, k in levels.items()
        }
        statistics["median_rank"] = median([float(np.mean(of_sample)) + 1 for of_sample in ranks.values()])
        statistics["map@10"] = mean([float(np.mean(of_sample)) for of_sample in precisions.values()])
        groups = groups_of(list(named.values()), range(len(named)), c.bootstrap_by)
        return Result(
            "joint_retrieval",
            [Items(list(ranks), statistics, groups)],
            facts=dict(candidates.facts),
            chance={f"chance@{k}": chance_recall(len(right), positives, k) for k in c.k},
            counts={
                "queries": len(positives),
                "samples": len(ranks),
                "candidates": len(right),
                "classes": len(numbers),
            },
            details={"galleries": galleries},
        )


def _labels(data: Embedded, rows: Tensor, label: str | None) -> list[str]:
    """What makes a candidate right, per row; a row without the label is its own."""
    if label is None:
        return [str(int(data.positions[row])) for row in rows]
    values = [data.meta[row].get(label) for row in rows.tolist()]
    if all(value is None for value in values):
        raise ConfigError(f"no sample has the label {label!r} in its metadata; fields: {fields_of(data.meta)}")
    return [
        f"= {v}" if v is not None else f"at {data.positions[r]}" for v, r in zip(values, rows.tolist(), strict=True)
    ]


def _together(data: Embedded, modalities: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Rows that have all of the modalities [q], and their embeddings, [q, D] each."""
    rows = data.having(*modalities)
    if not len(rows):
        return rows, [torch.zeros(0, 1)]
    return rows, [data.z[m][torch.searchsorted(data.rows[m], rows)] for m in modalities]


def _bring_together(z: Sequence[Tensor], score: Literal["product", "sum"]) -> Tensor:
    """[q, D]: what a candidate's inner product with is the score."""
    stacked = torch.stack(list(z))
    return stacked.prod(0) if score == "product" else stacked.sum(0)
