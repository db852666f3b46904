"""Which candidate belongs to several known modalities together, such as the picture to a prompt and a text.

Letters: q queries, n candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.data.compose import Compose
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import Embedded, embed
from mmcontrast.eval.ranks import rank
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.statistics import chance_recall, mean
from mmcontrast.eval.task import Task, fields_of, groups_of


class Joint(Task):
    """Accuracy of the nearest candidates, given all other modalities (Saporta et al. 2024, arXiv:2411.01053, sec. 5).

    The score "product" is Symile's: the inner product of a candidate with the elementwise product of the known
    embeddings. "sum" is that of pairwise models: the sum of the candidate's cosines with them.
    """

    @dataclass(kw_only=True)
    class Config(Task.Config):
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

    config: Config

    def __init__(self, config: Config) -> None:
        if config.draws < 1:
            raise ConfigError(f"joint draws is {config.draws}; it must be at least 1")
        if not config.known or config.candidate in config.known:
            raise ConfigError(f"joint known is {config.known}; name modalities other than {config.candidate!r}")
        self.config = config

    def answer(self, model: MultiEncoder) -> Result:
        """Embed the candidates once and the queries `draws` times; the result of `score`."""
        c = self.config
        candidates = embed(model, c.data, modalities=[c.candidate], compose=c.compose)
        draws = range(c.draws)
        return self.score(
            candidates, [embed(model, c.data, modalities=c.known, compose=c.compose, draw=d) for d in draws]
        )

    def score(self, candidates: Embedded, queries: Sequence[Embedded]) -> Result:
        """acc1 and acc5 over samples, what chance reaches, and what is known of the data.

        A wrong candidate that ties with the best right one stands before it, so equal embeddings do not score.

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
        named: dict[str, Mapping[str, Any]] = {}
        positives: list[int] = []
        for draw in queries:
            rows, z = _together(draw, c.known)
            names = _labels(draw, rows, c.label)
            asked = [i for i, name in enumerate(names) if name in numbers]
            labels = torch.tensor([numbers[names[i]] for i in asked], dtype=torch.int64)
            if not asked:
                continue
            found = rank(_bring_together(z, c.score)[asked], candidates.z[c.candidate], labels, right)
            positives += counts[labels.numpy()].tolist()
            for i, place in zip(asked, found.best.tolist(), strict=True):
                row = int(rows[i])
                (name,) = draw.names_of(rows[i : i + 1])
                named[name] = draw.meta[row]
                ranks.setdefault(name, []).append(place)
        if not ranks:
            raise ConfigError(f"no sample has all of {', '.join(c.known)} and a right candidate: nothing is asked")
        # By sample: the draws of one sample are not independent questions.
        hits = {k: [float(np.mean([place < k for place in of_sample])) for of_sample in ranks.values()] for k in (1, 5)}
        groups = groups_of(list(named.values()), range(len(named)), c.bootstrap_by)
        return Result(
            "joint_retrieval",
            [Items(list(ranks), {f"acc{k}": mean(values) for k, values in hits.items()}, groups)],
            facts=dict(candidates.facts),
            chance={f"chance@{k}": chance_recall(len(right), positives, k) for k in hits},
            counts={
                "queries": len(positives),
                "samples": len(ranks),
                "candidates": len(right),
                "classes": len(numbers),
            },
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
