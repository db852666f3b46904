"""Gradients in float32: right where the softmax saturates, finite everywhere, exactly zero where masked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcontrast.objectives import (
    DCL,
    InfoNCE,
    MultiPositive,
    Objective,
    SigLIP,
    Symile,
    plain_loss,
)
from tests.conftest import GlooPool
from tests.objectives_setup import EVERY, THREE, Data, draw, relative_error, run

# ------------------------------------------------------------------------------------------ saturated softmax


def _saturated(n: int, *, missing: bool) -> Data:
    """Each row shares half its square with all and half with its partner: cosines 1 with it, 0.5 with others."""
    base = torch.zeros(n, n + 1, dtype=torch.float64)
    base[:, 0] = base[torch.arange(n), torch.arange(n) + 1] = 1.0
    g = torch.Generator().manual_seed(1)
    z = {m: nn.functional.normalize(base + 0.02 * torch.randn(base.shape, generator=g)).float() for m in THREE}
    data = draw(n, missing=0.25 if missing else 0.0, seed=3)
    return Data(z, data.present, data.ids, data.groups)


def _rows_loss(positive: Tensor, negatives: list[Tensor]) -> Tensor:
    """log(1 + sum_j e^(s_j - s)): in float64 its gradient keeps what e^-50 leaves."""
    odds = torch.zeros((), dtype=torch.float64)
    for score in negatives:
        odds = odds + (score - positive).exp()
    return torch.log1p(odds)


def _pairs_in_loops(z: Mapping[str, Tensor], data: Data, scale: Tensor) -> Tensor:
    """CLIP, row by row."""
    loss = torch.zeros((), dtype=torch.float64)
    for a, b in (("image", "text"), ("text", "image")):
        rows = [i for i in range(len(data.ids)) if data.present[a][i] and data.present[b][i]]
        for i in rows:
            others = [j for j in range(len(data.ids)) if data.present[b][j] and data.ids[i] != data.ids[j]]
            negatives = [scale * (z[a][i] * z[b][j]).sum() for j in others]
            loss = loss + _rows_loss(scale * (z[a][i] * z[b][i]).sum(), negatives) / len(rows) / 2
    return loss


def _tuples_in_loops(z: Mapping[str, Tensor], data: Data, scale: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    """Symile with shuffled negatives, tuple by tuple."""
    loss = torch.zeros((), dtype=torch.float64)
    rows = [i for i in range(len(data.ids)) if all(data.present[m][i] for m in THREE)]
    for anchor in THREE:
        x, y = (m for m in THREE if m != anchor)
        columns = list(zip(drawn[f"{anchor}/{x}"].tolist(), drawn[f"{anchor}/{y}"].tolist(), strict=True))
        products = [z[x][j] * z[y][k] for j, k in columns]
        for i in rows:
            negatives = [
                scale * (z[anchor][i] * product).sum()
                for (j, k), product in zip(columns, products, strict=True)
                if not data.ids[j] == data.ids[k] == data.ids[i]
            ]
            positive = scale * (z[anchor][i] * z[x][i] * z[y][i]).sum()
            loss = loss + _rows_loss(positive, negatives) / len(rows) / 3
    return loss


SATURATED: dict[str, Objective.Config] = {
    "InfoNCE": InfoNCE.Config(scale=100.0),
    "InfoNCE of each direction": InfoNCE.Config(scale=100.0, temperature="per_direction"),
    "MultiPositive": MultiPositive.Config(scale=100.0),
    "MultiPositive decoupled": MultiPositive.Config(scale=100.0, denominator="decoupled"),
    "Symile": Symile.Config(modalities=THREE, scale=100.0),
}


def _float32(group: Any, config: Objective.Config, data: Data, block: int | None) -> tuple[dict[str, Tensor], Tensor]:
    result, own = run(group, {"a": config.build()}, data, block=block)
    return dict(result.gradients), own["a.log_scale"]


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("name", SATURATED)
def test_gradients_survive_saturation(gloo: GlooPool, name: str, missing: bool) -> None:
    """Scale 100, cosines 1 and 0.5: 1 - P is 1e-20, which a softmax of all in one loses, and with it the gradient."""
    config, data = SATURATED[name], _saturated(16, missing=missing)
    if name.startswith("Multi"):
        data = replace(data, ids=torch.arange(16))  # one positive for each row
    objective = config.build()
    assert isinstance(objective, InfoNCE | MultiPositive | Symile)
    z = {m: (data.z[m] * data.present[m][:, None]).double().requires_grad_() for m in THREE}
    scale = objective.log_scale.detach().double().exp()[0].requires_grad_()
    if isinstance(objective, Symile):
        drawn = objective.prepare(data.z, data.present, data.ids, 0)
        loss = _tuples_in_loops(z, data, scale, drawn)
    else:
        loss = _pairs_in_loops(z, data, scale)
    loss.backward()
    assert 0 < float(loss.detach()) < 1e-9
    for world, block in ((1, None), (1, 3), (2, 3)):
        for gradients, of_scale in gloo(world, _float32, config, data, block):
            for m in objective.modalities:
                want = z[m].grad
                assert want is not None
                assert relative_error(gradients[m] * data.present[m][:, None], want) < 1e-4
            assert scale.grad is not None
            assert relative_error(of_scale.sum()[None], (scale.grad * scale.detach())[None]) < 1e-4


def test_the_usual_softmax_does_not_survive_saturation() -> None:
    """Else the test above would prove nothing."""
    data = _saturated(16, missing=False)
    data = replace(data, ids=torch.arange(16))
    usual = {m: data.z[m].clone().requires_grad_() for m in THREE}
    logits = 100.0 * usual["image"] @ usual["text"].T
    at = torch.arange(16)
    (nn.functional.cross_entropy(logits, at) + nn.functional.cross_entropy(logits.T, at)).div(2).backward()
    z = {m: data.z[m].double().requires_grad_() for m in THREE}
    _pairs_in_loops(z, data, torch.tensor(100.0, dtype=torch.float64)).backward()
    got, want = usual["image"].grad, z["image"].grad
    assert got is not None and want is not None and relative_error(got, want) > 0.1


# ------------------------------------------------------------------------------------------------- finite


def _with_scale(config: Objective.Config, scale: float) -> Objective:
    objective = config.build()
    if hasattr(objective, "log_scale"):
        nn.init.constant_(objective.get_parameter("log_scale"), float(torch.tensor(scale).log()))
    return objective


@pytest.mark.parametrize("name", EVERY)
def test_everything_is_finite(name: str) -> None:
    """Scales 1 to 100, cosines -1 to 1, rows without negatives, without partners, without anything."""
    n = 6
    drawn = draw(n, dtype=torch.float32)
    one = drawn.z["image"][:1].expand(n, -1)
    embeddings: dict[str, Mapping[str, Tensor]] = {
        "random": drawn.z,
        "equal": {m: one for m in THREE},
        "opposite": {"image": one, "text": -one, "audio": one},
        "matched": {m: drawn.z["image"] for m in THREE},
    }
    first = torch.arange(n) < n // 2
    there, nowhere = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    presence: list[Mapping[str, Tensor]] = [
        {m: there for m in THREE},
        {"image": first, "text": ~first, "audio": there},
        {"image": there, "text": nowhere, "audio": first},
        {m: nowhere for m in THREE},
    ]
    moved = False
    for z, present, ids, scale in itertools.product(
        embeddings.values(), presence, (torch.arange(n), torch.zeros(n, dtype=torch.int64)), (1.0, 100.0)
    ):
        data = Data(z, present, ids, {"patient": torch.arange(n) // 2})
        objective = _with_scale(EVERY[name], scale)
        result, own = run(None, {"a": objective}, data, block=4)
        assert all(torch.isfinite(t).all() for t in (result.loss, *result.gradients.values(), *own.values()))
        moved |= any(bool(g.any()) for g in result.gradients.values())
        leaves = {m: t.clone().requires_grad_() for m, t in data.masked().z.items()}
        plain = plain_loss({"a": objective}, leaves, present, ids, groups=data.groups)
        torch.testing.assert_close(result.loss, plain.detach(), rtol=1e-4, atol=1e-5)
        if plain.requires_grad:
            objective.zero_grad()
            plain.backward()
            for tensor in [*leaves.values(), *objective.parameters()]:
                assert tensor.grad is None or torch.isfinite(tensor.grad).all()
    assert moved


@pytest.mark.parametrize("name", [k for k in EVERY if k.startswith(("InfoNCE", "DCL", "Symile"))])
def test_a_row_without_negatives_costs_nothing(name: str) -> None:
    data = draw(4)
    alone = replace(data, ids=torch.full([4], 5), groups={"patient": torch.zeros(4, dtype=torch.int64)})
    result, own = run(None, {"a": EVERY[name].build().double()}, alone)
    assert float(result.loss) == 0.0
    assert not any(g.any() for g in (*result.gradients.values(), *own.values()))


def test_a_row_without_partner_is_a_negative_all_the_same() -> None:
    z = draw(3).z
    present = {"image": torch.tensor([True, True, False]), "text": torch.tensor([True, False, True])}
    objective = InfoNCE.Config().build().double()
    pair = {m: z[m] for m in ("image", "text")}
    got, _ = run(None, {"clip": objective}, Data(pair, present, torch.tensor([1, 2, 3])), block=1)
    # Only row 0 is a pair; its negatives are text 2 (for its image) and image 1 (for its text).
    s = z["image"] @ z["text"].T * objective.log_scale.detach().exp()
    want = (torch.log1p((s[0, 2] - s[0, 0]).exp()) + torch.log1p((s[1, 0] - s[0, 0]).exp())) / 2
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    assert got.gradients["image"][1].any() and got.gradients["text"][2].any()
    assert not got.gradients["image"][2].any() and not got.gradients["text"][1].any()


# ------------------------------------------------------------------------------------------------- masked


@pytest.mark.parametrize("scale", [5.0, 100.0])
@pytest.mark.parametrize(
    ("config", "by"),
    [
        (InfoNCE.Config(), "id"),
        (InfoNCE.Config(never_negative=("patient",), label_smoothing=0.1), "group"),
        (DCL.Config(temperature="per_direction"), "id"),
        (SigLIP.Config(never_negative=("patient",)), "group"),
        (MultiPositive.Config(never_negative=("patient",)), "group"),
    ],
    ids=["InfoNCE", "smoothed", "DCL", "SigLIP", "MultiPositive"],
)
def test_what_is_masked_has_exactly_no_influence(config: Objective.Config, by: str, scale: float) -> None:
    """Image 0 never sees text 1: its gradient stays the same to the last bit whatever text 1 is."""
    data = draw(6, dtype=torch.float32)
    other = draw(6, dtype=torch.float32, seed=9).z["text"]
    apart, equal = torch.arange(6), torch.tensor([0, 0, 2, 3, 4, 5])

    def gradient(label: Tensor, text: Tensor) -> Tensor:
        z = {"image": data.z["image"], "text": torch.cat([data.z["text"][:1], text[1:2], data.z["text"][2:]])}
        present = {m: torch.ones(6, dtype=torch.bool) for m in z}
        ids, patients = (label, apart) if by == "id" else (apart, label)
        objective = _with_scale(config, scale)
        return run(None, {"a": objective}, Data(z, present, ids, {"patient": patients}), block=2)[0].gradients["image"][
            0
        ]

    assert torch.equal(gradient(equal, data.z["text"]), gradient(equal, other))
    assert not torch.equal(gradient(apart, data.z["text"]), gradient(apart, other))


# ------------------------------------------------------------------------------------------- lower precision


@pytest.mark.parametrize("name", ["InfoNCE", "InfoNCE of each direction", "SigLIP", "Symile", "Uniformity"])
def test_gradients_in_bfloat16_are_what_they_say(name: str) -> None:
    """A relative error of 3e-3, and of the two products that make gradients alone: the loss is the same bit for bit."""
    data = draw(64, 32, dtype=torch.float32)
    exact, _ = run(None, {"a": EVERY[name].build()}, data, block=16)
    default, _ = run(None, {"a": EVERY[name].build()}, data, block=16, gradient_dtype=torch.float32)
    low, _ = run(None, {"a": EVERY[name].build()}, data, block=16, gradient_dtype=torch.bfloat16)
    assert torch.equal(exact.loss, low.loss)
    for m in EVERY[name].build().modalities:
        assert low.gradients[m].dtype == torch.float32
        assert relative_error(default.gradients[m], exact.gradients[m]) < 1e-6
        assert 1e-5 < relative_error(low.gradients[m], exact.gradients[m]) < 5e-3
