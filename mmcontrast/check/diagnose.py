"""What, in a model or an objective, would make the gradient depend on how a batch is split; by name, with the remedy.

Letters: n_m rows that have modality m, B rows of a probe, T tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.check.tracing import (
    SAME,
    Lowered,
    Trace,
    difference,
    first_not_finite,
    first_unexplained,
    tensors_in,
)
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.objectives.base import Objective, plain_loss
from mmcontrast.sharding import World, value_and_grad

_PROBE = 7  # rows of a probe; seldom the size of another axis, by which a row's values are found

Cause = Literal[
    "mixes samples",
    "padding",
    "randomness",
    "state",
    "not deterministic",
    "not finite",
    "float64",
    "no gradient",
    "no samples",
    "not additive",
    "not its formula",
    "fails",
]


@dataclass(frozen=True)
class Fault:
    """One reason why the gradient is not, or cannot be shown to be, the same.

    Attributes:
        cause: the kind of reason.
        where: name of the module, parameter, modality or objective.
        text: what a person needs to mend it.
    """

    cause: Cause
    where: str
    text: str


def called(model: nn.Module, name: str) -> str:
    """A module's name with its class."""
    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"


# ---------------------------------------------------------------------------------------------------- running


def find_unusable(model: MultiEncoder, batch: Batch, convert: Callable[[MultiEncoder], object]) -> list[Fault]:
    """Samples that are not finite, and a model that cannot run them; `convert` makes it float64, in place."""
    for modality, x in batch.inputs.items():
        for place, row in enumerate(batch.rows[modality].tolist()):
            if not _all_finite(map_tensors(x, lambda t, place=place: t[place])):
                return [
                    Fault(
                        "not finite",
                        modality,
                        f"the {modality} of the sample {batch.keys[row]!r} holds NaN or infinity after its transform; "
                        "mend or drop the sample",
                    )
                ]
    for kind in ("float32", "float64"):
        if kind == "float64":
            convert(model)
        with Trace(model) as trace, torch.no_grad(), seeded(0):
            try:
                encoded = model.train()(batch.inputs, batch.rows)
            except Exception as error:  # of any library: the module's name is what matters
                where, reason = trace.innermost, _reason(error)
                if kind == "float32":
                    return [Fault("fails", where, f"{called(model, where)} fails on these samples: {reason}")]
                return [
                    Fault(
                        "float64",
                        where,
                        f"{called(model, where)} cannot run in float64, so nothing can be proved: {reason}. Let it "
                        "take the type of its input or of its weights instead of a fixed one",
                    )
                ]
        for name, found in encoded.items():
            if not torch.isfinite(found).all():
                where = first_not_finite(trace) or ""
                rows = batch.rows[name][~found.isfinite().all(1)].tolist() if name in batch.rows else []
                bad = [batch.keys[int(row)] for row in rows]
                of = f" of {name}, first of the samples {', '.join(bad[:4])}" if bad else f" of {name}"
                text = f"{called(model, where)} makes NaN or infinity of finite inputs ({kind}){of}"
                return [Fault("not finite", where, text)]
    return []


def lowered_modules(model: MultiEncoder, batch: Batch) -> list[str]:
    """Modules that compute in less than float64 inside: what they do is exact to their own rounding only."""
    with Trace(model) as trace, torch.no_grad(), seeded(0), Lowered(trace) as lowered:
        model.train()(batch.inputs, batch.rows)
    return [called(model, name) for name in dict.fromkeys(lowered.names)]


# --------------------------------------------------------------------------------------------------- encoders


def find_in_encoders(model: MultiEncoder, batch: Batch) -> list[Fault]:
    """Towers and heads that do not repeat themselves, or whose rows depend on each other; in training mode."""
    model.train()
    faults: dict[str, Fault] = {}
    failures: dict[str, Fault] = {}
    probes = [Probe(model, batch, (m,), heads=False) for m in batch.inputs]
    probes += [Probe(model, batch, head.modalities, heads=True) for head in model.terms.values()]
    with undisturbed():
        for probe in probes:
            rows = _common(batch, probe.names)[:_PROBE]
            if len(rows) < 2:
                continue
            try:
                fault = _find_randomness(model, probe, rows) or _find_mixing(model, probe, rows)
                if fault is not None and fault.cause == "mixes samples":  # rare randomness looks like it: look harder
                    fault = _find_randomness(model, probe, rows, tries=16) or fault
            except (RuntimeError, ValueError) as error:  # such as of batch norm, which refuses a single row
                text = (
                    f"{called(model, probe.running)} fails on a single row, which stands in where a micro-batch lacks"
                )
                failures[probe.running] = Fault("fails", probe.running, f"{text} the modality: {_reason(error)}")
            else:
                if fault is not None:
                    faults.setdefault(fault.where, fault)
    return list((failures | faults).values())


class Probe:
    """Runs chosen rows of some modalities through a model, with torch's generator in one state."""

    def __init__(self, model: MultiEncoder, batch: Batch, names: Sequence[str], *, heads: bool) -> None:
        self.model, self.batch, self.names, self.heads = model, batch, names, heads
        self.running = ""  # the module in which the last forward failed

    def __call__(self, rows: Sequence[int], *, graph: bool = False, row: int | None = None) -> Trace:
        """The trace of one forward of some rows of the batch, which may come several times; of one `row`, or of all."""
        inputs: dict[str, Any] = {}
        for name in self.names:
            at = torch.searchsorted(self.batch.rows[name], torch.tensor(rows))
            inputs[name] = map_tensors(self.batch.inputs[name], lambda t, at=at: t[at])
        places = {name: torch.arange(len(rows)) for name in self.names}
        for name in self.model.modalities:
            places.setdefault(name, torch.zeros(0, dtype=torch.int64))
        kept = {} if row is None else {"rows": len(rows), "row": row}
        with Trace(self.model, **kept) as trace, torch.set_grad_enabled(graph), seeded(0):
            try:
                self.model(inputs, places if self.heads else None)
            finally:
                self.running = trace.innermost
        return trace


def _find_randomness(model: MultiEncoder, probe: Probe, rows: Sequence[int], tries: int = 4) -> Fault | None:
    """The two passes of the gradient cache: without graph and with it, same rows, same seed."""

    def again(fix: Callable[[], None] = lambda: None) -> tuple[str, float] | None:
        """Several times, for a layer that is skipped now and then mostly does the same twice."""
        fix()
        first = probe(rows)
        for _ in range(tries):
            fix()
            found = first_unexplained(first, probe(rows, graph=True))
            if found is not None:
                return found
        return None

    found = again()
    if found is None:
        return None
    where, size = found
    if size < 1e-6:
        return Fault(
            "not deterministic",
            where,
            f"{called(model, where)} is not deterministic: the same rows, encoded twice with one seed, differ by "
            f"{size:.0e}; torch.use_deterministic_algorithms(True) names the operation",
        )
    source = next((name for name, fix in _SOURCES.items() if again(fix) is None), None)
    if source is None:
        module = model.get_submodule(where)
        before = {name: b.clone() for name, b in module.named_buffers()}
        probe(rows)
        for name, buffer in module.named_buffers():
            if not torch.equal(before[name], buffer):
                return Fault(
                    "state",
                    where,
                    f"{called(model, where)} changes its buffer {name!r} in every forward and then answers otherwise, "
                    "so the second pass of the gradient cache differs from the first; change state outside of forward",
                )
    return Fault(
        "randomness",
        where,
        f"{called(model, where)} draws from {source or 'a generator of its own, the clock or hidden state'}, which the "
        f"gradient cache cannot replay: the same rows, encoded twice with one seed, differ by {size:.0e} of their "
        "size. Draw from torch's global generator, which is seeded anew for every micro-batch",
    )


def _find_mixing(model: MultiEncoder, probe: Probe, rows: Sequence[int]) -> Fault | None:
    """One row stays and all others become copies of it: nothing that belongs to the row may change."""
    count = len(rows)
    for row in (0, count - 1):
        among_others, among_copies = probe(rows, row=row), probe([rows[row]] * count, row=row)
        seen = difference(among_others.calls["", 0].outputs, among_copies.calls["", 0].outputs)
        # Embeddings decide, modules only explain; of a head's sum no row can be told apart.
        if not probe.heads and seen <= SAME:
            continue
        found = first_unexplained(among_others, among_copies)
        if found is None and not probe.heads:
            found = f"encoders.{probe.names[0]}", seen
        if found is not None:
            where, size = found
            remedy = "Let it see one row at a time"
            if isinstance(model.get_submodule(where), _BatchNorm):
                remedy = "Replace it by group or layer norm, or keep it on stored statistics (`eval()`) and freeze it"
            text = (
                f"{called(model, where)} mixes samples: with other rows beside it, a row's output differs by "
                f"{size:.0e} of its size, so the gradient depends on the micro-batch. {remedy}"
            )
            return Fault("mixes samples", where, text)
    return None


def forward_errors(model: MultiEncoder, batch: Batch, micro_batch: int, of_ranks: Sequence[Batch]) -> dict[str, float]:
    """Modality -> how far one forward of all rows is from that of pieces, with randomness off; heads likewise.

    `of_ranks` are the same rows as several ranks read them, where texts may be padded to another length.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(batch.inputs, batch.rows)
            pieces = [model(p.inputs, p.rows) for p in batch.split(micro_batch)]
            ranks = [model(b.inputs, b.rows) for b in of_ranks]
    finally:
        model.train(training)
    errors: dict[str, float] = {}
    for parts in (pieces, ranks):
        for name, all_rows in whole.items():
            values = [part[name] for part in parts]
            merged = torch.cat(values) if name in batch.rows else torch.stack(values).sum()
            errors[name] = max(errors.get(name, 0.0), difference([merged], [all_rows]) if all_rows.numel() else 0.0)
    return errors


def explain_forward(errors: Mapping[str, float], tolerance: float) -> list[Fault]:
    """Faults of `forward_errors`."""
    return [
        Fault(
            "padding",
            name,
            f"{name} comes out otherwise (by {error:.0e}) when its rows are encoded in pieces, or padded to the "
            "longest text of another batch: padding must not be seen, nor shift positions",
        )
        for name, error in errors.items()
        if not error <= tolerance
    ]


# ------------------------------------------------------------------------------------------------- objectives


def find_in_objectives(
    objectives: Mapping[str, Objective], z: Mapping[str, Tensor], batch: Batch, *, block: int, step: int
) -> list[Fault]:
    """Objectives whose totals are not additive, that do not repeat themselves, or that the engine gets wrong."""
    present = {m: batch.present(m) for m in batch.rows}
    faults: list[Fault] = []
    for name, objective in objectives.items():
        title = f"the objective {name!r} ({type(objective).__name__})"

        def engine(size: int | None, name: str = name, objective: Objective = objective) -> list[Tensor]:
            own = copy.deepcopy(objective)  # it may change its state
            found = value_and_grad(
                {name: own}, z, present, batch.ids, groups=batch.groups, block=size, step=step, world=World()
            )
            return [found.loss, *(found.gradients[m] for m in sorted(z)), *_own_gradients(own)]

        def plain(name: str = name, objective: Objective = objective) -> list[Tensor]:
            own = copy.deepcopy(objective)
            leaves = {m: t.detach().clone().requires_grad_() for m, t in z.items()}
            loss = plain_loss({name: own}, leaves, present, batch.ids, groups=batch.groups, step=step)
            if loss.requires_grad:
                loss.backward()
            of_z = [leaves[m].grad for m in sorted(leaves)]
            zeros = [torch.zeros_like(leaves[m]) for m in sorted(leaves)]
            of_z = [zero if g is None else g for g, zero in zip(of_z, zeros, strict=True)]
            return [loss.detach(), *of_z, *_own_gradients(own)]

        try:
            whole, blocks, want, again = engine(None), engine(block), plain(), plain()
        except Exception as error:  # of an objective's own code: which one is what matters
            faults.append(Fault("fails", name, f"{title} fails in float64: {_reason(error)}"))
            continue
        if not all(bool(torch.isfinite(t).all()) for t in want):
            text = f"{title} gives {float(want[0])} on these samples, or a gradient that is not finite"
            faults.append(Fault("not finite", name, text))
        elif (size := difference(again, want)) > SAME:
            text = f"{title} does not repeat itself (by {size:.0e}): draw in `prepare`, from `step`, and write no state"
            faults.append(Fault("randomness", name, f"{text} in `partial`"))
        elif (size := difference(blocks, whole)) > SAME:
            faults.append(
                Fault(
                    "not additive",
                    name,
                    f"{title} gives another loss or gradient (by {size:.0e}) in blocks of {block} anchors than in one: "
                    "the totals of `partial` must add up over blocks. Return sums, and divide in `finalize` by a count "
                    "of the whole batch; a mean over the block is none",
                )
            )
        elif (size := difference(whole, want)) > SAME:
            text = (
                f"{title} differs (by {size:.0e}) from plain autograd of its formula: its closed-form gradient is not"
            )
            faults.append(Fault("not its formula", name, f"{text} that of its loss, or `partial` depends on the rows"))
    return faults


def _own_gradients(objective: Objective) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in objective.parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------------ common


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Torch's global generator in a known state; as it was, afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def undisturbed() -> Generator[None]:
    """Python's and numpy's global generators as they were, afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


_SOURCES: Mapping[str, Callable[[], None]] = {
    "python's `random`": lambda: random.seed(0),
    "`numpy.random`": lambda: np.random.seed(0),
}


def _common(batch: Batch, names: Sequence[str]) -> list[int]:
    """Rows that have all of some modalities."""
    found = [set(batch.rows[name].tolist()) for name in names]
    return sorted(set.intersection(*found))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _all_finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(value) if t.is_floating_point())
