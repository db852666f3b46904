"""The objectives against public implementations and against each other, what they report, and what they refuse."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError
from mmcontrast.objectives import (
    CWCL,
    DCL,
    Alignment,
    Block,
    CrossUniformity,
    InfoNCE,
    MultiPositive,
    Objective,
    SigLIP,
    Symile,
    Uniformity,
    all_pairs,
    pairs_with,
    plain_loss,
)
from mmcontrast.sharding import World, value_and_grad
from tests.conftest import GlooPool
from tests.formulas import symile_formula
from tests.invariance import Kernel, watched
from tests.objectives_setup import EVERY, PAIRS, THREE, Data, draw, run

# ------------------------------------------------------------------------------------ public implementations


def _distinct(n: int, d: int = 8) -> Data:
    """Every row a sample of its own, as public implementations take it."""
    return replace(draw(n, d), ids=torch.arange(n))


def _assert_equals(objective: Objective, data: Data, theirs: Tensor, leaves: dict[str, Tensor], block: int) -> None:
    """Loss and embedding gradients; the parameters' gradients are left in place on both sides."""
    theirs.backward()
    got, _ = run(None, {"a": objective}, data, block=block)
    torch.testing.assert_close(got.loss, theirs.detach(), rtol=1e-12, atol=0)
    for m, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().max() > 1e-4
        torch.testing.assert_close(got.gradients[m], leaf.grad, rtol=1e-9, atol=1e-13)


def _leaves(data: Data, modalities: Sequence[str]) -> dict[str, Tensor]:
    return {m: data.z[m].clone().requires_grad_() for m in modalities}


def test_infonce_is_open_clips() -> None:
    from open_clip.loss import ClipLoss

    data = _distinct(17)
    z = _leaves(data, ("image", "text"))
    objective = InfoNCE.Config(scale=20.0).build().double()
    scale = objective.log_scale.detach().exp()[0].requires_grad_()
    _assert_equals(objective, data, ClipLoss()(z["image"], z["text"], scale), z, block=5)
    assert scale.grad is not None and objective.log_scale.grad is not None
    torch.testing.assert_close(objective.log_scale.grad[0], scale.detach() * scale.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [10.0, 40.0])
def test_siglip_is_open_clips(scale: float) -> None:
    from open_clip.loss import SigLipLoss

    data = _distinct(17)
    z = _leaves(data, ("image", "text"))
    objective = SigLIP.Config(scale=scale, bias=-9.0).build().double()
    theirs = objective.log_scale.detach().exp()[0].requires_grad_()
    bias = objective.logit_bias.detach()[0].clone().requires_grad_()
    _assert_equals(objective, data, SigLipLoss()(z["image"], z["text"], theirs, bias), z, block=5)
    assert theirs.grad is not None and bias.grad is not None
    assert objective.log_scale.grad is not None and objective.logit_bias.grad is not None
    torch.testing.assert_close(objective.log_scale.grad[0], theirs.detach() * theirs.grad, rtol=1e-10, atol=0)
    torch.testing.assert_close(objective.logit_bias.grad[0], bias.grad, rtol=1e-10, atol=0)


def test_all_tuples_are_those_of_the_released_symile() -> None:
    symile = pytest.importorskip("symile", reason="the extra `benchmarks` brings it")
    data = _distinct(7)
    z = _leaves(data, THREE)
    objective = Symile.Config(modalities=THREE, scale=30.0, negatives="all").build().double()
    scale = objective.log_scale.detach().exp()[0].requires_grad_()
    theirs = symile.Symile(negative_sampling="n_squared")(list(z.values()), scale)
    _assert_equals(objective, data, theirs, z, block=3)
    assert scale.grad is not None and objective.log_scale.grad is not None
    torch.testing.assert_close(objective.log_scale.grad[0], scale.detach() * scale.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_all_tuples_of_four_modalities(missing: float) -> None:
    names = (*THREE, "touch")
    data = draw(5, 4, missing=missing, seed=2, modalities=names).masked()
    objective = Symile.Config(modalities=names, scale=30.0, negatives="all", learned_missing=4).build().double()
    z = _leaves(data, names)
    theirs = symile_formula(objective, z, data.present, Batch({}, {}, data.ids), 0)
    theirs.backward()
    want = objective.missing["touch"].grad
    assert (want is not None) == (missing > 0) == (not all(bool(p.all()) for p in data.present.values()))
    _, own = run(None, {"a": objective}, data, block=2)
    if want is not None:
        torch.testing.assert_close(own["a.missing.touch"], want, rtol=1e-9, atol=1e-12)
    got, _ = run(None, {"a": objective}, data, block=2)
    torch.testing.assert_close(got.loss, theirs.detach(), rtol=1e-11, atol=0)
    for m, leaf in z.items():
        assert leaf.grad is not None and leaf.grad.any()
        torch.testing.assert_close(got.gradients[m], leaf.grad * data.present[m][:, None], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("negatives", ["shuffled", "single", "all"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_symile_of_two_modalities_is_infonce(negatives: Any, missing: float) -> None:
    data = draw(13, missing=missing)
    symile = Symile.Config(modalities=("image", "text"), scale=25.0, negatives=negatives).build().double()
    infonce = InfoNCE.Config(scale=25.0).build().double()
    got, own = run(None, {"a": symile}, data, block=4)
    want, its = run(None, {"a": infonce}, data, block=4)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(own["a.log_scale"], its["a.log_scale"], rtol=1e-11, atol=0)
    for m in ("image", "text"):
        assert want.gradients[m].abs().max() > 1e-3
        torch.testing.assert_close(got.gradients[m], want.gradients[m], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", EVERY)
def test_the_plain_loss_is_the_engines_and_can_be_differentiated_twice(name: str) -> None:
    data = draw(9, missing=0.25)
    objective = EVERY[name].build().double()
    got, own = run(None, {"a": objective}, data, block=4, step=3)
    z = _leaves(data.masked(), THREE)
    objective.zero_grad()
    plain = plain_loss({"a": objective}, z, data.present, data.ids, groups=data.groups, step=3)
    read = [z[m] for m in objective.modalities]
    parameters = dict(objective.named_parameters())
    first = torch.autograd.grad(plain, [*read, *parameters.values()], create_graph=True, allow_unused=True)
    torch.testing.assert_close(got.loss, plain.detach(), rtol=1e-11, atol=0)
    for m, gradient in zip(objective.modalities, first, strict=False):
        want = gradient.detach() * data.present[m][:, None]
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got.gradients[m], want, rtol=1e-9, atol=1e-12)  # absent rows have exactly none
        assert not got.gradients[m][~data.present[m]].any() and not data.present[m].all()
    for key, gradient in zip(parameters, first[len(read) :], strict=True):
        torch.testing.assert_close(own[f"a.{key}"], gradient.detach(), rtol=1e-9, atol=1e-12)
    (second,) = torch.autograd.grad(first[0].square().sum(), read[0])
    assert torch.isfinite(second).all() and second.any()
    if name != "Symile of all":  # also where no row has a negative; all tuples merge matrices, which torch cannot
        lonely = plain_loss({"a": objective}, z, data.present, torch.zeros_like(data.ids), groups=data.groups)
        (first_of_it,) = torch.autograd.grad(lonely, read[0], create_graph=True, materialize_grads=True)
        if first_of_it.requires_grad:
            assert torch.isfinite(torch.autograd.grad(first_of_it.square().sum(), read[0])[0]).all()


# ------------------------------------------------------------------------------------------ Symile's draws


def _block(objective: Objective, data: Data, step: int) -> Block:
    with torch.no_grad():
        aux = objective.prepare(data.z, data.present, data.ids, step)
    return Block(data.z, data.z, data.present, torch.arange(len(data.ids)), data.ids, data.groups, aux)


@pytest.mark.parametrize("modalities", [("image", "text"), THREE])
def test_no_shuffled_negative_is_the_anchors_own_tuple(modalities: tuple[str, ...]) -> None:
    """Over 200 draws, what is masked is that tuple, wherever it fell, and nothing else."""
    n, off_diagonal = 5, 0
    data = _distinct(n)
    objective = Symile.Config(modalities=modalities).build().double()
    for step in range(200):
        block = _block(objective, data, step)
        for scores in objective.scores(block):
            taken = [block.aux[f"{scores.name}/{m}"].tolist() for m in modalities if m != scores.name]
            assert all(sorted(rows) == list(range(n)) for rows in taken)
            for i in range(n):
                for j in range(n):
                    masked = any(bool(of_rows[i] == of_columns[j]) for of_rows, of_columns in scores.labels)
                    own = all(rows[j] == i for rows in taken)
                    assert masked == own
                    off_diagonal += own and i != j
    # In each draw and for each anchor, n columns hit their own row with 1 / n^(M-2); n - 1 of n of them elsewhere.
    expected = 200 * len(modalities) * n * (1 - 1 / n) / n ** (len(modalities) - 2)
    assert expected * 0.8 < off_diagonal < expected * 1.2


def test_shuffled_rows_have_their_modality() -> None:
    data = draw(20, missing=0.4)
    objective = Symile.Config(modalities=THREE).build()
    for step in range(5):
        for name, rows in objective.prepare(data.z, data.present, data.ids, step).items():
            anchor, other = name.split("/")
            fewest = min(int(data.present[m].sum()) for m in THREE if m != anchor)
            assert len(rows) == len(set(rows.tolist())) == fewest and data.present[other][rows].all()


def _draws(group: Any, data: Data) -> list[dict[str, Tensor]]:
    world = World(group)
    torch.manual_seed(world.rank)  # the ranks' own randomness has no part in it
    drawn: list[dict[str, Tensor]] = []

    class Watched(Symile):
        def prepare(self, z: Any, present: Any, ids: Tensor, step: int) -> Any:
            drawn.append(dict(super().prepare(z, present, ids, step)))
            return drawn[-1]

    objective = Watched(Symile.Config(modalities=THREE)).double()
    for step in (0, 1, 0):
        run(group, {"a": objective}, data, step=step)
    return drawn


def test_draws_differ_by_step_and_anchor_and_are_those_of_all_ranks(gloo: GlooPool) -> None:
    data = draw(24)
    alone = _draws(None, data)
    for of_rank in gloo(4, _draws, data):
        for mine, want in zip(of_rank, alone, strict=True):
            assert all(torch.equal(mine[key], want[key]) for key in want)
    first, second, again = alone
    assert all(torch.equal(first[k], again[k]) and not torch.equal(first[k], second[k]) for k in first)
    assert len({tuple(rows.tolist()) for rows in first.values()}) == 6


# ------------------------------------------------------------------------------------- what a run is told


def _observed(group: Any, data: Data, kernel: Kernel) -> dict[str, float]:
    objectives: dict[str, Objective] = {
        "clip": InfoNCE.Config(never_negative=("patient",)).build(),
        "apart": InfoNCE.Config(pairs=PAIRS, temperature="per_direction").build(),
        "siglip": SigLIP.Config(never_negative=("patient",)).build(),
        "soft": MultiPositive.Config(never_negative=("patient",)).build(),
        "symile": Symile.Config(modalities=THREE).build(),
    }
    paths = Counter[str]()
    with watched(kernel, paths):
        result, _ = run(group, {k: o.double() for k, o in objectives.items()}, data, block=2)
    assert paths["listed mask" if kernel.sparse else "dense mask"]
    return {k: float(v) for k, v in result.observed.items()}


@pytest.mark.parametrize(("world", "kernel"), [(1, Kernel()), (1, Kernel(sparse=1)), (2, Kernel(sparse=1))])
def test_masked_negatives_are_counted(gloo: GlooPool, world: int, kernel: Kernel) -> None:
    data = draw(16, missing=0.3)
    rows = range(16)

    def count(x: str, y: str, groups: Sequence[str], ids: bool = True) -> int:
        labels = [data.ids, *(data.groups[g] for g in groups)] if ids else [data.groups[g] for g in groups]
        return sum(
            any(bool(label[i] == label[j]) for label in labels)
            for i in rows
            for j in rows
            if i != j and data.present[x][i] and data.present[y][j]
        )

    want = {
        "clip.masked_negatives": count("image", "text", ["patient"]),
        "apart.masked_negatives": sum(count(x, y, []) + count(y, x, []) for x, y in PAIRS),
        "siglip.masked_negatives": count("image", "text", ["patient"]),
        # Equal ids are positives here, not masked.
        "soft.masked_negatives": sum(
            count(x, y, ["patient"]) - count(x, y, []) for x, y in (("image", "text"), ("text", "image"))
        ),
        "symile.complete": sum(all(bool(data.present[m][i]) for m in THREE) for i in rows),
    }
    assert min(want.values()) > 0 and want["clip.masked_negatives"] > count("image", "text", [])
    for got in gloo(world, _observed, data, kernel):
        assert got == want


def test_a_term_before_its_first_step_is_absent() -> None:
    data = draw(6)
    objectives: dict[str, Objective] = {
        "clip": InfoNCE.Config().build().double(),
        "late": SigLIP.Config(start_step=3, weight=0.5).build().double(),
    }
    before, own = run(None, objectives, data, step=2)
    alone, _ = run(None, {"clip": objectives["clip"]}, data, step=2)
    assert set(before.terms) == {"clip"} and {k.split(".")[0] for k in own} == {"clip"}
    assert {k.split(".")[0] for k in before.observed} == {"clip"}
    assert torch.equal(before.loss, alone.loss) and torch.equal(before.gradients["image"], alone.gradients["image"])
    plain = plain_loss(objectives, data.z, data.present, data.ids, step=2)
    torch.testing.assert_close(plain.detach(), before.loss)
    after, own = run(None, objectives, data, step=3)
    assert set(after.terms) == {"clip", "late"} and {k.split(".")[0] for k in own} == {"clip", "late"}
    torch.testing.assert_close(after.loss, after.terms["clip"] + 0.5 * after.terms["late"])


def test_parameters_stay_in_their_range() -> None:
    for name, config in EVERY.items():
        objective = config.build()
        if not hasattr(objective, "log_scale"):
            continue
        for start, limited in ((200.0, 100.0), (0.5, 1.0)):
            objective.log_scale.data.fill_(math.log(start))
            objective.clamp()
            want = start if name.startswith("Symile") else limited
            torch.testing.assert_close(objective.log_scale.detach().exp(), torch.full_like(objective.log_scale, want))
            scales = [v for k, v in objective.metrics().items() if k.startswith("logit_scale")]
            assert scales == pytest.approx([want] * objective.log_scale.numel())
    capped = Symile.Config(modalities=THREE, max_scale=50.0).build()
    capped.log_scale.data.fill_(math.log(200.0))
    capped.clamp()
    assert capped.metrics()["logit_scale"] == pytest.approx(50.0)


def test_a_scale_that_is_not_learned_gets_no_gradient() -> None:
    data = draw(6)
    for config in (InfoNCE.Config(), SigLIP.Config(), Symile.Config(modalities=THREE), CWCL.Config()):
        config = copy.copy(config)
        config.learn_scale = False
        _, own = run(None, {"a": config.build().double()}, data)
        assert "a.log_scale" not in own


def test_gradients_are_made_under_no_grad_too() -> None:
    data = draw(6)
    for name, config in EVERY.items():
        objective = config.build().double()
        want, own = run(None, {"a": objective}, data)
        own = {k: g.clone() for k, g in own.items()}
        with torch.no_grad():
            got, its = run(None, {"a": objective}, data)
        assert all(torch.equal(got.gradients[m], want.gradients[m]) for m in THREE), name
        assert own.keys() == its.keys() and all(torch.equal(own[k], its[k]) for k in own), name


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (InfoNCE.Config(pairs=()), "InfoNCE needs at least one pair of modalities; `pairs` is empty"),
        (SigLIP.Config(pairs=(("image", "image"),)), r"contrasts two modalities, got the pair \('image', 'image'\)"),
        (CWCL.Config(pairs=(("a", "b"), ("b", "a"))), r"\('a', 'b'\) more than once; use `pair_weights`"),
        (
            DCL.Config(pairs=PAIRS, pair_weights=(1.0,)),
            r"2 pairs and pair_weights \(1.0,\); give one weight of 0 or more",
        ),
        (Alignment.Config(pair_weights=(-1.0,)), "1 pairs and pair_weights .* give one weight of 0 or more for each"),
        (CrossUniformity.Config(pair_weights=(0.0,)), "give one weight of 0 or more for each"),
        (InfoNCE.Config(scale=0.5), r"scale 0.5 is outside 1..max_scale \(100.0\)"),
        (MultiPositive.Config(scale=101.0), r"MultiPositive scale 101.0 is outside 1..max_scale \(100.0\)"),
        (InfoNCE.Config(label_smoothing=1.0), "label_smoothing is 1.0; it must be in 0..1, below 1"),
        (InfoNCE.Config(label_smoothing=-0.1), "label_smoothing is -0.1; it must be in 0..1"),
        (DCL.Config(sigma=0.0), "sigma is 0.0; it must be above 0, or None"),
        (Uniformity.Config(t=0.0), "Uniformity t is 0.0; it must be above 0"),
        (Uniformity.Config(modalities=()), "at least one modality; `modalities` is empty"),
        (MultiPositive.Config(positives={"p": 0.0}), "weight 0.0 of 'p' must be above 0; never_negative masks"),
        (CWCL.Config(power=0.0), "power is 0.0; it must be above 0"),
        (Symile.Config(modalities=("image",)), r"two modalities or more, each once; got \('image',\)"),
        (Symile.Config(modalities=("a", "b", "a")), "each once; got"),
        (Symile.Config(modalities=THREE, scale=0.0), "scale 0.0 must be above 0"),
        (Symile.Config(modalities=THREE, max_scale=5.0), r"at most max_scale \(5.0\)"),
        (Symile.Config(modalities=THREE, learned_missing=0), "learned_missing is 0; it is D, the dimensions"),
        (InfoNCE.Config(start_step=-1), "start_step is -1; it must be 0 or more"),
    ],
)
def test_wrong_settings_are_refused(config: Objective.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            InfoNCE.Config(never_negative=("study",)),
            "InfoNCE.never_negative names the group 'study', .*groups: patient",
        ),
        (Symile.Config(modalities=THREE, never_negative=("study",)), "Symile.never_negative names the group 'study'"),
        (MultiPositive.Config(positives={"patients": 1.0}), "'patients', which the data do not carry; .*'patient'"),
        (Symile.Config(modalities=THREE, learned_missing=5), "learned_missing is 5; the shared space has 8 dimensions"),
    ],
)
def test_settings_that_the_data_do_not_bear_out(config: Objective.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(None, {"a": config.build().double()}, draw(4))


def test_pairs_by_name() -> None:
    assert all_pairs("image", "text", "audio") == (("image", "text"), ("image", "audio"), ("text", "audio"))
    assert pairs_with("text", "image", "audio") == PAIRS
    assert InfoNCE.Config(pairs=PAIRS).build().candidates == ("text",)


def test_a_wrong_call_is_named() -> None:
    data = draw(2)
    with pytest.raises(ValueError, match="'clip' reads the modality 'ecg'"):
        run(None, {"clip": InfoNCE.Config(pairs=(("image", "ecg"),)).build()}, data)
    clip = {"c": InfoNCE.Config().build()}
    with pytest.raises(ValueError, match=r"z\['text'\] is torch.bfloat16; objectives take float32 or float64: .*float"):
        run(None, clip, replace(data, z={**data.z, "text": data.z["text"].bfloat16()}))
    with pytest.raises(ValueError, match="this rank has no rows"):
        value_and_grad(clip, {m: t[:0] for m, t in data.z.items()}, data.present, data.ids[:0])
    with pytest.raises(ValueError, match="block is 0"):
        run(None, clip, data, block=0)
