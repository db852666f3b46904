"""Why Symile exists: of a, b and c = a XOR b, any two are independent, and only all three together tell anything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mmcontrast.objectives import InfoNCE, Objective, Symile, all_pairs
from mmcontrast.sharding import value_and_grad

BITS = ("a", "b", "c")
N, DIM, EPOCHS = 1000, 16, 50  # of the paper's released code


def xor(seed: int) -> dict[str, Tensor]:
    """[N, 1] zeros and ones per modality."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randint(2, (2, N, 1), generator=draw)
    return {"a": a.float(), "b": b.float(), "c": (a ^ b).float()}


def train(objective: Objective, data: dict[str, Tensor], seed: int) -> nn.ModuleDict:
    """One affine map per modality, trained by the package's own gradient."""
    torch.manual_seed(seed)
    towers = nn.ModuleDict({m: nn.Linear(1, DIM) for m in BITS})
    optimizer = torch.optim.AdamW([*towers.parameters(), *objective.parameters()], lr=0.1)
    present = {m: torch.ones(N, dtype=torch.bool) for m in BITS}
    for epoch in range(EPOCHS):
        z = embed(towers, data)
        leaves = {m: t.detach() for m, t in z.items()}
        found = value_and_grad({"it": objective}, leaves, present, torch.arange(N), block=250, step=epoch)
        torch.autograd.backward([z[m] for m in BITS], [found.gradients[m] for m in BITS])
        optimizer.step()
        optimizer.zero_grad()
        objective.clamp()
    return towers


def embed(towers: nn.ModuleDict, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {m: nn.functional.normalize(towers[m](data[m]), dim=-1) for m in BITS}


def accuracy(towers: nn.ModuleDict, data: dict[str, Tensor], *, product: bool) -> float:
    """How often b is told from a and c: by the product of what is known, or by the sum of pairwise scores."""
    with torch.no_grad():
        z = embed(towers, data)
        bits = nn.functional.normalize(towers["b"](torch.tensor([[0.0], [1.0]])), dim=-1)  # [2, D]
        known = z["a"] * z["c"] if product else z["a"] + z["c"]
        return float(((known @ bits.T).argmax(1) == data["b"][:, 0]).double().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_symile_learns_xor_and_pairs_do_not(seed: int) -> None:
    data, unseen = xor(seed), xor(100 + seed)
    for negatives in ("shuffled", "single"):
        symile = train(Symile.Config(modalities=BITS, scale=math.exp(-0.3), negatives=negatives).build(), data, seed)
        assert accuracy(symile, unseen, product=True) >= 0.99
    clip = train(InfoNCE.Config(pairs=all_pairs(*BITS)).build(), data, seed)
    assert abs(accuracy(clip, unseen, product=False) - 0.5) < 0.1


def test_pairs_of_xor_are_independent() -> None:
    """Not vacuous: what the pairs see is a table of four equal parts, the triples are only half of the eight."""
    data = xor(0)
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        shares = [float(((data[x] == i) & (data[y] == j)).double().mean()) for i in (0, 1) for j in (0, 1)]
        assert all(abs(share - 0.25) < 0.05 for share in shares)
    assert bool(((data["a"] + data["b"]) % 2 == data["c"]).all())
