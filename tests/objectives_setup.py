"""Every objective of the package once, data for them, and one run of the engine on however many ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

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
from mmcontrast.sharding import Result, World, value_and_grad

THREE = ("image", "text", "audio")
PAIRS = (("image", "text"), ("audio", "text"))

EVERY: dict[str, Objective.Config] = {
    "InfoNCE": InfoNCE.Config(),
    "InfoNCE of each direction": InfoNCE.Config(pairs=PAIRS, temperature="per_direction", never_negative=("patient",)),
    "InfoNCE smoothed": InfoNCE.Config(pairs=PAIRS, label_smoothing=0.1),
    "DCL": DCL.Config(),
    "DCLW": DCL.Config(sigma=0.5),
    "SigLIP": SigLIP.Config(never_negative=("patient",)),
    "Symile": Symile.Config(modalities=THREE),
    "Symile of all": Symile.Config(modalities=THREE, negatives="all", never_negative=("patient",)),
    "Symile of single exchanges": Symile.Config(modalities=THREE, negatives="single", never_negative=("patient",)),
    "Symile that learns what is missing": Symile.Config(modalities=THREE, learned_missing=8, normalize=True),
    "Alignment": Alignment.Config(pairs=PAIRS),
    "Uniformity": Uniformity.Config(modalities=THREE),
    "CrossUniformity": CrossUniformity.Config(pairs=PAIRS),
    "MultiPositive": MultiPositive.Config(positives={"patient": 0.5}),
    "MultiPositive decoupled": MultiPositive.Config(positives={"patient": 0.5}, denominator="decoupled"),
    "MultiPositive negatives": MultiPositive.Config(positives={"patient": 0.5}, denominator="negatives"),
    "CWCL": CWCL.Config(),
    "CWCL of both sides": CWCL.Config(both_sides=True, power=2.0, pairs=PAIRS),
}


@dataclass(frozen=True)
class Data:
    """A global batch of embeddings."""

    z: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    ids: Tensor
    groups: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of_rank(self, rank: int, size: int) -> Data:
        n = len(self.ids) // size

        def mine(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: t[rank * n : (rank + 1) * n] for name, t in tensors.items()}

        return Data(mine(self.z), mine(self.present), self.ids[rank * n : (rank + 1) * n], mine(self.groups))

    def masked(self) -> Data:
        """Zeros where a modality is absent, as formulas and plain losses want it."""
        return replace(self, z={m: t * self.present[m][:, None] for m, t in self.z.items()})


def draw(
    n: int,
    d: int = 8,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    missing: float = 0.0,
    modalities: Sequence[str] = THREE,
) -> Data:
    """Random unit vectors; the first and the last row are one sample, and patients have about three rows."""
    g = torch.Generator().manual_seed(seed)
    z = {m: nn.functional.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=1) for m in modalities}
    present = {m: torch.rand(n, generator=g) >= missing for m in modalities}
    ids = torch.arange(n) + 50
    ids[-1] = ids[0]
    patients = torch.randint(0, max(1, n // 3), (n,), generator=g)
    patients[-1] = patients[0]
    return Data({m: t.to(dtype) for m, t in z.items()}, present, ids, {"patient": patients})


def run(
    group: Any, objectives: Mapping[str, Objective], data: Data, **options: Any
) -> tuple[Result, dict[str, Tensor]]:
    """The engine on one rank's rows: the result with gradients [N, D] of all ranks, and gradients of parameters."""
    world = World(group)
    mine = data.of_rank(world.rank, world.size)
    for objective in objectives.values():
        objective.zero_grad()
    result = value_and_grad(objectives, mine.z, mine.present, mine.ids, groups=mine.groups, world=world, **options)
    gradients = {m: world.gather(g) for m, g in result.gradients.items()}
    own = {
        f"{name}.{key}": p.grad
        for name, o in objectives.items()
        for key, p in o.named_parameters()
        if p.grad is not None
    }
    return replace(result, gradients=gradients), own


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    assert want.norm() > 0
    return float((got.double() - want.double()).norm() / want.double().norm())
