"""Objectives that see other samples only through a score matrix: most of the field.

Such an objective says which matrices it looks at (`scores`), which statistics of them it wants, and what the loss is
of those statistics (`term`). It never touches a tile: the engine walks each matrix in place, block by block, without
an autograd graph. `partial` is the same in plain operations, for whoever wants a graph or a check.

Letters: n rows of this block, N rows of the global batch, C candidates (mostly N), D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.objectives.base import Block, Objective, Totals, masked_logsumexp

Statistic = Literal["rows", "columns", "row_sums", "column_sums", "row_counts", "column_counts", "softplus"]
"""Log-sum-exps, plain sums and numbers of each row's or each column's negatives; softplus: each row's sum of it."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A score matrix S = scale * anchors @ candidates.T + bias, [n, C], and what is wanted of it.

    Entry (i, j) is a negative if row i is an anchor, column j is a candidate, and no pair of labels is equal. The
    positive of a row is no entry of the matrix but a vector of its own: so it stays out of the sums, and gradients
    stay right where the softmax saturates.

    Attributes:
        name: of the statistics; matrices with one name are columns of one larger matrix.
        anchors: [n, D].
        candidates: [C, D].
        positives: [n, D], what row i should match, or None.
        scale: [1].
        bias: [1], or None for 0.
        has_row: [n] bool.
        has_column: [C] bool.
        labels: pairs ([n], [C]) of int64.
        wants: names of `Statistics`.
    """

    name: str
    anchors: Tensor
    candidates: Tensor
    positives: Tensor | None
    scale: Tensor
    bias: Tensor | None = None
    has_row: Tensor
    has_column: Tensor
    labels: Sequence[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    wants: frozenset[Statistic]


@dataclass(frozen=True)
class Statistics:
    """What is known of the matrices of one name, merged over all of them and over all ranks.

    [N] per row and [C] per column of the global batch; rows and columns that take no part have -inf, or 0 in sums.
    """

    positives: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    row_sums: Tensor | None = None
    column_sums: Tensor | None = None
    row_counts: Tensor | None = None
    column_counts: Tensor | None = None
    softplus: Tensor | None = None
    masked: Tensor | None = None
    """Number of entries with equal labels; scalar."""


LOGSUMEXPS = ("rows", "columns")
PER_ROW = ("positives", "rows", "row_sums", "row_counts", "softplus")


class ScoreObjective(Objective):
    """An objective that is a sum of terms, each a function of the statistics of one score matrix.

    Attributes:
        separable: True where a term is a sum over rows, each a function of that row's statistics alone; then one
            walk gives statistics and gradient (6N²D operations instead of 8N²D).
    """

    separable: ClassVar[bool] | bool = False

    def scores(self, block: Block) -> Iterator[Scores]:
        """The matrices, their rows being the block's, each with a graph of its own. Called once per walk."""
        raise NotImplementedError

    def term(self, name: str, statistics: Statistics, present: Mapping[str, Tensor]) -> Tensor:
        """Scalar loss of one name."""
        raise NotImplementedError

    def partial(self, block: Block) -> Totals:
        """The statistics of a block by plain operations, as totals `NAME/STATISTIC`."""
        sums: dict[str, Tensor] = {}
        logsumexps: dict[str, Tensor] = {}
        for scores in self.scores(block):
            for statistic, value in _dense(scores).items():
                key = f"{scores.name}/{statistic}"
                if statistic in PER_ROW:
                    empty = -torch.inf if statistic in LOGSUMEXPS else 0.0
                    whole = value.new_full([len(block.ids)], empty)
                    value = whole.index_put((block.rows,), value)
                if statistic in LOGSUMEXPS:
                    logsumexps[key] = torch.logaddexp(logsumexps[key], value) if key in logsumexps else value
                else:
                    sums[key] = sums[key] + value if key in sums else value
        return Totals(sums, logsumexps)

    def finalize(self, totals: Totals, present: Mapping[str, Tensor]) -> Tensor:
        """The sum of the terms."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in [*totals.sums.items(), *totals.logsumexps.items()]:
            name, _, statistic = key.rpartition("/")
            found.setdefault(name, {})[statistic] = value
        terms = [self.term(name, Statistics(**statistics), present) for name, statistics in found.items()]
        if not terms:  # no row has what the matrices need
            return next(iter(present.values())).new_zeros((), dtype=torch.float32)
        return torch.stack(terms).sum()


def _dense(scores: Scores) -> dict[str, Tensor]:
    """Statistics of one matrix, the whole of it at once."""
    matrix = scores.scale * scores.anchors @ scores.candidates.T
    if scores.bias is not None:
        matrix = matrix + scores.bias
    allowed = scores.has_row[:, None] & scores.has_column
    equal = torch.zeros_like(allowed)
    for of_rows, of_columns in scores.labels:
        equal |= of_rows[:, None] == of_columns
    found = {"masked": (allowed & equal).sum().to(matrix.dtype)}
    allowed &= ~equal
    masked = ~allowed
    if scores.positives is not None:
        positive = scores.scale * (scores.anchors * scores.positives).sum(1)
        positive = positive if scores.bias is None else positive + scores.bias
        found["positives"] = torch.where(scores.has_row, positive, 0)
    if "rows" in scores.wants:
        found["rows"] = masked_logsumexp(matrix, masked, dim=1)
    if "columns" in scores.wants:
        found["columns"] = masked_logsumexp(matrix, masked, dim=0)
    kept, counted = matrix.masked_fill(masked, 0), allowed.to(matrix.dtype)
    for dim, side in ((1, "row"), (0, "column")):
        if f"{side}_sums" in scores.wants:
            found[f"{side}_sums"] = kept.sum(dim)
        if f"{side}_counts" in scores.wants:
            found[f"{side}_counts"] = counted.sum(dim)
    if "softplus" in scores.wants:
        # Not torch's softplus: beyond its threshold it drops e^-x, which float64 sees.
        found["softplus"] = torch.logaddexp(matrix, torch.zeros_like(matrix)).masked_fill(masked, 0).sum(1)
    return found


def labels_of(block: Block, groups: Sequence[str], asked: str) -> list[tuple[Tensor, Tensor]]:
    """Labels whose equality forbids a negative: the sample ids, and the named groups.

    Raises:
        ConfigError: the data do not carry a group; `asked` says which setting names it.
    """
    labels = [block.ids]
    for name in groups:
        if name not in block.groups:
            raise ConfigError(
                f"{asked} names the group {name!r}, which the data do not carry; "
                f"groups: {', '.join(block.groups) or 'none'}"
            )
        labels.append(block.groups[name])
    return [(label[block.rows], label) for label in labels]
