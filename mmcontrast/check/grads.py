"""`check grads`: on a recipe and some of its own samples, is the gradient the same however the batch is split?

The reference is plain autograd of the whole formula on the full batch in one process. Beside it stand the trainer's
own step in one process (micro-batches, blocks) and on several. Model, objectives and inputs are float64, so that what
is left is rounding: a true difference is many orders larger. What would break the equality is looked for first, and
named.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch
from mmcontrast.cached import batch_coupled_layers
from mmcontrast.check.arms import (
    BLOCK,
    DRAWN,
    DROPPED,
    PIECES,
    Comparison,
    Job,
    batch_of,
    largest,
    load_weights,
    prepared,
    reference,
    run_trainer,
    save_reference,
    save_weights,
    to_float64,
)
from mmcontrast.check.diagnose import (
    Fault,
    explain_forward,
    find_in_encoders,
    find_in_objectives,
    find_unusable,
    forward_errors,
    lowered_modules,
)
from mmcontrast.check.ranks import make_ready, rank_environment, run_ranks
from mmcontrast.check.report import Compared, Proof
from mmcontrast.check.tracing import SAME
from mmcontrast.config import ConfigError, RunError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.objectives.base import Objective
from mmcontrast.trainer import Trainer

CACHED = "1 process"


def check_grads(
    config: Trainer.Config,
    *,
    rows: int = 32,
    ranks: Sequence[int] = (2, 4),
    tolerance: float = 1e-9,
    timeout: float = 600.0,
    say: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Prove that a recipe's gradient does not depend on micro-batch, block and ranks, or say why it does.

    Args:
        config: the recipe; its batch, micro-batch, block and precision are replaced, its weights are the first step's.
        rows: samples that are drawn from its stream; 8 micro-batches are made of them.
        ranks: numbers of processes.
        tolerance: largest relative error of a gradient or the loss.
        timeout: seconds that the processes of one arm may take.
        say: told what begins.

    Raises:
        ConfigError: settings that cannot be used, or no such data.
    """
    _check(rows, ranks, tolerance)
    steps = 4 + len(ranks)
    config, step = prepared(config, rows)
    say(f"1/{steps} draws {rows} samples and builds the model")
    torch.manual_seed(config.seed)
    model: MultiEncoder = config.model.build()
    terms: dict[str, Objective] = {name: o.build() for name, o in config.objectives.items()}
    modules = nn.ModuleDict(terms)
    drawn = _draw(config, model, step, 0, 1)
    with tempfile.TemporaryDirectory(prefix="mmcontrast-check-") as folder:
        batches = (DRAWN, DROPPED) if len(model.modalities) > 1 else (DRAWN,)
        job = Job(config, step, batches, Path(folder))
        save_weights(job, model, modules)
        proof = Proof(rows=rows, micro_batch=config.micro_batch, block=BLOCK, ranks=tuple(ranks), tolerance=tolerance)
        proof.modalities = model.modalities
        proof.frozen = [m for m in model.modalities if not _trains(model.encoder(m))]
        proof.skipped = len(drawn.skipped)

        if ranks:
            make_ready()
        say(f"2/{steps} looks for what would break it: layers, randomness, objectives")
        proof.faults += find_unusable(model, drawn, to_float64)
        modules.double()
        if proof.faults:
            return proof
        _diagnose(proof, config, model, terms, drawn, step)
        coupled = batch_coupled_layers(model.train())
        if coupled:
            proof.failed[CACHED] = f"training refuses this recipe: the layer {coupled[0]} mixes samples"
        if any(fault.cause in ("fails", "not finite") for fault in proof.faults):
            return proof

        say(f"3/{steps} reference: plain autograd of the full batch")
        try:
            for name in batches:
                _save_reference(proof, job, model, terms, name, batch_of(job, name, drawn))
        except (RuntimeError, ValueError) as error:  # such as of batch norm, which refuses a single row
            if not proof.faults:
                raise
            proof.failed["reference"] = str(error)
            return proof
        del model, terms, modules  # every arm builds its own

        say(f"4/{steps} {CACHED}: {PIECES} micro-batches, blocks of {BLOCK}")
        with rank_environment(0, 1, None):
            if not coupled:
                _run(proof, CACHED, lambda: run_trainer(job))
        for turn, size in enumerate(ranks):
            if proof.faults or not proof.passed:
                proof.failed[f"{size} ranks"] = "not run: mend what is named first"
                continue
            say(f"{5 + turn}/{steps} {size} processes")
            _run(proof, f"{size} ranks", lambda size=size: run_ranks(job, size, timeout))
    return proof


def _check(rows: int, ranks: Sequence[int], tolerance: float) -> None:
    if rows < PIECES or rows % PIECES:
        raise ConfigError(f"rows is {rows}; {PIECES} micro-batches are made of them, so it must be a multiple of that")
    for size in ranks:
        if size < 2 or PIECES % size:
            raise ConfigError(f"ranks: {size} processes cannot share {PIECES} micro-batches; use 2, 4 or 8")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance is {tolerance}; it must be 0 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("check grads starts its own processes: run it without torchrun or accelerate launch")


def _draw(config: Trainer.Config, model: MultiEncoder, step: int, rank: int, world: int) -> Batch:
    stream = config.data.build(
        model.transforms(train=True), seed=config.seed, global_batch=config.global_batch, rank=rank, world=world
    )
    return stream.batch(step)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _diagnose(
    proof: Proof,
    config: Trainer.Config,
    model: MultiEncoder,
    terms: Mapping[str, Objective],
    drawn: Batch,
    step: int,
) -> None:
    """Note everything that can be told without comparing gradients."""
    proof.lowered = lowered_modules(model, drawn)
    proof.faults += find_in_encoders(model, drawn)
    halves = [_draw(config, model, step, rank, 2) for rank in range(2)]
    proof.forward = forward_errors(model, drawn, config.micro_batch, halves)
    if not proof.faults:  # else they explain it
        proof.faults += explain_forward(proof.forward, max(proof.tolerance, SAME))
    model.eval()
    with torch.no_grad():
        encoded = model(drawn.inputs)
    z = {m: encoded[m].new_zeros(len(drawn), encoded[m].shape[1]) for m in drawn.rows}
    z = {m: t.index_copy(0, drawn.rows[m], encoded[m]) for m, t in z.items()}
    proof.faults += find_in_objectives(terms, z, drawn, block=BLOCK, step=step)


def _save_reference(
    proof: Proof, job: Job, model: MultiEncoder, terms: Mapping[str, Objective], name: str, batch: Batch
) -> None:
    """Write the reference of one batch for the arms, and note what it shows."""
    c = job.config
    load_weights(job, model, nn.ModuleDict(terms))
    sizes = {m: c.tower_micro_batch.get(m, c.micro_batch) for m in model.modalities}
    loss, gradients = reference(model, terms, batch, sizes, c.seed, job.step)
    save_reference(job, name, loss, gradients)
    present = {m: len(batch.rows[m]) for m in model.modalities}
    proof.batches[name] = Compared(present, float(loss), largest(gradients))
    if name == DRAWN:
        proof.faults += _unproved(gradients, present)


def _unproved(gradients: Mapping[str, Tensor | None], present: Mapping[str, int]) -> list[Fault]:
    """What the reference's own gradient shows: parameters that it does not reach, and parts where it is all zero."""
    faults = [
        Fault("no samples", m, f"none of the drawn samples has the modality {m!r}: draw more of them with --rows")
        for m, count in present.items()
        if not count
    ]
    model = {name: g for name, g in gradients.items() if name.startswith("model.")}
    lost = [name.removeprefix("model.") for name, g in model.items() if g is None]
    if lost:
        text = f"no gradient reaches {lost[0]}" + (f" and {len(lost) - 1} more parameters" if lost[1:] else "")
        remedy = "on several ranks DDP would wait for them: freeze or remove them"
        faults.append(Fault("no gradient", lost[0], f"{text}; {remedy}"))
    for part, size in largest(model).items():
        if size == 0 and present.get(part, 1) and not lost:
            faults.append(Fault("no gradient", part, f"the gradient of {part} is zero everywhere: no loss reaches it"))
        elif size == torch.inf or size != size:
            faults.append(
                Fault("not finite", part, f"the gradient of {part} holds NaN or infinity; its output does not")
            )
    return faults


def _run(proof: Proof, arm: str, run: Callable[[], Mapping[str, Comparison]]) -> None:
    try:
        for name, comparison in run().items():
            proof.batches[name].arms[arm] = comparison
    except (RunError, RuntimeError, FloatingPointError) as error:
        proof.failed[arm] = str(error)
