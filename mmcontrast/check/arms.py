"""The same gradient in several ways: plain autograd of the whole formula, and the trainer's own step.

Letters: N rows of the global batch, n rows per rank, n_m rows that have modality m, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, map_tensors
from mmcontrast.cached import pieces_of
from mmcontrast.checkpoint import names_of
from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.objectives.base import Objective, plain_loss
from mmcontrast.parallel import load_whole, whole
from mmcontrast.randomness import fold_seed
from mmcontrast.trainer import Trainer

PIECES, BLOCK = 8, 3  # micro-batches of the global batch, the same rows in every arm; and anchors of a block
DRAWN, DROPPED = "as drawn", "with modalities dropped"
_FLOOR = 1e-4  # a tensor's error is relative to its own largest entry, or to this share of its tower's


@dataclass(frozen=True)
class Job:
    """What every arm is given.

    Attributes:
        config: the recipe, with the check's batch, micro-batch and block.
        step: an optimizer step at which every objective counts.
        batches: which batches are compared, of `DRAWN` and `DROPPED`.
        folder: weights, and the reference's gradients of each batch, as safetensors.
    """

    config: Trainer.Config
    step: int
    batches: Sequence[str]
    folder: Path


@dataclass(frozen=True)
class Comparison:
    """One arm beside the reference.

    Attributes:
        loss: the arm's loss.
        loss_error: relative.
        errors: part of the model -> largest relative error of its gradients.
        worst: the parameter with the largest error of all.
    """

    loss: float
    loss_error: float
    errors: Mapping[str, float]
    worst: str

    @property
    def largest(self) -> float:
        """The largest error, the loss's included."""
        return max([self.loss_error, *self.errors.values()])


def prepared(config: Trainer.Config, rows: int) -> tuple[Trainer.Config, int]:
    """The recipe as the check runs it, and the step at which it does."""
    step = max((o.start_step for o in config.objectives.values()), default=0)
    checked = replace(
        config,
        data=replace(config.data, lanes=math.gcd(config.data.lanes, rows), workers=0),
        global_batch=rows,
        micro_batch=rows // PIECES,
        tower_micro_batch={
            m: min(rows, max(1, rows // PIECES * size // config.micro_batch))
            for m, size in config.tower_micro_batch.items()
        },
        keep_graphs=2,  # some are kept, some made again
        keep_graph_bytes=0,
        block=BLOCK,
        keep_bytes=BLOCK * rows * 8,  # of the score tiles some are kept, some computed twice
        steps=max(config.steps, step + 1),
        precision="fp32",
        clip_norm=None,
        evaluators={},
        trackers=(),
    )
    return checked, step


def to_float64(model: MultiEncoder) -> MultiEncoder:
    """The model in float64, in place; what flows into its towers and heads is converted on the way."""

    def widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(map_tensors(a, lambda t: t.double() if t.is_floating_point() else t) for a in args)

    model.double()
    for part in [*model.encoders.values(), *model.heads.values()]:
        part.register_forward_pre_hook(widen)
    return model


def _in_float64(config: MultiEncoder.Config) -> MultiEncoder.Config:
    """Settings whose model is float64 from the start: DDP lays out its buckets by type when the trainer wraps it."""
    owner = cast(type[MultiEncoder], config.owner)

    class Float64(owner):
        def __init__(self, config: MultiEncoder.Config, restore: Path | None = None) -> None:
            super().__init__(config, restore)
            to_float64(self)

    return Float64.Config(**{f.name: getattr(config, f.name) for f in fields(config)})


# -------------------------------------------------------------------------------------------------- batches


def with_missing(batch: Batch, modalities: Sequence[str], *, first_row: int, rows: int, seed: int) -> Batch:
    """The batch with a quarter of its modalities dropped at random, by global row, so alike on any number of ranks.

    The last quarter of the rows loses the first modality throughout: one of four ranks then has none of it. A row
    keeps at least one modality.
    """
    having: dict[int, list[str]] = {}
    for modality in modalities:
        for row in batch.rows[modality].tolist():
            having.setdefault(row, []).append(modality)
    kept: dict[int, list[str]] = {}
    for row, names in having.items():
        number = first_row + row
        late = number >= rows - rows // 4
        left = [m for m in names if not (late and m == modalities[0]) and fold_seed(seed, "drop", number, m) % 4]
        kept[row] = left or names[-1:]
    places: dict[str, Tensor] = {}
    inputs: dict[str, Any] = {}
    for modality in modalities:
        index = batch.rows[modality]
        stays = torch.tensor([modality in kept[row] for row in index.tolist()], dtype=torch.bool)
        places[modality] = index[stays]
        if stays.any():
            inputs[modality] = map_tensors(batch.inputs[modality], lambda t, stays=stays: t[stays])
    return replace(batch, inputs=inputs, rows=places)


def batch_of(job: Job, name: str, drawn: Batch, *, rank: int = 0) -> Batch:
    """A rank's batch of that name."""
    if name == DRAWN:
        return drawn
    return with_missing(
        drawn,
        list(job.config.model.towers()),
        first_row=rank * len(drawn),
        rows=job.config.global_batch,
        seed=job.config.seed,
    )


# ------------------------------------------------------------------------------------------------------ arms


def reference(
    model: MultiEncoder,
    objectives: Mapping[str, Objective],
    batch: Batch,
    sizes: Mapping[str, int],
    seed: int,
    step: int,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss, and gradients by name, of plain autograd: all graphs kept, no cache, no blocks, no collectives.

    The pieces are those of the cache, with its seeds, for the same dropout; a frozen tower is not pooled ahead. `sizes`
    are the micro-batches of the towers.

    Raises:
        ConfigError: nothing trains.
    """
    terms = nn.ModuleDict(cast(Mapping[str, nn.Module], objectives))
    names = names_of(("model", model.train()), ("objectives", terms))
    for parameter in names:
        parameter.grad = None
    with torch.random.fork_rng(devices=[]):
        outputs: list[Mapping[str, Tensor]] = []
        for piece in pieces_of(batch, sizes, [head.modalities for head in model.terms.values()]):
            torch.manual_seed(fold_seed(seed, step, piece.start, *piece.apart))
            outputs.append(model(piece.inputs, piece.rows, towers=piece.towers))
    z: dict[str, Tensor] = {}
    for modality, index in batch.rows.items():
        encoded = torch.cat([found[modality] for found in outputs if modality in found])
        z[modality] = encoded.new_zeros(len(batch), encoded.shape[1]).index_copy(0, index, encoded)
    present = {m: batch.present(m) for m in batch.rows}
    loss = plain_loss(objectives, z, present, batch.ids, groups=batch.groups, step=step)
    for name, head in model.terms.items():
        total = torch.stack([found[name] for found in outputs if name in found]).sum()
        loss = loss + head.weight_at(step) * total / head.count(batch).clamp(min=1)
    if not loss.requires_grad:
        raise ConfigError("no parameter trains: every tower is frozen and no objective learns")
    loss.backward()
    return loss.detach(), {name: parameter.grad for parameter, name in names.items() if parameter.requires_grad}


def run_trainer(job: Job) -> dict[str, Comparison]:
    """Batch -> what `Trainer.step` of this process and its fellow ranks makes of it, beside the saved reference.

    The real step of a real trainer: its encoding, cache, blocks, collectives and wrapper are those that train. Its
    gradients are taken when the optimizer is about to use them; the weights stay as they are.
    """
    from safetensors.torch import load_file

    trainer = replace(job.config, model=_in_float64(job.config.model)).build()
    trainer.objectives.double()
    found: dict[str, Tensor | None] = {}

    def take(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = {name: p.grad for p, name in trainer.state.names.items()}
        found.update(dict.fromkeys(gradients))
        found.update(whole({name: g.clone() for name, g in gradients.items() if g is not None}))
        optimizer.zero_grad(set_to_none=True)

    trainer.optimizer.register_step_pre_hook(take)
    drawn = trainer.stream.batch(job.step)
    compared: dict[str, Comparison] = {}
    for name in job.batches:
        load_weights(job, trainer.model, trainer.objectives)
        values = trainer.step(job.step, batch_of(job, name, drawn, rank=trainer.world.rank))
        compared[name] = compare(float(values["loss"]), found, load_file(job.folder / f"{name}.safetensors"))
    trainer.accelerator.wait_for_everyone()  # one that ended now could take a collective's last words with it
    return compared


def save_weights(job: Job, model: nn.Module, objectives: nn.Module) -> None:
    """Write the weights that every arm starts from."""
    state = {f"model.{k}": t for k, t in model.state_dict().items()}
    state |= {f"objectives.{k}": t for k, t in objectives.state_dict().items()}
    _save(job.folder / "weights.safetensors", state)


def load_weights(job: Job, model: nn.Module, objectives: nn.Module) -> None:
    """Set the weights and state that every arm starts from; a step may have changed the latter."""
    from safetensors.torch import load_file

    weights = load_file(job.folder / "weights.safetensors")
    for prefix, module in (("model.", model), ("objectives.", objectives)):
        load_whole(module, {k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)})


def save_reference(job: Job, name: str, loss: Tensor, gradients: Mapping[str, Tensor | None]) -> None:
    """Write what `run_trainer` compares with; a parameter without gradient is left out."""
    _save(job.folder / f"{name}.safetensors", {"loss": loss, **{k: t for k, t in gradients.items() if t is not None}})


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, path)


# ------------------------------------------------------------------------------------------------ comparison


def part_of(name: str) -> str:
    """The part of a run that a parameter belongs to: a tower with its projection, a head, an objective's parameter."""
    words = name.split(".")
    if words[0] == "objectives":
        return ".".join(words[1:])
    if words[1] in ("encoders", "projections"):
        return words[2]
    return f"{words[2]} (head)" if words[1] == "heads" else words[1]


def largest(gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Part -> its largest entry of a gradient; NaN counts as infinity."""
    found: dict[str, float] = {}
    for name, gradient in gradients.items():
        size = 0.0 if gradient is None or not gradient.numel() else float(gradient.abs().max())
        found[part_of(name)] = max(found.get(part_of(name), 0.0), size if size == size else torch.inf)
    return found


def compare(loss: float, got: Mapping[str, Tensor | None], want: Mapping[str, Tensor]) -> Comparison:
    """An arm's loss and gradients beside the reference's, which hold the loss under its name."""
    wanted_loss = float(want["loss"])
    gradients = {name: t for name, t in want.items() if name != "loss"}
    sizes = largest(gradients)
    errors: dict[str, float] = {}
    worst, worst_error = "", -1.0
    for name, gradient in got.items():
        expected = gradients.get(name)
        if gradient is None and expected is None:
            continue
        a = torch.zeros(()) if gradient is None else gradient
        b = torch.zeros(()) if expected is None else expected
        scale = max(float(b.abs().max()), _FLOOR * sizes.get(part_of(name), 0.0), 1e-12)
        error = float((a - b).abs().max()) / scale
        error = error if error == error else torch.inf  # NaN would compare as no error
        errors[part_of(name)] = max(errors.get(part_of(name), 0.0), error)
        if error > worst_error:
            worst, worst_error = name, error
    loss_error = abs(loss - wanted_loss) / max(abs(wanted_loss), 1e-6)
    return Comparison(loss, loss_error if loss_error == loss_error else torch.inf, errors, worst)
