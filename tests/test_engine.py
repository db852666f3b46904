"""The promise: one exact gradient for every number of ranks, block and micro-batch, with modalities missing."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import Keep, batch_coupled_layers, forward_backward, pieces_of
from mmcontrast.objectives import (
    CWCL,
    DCL,
    Alignment,
    CrossUniformity,
    InfoNCE,
    MultiPositive,
    SigLIP,
    Symile,
    Uniformity,
)
from mmcontrast.objectives.base import Objective
from mmcontrast.randomness import fold_seed
from mmcontrast.sharding import Result, World, value_and_grad
from tests.conftest import SIZES, GlooPool
from tests.formulas import (
    Formula,
    alignment_formula,
    cross_uniformity_formula,
    cwcl_formula,
    dcl_formula,
    infonce_formula,
    multi_positive_formula,
    siglip_formula,
    symile_formula,
    uniformity_formula,
)
from tests.invariance import DIM, KERNELS, ROWS, Case, Kernel, Outcome, assert_same, run_engine, run_reference
from tests.objectives_for_tests import (
    Decorrelate,
    Drift,
    Shuffled,
    Spread,
    decorrelate_formula,
    drift_formula,
    shuffled_formula,
    spread_formula,
)

ALL_PAIRS = (("image", "text"), ("audio", "text"), ("audio", "image"))
TWO_PAIRS = ALL_PAIRS[:2]
THREE = ("image", "text", "audio")
PATIENT = ("patient",)

OBJECTIVES: dict[str, tuple[dict[str, Objective.Config], dict[str, Formula]]] = {
    "clip": ({"a": InfoNCE.Config()}, {"a": infonce_formula}),
    "weighted sum of everything": (
        {
            "clip": InfoNCE.Config(weight=0.7, pairs=TWO_PAIRS),
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
    "clip, saturated": ({"a": InfoNCE.Config(scale=50.0, weight=0.01)}, {"a": infonce_formula}),
    "three modalities": (
        {"a": InfoNCE.Config(pairs=ALL_PAIRS, pair_weights=(1.0, 2.0, 0.5), never_negative=PATIENT, scale=5.0)},
        {"a": infonce_formula},
    ),
    "smoothing and temperatures": (
        {
            "pair": InfoNCE.Config(pairs=TWO_PAIRS, temperature="per_pair", label_smoothing=0.1, weight=0.5),
            "direction": InfoNCE.Config(
                pairs=TWO_PAIRS,
                pair_weights=(3.0, 1.0),
                temperature="per_direction",
                label_smoothing=0.2,
                scale=40.0,
                weight=0.8,
            ),
            "one": InfoNCE.Config(symmetric=False, label_smoothing=0.3, never_negative=PATIENT, scale=20.0),
        },
        dict.fromkeys(("pair", "direction", "one"), infonce_formula),
    ),
    "dcl": (
        {
            "dcl": DCL.Config(pairs=TWO_PAIRS, pair_weights=(1.0, 3.0), never_negative=PATIENT, weight=0.5),
            "dclw": DCL.Config(sigma=0.5, scale=40.0, weight=0.4),
            "apart": DCL.Config(temperature="per_direction", weight=0.3),
        },
        dict.fromkeys(("dcl", "dclw", "apart"), dcl_formula),
    ),
    "siglip": (
        {
            "start": SigLIP.Config(pairs=TWO_PAIRS, pair_weights=(1.0, 3.0), never_negative=PATIENT),
            "beyond": SigLIP.Config(scale=40.0, weight=0.1),
        },
        dict.fromkeys(("start", "beyond"), siglip_formula),
    ),
    "symile": (
        {
            "two": Symile.Config(modalities=("image", "text"), scale=40.0, weight=0.5),
            "three": Symile.Config(modalities=THREE, normalize=True, never_negative=PATIENT, scale=3.0),
            "four": Symile.Config(modalities=(*THREE, "touch"), scale=200.0, weight=0.7),
            "single": Symile.Config(modalities=THREE, negatives="single", never_negative=PATIENT, scale=50.0),
        },
        dict.fromkeys(("two", "three", "four", "single"), symile_formula),
    ),
    "symile, missing learned": (
        {
            "a": Symile.Config(modalities=THREE, learned_missing=DIM, scale=10.0, weight=0.5),
            "single": Symile.Config(modalities=THREE, negatives="single", learned_missing=DIM, scale=40.0),
        },
        dict.fromkeys(("a", "single"), symile_formula),
    ),
    "symile, all tuples": (
        {
            "two": Symile.Config(modalities=("image", "text"), negatives="all", learned_missing=DIM, weight=0.5),
            "three": Symile.Config(modalities=THREE, negatives="all", never_negative=PATIENT, scale=50.0),
        },
        dict.fromkeys(("two", "three"), symile_formula),
    ),
    "gap": (
        {
            "align": Alignment.Config(pairs=TWO_PAIRS, pair_weights=(2.0, 1.0)),
            "uniform": Uniformity.Config(modalities=THREE, weight=0.5),
            "cross": CrossUniformity.Config(pairs=TWO_PAIRS, pair_weights=(1.0, 2.0), t=3.0, weight=0.7),
            "far": CrossUniformity.Config(t=20.0, weight=0.1),
        },
        {
            "align": alignment_formula,
            "uniform": uniformity_formula,
            "cross": cross_uniformity_formula,
            "far": cross_uniformity_formula,
        },
    ),
    "several positives": (
        {
            "all": MultiPositive.Config(positives={"patient": 0.5}, pairs=TWO_PAIRS, pair_weights=(1.0, 3.0)),
            "decoupled": MultiPositive.Config(positives={"patient": 2.0}, denominator="decoupled", scale=40.0),
            "negatives": MultiPositive.Config(positives={"site": 0.3}, never_negative=PATIENT, denominator="negatives"),
        },
        dict.fromkeys(("all", "decoupled", "negatives"), multi_positive_formula),
    ),
    "soft positives": (
        {
            "one side": CWCL.Config(pairs=TWO_PAIRS, pair_weights=(1.0, 3.0)),
            "both sides": CWCL.Config(power=3.5, both_sides=True, scale=30.0),
        },
        dict.fromkeys(("one side", "both sides"), cwcl_formula),
    ),
}

BLOCKS, MICRO_BATCHES = (1, 3, None), (ROWS, 1, 4)
CACHES: dict[int, tuple[int | dict[str, int], Keep]] = {
    ROWS: (ROWS, Keep()),
    1: ({"image": 1, "text": 3, "audio": ROWS, "touch": 3}, Keep(graphs=4)),
    4: (4, Keep(bytes=1 << 20)),
}
"""Micro-batch -> how the cache is asked: also of another size for each tower, and with graphs that are kept."""
Cell = tuple[int, int | None, int, Kernel, bool]
"""Ranks, block, micro-batch, way through the kernel, and whether modalities are missing."""
# Each value of ranks, block, micro-batch and kernel meets each value of the other three (an orthogonal array), and
# every rank count, block and kernel is tried with and without gaps. Micro-batches come before the objective and cannot
# know it, so only two objectives get the whole product.
CELLS: list[Cell] = [
    (SIZES[i], BLOCKS[j], MICRO_BATCHES[(i + j) % 3], KERNELS[(i + 2 * j) % 3], (i + j) % 3 > 0)
    for i, j in product(range(3), repeat=2)
]
PRODUCT: list[Cell] = [
    (SIZES[i], BLOCKS[j], MICRO_BATCHES[k], KERNELS[(i + j + k) % 3], missing)
    for i, j, k in product(range(3), repeat=3)
    for missing in (False, True)
]
WHOLE_PRODUCT = ("clip", "weighted sum of everything")
SPLITS = [(name, cell) for name in OBJECTIVES for cell in (PRODUCT if name in WHOLE_PRODUCT else CELLS)]


def _named(value: object) -> str:
    if isinstance(value, tuple):
        world, block, micro_batch, kernel, missing = value
        gaps = "missing" if missing else "complete"
        return f"{world} ranks, block {block}, micro {micro_batch}, kernel {KERNELS.index(kernel)}, {gaps}"
    return str(value)


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, bool], Outcome]:
    """Filled on demand: the slow formulas are asked once for all splits."""
    return {}


def _reference(references: dict[tuple[str, bool], Outcome], objective: str, missing: bool) -> Outcome:
    if (objective, missing) not in references:
        configs, formulas = OBJECTIVES[objective]
        references[objective, missing] = run_reference(Case(configs, missing), formulas)
    return references[objective, missing]


@pytest.mark.parametrize(("objective", "cell"), SPLITS, ids=_named)
def test_same_gradient_everywhere(
    gloo: GlooPool,
    references: dict[tuple[str, bool], Outcome],
    objective: str,
    cell: Cell,
) -> None:
    world, block, micro_batch, kernel, missing = cell
    case = Case(OBJECTIVES[objective][0], missing, world, block, *CACHES[micro_batch], kernel)
    for got in gloo(world, run_engine, case):
        assert_same(got, _reference(references, objective, missing))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_comparison_can_fail(references: dict[tuple[str, bool], Outcome], objective: str) -> None:
    """A gradient that is off by one part in a million does not pass, an embedding's, an encoder's or a scale's."""
    want = _reference(references, objective, missing=True)
    assert_same(want, want)
    large = [k for k, g in want.gradients[1].items() if g.abs().max() > 1e-3]
    assert {k.split(".")[0].split()[0] for k in large} >= {"embeddings", "image", "text"}
    for name in large:
        gradients = [dict(step) for step in want.gradients]
        gradients[1][name] = gradients[1][name] * (1 + 1e-6)
        with pytest.raises(AssertionError, match=f"step 1, {name}"):
            assert_same(Outcome(want.losses, gradients, want.final), want)
    with pytest.raises(AssertionError):
        assert_same(Outcome([*want.losses[:2], want.losses[2] + 1e-6], want.gradients, want.final), want)


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
def test_every_way_through_the_kernel_is_taken(missing: bool) -> None:
    """What the splits above promise to cover, counted: 3 steps of 7 blocks of 3 rows."""
    clip, saturated = (OBJECTIVES[name][0] for name in ("clip", "clip, saturated"))

    def ways(configs: Any, kernel: Kernel, block: int | None = 3) -> Counter[str]:
        return run_engine(None, Case(configs, missing, 1, block, kernel=kernel)).paths

    plain, some, everything = (ways(clip, kernel) for kernel in KERNELS)
    assert plain["exponentials"] and not plain["maximum subtracted"]
    beyond = ways(saturated, KERNELS[0])
    assert beyond["maximum subtracted"] and not beyond["exponentials"]
    assert plain["all rows"] == 0 if missing else plain["some rows"] == 0
    assert plain["several slices"] == 0 and some["one slice"] < some["several slices"]
    assert plain["dense mask"] > plain["listed mask"] and some["dense mask"] == 0 < some["listed mask"]
    assert everything["listed mask"] and (missing or everything["dense mask"] == 0)
    blocks = plain["add_gradients"] = plain["all rows"] + plain["some rows"]
    assert plain["found"] == 0 and plain["made"] == 2 * blocks
    assert 0 < some["found"] < blocks and some["made"] == 2 * blocks - some["found"]
    assert everything["found"] == blocks == everything["made"]
    assert ways(clip, KERNELS[0], block=None)["found"] == 3  # a single tile is kept in any case


def _embeddings(n: int) -> dict[str, torch.Tensor]:
    return {m: nn.functional.normalize(torch.ones(n, 8), dim=-1) for m in ("image", "text")}


def _everyone(n: int) -> dict[str, torch.Tensor]:
    return {m: torch.ones(n, dtype=torch.bool) for m in ("image", "text")}


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


class Dropping(nn.Module):
    """A tower with dropout that notes its inputs; the sine, the mask and the last layer keep 32 numbers of each row."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(6, 32).double(), nn.Linear(32, 4).double()
        self.asked: list[tuple[int, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append((len(x), torch.is_grad_enabled()))
        return self.last(nn.functional.dropout(self.first(x).sin(), 0.5))


def _coupled(z: Any, present: Any) -> Result:
    leaves = {m: t.detach().requires_grad_() for m, t in z.items()}
    value = torch.cat([*leaves.values()]).square().sum() * torch.stack([t.sum() for t in leaves.values()]).prod()
    return Result(value.detach(), {}, dict(zip(leaves, torch.autograd.grad(value, [*leaves.values()]), strict=True)))


ROW_BYTES = 8 * (32 + 32 + 32)
SPLITS_OF_12: list[tuple[int | dict[str, int], Keep, int]] = [
    (12, Keep(), 2),
    (5, Keep(), 1),
    (5, Keep(graphs=0), 1),
    (5, Keep(graphs=2), 2),
    (5, Keep(graphs=9), 6),
    (4, Keep(bytes=4 * ROW_BYTES - 1), 1),
    (4, Keep(bytes=4 * ROW_BYTES), 2),
    (4, Keep(bytes=2 * 4 * ROW_BYTES - 1), 2),
    (4, Keep(bytes=2 * 4 * ROW_BYTES), 3),
    (4, Keep(graphs=2, bytes=1), 2),
    ({"image": 3, "text": 12}, Keep(), 1),
    ({"image": 3, "text": 6}, Keep(graphs=3), 3),
    ({"image": 6, "text": 3}, Keep(bytes=1 << 20), 6),
]


@pytest.mark.parametrize(("micro_batch", "keep", "kept"), SPLITS_OF_12)
def test_dropout_is_replayed(micro_batch: int | dict[str, int], keep: Keep, kept: int) -> None:
    """The cached gradient is that of one forward with the same masks; graphs that are kept are not made twice."""
    towers = {"image": Dropping(0), "text": Dropping(1)}
    x = {m: torch.randn(12, 6, dtype=torch.float64) for m in towers}
    batch = Batch(inputs=x, rows=dict.fromkeys(x, torch.arange(12)), ids=torch.arange(12))

    def encode(piece: MicroBatch) -> dict[str, torch.Tensor]:
        asked = towers if piece.towers is None else piece.towers
        empty = torch.zeros(1, 6, dtype=torch.float64)
        return {m: towers[m](piece.inputs.get(m, empty))[: len(piece.rows.get(m, ()))] for m in asked}

    weights = [p for tower in towers.values() for p in tower.parameters()]
    before = torch.random.get_rng_state()
    # Weights that are not named do not count either: those that sharding has gathered are not the model's.
    named = weights if keep.bytes % 2 else []
    forward_backward(encode, batch, _coupled, micro_batch=micro_batch, seed=(7, 1), keep=keep, weights=named)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random state was touched"
    found = [p.grad for p in weights]
    sizes = dict.fromkeys(towers, micro_batch) if isinstance(micro_batch, int) else micro_batch
    pieces = sum(-(-12 // sizes[m]) for m in towers)
    forwards = [rows for tower in towers.values() for rows, _ in tower.asked if rows > 1]
    # A budget is tried once more than it holds, by a forward that must be done in any case.
    assert len(forwards) == 2 * pieces - kept

    parts: dict[str, list[torch.Tensor]] = {m: [] for m in towers}
    for m, tower in towers.items():
        tower.zero_grad()
        for start in range(0, 12, sizes[m]):
            torch.manual_seed(fold_seed(7, 1, start, m))
            parts[m].append(tower(x[m][start : start + sizes[m]]))
    z = {m: torch.cat(p) for m, p in parts.items()}
    (torch.cat([*z.values()]).square().sum() * torch.stack([t.sum() for t in z.values()]).prod()).backward()
    for got, parameter in zip(found, weights, strict=True):
        assert got is not None and parameter.grad is not None and parameter.grad.abs().max() > 0
        torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)


def test_only_towers_that_a_head_joins_are_encoded_together() -> None:
    """So that otherwise one tower alone has its activations in memory; the last piece runs all, for the wrapper."""
    rows = torch.arange(6)
    having = {"a": rows, "b": rows, "c": rows[:3], "d": rows}
    batch = Batch(inputs=having, rows=having, ids=rows)

    def found(size: int | dict[str, int], *joined: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
        return [(piece.start, tuple(piece.rows)) for piece in pieces_of(batch, size, joined)]

    assert found(4) == [(start, (m,)) for m in "abcd" for start in (0, 4)]
    assert found(4, ("d", "b")) == [(s, t) for t in (("a",), ("c",), ("b", "d")) for s in (0, 4)]
    sizes = {"a": 6, "b": 3, "c": 3, "d": 3}
    assert found(sizes, ("b", "c"), ("c", "d")) == [(0, ("a",)), (0, ("b", "c", "d")), (3, ("b", "c", "d"))]
    assert pieces_of(batch, sizes, [("b", "c"), ("d", "c")])[-1].towers == ("b", "c", "d", "a")
    assert [piece.towers for piece in pieces_of(batch, 6, ["abc", "cd"])] == [None]


def test_batch_norm_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert batch_coupled_layers(model) == ["1"]
    assert batch_coupled_layers(model.eval()) == []
