"""How an objective is evaluated on the global batch: in score tiles, in blocks, or whole. No ranks are named here.

Each evaluator returns the term's loss and adds its gradients to an `Accumulator`; collectives are those of `Ranks`.

Letters: W ranks, n rows per rank, N = W * n rows of the global batch, C candidates, B rows of a block, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from mmcontrast.batch import Embeddings
from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.objectives.scores import LOGSUMEXPS, PER_ROW, ScoreObjective, Scores
from mmcontrast.tiles import Gradients, Walk


class Ranks(Protocol):
    """The collectives that an evaluator needs (`mmcontrast.sharding.World`)."""

    rank: int
    size: int

    def gather(self, local: Tensor) -> Tensor:
        """[n, ...] of every rank -> [N, ...]."""
        ...

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """[N, ...] of every rank -> the sum's rows of this rank."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks."""
        ...

    def logsumexp(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Elementwise log-sum-exp over ranks."""
        ...


@dataclass(frozen=True)
class Settings:
    """What changes time and memory, and no result but the last digits."""

    block: int | None
    keep_bytes: int = 0
    gradient_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch as one rank holds it: its own rows of every modality, all rows of the candidates."""

    world: Ranks
    local: Embeddings  # [n, D], zeros where absent
    z: Embeddings  # [N, D] of the candidates
    present: Mapping[str, Tensor]  # [N] bool
    ids: Tensor  # [N]
    groups: Mapping[str, Tensor]  # [N]
    step: int  # the optimizer step that it is for

    @property
    def n(self) -> int:
        """Rows of this rank."""
        return len(self.ids) // self.world.size

    @property
    def first_row(self) -> int:
        """Where they begin."""
        return self.world.rank * self.n

    def candidates_of(self, objective: Objective) -> Embeddings:
        """What an objective may look at: all rows of its candidates."""
        names = objective.modalities if objective.whole else objective.candidates
        return {m: self.z[m] for m in names}

    def mine(self, whole: Tensor) -> Tensor:
        """[N, ...] -> the rows of this rank."""
        return whole[self.first_row : self.first_row + self.n]

    def block(self, objective: Objective, aux: Mapping[str, Tensor], start: int, stop: int) -> Block:
        """Rows start .. stop - 1 of this rank as anchors, all tensors fresh leaves."""
        anchors = {m: self.local[m][start:stop].detach().requires_grad_() for m in objective.modalities}
        z = {m: self.z[m].detach().requires_grad_() for m in objective.candidates}
        rows = torch.arange(start, stop, device=self.ids.device) + self.first_row
        return Block(anchors, z, self.present, rows, self.ids, self.groups, aux)


class Accumulator:
    """Sums gradients of anchors (this rank's rows), candidates (all rows) and parameters, then reduces them once."""

    def __init__(self, batch: GlobalBatch) -> None:
        self.batch = batch
        self.anchors = {m: torch.zeros_like(t) for m, t in batch.local.items()}
        # Of one rank, all rows are its own: one buffer serves both.
        alone = batch.world.size == 1
        self.candidates = {m: self.anchors[m] if alone else torch.zeros_like(t) for m, t in batch.z.items()}
        self.parameters: dict[Tensor, Tensor] = {}

    def add_parameters(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of an objective's own parameters."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter not in self.parameters:
                self.parameters[parameter] = torch.zeros_like(parameter)
            if gradient is not None:
                self.parameters[parameter] += gradient

    def add(self, block: Block, start: int, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of a block's anchors, which begin at row `start` of the rank, and of its candidates."""
        names = [*block.anchors, *block.z]
        for i, (modality, gradient) in enumerate(zip(names, gradients, strict=True)):
            if gradient is None:
                continue
            if i < len(block.anchors):
                self.anchors[modality][start : start + len(gradient)] += gradient
            else:
                self.candidates[modality] += gradient

    def reduce(self) -> dict[str, Tensor]:
        """Exchange with the other ranks; gives the gradients of this rank's rows and sets those of parameters."""
        world = self.batch.world
        if world.size > 1:
            for modality in sorted(self.candidates):
                self.anchors[modality] += world.reduce_scatter(self.candidates[modality])
        for parameter, gradient in zip(self.parameters, world.sum(list(self.parameters.values())), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return self.anchors


def evaluate(
    objective: Objective, batch: GlobalBatch, aux: Mapping[str, Tensor], settings: Settings, into: Accumulator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The objective's loss without its weight, and what it observes; its weighted gradients are added to `into`."""
    if isinstance(objective, ScoreObjective):
        return _in_tiles(objective, batch, aux, settings, into)
    if objective.whole:
        return _whole(objective, batch, aux, into)
    return _in_blocks(objective, batch, aux, settings.block, into)


# -------------------------------------------------------------------------------------------------- score tiles


def _in_tiles(
    objective: ScoreObjective, batch: GlobalBatch, aux: Mapping[str, Tensor], settings: Settings, into: Accumulator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """One walk where a row's statistics decide its gradient; else one for the statistics and one for the gradient."""
    parameters = trainable(objective)
    seen = batch.block(objective, aux, 0, batch.n)
    found: dict[str, dict[str, Tensor]] = {}
    kept: list[dict[int, Tensor]] = []
    budget = settings.keep_bytes
    if objective.separable:
        for scores in objective.scores(seen):
            walk = Walk(scores, settings.block, gradient_dtype=settings.gradient_dtype)
            gradients = _Inputs(scores, seen, into)
            for start in walk.starts:
                walk.statistics(start)
                # The other rows are not known yet, and do not matter for these.
                totals = _spread({scores.name: walk.totals}, batch)
                _, cotangents, _ = _finalize(objective, totals, batch, parameters)
                walk.add_gradients(start, walk.totals, _of_rank(cotangents, scores.name, batch), gradients.sums)
            gradients.propagate(parameters)
            _merge_into(found, scores.name, walk.result())
    else:
        with torch.no_grad():
            for scores in objective.scores(seen):
                # One tile of each name, not of each of its matrices: of all Symile's tuples there would be N.
                single = scores.name not in found
                walk = Walk(scores, settings.block, keep_bytes=budget, keep_single=single)
                for start in walk.starts:
                    walk.statistics(start)
                _merge_into(found, scores.name, walk.result())
                budget -= sum(t.numel() * t.element_size() for t in walk.kept.values())
                kept.append(walk.kept)
    totals = _over_ranks(found, batch)
    loss, cotangents, own = _finalize(objective, totals, batch, parameters)
    into.add_parameters(parameters, own if batch.world.rank == 0 else [None] * len(own))
    if not objective.separable:
        for scores, tiles in zip(objective.scores(seen), kept, strict=True):
            walk = Walk(scores, settings.block, kept=tiles, gradient_dtype=settings.gradient_dtype)
            gradients = _Inputs(scores, seen, into)
            merged = _of_rank(totals, scores.name, batch)
            weights = _of_rank(cotangents, scores.name, batch)
            for start in walk.starts:
                walk.add_gradients(start, merged, weights, gradients.sums)
            gradients.propagate(parameters)
    with torch.no_grad():
        return loss, objective.observe(totals, batch.present)


class _Inputs:
    """Gradients of a matrix's inputs: added in place where an input is a leaf, else sent on through its graph."""

    def __init__(self, scores: Scores, block: Block, into: Accumulator) -> None:
        self.block, self.into = block, into
        self.places: dict[Tensor, Tensor] = {t: into.anchors[m] for m, t in block.anchors.items()}
        self.places |= {t: into.candidates[m] for m, t in block.z.items()}
        self.derived: list[tuple[Tensor, Tensor]] = []
        self.sums = Gradients(
            anchors=self._place(scores.anchors),
            candidates=self._place(scores.candidates),
            positives=None if scores.positives is None else self._place(scores.positives),
            scale=self._place(scores.scale),
            bias=None if scores.bias is None else self._place(scores.bias),
        )

    def _place(self, tensor: Tensor) -> Tensor:
        if tensor in self.places:
            return self.places[tensor]
        place = torch.zeros_like(tensor)
        self.derived.append((tensor, place))
        return place

    def propagate(self, parameters: Sequence[Tensor]) -> None:
        """From derived inputs, such as a scale or a product of embeddings, to leaves and parameters."""
        derived = [(tensor, place) for tensor, place in self.derived if tensor.requires_grad]
        leaves = [*self.block.anchors.values(), *self.block.z.values()]
        found = gradients_of([t for t, _ in derived], [*leaves, *parameters], [place for _, place in derived])
        self.into.add(self.block, 0, found[: len(leaves)])
        self.into.add_parameters(parameters, found[len(leaves) :])


def _merge_into(found: dict[str, dict[str, Tensor]], name: str, statistics: Mapping[str, Tensor]) -> None:
    """Matrices of one name are columns of one larger matrix."""
    if name not in found:
        found[name] = dict(statistics)
        return
    for key, value in statistics.items():
        old = found[name][key]
        # Each brings the same positives.
        if key != "positives":
            found[name][key] = torch.logaddexp(old, value) if key in LOGSUMEXPS else old + value


def _spread(found: Mapping[str, Mapping[str, Tensor]], batch: GlobalBatch) -> Totals:
    """Statistics of this rank's rows, at their places among all rows."""
    sums: dict[str, Tensor] = {}
    logsumexps: dict[str, Tensor] = {}
    for name, statistics in found.items():
        for key, value in statistics.items():
            if key in PER_ROW:
                whole = value.new_full([len(batch.ids)], -torch.inf if key in LOGSUMEXPS else 0.0)
                batch.mine(whole).copy_(value)
                value = whole
            (logsumexps if key in LOGSUMEXPS else sums)[f"{name}/{key}"] = value
    return Totals(sums, logsumexps)


def _over_ranks(found: Mapping[str, Mapping[str, Tensor]], batch: GlobalBatch) -> Totals:
    """Merged over ranks: one gather for what belongs to rows, one sum and one log-sum-exp for the rest."""
    rows, sums, peaks = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for name, statistics in found.items():
        for key, value in statistics.items():
            kind = rows if key in PER_ROW else peaks if key in LOGSUMEXPS else sums
            kind[f"{name}/{key}"] = value
    gathered = batch.world.gather(torch.stack(list(rows.values()), 1)).unbind(1) if rows else ()
    sums = dict(zip(sums, batch.world.sum(list(sums.values())), strict=True))
    peaks = dict(zip(peaks, batch.world.logsumexp(list(peaks.values())), strict=True))
    for key, value in zip(rows, gathered, strict=True):
        (peaks if key.rpartition("/")[2] in LOGSUMEXPS else sums)[key] = value
    return Totals(sums, peaks)


def _of_rank(totals: Totals, name: str, batch: GlobalBatch) -> dict[str, Tensor]:
    """The statistics of one name, of this rank's rows."""
    found: dict[str, Tensor] = {}
    for key, value in [*totals.sums.items(), *totals.logsumexps.items()]:
        owner, _, statistic = key.rpartition("/")
        if owner == name:
            found[statistic] = batch.mine(value) if statistic in PER_ROW else value
    return found


# -------------------------------------------------------------------------------------------------- blocks, whole


def _in_blocks(
    objective: Objective, batch: GlobalBatch, aux: Mapping[str, Tensor], block: int | None, into: Accumulator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Two passes over the blocks: totals, then gradients. One pass where cotangents need no totals, or for a block."""
    n = batch.n
    starts = range(0, n, block or n)
    parameters = trainable(objective)

    def run(start: int) -> tuple[Totals, Block]:
        seen = batch.block(objective, aux, start, min(start + starts.step, n))
        return objective.partial(seen), seen

    def add(start: int, partial: Totals, seen: Block, totals: Totals, cotangents: Totals) -> None:
        outputs, weights = _cotangents_of_block(partial, totals, cotangents)
        leaves = [*seen.anchors.values(), *seen.z.values()]
        found = gradients_of(outputs, [*leaves, *parameters], weights)
        into.add(seen, start, found[: len(leaves)])
        into.add_parameters(parameters, found[len(leaves) :])

    kept: tuple[Totals, Block] | None = None
    if objective.linear:
        parts: list[Totals] = []
        for start in starts:
            partial, seen = run(start)
            parts.append(_detach(partial))
            # Of a linear function the gradient is the same everywhere, so also at what one block knows.
            add(start, partial, seen, parts[-1], _finalize(objective, parts[-1], batch, parameters)[1])
        local = reduce(_merge, parts)
    elif len(starts) == 1:
        kept = run(0)
        local = _detach(kept[0])
    else:
        with torch.no_grad():
            local = reduce(_merge, (run(start)[0] for start in starts))
    totals = Totals(
        dict(zip(local.sums, batch.world.sum(list(local.sums.values())), strict=True)),
        dict(zip(local.logsumexps, batch.world.logsumexp(list(local.logsumexps.values())), strict=True)),
    )

    loss, cotangents, own = _finalize(objective, totals, batch, parameters)
    # Every rank finalizes the same totals: only one may count the parameters that finalize itself reads.
    into.add_parameters(parameters, own if batch.world.rank == 0 else [None] * len(own))
    if not objective.linear:
        for start in starts:
            add(start, *(kept or run(start)), totals, cotangents)
    with torch.no_grad():
        return loss, objective.observe(totals, batch.present)


def _whole(
    objective: Objective, batch: GlobalBatch, aux: Mapping[str, Tensor], into: Accumulator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The escape hatch: the formula of the whole batch on every rank, of which each keeps its own rows' gradient."""
    parameters = trainable(objective)
    z = {m: batch.z[m].detach().requires_grad_() for m in objective.modalities}
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    totals = objective.partial(Block(z, z, batch.present, rows, batch.ids, batch.groups, aux))
    loss = objective.finalize(totals, batch.present)
    gradients = gradients_of([objective.weight_at(batch.step) * loss], [*z.values(), *parameters])
    for modality, gradient in zip(z, gradients, strict=False):
        if gradient is not None:
            into.anchors[modality] += batch.mine(gradient)
    own = gradients[len(z) :]
    into.add_parameters(parameters, own if batch.world.rank == 0 else [None] * len(own))
    with torch.no_grad():
        return loss.detach(), objective.observe(_detach(totals), batch.present)


# -------------------------------------------------------------------------------------------------- common


def trainable(objective: Objective) -> list[Tensor]:
    """The objective's own parameters that learn."""
    return [p for p in objective.parameters() if p.requires_grad]


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of the weighted sum of outputs; None for inputs that no output depends on."""
    if not any(output.requires_grad for output in outputs):  # a constant, such as a term without any valid row
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))


def _detach(totals: Totals) -> Totals:
    return Totals(
        {k: t.detach() for k, t in totals.sums.items()}, {k: t.detach() for k, t in totals.logsumexps.items()}
    )


def _merge(a: Totals, b: Totals) -> Totals:
    return Totals(
        {k: t + b.sums[k] for k, t in a.sums.items()},
        {k: torch.logaddexp(t, b.logsumexps[k]) for k, t in a.logsumexps.items()},
    )


def _finalize(
    objective: Objective, totals: Totals, batch: GlobalBatch, parameters: Sequence[Tensor]
) -> tuple[Tensor, Totals, Sequence[Tensor | None]]:
    """The loss; its weighted gradient with respect to every total, and with respect to what finalize itself reads."""

    def leaf(total: Tensor) -> Tensor:
        return total.detach().to(torch.promote_types(total.dtype, torch.float32)).requires_grad_()  # counts too

    leaves = Totals({k: leaf(t) for k, t in totals.sums.items()}, {k: leaf(t) for k, t in totals.logsumexps.items()})
    with torch.enable_grad():
        loss = objective.finalize(leaves, batch.present)
    inputs = [*leaves.sums.values(), *leaves.logsumexps.values()]
    found = gradients_of([objective.weight_at(batch.step) * loss], [*inputs, *parameters])
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=False)]
    cotangents = Totals(
        dict(zip(leaves.sums, filled, strict=False)),
        dict(zip(leaves.logsumexps, filled[len(leaves.sums) :], strict=True)),
    )
    return loss.detach(), cotangents, found[len(inputs) :]


def _cotangents_of_block(partial: Totals, totals: Totals, cotangents: Totals) -> tuple[list[Tensor], list[Tensor]]:
    """A block's outputs and their cotangents: a sum passes its own on, a log-sum-exp times its block's share."""
    pairs = [(value, cotangents.sums[name]) for name, value in partial.sums.items()]
    for name, value in partial.logsumexps.items():
        total = totals.logsumexps[name]
        share = torch.where(total.isneginf(), 0, (value.detach() - total).exp())
        pairs.append((value, cotangents.logsumexps[name] * share))
    # A total that depends on no leaf (a count, say) cannot be differentiated.
    kept = [(value, cotangent) for value, cotangent in pairs if value.requires_grad]
    return [value for value, _ in kept], [cotangent for _, cotangent in kept]
