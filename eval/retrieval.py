"""Retrieval between two modalities, with several right answers per query and bounded memory.

Letters: n, m items of the two modalities, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.counting import BLOCK
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.ranks import Ranks, rank_both_ways
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.shown import gallery, items_of, plane
from mmcontrast.eval.statistics import Statistic, chance_recall, mean, median
from mmcontrast.eval.task import EmbeddedTask, fields_of, groups_of


class Retrieval(EmbeddedTask):
    """Recall@k from one modality to another and back (Karpathy and Fei-Fei 2015, arXiv:1412.2306, 4.1)."""

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is searched with what."""

        pair: tuple[str, str] = ("image", "text")
        """The two modalities."""
        k: tuple[int, ...] = (1, 5, 10)
        """Ranks at which recall is counted."""
        group: str | None = None
        """Metadata field: samples with equal values are right answers to each other's queries."""
        equal_texts: bool = True
        """Where each sample has one text: samples with the same text are right answers to each other's queries."""
        block: int = BLOCK
        """Queries that a core scores at once: 8 kB for each of them; changes no rank."""

    config: Config

    def __init__(self, config: Config) -> None:
        if not config.k or min(config.k) < 1:
            raise ConfigError(f"retrieval k is {config.k}; name ranks of at least 1")
        if config.block < 1:
            raise ConfigError(f"retrieval block is {config.block}; it must be at least 1")
        self.config = config

    def modalities(self) -> Sequence[str]:
        """Both of the pair."""
        return self.config.pair

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """For each direction x_to_y, over its queries, see below.

        - recall@k: the share with a right answer among the first k; recall@1%: among the first hundredth.
        - median_rank of the best right answer, from 1.
        - map@10: mean average precision at 10.

        A query may have several right answers: all items of its own sample, of samples with the same `group`, or, by
        `equal_texts`, with the same text. A wrong candidate that ties with the best right one stands before it, so
        equal embeddings do not score. Image and text also get CLIP_benchmark's names.

        Raises:
            ConfigError: no sample has both modalities, or none has the group.
        """
        c = self.config
        x, y = c.pair
        rows = data.having(x, y)
        if not len(rows):
            raise ConfigError(f"no sample has both {x} and {y}: there is nothing to retrieve")
        labels = self._labels(data, rows)
        places = {m: data.items_of(m, rows) for m in (x, y)}
        owners = {m: torch.searchsorted(rows, data.rows[m][places[m]]) for m in (x, y)}
        zx, zy = (data.z[m][places[m]] for m in (x, y))
        found = rank_both_ways(zx, zy, labels[owners[x]], labels[owners[y]], block=c.block)
        items: list[Items] = []
        chance: dict[str, float] = {}
        for way, query, ranks in ((f"{x}_to_{y}", x, found[0]), (f"{y}_to_{x}", y, found[1])):
            of_query = rows[owners[query]]
            groups = groups_of(data.meta, of_query.tolist(), c.bootstrap_by)
            items.append(Items(_names(data.names_of(of_query), way), self._statistics(way, ranks), groups))
            chance |= {f"{way}_chance@{k}": chance_recall(ranks.candidates, ranks.positives, k) for k in c.k}
        if all(chance[f"{x}_to_{y}_chance@{k}"] == chance[f"{y}_to_{x}_chance@{k}"] for k in c.k):
            chance = {f"chance@{k}": chance[f"{x}_to_{y}_chance@{k}"] for k in c.k}
        counts = {"samples": len(rows)}
        if len(zx) > len(rows) or len(zy) > len(rows):
            counts |= {f"{x}_items": len(zx), f"{y}_items": len(zy)}
        return Result(
            "zeroshot_retrieval",
            items,
            chance=chance,
            counts=counts,
            renamed=clip_benchmark_names(c),
            details=self._shown(data, places, {m: labels[owners[m]] for m in (x, y)}, found),
        )

    def _shown(
        self,
        data: Embedded,
        places: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        found: tuple[Ranks, Ranks],
    ) -> dict[str, Any]:
        """Queries with their answers, both ways; and pairs in a plane."""
        x, y = self.config.pair
        z = {m: data.z[m][places[m]] for m in (x, y)}
        items = {m: items_of(data, m, places[m]) for m in (x, y)}
        galleries = [
            {"from": a, "to": b} | gallery(z[a], z[b], labels[a], labels[b], ranks, items[a], items[b])
            for a, b, ranks in ((x, y, found[0]), (y, x, found[1]))
        ]
        return {"pair": [x, y], "galleries": galleries, "plane": plane(data, x, y)}

    def _statistics(self, way: str, ranks: Ranks) -> dict[str, Statistic]:
        best = ranks.best.double().cpu().numpy()
        found = {f"{way}_recall@{k}": mean(best < k) for k in self.config.k}
        hundredth = math.ceil(ranks.candidates / 100)
        return found | {
            f"{way}_recall@1%": mean(best < hundredth),
            f"{way}_median_rank": median(best + 1),
            f"{way}_map@10": mean(ranks.average_precision.cpu().numpy()),
        }

    def _labels(self, data: Embedded, rows: Tensor) -> Tensor:
        """[len(rows)]: equal numbers are right answers to each other."""
        group = self.config.group
        listed = rows.tolist()
        if group is not None:
            values = [data.meta[row].get(group) for row in listed]
            if all(value is None for value in values):
                raise ConfigError(f"no sample has the group {group!r} in its metadata; fields: {fields_of(data.meta)}")
        else:
            texts = [m for m in self.config.pair if data.kinds[m] == "text"]
            if not texts or not self.config.equal_texts or len(data.items_of(texts[0], rows)) > len(rows):
                return torch.arange(len(rows))
            values = data.texts(texts[0], rows)
        numbers: dict[str, int] = {}
        named = (f"at {row}" if v is None else f"= {v}" for row, v in zip(listed, values, strict=True))
        return torch.tensor([numbers.setdefault(name, len(numbers)) for name in named])


def clip_benchmark_names(config: Retrieval.Config) -> dict[str, str]:
    """CLIP_benchmark's names of image-text metrics -> ours."""
    if set(config.pair) != {"image", "text"}:
        return {}
    return {
        theirs: ours
        for k in config.k
        for theirs, ours in (
            (f"image_retrieval_recall@{k}", f"text_to_image_recall@{k}"),
            (f"text_retrieval_recall@{k}", f"image_to_text_recall@{k}"),
        )
    }


def _names(keys: Sequence[str], way: str) -> list[str]:
    """One name per query: the sample's key, numbered where a sample has several."""
    seen: dict[str, int] = {}
    names: list[str] = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        names.append(f"{way} {key}" if seen[key] == 1 else f"{way} {key} {seen[key]}")
    return names
