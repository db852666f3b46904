"""Retrieval between two modalities, with several right answers per query and bounded memory.

Letters: n pairs, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import Embedded, embed, fields_of
from mmcontrast.eval.statistics import bootstrap, chance_recall


class Retrieval(Configurable):
    """Recall@k from one modality to another and back (Karpathy and Fei-Fei 2015, arXiv:1412.2306, 4.1)."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """What is searched with what."""

        data: tuple[str, ...]
        """Shards with pairs."""
        pair: tuple[str, str] = ("image", "text")
        """The two modalities."""
        k: tuple[int, ...] = (1, 5, 10)
        """Ranks at which recall is counted."""
        group: str | None = None
        """Metadata field: samples with equal values are right answers to each other's queries."""

    def __init__(self, config: Config) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(f"retrieval k is {config.k}; name ranks of at least 1")
        self.config = config

    def run(self, model: MultiEncoder) -> dict[str, float | None]:
        """Embed and rank; the metrics of `score`."""
        return self.score(embed(model, self.config.data, modalities=self.config.pair))

    def score(self, data: Embedded) -> dict[str, float | None]:
        """`x_to_y_recall@k` both ways with 95 % intervals at the largest k, `chance@k`, and the median rank.

        Samples with the same text, or the same `group`, are right answers to each other. A wrong candidate
        that ties with the best right one stands before it, so equal embeddings do not score.

        Raises:
            ConfigError: no sample has both modalities, or none has the group.
        """
        x, y = self.config.pair
        rows, zx, zy = data.paired(x, y)
        if not len(rows):
            raise ConfigError(f"no sample has both {x} and {y}: there is nothing to retrieve")
        labels = self._labels(data, rows)
        positives = np.bincount(labels.numpy())[labels.numpy()]
        found: dict[str, float | None] = {"samples": float(len(rows))}
        for a, b, za, zb in ((x, y, zx, zy), (y, x, zy, zx)):
            ranks = best_ranks(za, zb, labels)
            for k in self.config.k:
                found[f"{a}_to_{b}_recall@{k}"] = float((ranks < k).double().mean())
            top = max(self.config.k)
            low, high = bootstrap((ranks < top).double())
            found |= {f"{a}_to_{b}_recall@{top}_low": low, f"{a}_to_{b}_recall@{top}_high": high}
            found[f"{a}_to_{b}_median_rank"] = float(ranks.double().median()) + 1
        return found | {f"chance@{k}": chance_recall(len(rows), positives, k) for k in self.config.k}

    def _labels(self, data: Embedded, rows: Tensor) -> Tensor:
        """[n]: equal numbers are right answers to each other."""
        numbers: dict[str, int] = {}
        labels: list[int] = []
        texts = [m for m in self.config.pair if data.reader.transforms[m].kind == "text"]
        group = self.config.group
        if group is not None and all(data.meta[row].get(group) is None for row in rows.tolist()):
            raise ConfigError(f"no sample has the group {group!r} in its metadata; fields: {fields_of(data.meta)}")
        for row in rows.tolist():
            own = f"row {row}"
            if group is not None:
                value = data.meta[row].get(group)
                own = own if value is None else f"group {value}"
            elif texts:
                own = f"text {data.reader.raw(int(data.positions[row]), texts[0])}"
            labels.append(numbers.setdefault(own, len(numbers)))
        return torch.tensor(labels)


def best_ranks(queries: Tensor, candidates: Tensor, labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """[n]: how many wrong candidates stand before the best right one; holds [chunk, n] scores at most."""
    ranks: list[Tensor] = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ candidates.T
        right = labels[start : start + chunk, None] == labels
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # "not below" instead of "at least": an embedding that is not a number must not win.
        ranks.append((~(scores < best) & ~right).sum(1))
    return torch.cat(ranks)


def clip_benchmark_names(metrics: dict[str, float | None], ks: Sequence[int]) -> dict[str, float | None]:
    """Image-text metrics under CLIP_benchmark's names beside our own."""
    renamed = {
        theirs: metrics[ours]
        for k in ks
        for theirs, ours in (
            (f"image_retrieval_recall@{k}", f"text_to_image_recall@{k}"),
            (f"text_retrieval_recall@{k}", f"image_to_text_recall@{k}"),
        )
        if ours in metrics
    }
    return metrics | renamed
