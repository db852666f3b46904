"""A modality that samples lack, with every kind of tower: a learned embedding stands in, all gradients are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.cached import forward_backward
from mmcontrast.encoders import BagOfWords, MultiEncoder
from mmcontrast.objectives import Symile
from mmcontrast.sharding import Result, World, value_and_grad
from tests import tiny
from tests.formulas import symile_formula
from tests.towers import EVERY, Origins, inputs, make_origins


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


@pytest.mark.parametrize("tower", list(EVERY))
@pytest.mark.parametrize("having", [(0, 2), ()])
def test_a_learned_embedding_stands_in_for_what_is_missing(
    origins: Origins, tower: str, having: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    encoders = {"m": EVERY[tower](origins), "image": tiny.vit(), "text": BagOfWords.Config(buckets=50, width=8)}
    model: MultiEncoder = MultiEncoder.Config(encoders=encoders, dim=6).build()
    model.eval()
    objective: Any = Symile.Config(modalities=("m", "image", "text"), negatives="all", learned_missing=6).build()
    rows = {"m": torch.tensor(having, dtype=torch.int64), "image": torch.tensor([0, 1, 3]), "text": torch.arange(4)}
    x: dict[str, Any] = {}
    for modality, places in rows.items():
        made = inputs(model.encoder(modality))
        if len(places):
            pick = torch.arange(len(places)) % 3
            x[modality] = map_tensors(made, lambda t, pick=pick: t[pick])
    batch = Batch(x, rows, torch.arange(4))

    def loss(z: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Result:
        return value_and_grad({"symile": objective}, z, present, batch.ids, block=2, step=0, world=World())

    # The second micro-batch has no row of the modality: its tower runs on a dummy row.
    found = forward_backward(lambda piece: model(piece.inputs), batch, loss, micro_batch=3, seed=(0,))
    names = {f"model.{n}": p for n, p in model.named_parameters()} | dict(objective.named_parameters())
    got = {n: p.grad for n, p in names.items()}

    for p in names.values():
        p.grad = None
    z = {m: torch.zeros(4, 6).index_copy(0, rows[m], e) for m, e in model(x).items()}
    want = symile_formula(objective, z, {m: batch.present(m) for m in rows}, batch, 0)
    want.backward()
    torch.testing.assert_close(found.loss, want.detach().float(), rtol=1e-4, atol=1e-5)
    assert objective.missing["m"].grad.abs().max() > 1e-4, "nothing was learned of what is missing"
    for name, p in names.items():
        mine = got[name]
        if not p.requires_grad:
            assert mine is None
            continue
        assert mine is not None, f"{name}: DDP would wait for it"
        torch.testing.assert_close(mine, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-2, atol=1e-4)
    own = [got[n] for n, p in names.items() if n.startswith("model.encoders.m.") and p.requires_grad]
    assert any(g is not None and bool(g.any()) for g in own) is bool(having)
