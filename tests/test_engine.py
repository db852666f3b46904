"""The promise: one exact gradient for every number of ranks, block and micro-batch, with modalities missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import batch_coupled_layers, forward_backward
from mmcontrast.objectives import InfoNCE
from mmcontrast.objectives.base import Objective
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result, World, value_and_grad
from tests.conftest import SIZES, GlooPool
from tests.invariance import ROWS, Case, Formula, Outcome, assert_same, run_engine, run_reference
from tests.objectives_for_tests import (
    Decorrelate,
    Drift,
    Shuffled,
    Spread,
    decorrelate_formula,
    drift_formula,
    infonce_formula,
    shuffled_formula,
    spread_formula,
)

ALL_PAIRS = (("image", "text"), ("audio", "text"), ("audio", "image"))

OBJECTIVES: dict[str, tuple[dict[str, Objective.Config], dict[str, Formula]]] = {
    "clip": ({"a": InfoNCE.Config()}, {"a": infonce_formula}),
    "three modalities": (
        {"a": InfoNCE.Config(pairs=ALL_PAIRS, never_negative=("patient",), scale=5.0)},
        {"a": infonce_formula},
    ),
    "nonlinear": ({"a": Spread.Config()}, {"a": spread_formula}),
    "stateful": ({"a": Drift.Config()}, {"a": drift_formula}),
    "random": ({"a": Shuffled.Config()}, {"a": shuffled_formula}),
    "whole": ({"a": Decorrelate.Config()}, {"a": decorrelate_formula}),
    "weighted sum of all": (
        {
            "clip": InfoNCE.Config(weight=0.7, pairs=ALL_PAIRS[:2]),
            "spread": Spread.Config(weight=0.3),
            "drift": Drift.Config(weight=0.2),
            "shuffled": Shuffled.Config(),
            "whole": Decorrelate.Config(weight=2.0),
        },
        {
            "clip": infonce_formula,
            "spread": spread_formula,
            "drift": drift_formula,
            "shuffled": shuffled_formula,
            "whole": decorrelate_formula,
        },
    ),
}


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def objective(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["complete", "missing"])
def reference(request: pytest.FixtureRequest, objective: str) -> tuple[Case, Outcome]:
    configs, formulas = OBJECTIVES[objective]
    case = Case(configs, missing=request.param)
    return case, run_reference(case, formulas)


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("block", [1, 3, None])
@pytest.mark.parametrize("micro_batch", [1, 4, ROWS])
def test_same_gradient_everywhere(
    gloo: GlooPool, reference: tuple[Case, Outcome], world: int, block: int | None, micro_batch: int
) -> None:
    case, want = reference
    case = Case(case.objectives, case.missing, world, block, micro_batch)
    for got in gloo(world, run_engine, case):
        assert_same(got, want)


def test_the_comparison_can_fail(reference: tuple[Case, Outcome], objective: str) -> None:
    """A gradient that is off by one part in a million does not pass."""
    case, want = reference
    got = run_engine(None, case)
    name = next(k for k, g in got.gradients[1].items() if g.abs().max() > 1e-3)
    got.gradients[1][name] *= 1 + 1e-6
    with pytest.raises(AssertionError, match="step 1"):
        assert_same(got, want)


def _embeddings(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = {m: torch.randn(n, 8, generator=g, dtype=torch.float64) for m in ("image", "text")}
    return {m: nn.functional.normalize(t, dim=-1).to(dtype) for m, t in draw.items()}


def _everyone(n: int) -> dict[str, torch.Tensor]:
    return {m: torch.ones(n, dtype=torch.bool) for m in ("image", "text")}


def test_infonce_equals_open_clip() -> None:
    from open_clip.loss import ClipLoss

    z = {m: t.requires_grad_() for m, t in _embeddings(17).items()}
    objective = InfoNCE.Config(scale=20.0).build().double()
    scale = objective.log_scale.detach().exp()[0].requires_grad_()
    theirs = ClipLoss()(z["image"], z["text"], scale)
    theirs.backward()
    ours = value_and_grad({"clip": objective}, z, _everyone(17), torch.arange(17), block=5)
    torch.testing.assert_close(ours.loss, theirs.detach(), rtol=1e-12, atol=0)
    assert scale.grad is not None and objective.log_scale.grad is not None
    for m, leaf in z.items():
        want = leaf.grad
        assert want is not None and want.abs().max() > 1e-3
        torch.testing.assert_close(ours.gradients[m], want, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(objective.log_scale.grad[0], scale.detach() * scale.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_survives_saturation(dtype: torch.dtype) -> None:
    """Scale 100, matched pairs of cosine 1, others 0.5: open_clip's float32 gradient is wholly wrong here."""
    n, d = 64, 65
    base = torch.zeros(n, d, dtype=torch.float64)
    base[:, 0] = base[torch.arange(n), torch.arange(n) + 1] = 2**-0.5
    z = {"image": base.to(dtype), "text": base.to(dtype)}
    objective = InfoNCE.Config(scale=100.0).build().to(dtype)
    got = value_and_grad({"clip": objective}, z, _everyone(n), torch.arange(n), block=16)
    # d loss / d s_ij = P_ij / n per direction, and both directions agree here by symmetry.
    scale = objective.log_scale.detach().double().exp()[0]
    off = torch.exp(-scale / 2)
    p = torch.full((n, n), float(off / (1 + (n - 1) * off)), dtype=torch.float64)
    p.fill_diagonal_(-float((n - 1) * off / (1 + (n - 1) * off)))
    want = scale / n * p @ base
    error = (got.gradients["image"].double() - want).norm() / want.norm()
    assert want.norm() > 0 and error < (1e-4 if dtype == torch.float32 else 1e-9), float(error)


def test_a_row_without_negatives_or_partner_costs_nothing() -> None:
    z = _embeddings(3)
    present = {"image": torch.tensor([True, True, False]), "text": torch.tensor([True, False, True])}
    objective = InfoNCE.Config().build().double()
    got = value_and_grad({"clip": objective}, z, present, torch.tensor([1, 2, 3]), block=1)
    # Only row 0 is a pair; its negatives are text 2 (for its image) and image 1 (for its text).
    s = z["image"] @ z["text"].T / 0.07
    want = (torch.log1p((s[0, 2] - s[0, 0]).exp()) + torch.log1p((s[1, 0] - s[0, 0]).exp())) / 2
    torch.testing.assert_close(got.loss, want, rtol=1e-7, atol=0)
    assert all(torch.isfinite(g).all() for g in got.gradients.values())

    alone = value_and_grad({"clip": objective}, z, _everyone(3), torch.tensor([5, 5, 5]))
    assert float(alone.loss) == 0.0 and all(not g.any() for g in alone.gradients.values())
    nobody = {"image": torch.zeros(3, dtype=torch.bool), "text": torch.ones(3, dtype=torch.bool)}
    empty = value_and_grad({"clip": objective}, z, nobody, torch.arange(3), block=2)
    assert float(empty.loss) == 0.0 and all(torch.isfinite(g).all() for g in empty.gradients.values())


def test_an_unknown_modality_is_named() -> None:
    with pytest.raises(ValueError, match="'clip' reads the modality 'audio'"):
        objective = InfoNCE.Config(pairs=(("image", "audio"),)).build()
        value_and_grad({"clip": objective}, _embeddings(2), _everyone(2), torch.arange(2))
    with pytest.raises(ValueError, match="this rank has no rows"):
        value_and_grad({"c": InfoNCE.Config().build()}, _embeddings(0), _everyone(0), torch.arange(0))
    with pytest.raises(ValueError, match="block is 0"):
        value_and_grad({"c": InfoNCE.Config().build()}, _embeddings(2), _everyone(2), torch.arange(2), block=0)


def _logsumexp_over_ranks(group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    world = World(group)
    g = torch.Generator().manual_seed(world.rank)
    mine = 1000 * torch.randn(5, generator=g, dtype=torch.float64)
    mine[0] = -torch.inf
    mine[1] = -torch.inf if world.rank else 3.0
    everything = world.gather(mine[None])
    return world.logsumexp([mine])[0], everything


def test_logsumexp_over_ranks_is_stable(gloo: GlooPool) -> None:
    for got, everything in gloo(4, _logsumexp_over_ranks):
        assert len(everything) == 4
        torch.testing.assert_close(got, torch.logsumexp(everything, 0), rtol=1e-12, atol=0)


def test_dropout_is_replayed() -> None:
    """With dropout the cached gradient equals that of one forward with the same masks, and masks do differ by row."""
    torch.manual_seed(0)
    first = nn.Linear(6, 32)
    encoder = nn.Sequential(first, nn.Dropout(0.5), nn.Linear(32, 4)).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    batch = Batch(inputs={"image": x}, rows={"image": torch.arange(12)}, ids=torch.arange(12))
    seen: list[torch.Tensor] = []

    def encode(piece: MicroBatch) -> dict[str, torch.Tensor]:
        seen.append(encoder(piece.inputs["image"]))
        return {"image": seen[-1]}

    def loss(z: Any, present: Any) -> Result:
        leaf = z["image"].detach().requires_grad_()
        value = leaf.square().sum() * leaf.sum()
        return Result(value.detach(), {}, {"image": torch.autograd.grad(value, leaf)[0]})

    before = torch.random.get_rng_state()
    forward_backward(encode, batch, loss, micro_batch=5, seed=(7, 1))
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random state was touched"
    assert len(seen) == 5  # three micro-batches, the last of which needs no second forward
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4])
    weight = first.weight.grad
    assert weight is not None

    encoder.zero_grad()
    parts: list[torch.Tensor] = []
    for start in (0, 5, 10):
        torch.manual_seed(fold_seed(7, 1, start))
        parts.append(encoder(x[start : start + 5]))
    z = torch.cat(parts)
    (z.square().sum() * z.sum()).backward()
    want = first.weight.grad
    assert want is not None and want.abs().max() > 0
    torch.testing.assert_close(weight, want, rtol=1e-12, atol=1e-12)


def test_batch_norm_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert batch_coupled_layers(model) == ["1"]
    assert batch_coupled_layers(model.eval()) == []
