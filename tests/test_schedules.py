"""Rates and weights over the steps: pure functions, equal to their papers' formulas, exact on any number of ranks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.objectives import InfoNCE, SigLIP
from mmcontrast.objectives.base import plain_loss
from mmcontrast.schedules import WSD, Constant, Cosine, RSqrt, Schedule, interpolate
from mmcontrast.sharding import World, value_and_grad
from tests.conftest import GlooPool

STEPS = 200


def curve(config: Schedule.Config, steps: int = STEPS) -> list[float]:
    schedule: Schedule = config.build()
    return [schedule.factor(step, steps) for step in range(steps)]


def constant(s: int) -> float:
    return 1.0


def cosine(s: int) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 20) / 180)) / 2


def wsd(s: int) -> float:
    return 1.0 if s < 150 else 1 - math.sqrt((s - 150) / 50)


def wsd_linear(s: int) -> float:
    return 1.0 if s < 150 else 0.2 + 0.8 * (200 - s) / 50


def rsqrt(s: int) -> float:
    """big_vision's, of 20 steps of warm-up, a time scale of 50 and 40 steps of cool-down."""
    rate = 1 / math.sqrt((s + 50 - 20) / 50)
    return rate * min(1, (200 - s) / 40)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (Constant.Config(), constant),
        (Cosine.Config(final=0.1), cosine),
        (WSD.Config(decay=0.25), wsd),
        (WSD.Config(decay=0.25, shape="linear", final=0.2), wsd_linear),
        (RSqrt.Config(timescale=50, cooldown=0.2), rsqrt),
    ],
    ids=["constant", "cosine", "wsd", "wsd-linear", "rsqrt"],
)
def test_rates_follow_their_formulas(config: Schedule.Config, reference: Any) -> None:
    found = curve(config)
    assert found[:20] == pytest.approx([(s + 1) / 20 for s in range(20)])  # the linear rise
    assert found[20:] == pytest.approx([reference(s) for s in range(20, STEPS)])
    assert all(value > 0 for value in found)  # no step is wasted
    assert max(found) == 1


@pytest.mark.parametrize("config", [Constant.Config, Cosine.Config, WSD.Config, RSqrt.Config])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_short_runs_have_a_rate_at_every_step(config: type[Schedule.Config], steps: int, warmup: float) -> None:
    found = curve(config(warmup=warmup), steps)
    assert len(found) == steps and all(0 < value <= 1 for value in found)


def test_a_stable_rate_without_an_end_and_an_end_without_a_stable_part() -> None:
    assert curve(WSD.Config(warmup=0.0, decay=0.0)) == curve(Constant.Config(warmup=0.0)) == [1.0] * STEPS
    falling = curve(WSD.Config(warmup=0.5, decay=0.5, shape="linear"))
    assert all(a > b for a, b in pairwise(falling[STEPS // 2 :]))


def test_a_weight_is_linear_between_its_points_and_constant_outside() -> None:
    points = ((10, 0.0), (20, 1.0), (40, 0.5))
    assert [interpolate(points, s) for s in (0, 10, 15, 20, 30, 40, 1000)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    assert interpolate((), 7) == 1 and interpolate(((5, 0.25),), 0) == interpolate(((5, 0.25),), 9) == 0.25


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cosine.Config(warmup=1.0).build(), "warmup 1.0"),
        (lambda: Cosine.Config(final=2.0).build(), "final 2.0"),
        (lambda: WSD.Config(warmup=0.5, decay=0.6).build(), "warmup 0.5 and decay 0.6"),
        (lambda: WSD.Config(decay=-0.1).build(), "decay -0.1"),
        (lambda: RSqrt.Config(timescale=0).build(), "timescale is 0"),
        (lambda: InfoNCE.Config(weight_schedule=((5, 1.0), (5, 2.0))).build(), "steps must rise"),
        (lambda: InfoNCE.Config(weight_schedule=((-1, 1.0),)).build(), "steps must rise"),
        (lambda: InfoNCE.Config(weight_schedule=((0, -1.0),)).build(), "0 or more"),
    ],
)
def test_bad_settings_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def batch() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = {
        m: torch.nn.functional.normalize(torch.randn(8, 5, generator=generator, dtype=torch.float64), dim=1)
        for m in ("image", "text")
    }
    return z, {m: torch.ones(8, dtype=torch.bool) for m in z}, torch.arange(8)


def scheduled() -> dict[str, Any]:
    rising = InfoNCE.Config(weight=2.0, weight_schedule=((0, 0.0), (10, 1.0)))
    falling = SigLIP.Config(weight_schedule=((0, 1.0), (4, 0.0)))
    return {"rising": rising.build().double(), "falling": falling.build().double()}


def on_a_rank(group: Any, step: int) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    world, terms = World(group), scheduled()
    z, present, ids = batch()
    n = len(ids) // world.size
    mine = slice(world.rank * n, (world.rank + 1) * n)
    found = value_and_grad(
        terms,
        {m: t[mine] for m, t in z.items()},
        {m: t[mine] for m, t in present.items()},
        ids[mine],
        block=3,
        step=step,
        world=world,
    )
    own = [p.grad for term in terms.values() for p in term.parameters()]
    return float(found.loss), dict(found.gradients), own


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scheduled_weights_are_exact_on_any_number_of_ranks(gloo: GlooPool, size: int) -> None:
    """Against autograd of the two terms under weights that are written out here."""
    z, present, ids = batch()
    for step, (rising, falling) in {0: (0.0, 1.0), 3: (0.6, 0.25), 4: (0.8, 0.0), 50: (2.0, 0.0)}.items():
        alone = {
            "rising": InfoNCE.Config(weight=rising).build().double(),
            "falling": SigLIP.Config(weight=falling).build().double(),
        }
        leaves = {m: t.clone().requires_grad_() for m, t in z.items()}
        loss = plain_loss(alone, leaves, present, ids)
        loss.backward()
        wanted = float(loss.detach())
        answers = gloo(size, on_a_rank, step)
        for value, _, own in answers:
            assert value == pytest.approx(wanted, abs=1e-12)
            for mine, theirs in zip(own, (p for term in alone.values() for p in term.parameters()), strict=True):
                torch.testing.assert_close(mine, theirs.grad, rtol=0, atol=1e-12)
        for modality, leaf in leaves.items():
            together = torch.cat([gradients[modality] for _, gradients, _ in answers])
            torch.testing.assert_close(together, leaf.grad, rtol=0, atol=1e-12)
            assert float(together.abs().max()) > 1e-3
