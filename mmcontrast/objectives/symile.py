"""Symile: any number of modalities at once, through the sum of their elementwise product.

Letters: M modalities, n rows of a block, N rows of the global batch, C columns, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product as combinations_of
from typing import Literal

import torch
from torch import Tensor, nn

from mmcontrast.batch import Embeddings
from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import Block, Totals, log_odds_against
from mmcontrast.objectives.scores import ScoreObjective, Scores, Statistics, labels_of
from mmcontrast.randomness import fold_seed

_NOBODY = torch.iinfo(torch.int64).min  # a label that no sample has


class Symile(ScoreObjective):
    r"""Symile (Saporta et al. 2024, arXiv:2411.01053, eq. 6 and algorithm 1): what M modalities say together.

    The score of a tuple is its multilinear inner product, scale * sum_d prod_m z_m[d]. Each modality in turn is the
    anchor a: the softmax runs over the row's own tuple and over tuples that keep the row's z_a and take the others
    from elsewhere in the batch,

        L = 1/M sum_a mean_i [log(e^{s_i} + sum_j e^{s_ij}) - s_i].

    - "shuffled": the others are permuted, each by itself, by a generator that all ranks share: O(N) negatives per
      anchor. The released code leaves the anchor's own tuple among the negatives about once per batch and anchor
      (at another place than the diagonal); here it is masked wherever it falls, and so are tuples that consist of
      samples with the same id, or of one group of `never_negative`, as the anchor.
    - "all": all N^(M-1) tuples, streamed: time O(N^M D), memory O(block N). For small N.
    - "single": not the paper's. The tuples differ from the row's own in one modality alone: the row's others together
      ask for z_a among all rows' z_a, s_ij = scale * sum_d z_a[j] prod_{m != a} z_m[i], which is the question that
      zero-shot retrieval asks. At the optimum e^s is p(z_a | others) / p(z_a) up to a factor of the others, so the
      loss bounds I(z_a; others) where the paper's bounds the total correlation. Every negative is hard: where tuples
      that differ in all modalities are told apart by one of them, the others learn little.

    With two modalities all three are InfoNCE with one temperature for both directions.

    A sample takes part if it has all modalities; its single embeddings serve as negatives in any case. With
    `learned_missing` every sample takes part, a learned embedding standing in for what it lacks.

    The scale: the product of M unit vectors shrinks as D^(-(M-1)/2), and a perfectly aligned dense tuple scores only
    D^(1-M/2) (0.044 for M = 3, D = 512), so CLIP's cap of 100 would hold the softmax flat. There is no cap unless
    `max_scale` sets one; or `normalize` multiplies scores by D^((M-1)/2), which brings those of random vectors to unit
    variance whatever M and D.
    """

    @dataclass(kw_only=True)
    class Config(ScoreObjective.Config):
        """Settings of Symile."""

        modalities: tuple[str, ...]
        """M of them, at least 2."""
        scale: float = 1 / 0.07
        """Start of the logit scale, the inverse temperature."""
        max_scale: float | None = None
        """The learned scale is kept at or below this; None does not."""
        learn_scale: bool = True
        """Learn the scale, or keep its start."""
        normalize: bool = False
        """Multiply scores by D^((M-1)/2)."""
        negatives: Literal["shuffled", "single", "all"] = "shuffled"
        """N tuples per anchor: all others shuffled, or a single modality exchanged; or all N^(M-1)."""
        never_negative: tuple[str, ...] = ()
        """Groups: a tuple whose exchanged parts all have the row's label is no negative."""
        learned_missing: int | None = None
        """D, to learn an embedding that stands in for a missing modality; None leaves incomplete tuples out."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        names = config.modalities
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"Symile takes two modalities or more, each once; got {names}")
        if config.scale <= 0 or (config.max_scale is not None and config.scale > config.max_scale):
            raise ConfigError(f"Symile scale {config.scale} must be above 0 and at most max_scale ({config.max_scale})")
        self.config = config
        self.modalities = self.candidates = names
        self.separable = config.negatives != "all"
        self.log_scale = nn.Parameter(torch.tensor([math.log(config.scale)]), requires_grad=config.learn_scale)
        if config.learned_missing is not None:
            width = config.learned_missing
            if width < 1:
                raise ConfigError(f"Symile learned_missing is {width}; it is D, the dimensions of the shared space")
            self.missing = nn.ParameterDict({m: nn.Parameter(torch.randn(width) * width**-0.5) for m in names})

    def prepare(self, z: Embeddings, present: Mapping[str, Tensor], ids: Tensor, step: int) -> Mapping[str, Tensor]:
        """For shuffled negatives, `ANCHOR/OTHER`: [C] rows that the columns take the other modality from.

        C is the number of rows of the modality that fewest have, so no row is used twice and none is empty.
        """
        if self.config.negatives != "shuffled":
            return {}
        generator = torch.Generator().manual_seed(fold_seed("symile", step))
        found: dict[str, Tensor] = {}
        for anchor in self.modalities:
            others = [m for m in self.modalities if m != anchor]
            rows = [self._present(present, m).nonzero()[:, 0] for m in others]
            columns = min(len(r) for r in rows)
            for other, having in zip(others, rows, strict=True):
                order = torch.randperm(len(having), generator=generator)[:columns]
                found[f"{anchor}/{other}"] = having[order.to(having.device)]
        return found

    def scores(self, block: Block) -> Iterator[Scores]:
        """For each anchor modality one matrix, or for "all" one for each combination of the others but the last."""
        for anchor in self.modalities:
            others = [m for m in self.modalities if m != anchor]
            if self.config.negatives == "single":
                yield self._question(block, anchor, others)
                continue
            if self.config.negatives == "shuffled":
                taken = [block.aux[f"{anchor}/{m}"] for m in others]
                parts = [self._candidates(block, m)[rows] for m, rows in zip(others, taken, strict=True)]
                yield self._matrix(block, anchor, _product(parts), taken, torch.ones_like(taken[0], dtype=torch.bool))
                continue
            last = self._present(block.present, others[-1])
            rows = torch.arange(len(last), device=last.device)
            having = [self._present(block.present, m).nonzero()[:, 0].tolist() for m in others[:-1]]
            for turn, chosen in enumerate(combinations_of(*having)):
                fixed = [self._candidates(block, m)[row] for m, row in zip(others, chosen, strict=False)]
                parts = [*fixed, self._candidates(block, others[-1])]
                taken = [*(torch.full_like(rows, row) for row in chosen), rows]
                matrix = self._matrix(block, anchor, _product(parts), taken, last)
                # All are columns of one matrix, whose positives count once.
                yield matrix if turn == 0 else replace(matrix, positives=None)

    def term(self, name: str, statistics: Statistics, present: Mapping[str, Tensor]) -> Tensor:
        """Mean over the rows that have all modalities, 1/M of the loss."""
        off, positive = statistics.rows, statistics.positives
        assert off is not None and positive is not None
        complete = self._complete(present)
        losses = torch.where(complete, log_odds_against(off, positive), 0)
        return losses.sum() / complete.sum().clamp(min=1) / len(self.modalities)

    def observe(self, totals: Totals, present: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """How many rows took part."""
        return {"complete": self._complete(present).sum()}

    def clamp(self) -> None:
        """Keep the scale at or below max_scale."""
        if self.config.max_scale is not None:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.config.max_scale))

    def metrics(self) -> Mapping[str, float]:
        """The logit scale."""
        return {"logit_scale": float(self.log_scale.detach().exp())}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """Of the scale, if it learns and has one."""
        if self.config.max_scale is None or not self.log_scale.requires_grad:
            return {}
        return {"logit_scale": (0.0, self.config.max_scale)}

    def chance(self, counts: Mapping[str, int]) -> float | None:
        """The logarithm of the tuples that a row is compared with; unknown where learned embeddings stand in."""
        if self.config.learned_missing is not None:
            return None
        found: list[float] = []
        for anchor in self.modalities:
            others = [max(1, counts[m]) for m in self.modalities if m != anchor]
            tuples = {"shuffled": 1 + min(others), "single": counts[anchor], "all": math.prod(others)}
            found.append(math.log(max(1, tuples[self.config.negatives])))
        return sum(found) / len(found)

    # ------------------------------------------------------------------------------------------ matrices

    def _matrix(self, block: Block, anchor: str, columns: Tensor, taken: list[Tensor], has_column: Tensor) -> Scores:
        """Scores of the anchors against columns whose parts come from the rows `taken`."""
        others = [m for m in self.modalities if m != anchor]
        labels: list[tuple[Tensor, Tensor]] = []
        for of_rows, label in labels_of(block, self.config.never_negative, "Symile.never_negative"):
            parts = [label[rows] for rows in taken]
            same = reduce(torch.logical_and, [part == parts[0] for part in parts])
            labels.append((of_rows, torch.where(same, parts[0], _NOBODY)))
        return Scores(
            name=anchor,
            anchors=self._anchors(block, anchor),
            candidates=columns,
            positives=_product([self._anchors(block, m) for m in others]),
            scale=self._scale(columns.shape[1]),
            has_row=self._complete(block.present)[block.rows],
            has_column=has_column,
            labels=labels,
            wants=frozenset({"rows"}),
        )

    def _question(self, block: Block, asked: str, known: list[str]) -> Scores:
        """Scores of the product of what is known against all rows of what is asked for."""
        columns = self._candidates(block, asked)
        return Scores(
            name=asked,
            anchors=_product([self._anchors(block, m) for m in known]),
            candidates=columns,
            positives=self._anchors(block, asked),
            scale=self._scale(columns.shape[1]),
            has_row=self._complete(block.present)[block.rows],
            has_column=self._present(block.present, asked),
            labels=labels_of(block, self.config.never_negative, "Symile.never_negative"),
            wants=frozenset({"rows"}),
        )

    def _scale(self, dims: int) -> Tensor:
        scale = self.log_scale.exp()
        return scale * dims ** ((len(self.modalities) - 1) / 2) if self.config.normalize else scale

    def _present(self, present: Mapping[str, Tensor], modality: str) -> Tensor:
        """[N] bool: whose embedding there is, learned ones included."""
        has = present[modality]
        return torch.ones_like(has) if self.config.learned_missing else has

    def _complete(self, present: Mapping[str, Tensor]) -> Tensor:
        return reduce(torch.logical_and, [self._present(present, m) for m in self.modalities])

    def _anchors(self, block: Block, modality: str) -> Tensor:
        return self._filled(block.anchors[modality], block.present[modality][block.rows], modality)

    def _candidates(self, block: Block, modality: str) -> Tensor:
        return self._filled(block.z[modality], block.present[modality], modality)

    def _filled(self, z: Tensor, has: Tensor, modality: str) -> Tensor:
        if not self.config.learned_missing:
            return z
        stand_in = nn.functional.normalize(self.missing[modality], dim=0)
        if len(stand_in) != z.shape[1]:
            raise ConfigError(
                f"Symile learned_missing is {len(stand_in)}; the shared space has {z.shape[1]} dimensions"
            )
        return torch.where(has[:, None], z, stand_in)


def _product(parts: list[Tensor]) -> Tensor:
    return reduce(torch.mul, parts)
