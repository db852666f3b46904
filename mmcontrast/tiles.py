"""The score matrix, walked in tiles: statistics and closed-form gradient in place, without an autograd graph.

A tile is some rows of S = scale * a bᵀ + bias against all columns. Pass 1 takes its statistics; pass 2 makes it again
(or finds it kept), turns it into dL/dS in place, and multiplies that into the gradients: four matrix products of
2 N²D operations each where two cross-entropies need six; three where tiles are kept. All else runs on slices that
stay in the processor's cache.

Rows and columns that take no part are left out before the products, so missing modalities save time.

Letters: n rows of this rank, C columns; of them r and c take part; B rows of a tile, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.objectives.scores import LOGSUMEXPS, PER_ROW, Scores

_SLICE = 1 << 17  # elements for each thread: half a megabyte of float32
_BOUND = 30.0  # scores within it need no maximum subtracted: float32 holds products of e^30 and e^-60 / N
_SPARSE = 32  # masked entries are listed while they are fewer than one in so many, and compared beyond


@dataclass(frozen=True)
class Gradients:
    """Where a walk adds d loss / d input."""

    anchors: Tensor  # [n, D]
    candidates: Tensor  # [C, D]
    positives: Tensor | None  # [n, D]
    scale: Tensor  # [1]
    bias: Tensor | None  # [1]


class Walk:
    """One score matrix in blocks of rows: `statistics` for each block, then `add_gradients` for each.

    Attributes:
        starts: first rows of the blocks, counted among the rows that take part.
    """

    def __init__(
        self,
        scores: Scores,
        block: int | None,
        *,
        keep_bytes: int = 0,
        keep_single: bool = True,
        kept: dict[int, Tensor] | None = None,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        """Choose the rows and columns that take part.

        Args:
            scores: the matrix; its tensors are read, never their graphs.
            block: B; None takes all rows in one tile.
            keep_bytes: tiles that fit into this are kept for the second pass.
            keep_single: a tile that is the only one is kept in any case.
            kept: the tiles that the first pass kept.
            gradient_dtype: of the two products that make gradients, such as bfloat16; None takes the inputs' own.
        """
        self.scores, self.gradient_dtype = scores, gradient_dtype
        self.rows, self.columns = _partial(scores.has_row), _partial(scores.has_column)
        self.anchors = scores.anchors.detach()
        self.candidates = _pick(scores.candidates.detach(), self.columns)
        self.scale = scores.scale.detach()
        self.masked = _Masked([(_pick(a, self.rows), _pick(b, self.columns)) for a, b in scores.labels])
        count = len(self.anchors) if self.rows is None else len(self.rows)
        if not len(self.candidates):
            count = 0
        self.count, self.block = count, max(1, min(block or count, count))
        self.starts = range(0, count, self.block)
        size = self.block * len(self.candidates) * self.anchors.element_size()
        self.keep = 1 if len(self.starts) == 1 and keep_single else keep_bytes // max(size, 1)
        self.kept: dict[int, Tensor] = {} if kept is None else kept
        self.scratch: Tensor | None = None
        self.in_scratch: int | None = None  # the block whose scores are there
        width = max(1, len(self.candidates))
        # On an accelerator a slice is the tile: there the time goes into launches.
        self.slice = self.block if self.anchors.is_cuda else max(1, _SLICE * torch.get_num_threads() // width)
        self.work = self.anchors.new_empty(min(self.slice, self.block), width)
        self.spare = torch.empty_like(self.work) if "softplus" in scores.wants else self.work
        self.bounded = self._bound() <= _BOUND
        self.peaks = self.anchors.new_full([len(self.candidates)], 0.0 if self.bounded else -torch.inf)
        self.totals: dict[str, Tensor] = {}
        wanted = sorted(scores.wants) if scores.positives is None else ["positives", *sorted(scores.wants)]
        for name in wanted:
            length = len(self.anchors) if name in PER_ROW else len(self.candidates)
            # Rows start as those that take no part; columns as sums of exponentials, whose logarithm comes last.
            self.totals[name] = self.anchors.new_full([length], -torch.inf if name == "rows" else 0.0)
        self.totals["masked"] = self.anchors.new_zeros([])

    # ---------------------------------------------------------------------------------------------- pass 1

    def statistics(self, start: int) -> None:
        """Add one block to `totals`."""
        stop = min(start + self.block, self.count)
        tile, _ = self._tile(start, stop)
        masked = self.masked.at(start, stop)
        self.totals["masked"] += masked.count
        if "row_counts" in self.totals:
            self._set("row_counts", start, (len(self.candidates) - masked.per_row()).to(tile.dtype))
        if "column_counts" in self.totals:
            self.totals["column_counts"] += (stop - start) - masked.per_column()
        if "row_sums" in self.totals or "column_sums" in self.totals:
            masked.fill_(tile, 0.0)
        if "row_sums" in self.totals:
            self._set("row_sums", start, tile.sum(1))
        if "column_sums" in self.totals:
            self.totals["column_sums"] += tile.sum(0)
        if "positives" in self.totals:
            self._set("positives", start, self._positives(start, stop))
        masked.fill_(tile, -torch.inf)
        if self.bounded:
            self._from_exponentials(tile, start)
        else:
            self._from_scores(tile, start)

    def result(self) -> dict[str, Tensor]:
        """Statistics by name after all blocks: [n] per row, [C] per column, the number of masked entries."""
        found = dict(self.totals)
        for name, value in self.totals.items():
            if name == "masked" or name in PER_ROW:
                continue
            if name in LOGSUMEXPS:
                value = value.log() + torch.where(self.peaks.isneginf(), 0, self.peaks)
            if self.columns is not None:
                whole = value.new_full([len(self.scores.has_column)], -torch.inf if name in LOGSUMEXPS else 0.0)
                value = whole.index_copy(0, self.columns, value)
            found[name] = value
        return found

    def _tile(self, start: int, stop: int) -> tuple[Tensor, bool]:
        """A block's scores, and True; or what `statistics` left there (of bounded scores, exponentials), and False."""
        if start in self.kept:
            return self.kept[start], False
        shape = (stop - start, len(self.candidates))
        if len(self.kept) < self.keep:
            tile = self.kept[start] = self.anchors.new_empty(shape)
        else:
            if self.scratch is None:
                self.scratch = self.anchors.new_empty(self.block, shape[1])
            tile = self.scratch[: stop - start]
            if self.in_scratch == start:
                return tile, False
            self.in_scratch = start
        torch.mm(self._rows(self.anchors, start, stop) * self.scale, self.candidates.T, out=tile)
        return (tile if self.scores.bias is None else tile.add_(self.scores.bias.detach())), True

    def _rows(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor[start:stop] if self.rows is None else tensor[self.rows[start:stop]]

    def _set(self, name: str, start: int, values: Tensor) -> None:
        stop = start + len(values)
        self.totals[name][slice(start, stop) if self.rows is None else self.rows[start:stop]] = values

    def _slices(self, tile: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """First row, slice of the tile, and as much room to work in."""
        step = self.slice
        parts = [(i, tile[i : i + step]) for i in range(0, len(tile), step)]
        return [(i, part, self.work[: len(part)]) for i, part in parts]

    def _positives(self, start: int, stop: int) -> Tensor:
        assert self.scores.positives is not None
        anchors = self._rows(self.anchors, start, stop)
        products = self.scale * (anchors * self._rows(self.scores.positives.detach(), start, stop)).sum(1)
        return products if self.scores.bias is None else products + self.scores.bias.detach()

    def _bound(self) -> float:
        """What no score exceeds."""
        if not self.count:
            return 0.0
        norms = [torch.linalg.vector_norm(t, dim=1).max() for t in (self.anchors, self.candidates)]
        bound = norms[0] * norms[1] * self.scale.abs()
        return float(bound if self.scores.bias is None else bound + self.scores.bias.detach().abs())

    def _from_exponentials(self, tile: Tensor, start: int) -> None:
        """Statistics of bounded scores: one exponential of each serves rows, columns and pass 2. Leaves it in place."""
        sums = {name: tile.new_empty(len(tile)) for name in ("rows", "softplus") if name in self.totals}
        for i, part, work in self._slices(tile):
            part.exp_()
            if "rows" in sums:
                torch.sum(part, 1, out=sums["rows"][i : i + len(part)])
            if "columns" in self.totals:
                self.totals["columns"] += part.sum(0)
            if "softplus" in sums:
                sums["softplus"][i : i + len(part)] = _sum_log1p(part, work, self.spare[: len(part)])
        for name, value in sums.items():
            self._set(name, start, value.log_() if name == "rows" else value)

    def _from_scores(self, tile: Tensor, start: int) -> None:
        """Statistics of any scores: the true maximum is subtracted before exponentials. Leaves the scores in place."""
        if "rows" in self.totals:
            peaks = _finite(tile.amax(1))
            sums = torch.empty_like(peaks)
            for i, part, work in self._slices(tile):
                shift = peaks[i : i + len(part), None]
                torch.sum(torch.sub(part, shift, out=work).exp_(), 1, out=sums[i : i + len(part)])
            self._set("rows", start, sums.log_().add_(peaks))
        if "columns" in self.totals:
            highest = torch.maximum(self.peaks, tile.amax(0))
            shift, total = _finite(highest), self.totals["columns"]
            total.mul_((self.peaks - shift).exp_())
            for _, part, work in self._slices(tile):
                total += torch.sub(part, shift, out=work).exp_().sum(0)
            self.peaks = highest
        if "softplus" in self.totals:
            sums = tile.new_empty(len(tile))
            for i, part, work in self._slices(tile):
                # softplus(s) = max(s, 0) + log(1 + e^-|s|), which no score overflows.
                torch.abs(part, out=work).neg_().exp_()
                sums[i : i + len(part)] = _sum_log1p(work, torch.empty_like(work), self.spare[: len(part)])
                sums[i : i + len(part)] += torch.clamp(part, min=0, out=work).sum(1)
            self._set("softplus", start, sums)

    # ---------------------------------------------------------------------------------------------- pass 2

    def add_gradients(
        self, start: int, totals: Mapping[str, Tensor], cotangents: Mapping[str, Tensor], into: Gradients
    ) -> None:
        """Add one block's share of the gradients. Right after `statistics` of the same block, its tile is still there.

        Args:
            start: one of `starts`.
            totals: statistics by name of this rank's rows [n] and of all columns [C], merged over all matrices and
                ranks.
            cotangents: d loss / d statistic, by name, likewise.
            into: the sums so far.
        """
        stop = min(start + self.block, self.count)
        tile, fresh = self._tile(start, stop)
        anchors = self._rows(self.anchors, start, stop)
        self._turn_into_gradient(tile, start, stop, totals, cotangents, fresh=fresh)
        if self.gradient_dtype is None:
            product = tile @ self.candidates
            self._add_candidates(into.candidates, tile, anchors * self.scale)
        else:
            low, dtype = tile.to(self.gradient_dtype), tile.dtype
            product = (low @ self.candidates.to(self.gradient_dtype)).to(dtype)
            self._add_candidates(into.candidates, low, (anchors * self.scale).to(self.gradient_dtype))
        into.scale.add_(torch.dot(product.view(-1), anchors.reshape(-1)))
        product.mul_(self.scale)
        if into.bias is not None:
            into.bias.add_(tile.sum())
        if "positives" in self.totals:
            assert self.scores.positives is not None and into.positives is not None
            positives = self._rows(self.scores.positives.detach(), start, stop)
            cotangent = self._rows(cotangents["positives"], start, stop)
            into.scale.add_((cotangent * (anchors * positives).sum(1)).sum())
            if into.bias is not None:
                into.bias.add_(cotangent.sum())
            weight = (self.scale * cotangent)[:, None]
            product.addcmul_(weight, positives)
            self._add_rows(into.positives, start, stop, weight * anchors)
        self._add_rows(into.anchors, start, stop, product)
        self.kept.pop(start, None)
        self.in_scratch = None

    def _turn_into_gradient(
        self,
        tile: Tensor,
        start: int,
        stop: int,
        totals: Mapping[str, Tensor],
        cotangents: Mapping[str, Tensor],
        *,
        fresh: bool,
    ) -> None:
        """S -> dL/dS without the positives, in place. What is masked may overflow on the way; it ends as 0."""

        def of_rows(values: Mapping[str, Tensor], name: str) -> Tensor:
            return self._rows(values[name], start, stop)[:, None]

        def of_columns(values: Mapping[str, Tensor], name: str) -> Tensor:
            return _pick(values[name], self.columns)

        both = "columns" in self.totals
        if "softplus" in self.totals:
            slopes = of_rows(cotangents, "softplus")
            for i, part, work in self._slices(tile):
                if self.bounded and fresh:
                    part.exp_()
                sigmoid = part.div_(torch.add(part, 1, out=work)) if self.bounded else part.sigmoid_()
                sigmoid.mul_(slopes[i : i + len(part)])
        elif self.bounded:
            # e^(s - peak) = e^s e^-peak: one factor for each entry.
            rows = of_rows(cotangents, "rows") * _finite(of_rows(totals, "rows")).neg().exp()
            columns = (
                of_columns(cotangents, "columns") * _finite(of_columns(totals, "columns")).neg().exp() if both else 0
            )
            for i, part, work in self._slices(tile):
                if fresh:
                    part.exp_()
                factors = rows[i : i + len(part)]
                part.mul_(torch.add(factors, columns, out=work) if both else factors)
        else:
            rows, row_peaks = of_rows(cotangents, "rows"), of_rows(totals, "rows")
            columns, column_peaks = (of_columns(x, "columns") if both else rows for x in (cotangents, totals))
            for i, part, work in self._slices(tile):
                at = slice(i, i + len(part))
                if both:
                    torch.sub(part, column_peaks, out=work).exp_().mul_(columns)
                part.sub_(row_peaks[at]).exp_().mul_(rows[at])
                if both:
                    part.add_(work)
        if "row_sums" in self.totals:
            tile.add_(of_rows(cotangents, "row_sums"))
        if "column_sums" in self.totals:
            tile.add_(of_columns(cotangents, "column_sums"))
        self.masked.at(start, stop).fill_(tile, 0.0)

    def _add_candidates(self, into: Tensor, gradient: Tensor, anchors: Tensor) -> None:
        if self.columns is None and into.dtype == gradient.dtype:
            into.addmm_(gradient.T, anchors)
        else:
            product = gradient.T @ anchors
            into.index_add_(0, self.columns, product.to(into.dtype)) if self.columns is not None else into.add_(product)

    def _add_rows(self, into: Tensor, start: int, stop: int, values: Tensor) -> None:
        if self.rows is None:
            into[start:stop] += values
        else:
            into.index_add_(0, self.rows[start:stop], values)


class _Masked:
    """The entries with equal labels, found by sorting: the cost is that of the entries, not of the matrix."""

    def __init__(self, labels: list[tuple[Tensor, Tensor]]) -> None:
        self.labels = labels
        self.found = [_find(rows, columns) for rows, columns in labels]

    def at(self, start: int, stop: int) -> _Entries:
        """Those of a block of rows."""
        columns = len(self.labels[0][1])
        counts = [count[start:stop] for _, _, count in self.found]
        if sum(int(count.sum()) for count in counts) * _SPARSE > (stop - start) * columns:
            mask = self.labels[0][0][start:stop, None] == self.labels[0][1]
            for of_rows, of_columns in self.labels[1:]:
                mask |= of_rows[start:stop, None] == of_columns
            return _Entries((stop - start, columns), mask=mask)
        flat: list[Tensor] = []
        for (order, first, _), count in zip(self.found, counts, strict=True):
            row = torch.repeat_interleave(torch.arange(stop - start, device=count.device), count)
            turn = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
            flat.append(row * columns + order[first[start:stop][row] + turn])
        index = flat[0] if len(flat) == 1 else torch.cat(flat).unique()
        return _Entries((stop - start, columns), index=index)


class _Entries:
    """Some entries of a tile: a list of flat positions, or a mask."""

    def __init__(self, shape: tuple[int, int], *, index: Tensor | None = None, mask: Tensor | None = None) -> None:
        self.shape, self.index, self.mask = shape, index, mask

    @property
    def count(self) -> int:
        """How many."""
        return len(self.index) if self.index is not None else int(self.per_row().sum())

    def fill_(self, tile: Tensor, value: float) -> None:
        """Overwrite them."""
        if self.index is None:
            assert self.mask is not None
            tile.masked_fill_(self.mask, value)
        else:
            tile.view(-1).index_fill_(0, self.index, value)

    def per_row(self) -> Tensor:
        """How many in each row."""
        return self._per(0)

    def per_column(self) -> Tensor:
        """How many in each column."""
        return self._per(1)

    def _per(self, dim: int) -> Tensor:
        if self.index is None:
            assert self.mask is not None
            return self.mask.sum(1 - dim)
        columns = self.shape[1]
        at = self.index % columns if dim else self.index // columns
        return torch.bincount(at, minlength=self.shape[dim])


def _find(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns in the order of their labels; for each row, where its label starts there and how often it occurs."""
    ordered, order = columns.sort()
    first = torch.searchsorted(ordered, rows.contiguous())
    last = torch.searchsorted(ordered, rows.contiguous(), right=True)
    return order, first, last - first


def _partial(has: Tensor) -> Tensor | None:
    """Positions of what takes part, or None if all does."""
    return None if bool(has.all()) else has.nonzero()[:, 0]


def _pick(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor[index]


def _finite(peaks: Tensor) -> Tensor:
    """Where everything is masked, 0: subtracting -inf would make NaN."""
    return torch.where(peaks.isneginf(), 0, peaks)


def _sum_log1p(x: Tensor, y: Tensor, lost: Tensor) -> Tensor:
    """Each row's sum of log(1 + x), x >= 0; y and lost are room to work in.

    With y the rounded 1 + x, log(1 + x) is log(y) + (x - (y - 1)) / y to the last digit: as exact as log1p and
    several times as fast.
    """
    torch.add(x, 1, out=y)
    torch.sub(y, 1, out=lost)
    torch.sub(x, lost, out=lost).div_(y)
    return lost.sum(1).add_(y.log_().sum(1))
