"""Runs an objective through the whole engine (cache, blocks, ranks) and through plain autograd of a slow formula.

A case trains four tiny encoders for three consecutive steps on rows whose modalities are missing at random. Every
rank count, block and micro-batch, and every way through the tile kernel, must give what one process gets from the
formula on the whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcontrast import tiles
from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import Keep, forward_backward
from mmcontrast.objectives.base import Objective
from mmcontrast.sharding import Result, World, value_and_grad
from tests.formulas import Formula

ROWS, DIM, STEPS, RATE = 20, 6, 3, 0.5
WIDTHS = {"audio": 4, "image": 7, "text": 5, "touch": 3}


@dataclass(frozen=True)
class Kernel:
    """One way through `mmcontrast.tiles`: bytes of tiles kept, elements of a slice, and when masks are listed."""

    keep_bytes: int = 0
    slice: int | None = None
    sparse: int | None = None


PLAIN = Kernel()
KERNELS = (PLAIN, Kernel(keep_bytes=1000, slice=1, sparse=1), Kernel(keep_bytes=1 << 20, sparse=10))
"""Two tiles of three rows fit into 1000 bytes, and a slice of one element is a row."""


@dataclass(frozen=True)
class Case:
    objectives: Mapping[str, Objective.Config]
    missing: bool
    world: int = 1
    block: int | None = None
    micro_batch: int | Mapping[str, int] = ROWS
    keep: Keep = Keep()
    kernel: Kernel = PLAIN


@dataclass
class Outcome:
    """Per step: loss, and the gradient of everything with a gradient; at the end: parameters and state.

    `paths` counts how often the tile kernel went which way.
    """

    losses: list[float] = field(default_factory=list[float])
    gradients: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])
    final: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    paths: Counter[str] = field(default_factory=Counter[str])


@contextmanager
def watched(kernel: Kernel, paths: Counter[str]) -> Generator[None]:
    """Set the kernel's constants, and count its ways while it works as ever."""
    walk, entries = tiles.Walk, tiles._Entries  # pyright: ignore[reportPrivateUsage]

    def count(owner: Any, name: str, way: Callable[[Any, Any], str]) -> None:
        original = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            paths[way(self, result)] += 1
            return result

        patch.setattr(owner, name, counted)

    with pytest.MonkeyPatch.context() as patch:
        if kernel.slice is not None:
            patch.setattr(tiles, "_SLICE", kernel.slice)
        if kernel.sparse is not None:
            patch.setattr(tiles, "_SPARSE", kernel.sparse)
        count(walk, "_from_exponentials", lambda self, result: "exponentials")
        count(walk, "_from_scores", lambda self, result: "maximum subtracted")
        count(walk, "_slices", lambda self, result: "several slices" if len(result) > 1 else "one slice")
        count(walk, "_tile", lambda self, result: "made" if result[1] else "found")
        count(walk, "add_gradients", lambda self, result: "all rows" if self.rows is None else "some rows")
        count(entries, "__init__", lambda self, result: "dense mask" if self.index is None else "listed mask")
        yield


def make_encoders() -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(3)
    encoders = nn.ModuleDict()
    for name, width in WIDTHS.items():
        encoders[name] = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, DIM))
    for parameter in encoders.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return encoders.double()


def make_batch(step: int, missing: bool) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    rows: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for name, width in WIDTHS.items():
        has = torch.rand(ROWS, generator=generator) < (0.6 if missing else 2.0)
        if missing and name == "audio":
            has[ROWS // 4 : ROWS // 2] = False  # rank 1 of 4 has no audio at all
        rows[name] = has.nonzero()[:, 0]
        inputs[name] = torch.randn(len(rows[name]), width, generator=generator, dtype=torch.float64)
    ids = torch.arange(ROWS) + 1000 * step
    ids[7] = ids[2]  # one sample twice in a batch
    groups = {name: torch.randint(0, 8, (ROWS,), generator=generator) for name in ("patient", "site")}
    return Batch(inputs=inputs, rows=rows, ids=ids, groups=groups)


def rows_of_rank(batch: Batch, rank: int, size: int) -> Batch:
    n = ROWS // size
    inputs: dict[str, Any] = {}
    rows: dict[str, Tensor] = {}
    for name, index in batch.rows.items():
        mine = (index >= rank * n) & (index < (rank + 1) * n)
        rows[name], inputs[name] = index[mine] - rank * n, batch.inputs[name][mine]
    part = slice(rank * n, (rank + 1) * n)
    return Batch(inputs=inputs, rows=rows, ids=batch.ids[part], groups={g: t[part] for g, t in batch.groups.items()})


def build(configs: Mapping[str, Objective.Config]) -> dict[str, Objective]:
    with torch.random.fork_rng():
        torch.manual_seed(11)  # Symile's stand-ins for what is missing start at random
        return {name: config.build().double() for name, config in configs.items()}


def along_sphere(gradient: Tensor, z: Tensor) -> Tensor:
    """The part of an embedding's gradient that its encoder sees: length is normalised away."""
    return gradient - (gradient * z).sum(1, keepdim=True) * z


def step_and_record(
    outcome: Outcome,
    loss: Tensor,
    of_embeddings: Mapping[str, Tensor],
    encoders: nn.Module,
    objectives: Mapping[str, Objective],
) -> None:
    """Note the parameters' gradients, then take one step of plain gradient descent with everything."""
    named = dict(encoders.named_parameters())
    for name, objective in objectives.items():
        named |= {f"{name}.{key}": parameter for key, parameter in objective.named_parameters()}
    outcome.losses.append(float(loss))
    found = {f"embeddings of {m}": gradient.clone() for m, gradient in of_embeddings.items()}
    for name, parameter in named.items():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
            parameter.data -= RATE * parameter.grad
            parameter.grad = None
    outcome.gradients.append(found)
    for objective in objectives.values():
        objective.clamp()
    state = {f"{n}.{k}": t for n, o in objectives.items() for k, t in o.state_dict().items()}
    outcome.final = {k: t.detach().clone() for k, t in (dict(encoders.state_dict()) | state).items()}


def run_engine(group: Any, case: Case) -> Outcome:
    world = World(group)
    encoders, objectives = make_encoders(), build(case.objectives)
    outcome = Outcome()
    nothing = {m: torch.zeros(1, width, dtype=torch.float64) for m, width in WIDTHS.items()}

    def encode(piece: MicroBatch) -> dict[str, Tensor]:
        return {
            m: nn.functional.normalize(encoder(piece.inputs.get(m, nothing[m])), dim=-1)[: len(piece.rows.get(m, ()))]
            for m, encoder in encoders.items()
            if piece.towers is None or m in piece.towers
        }

    for step in range(STEPS):
        local = rows_of_rank(make_batch(step, case.missing), world.rank, world.size)
        of_embeddings: dict[str, Tensor] = {}

        def loss(
            z: Mapping[str, Tensor],
            present: Mapping[str, Tensor],
            step: int = step,
            local: Batch = local,
            seen: dict[str, Tensor] = of_embeddings,
        ) -> Result:
            result = value_and_grad(
                objectives,
                z,
                present,
                local.ids,
                groups=local.groups,
                block=case.block,
                keep_bytes=case.kernel.keep_bytes,
                step=step,
                world=world,
            )
            for m in WIDTHS:
                seen[m] = world.gather(along_sphere(result.gradients[m], z[m].detach()))
            return result

        with watched(case.kernel, outcome.paths):
            result = forward_backward(encode, local, loss, micro_batch=case.micro_batch, seed=(step,), keep=case.keep)
        parameters = [p for p in encoders.parameters()]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, total in zip(parameters, world.sum(grads), strict=True):
            parameter.grad = total
        step_and_record(outcome, result.loss, of_embeddings, encoders, objectives)
    return outcome


def run_reference(case: Case, formulas: Mapping[str, Formula]) -> Outcome:
    """Plain autograd of the loop-written formulas, whole batch, one process."""
    encoders, objectives = make_encoders(), build(case.objectives)
    outcome = Outcome()
    for step in range(STEPS):
        batch = make_batch(step, case.missing)
        present = {m: batch.present(m) for m in WIDTHS}
        z: dict[str, Tensor] = {}
        for m in WIDTHS:
            encoded = nn.functional.normalize(encoders[m](batch.inputs[m]), dim=-1)
            z[m] = torch.zeros(ROWS, DIM, dtype=torch.float64).index_copy(0, batch.rows[m], encoded)
            z[m].retain_grad()
        terms = [o.weight_at(step) * formulas[n](o, z, present, batch, step) for n, o in objectives.items()]
        loss = torch.stack(terms).sum()
        loss.backward()
        of_embeddings = {m: along_sphere(t.grad, t.detach()) for m, t in z.items() if t.grad is not None}
        with torch.no_grad():
            for objective in objectives.values():
                objective.update({m: z[m].detach() for m in objective.candidates}, batch.ids)
        step_and_record(outcome, loss.detach(), of_embeddings, encoders, objectives)
    return outcome


def assert_same(got: Outcome, want: Outcome, tolerance: float = 1e-9) -> None:
    """Equal losses, gradients and final state; and not vacuously: gradients exist, differ from zero, and move."""
    assert len(got.losses) == STEPS and len(set(want.losses)) == STEPS
    for step in range(STEPS):
        want_grads, got_grads = want.gradients[step], got.gradients[step]
        moving = {k for k, g in want_grads.items() if g.abs().max() > 1e-6}
        assert moving, "the reference has no gradient: the comparison would be empty"
        assert abs(got.losses[step] - want.losses[step]) <= tolerance * max(1.0, abs(want.losses[step]))
        for name in want_grads.keys() | got_grads.keys():
            a = got_grads.get(name, torch.zeros(()))
            b = want_grads.get(name, torch.zeros(()))
            scale = max(1.0, float(b.abs().max()))
            assert (a - b).abs().max() <= tolerance * scale, f"step {step}, {name}: {(a - b).abs().max():.2e}"
    assert got.final.keys() == want.final.keys()
    for name, value in want.final.items():
        torch.testing.assert_close(got.final[name], value, rtol=tolerance, atol=tolerance, msg=name)
