"""Which candidate belongs to several known modalities together, such as the picture to a prompt and a text.

Letters: q queries, n candidates, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.data.compose import Compose
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import Embedded, embed, fields_of
from mmcontrast.eval.statistics import bootstrap, chance_recall


class Joint(Configurable):
    """Accuracy of the nearest candidates, given all other modalities (Saporta et al. 2024, arXiv:2411.01053, sec. 5).

    The score "product" is Symile's: the inner product of a candidate with the elementwise product of the known
    embeddings. "sum" is that of pairwise models: the sum of the candidate's cosines with them.
    """

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """What is asked, of which data."""

        data: tuple[str, ...]
        """Shards of the samples, or of the anchors where examples are composed."""
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

    def __init__(self, config: Config) -> None:
        if config.draws < 1:
            raise ConfigError(f"joint draws is {config.draws}; it must be at least 1")
        if not config.known or config.candidate in config.known:
            raise ConfigError(f"joint known is {config.known}; name modalities other than {config.candidate!r}")
        self.config = config

    def run(self, model: MultiEncoder) -> dict[str, float | None]:
        """Embed the candidates once and the queries `draws` times; the metrics of `score`."""
        c = self.config
        candidates = embed(model, c.data, modalities=[c.candidate], compose=c.compose)
        draws = range(c.draws)
        return self.score(
            candidates, [embed(model, c.data, modalities=c.known, compose=c.compose, draw=d) for d in draws]
        )

    def score(self, candidates: Embedded, queries: Sequence[Embedded]) -> dict[str, float | None]:
        """acc1 and acc5 with 95 % intervals over samples, what chance reaches, what is known of the data, and counts.

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
        ranks: dict[int, list[float]] = {}  # a sample's position -> of each of its draws
        positives: list[int] = []
        for draw in queries:
            rows, z = _together(draw, c.known)
            names = _labels(draw, rows, c.label)
            asked = [i for i, name in enumerate(names) if name in numbers]
            labels = torch.tensor([numbers[names[i]] for i in asked], dtype=torch.int64)
            found = _ranks(_bring_together(z, c.score)[asked], candidates.z[c.candidate], labels, right)
            positives += counts[labels.numpy()].tolist()
            for i, rank in zip(asked, found.tolist(), strict=True):
                ranks.setdefault(int(draw.positions[rows[i]]), []).append(rank)
        if not ranks:
            raise ConfigError(f"no sample has all of {', '.join(c.known)} and a right candidate: nothing is asked")
        metrics: dict[str, float | None] = {}
        for k in (1, 5):
            # By sample: the draws of one sample are not independent questions.
            hits = [float(np.mean([rank < k for rank in of_sample])) for of_sample in ranks.values()]
            low, high = bootstrap(hits)
            metrics |= {f"acc{k}": float(np.mean(hits)), f"acc{k}_low": low, f"acc{k}_high": high}
            metrics[f"chance@{k}"] = chance_recall(len(right), positives, k)
        return metrics | {
            **candidates.facts,
            "queries": float(len(positives)),
            "samples": float(len(ranks)),
            "candidates": float(len(right)),
            "classes": float(len(numbers)),
        }


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
    rows = torch.arange(len(data.keys))
    for modality in modalities:
        rows = rows[torch.isin(rows, data.rows.get(modality, torch.zeros(0, dtype=torch.int64)))]
    if not len(rows):
        return rows, [torch.zeros(0, 1)]
    return rows, [data.z[m][torch.searchsorted(data.rows[m], rows)] for m in modalities]


def _bring_together(z: Sequence[Tensor], score: Literal["product", "sum"]) -> Tensor:
    """[q, D]: what a candidate's inner product with is the score."""
    stacked = torch.stack(list(z))
    return stacked.prod(0) if score == "product" else stacked.sum(0)


def _ranks(queries: Tensor, candidates: Tensor, wanted: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """[q]: how many wrong candidates stand before the best right one; holds [chunk, n] scores at most."""
    ranks = [torch.zeros(0, dtype=torch.int64)]
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ candidates.T
        right = wanted[start : start + chunk, None] == labels
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # "not below" instead of "at least": an embedding that is not a number must not win.
        ranks.append((~(scores < best) & ~right).sum(1))
    return torch.cat(ranks)
