"""The objectives of the package as their papers write them: loops over rows, one number at a time, in float64.

Nothing here is shared with the package but the parameters that it learns and Symile's shuffled rows. A formula takes
(objective, z with zeros where absent, present, batch, step) and gives the loss, differentiable by plain autograd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmcontrast.batch import Batch
from mmcontrast.objectives import (
    CWCL,
    DCL,
    Alignment,
    CrossUniformity,
    InfoNCE,
    MultiPositive,
    Objective,
    SigLIP,
    Symile,
    Uniformity,
)

Formula = Callable[[Objective, Mapping[str, Tensor], Mapping[str, Tensor], Batch, int], Tensor]
Rows = dict[str, list[Tensor]]
Has = dict[str, list[bool]]

ZERO = torch.zeros((), dtype=torch.float64)


def rows_of(z: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> tuple[Rows, Has]:
    """Rows one by one, and whether each is there."""
    return {m: list(t.unbind(0)) for m, t in z.items()}, {m: t.tolist() for m, t in present.items()}


def total(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, one after the other; 0 of none."""
    result = ZERO
    for term in terms:
        result = result + term
    return result


def share(weights: Sequence[float], pairs: Sequence[object], index: int) -> float:
    """A pair's part of the loss."""
    return weights[index] / sum(weights) if weights else 1 / len(pairs)


def alike(batch: Batch, groups: Sequence[str], i: int, j: int) -> bool:
    """Whether two rows are one sample or share a label."""
    return bool(batch.ids[i] == batch.ids[j]) or any(bool(batch.groups[g][i] == batch.groups[g][j]) for g in groups)


def directions(o: InfoNCE | DCL) -> list[tuple[str, str, float, Tensor]]:
    """From, to, part of the loss and scale of every softmax."""
    config, found = o.config, list[tuple[str, str, float, Tensor]]()
    for p, (x, y) in enumerate(config.pairs):
        ways = [(x, y), (y, x)] if config.symmetric else [(x, y)]
        for w, (a, b) in enumerate(ways):
            which = {"shared": 0, "per_pair": p, "per_direction": len(ways) * p + w}[config.temperature]
            part = share(config.pair_weights, config.pairs, p) / len(ways)
            found.append((a, b, part, o.log_scale[which].exp()))
    return found


def infonce_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, InfoNCE)
    rows, has = rows_of(z, present)
    loss = ZERO
    for a, b, part, scale in directions(o):
        terms: list[Tensor] = []
        for i in range(len(batch)):
            if not (has[a][i] and has[b][i]):
                continue
            scores = [scale * (rows[a][i] * rows[b][i]).sum()]
            for j in range(len(batch)):
                if has[b][j] and not alike(batch, o.config.never_negative, i, j):
                    scores.append(scale * (rows[a][i] * rows[b][j]).sum())
            denominator = total([s.exp() for s in scores])
            for c, score in enumerate(scores):
                target = o.config.label_smoothing / len(scores) + (1 - o.config.label_smoothing if c == 0 else 0)
                if target:
                    terms.append(-target * torch.log(score.exp() / denominator))
        pairs = sum(p and q for p, q in zip(has[a], has[b], strict=True))
        loss = loss + part * total(terms) / max(1, pairs)
    return loss


def dcl_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, DCL)
    rows, has = rows_of(z, present)
    loss = ZERO
    for a, b, part, scale in directions(o):
        paired = [i for i in range(len(batch)) if has[a][i] and has[b][i]]
        terms: list[Tensor] = []
        for i in paired:
            negatives = [
                (scale * (rows[a][i] * rows[b][j]).sum()).exp()
                for j in range(len(batch))
                if has[b][j] and not alike(batch, o.config.never_negative, i, j)
            ]
            if not negatives:
                continue
            weight = 1.0
            if o.config.sigma is not None:
                mean = 0.0
                for k in paired:
                    mean += math.exp(float((rows[a][k] * rows[b][k]).sum().detach()) / o.config.sigma) / len(paired)
                weight = 2 - math.exp(float((rows[a][i] * rows[b][i]).sum().detach()) / o.config.sigma) / mean
            terms.append(-weight * scale * (rows[a][i] * rows[b][i]).sum() + total(negatives).log())
        loss = loss + part * total(terms) / max(1, len(paired))
    return loss


def siglip_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, SigLIP)
    rows, has = rows_of(z, present)
    loss = ZERO
    for p, (x, y) in enumerate(o.config.pairs):
        terms: list[Tensor] = []
        pairs = 0
        for i in range(len(batch)):
            pairs += has[x][i] and has[y][i]
            for j in range(len(batch)):
                if not (has[x][i] and has[y][j]):
                    continue
                if i != j and alike(batch, o.config.never_negative, i, j):
                    continue
                label = 1 if i == j else -1
                score = o.log_scale.exp()[0] * (rows[x][i] * rows[y][j]).sum() + o.logit_bias[0]
                terms.append(-torch.log(1 / (1 + torch.exp(-label * score))))
        loss = loss + share(o.config.pair_weights, o.config.pairs, p) * total(terms) / max(1, pairs)
    return loss


def symile_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    """Shuffled tuples take the rows that `prepare` drew; others are counted out.

    A tuple is its rows, one per modality; the anchor keeps its own, or of "single" is the one that is exchanged.
    """
    assert isinstance(o, Symile)
    config, names = o.config, o.config.modalities
    rows, has = rows_of(z, present)
    if config.learned_missing:
        for m in names:
            vector = o.missing[m]
            stand_in = vector / (vector * vector).sum().sqrt()
            rows[m] = [row if there else stand_in for row, there in zip(rows[m], has[m], strict=True)]
            has[m] = [True] * len(batch)
    taken = o.prepare(z, present, batch.ids, step)
    scale = o.log_scale.exp()[0]
    if config.normalize:
        scale = scale * (len(rows[names[0]][0]) ** 0.5) ** (len(names) - 1)
    labels = [batch.ids.tolist(), *(batch.groups[g].tolist() for g in config.never_negative)]
    complete = [i for i in range(len(batch)) if all(has[m][i] for m in names)]
    terms: list[Tensor] = []
    for anchor in names:
        others = [m for m in names if m != anchor]
        if config.negatives == "single":
            others = [anchor]
        if config.negatives == "shuffled":
            columns = list(zip(*(taken[f"{anchor}/{m}"].tolist() for m in others), strict=True))
        else:
            columns = list(itertools.product(range(len(batch)), repeat=len(others)))
        products: list[tuple[tuple[int, ...], Tensor]] = []
        for column in columns:
            if all(has[m][j] for m, j in zip(others, column, strict=True)):
                product = rows[others[0]][column[0]]
                for m, j in zip(others[1:], column[1:], strict=True):
                    product = product * rows[m][j]
                products.append((column, product))
        for i in complete:
            kept = torch.ones_like(rows[anchor][i])
            for m in names:
                kept = kept if m in others else kept * rows[m][i]
            own = kept
            for m in others:
                own = own * rows[m][i]
            positive = (scale * own.sum()).exp()
            denominator = positive
            for column, product in products:
                if not any(all(label[j] == label[i] for j in column) for label in labels):
                    denominator = denominator + (scale * (kept * product).sum()).exp()
            terms.append(-torch.log(positive / denominator))
    return total(terms) / max(1, len(complete)) / len(names)


def alignment_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, Alignment)
    rows, has = rows_of(z, present)
    loss = ZERO
    for p, (x, y) in enumerate(o.config.pairs):
        terms = [((rows[x][i] - rows[y][i]) ** 2).sum() for i in range(len(batch)) if has[x][i] and has[y][i]]
        loss = loss + share(o.config.pair_weights, o.config.pairs, p) * total(terms) / max(1, len(terms))
    return loss


def uniformity_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    """Distances themselves, where the package has inner products: their gradients are equal along the sphere."""
    assert isinstance(o, Uniformity)
    rows, has = rows_of(z, present)
    loss = ZERO
    for m in o.config.modalities:
        terms = [
            torch.exp(-o.config.t * ((rows[m][i] - rows[m][j]) ** 2).sum())
            for i in range(len(batch))
            for j in range(i)
            if has[m][i] and has[m][j] and not alike(batch, (), i, j)
        ]
        if terms:
            loss = loss + (total(terms) / len(terms)).log() / len(o.config.modalities)
    return loss


def cross_uniformity_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, CrossUniformity)
    rows, has = rows_of(z, present)
    loss = ZERO
    for p, (x, y) in enumerate(o.config.pairs):
        terms = [
            torch.exp(-o.config.t * ((rows[x][i] - rows[y][j]) ** 2).sum())
            for i in range(len(batch))
            for j in range(len(batch))
            if has[x][i] and has[y][j] and not alike(batch, (), i, j)
        ]
        if terms:
            loss = loss + share(o.config.pair_weights, o.config.pairs, p) * (total(terms) / len(terms)).log()
    return loss


def multi_positive_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    assert isinstance(o, MultiPositive)
    config, scale = o.config, o.log_scale.exp()[0]
    rows, has = rows_of(z, present)
    loss = ZERO
    for p, (x, y) in enumerate(config.pairs):
        for a, b in ((x, y), (y, x)):
            terms: list[Tensor] = []
            paired = [i for i in range(len(batch)) if has[a][i] and has[b][i]]
            for i in paired:
                positives: list[tuple[float, Tensor]] = []
                negatives: list[Tensor] = []
                for j in range(len(batch)):
                    if not has[b][j]:
                        continue
                    score = scale * (rows[a][i] * rows[b][j]).sum()
                    weights = [1.0] if batch.ids[i] == batch.ids[j] else []
                    weights += [w for g, w in config.positives.items() if batch.groups[g][i] == batch.groups[g][j]]
                    if weights:
                        positives.append((max(weights), score))
                    elif not alike(batch, config.never_negative, i, j):
                        negatives.append(score)
                against = total([s.exp() for s in negatives])
                everything = against + total([s.exp() for _, s in positives])
                for weight, score in positives:
                    target = weight / sum(w for w, _ in positives)
                    if config.denominator == "all":
                        terms.append(-target * torch.log(score.exp() / everything))
                    elif config.denominator == "decoupled":
                        terms.append(-target * torch.log(score.exp() / (score.exp() + against)))
                    elif negatives:
                        terms.append(target * (torch.log(against) - score))
            loss = loss + share(config.pair_weights, config.pairs, p) / 2 * total(terms) / max(1, len(paired))
    return loss


def cwcl_formula(
    o: Objective, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int
) -> Tensor:
    """For the pair (x, y), y is the side whose similarities weigh; a candidate without it weighs nothing."""
    assert isinstance(o, CWCL)
    config, scale = o.config, o.log_scale.exp()[0]
    rows, has = rows_of(z, present)
    loss = ZERO
    for p, (x, y) in enumerate(config.pairs):
        paired = [i for i in range(len(batch)) if has[x][i] and has[y][i]]
        for a, b in ((x, y), (y, x)):
            terms: list[Tensor] = []
            soft = b == y or config.both_sides
            for i in paired:
                weights: list[float] = []
                scores: list[Tensor] = []
                for j in range(len(batch)):
                    if not has[b][j]:
                        continue
                    weight = float(i == j)
                    if soft:
                        cosine = float((rows[y][i] * rows[y][j]).sum().detach()) if has[y][j] else -1.0
                        weight = (cosine / 2 + 0.5) ** config.power
                    if weight or not alike(batch, (), i, j):
                        weights.append(weight)
                        scores.append(scale * (rows[a][i] * rows[b][j]).sum())
                denominator = total([s.exp() for s in scores])
                for weight, score in zip(weights, scores, strict=True):
                    terms.append(-weight / sum(weights) * torch.log(score.exp() / denominator))
            loss = loss + share(config.pair_weights, config.pairs, p) / 2 * total(terms) / max(1, len(paired))
    return loss
