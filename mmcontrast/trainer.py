"""The trainer: a recipe's settings -> a run folder. Reads top to bottom: set up, resume, step, report, save.

Accelerate starts the processes and picks device and precision. Nothing random is saved: batches, augmentation and
dropout are functions of (seed, step), so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import Keep, forward_backward
from mmcontrast.checkpoint import Checkpoints, read_state
from mmcontrast.config import ConfigError, Configurable, to_dict
from mmcontrast.data.stream import Batches
from mmcontrast.data.tally import Tally
from mmcontrast.ema import EMA
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.execution import CompileMode, compile_blocks, recompute
from mmcontrast.health.measure import gradient_norms, measure
from mmcontrast.health.pulse import Pulse
from mmcontrast.health.rules import Health
from mmcontrast.interrupts import Interrupted, Interrupts
from mmcontrast.launch import check_launch, launcher
from mmcontrast.not_finite import describe, write
from mmcontrast.objectives.base import Objective
from mmcontrast.optim import AdamW, Optimizer, clip_gradients, set_rate
from mmcontrast.parallel import Layout, Sharded, Whole, check_optimizer, local, whole
from mmcontrast.progress import Progress
from mmcontrast.questions import Evaluator, ask
from mmcontrast.run_folder import Content, RunFolder
from mmcontrast.run_state import RunState
from mmcontrast.schedules import Cosine, Schedule
from mmcontrast.settings import check_config, check_model, micro_batches
from mmcontrast.sharding import Result, World, value_and_grad


class Agreed(NamedTuple):
    """What all ranks know after a step, if one of them has found it or was asked for it."""

    not_finite: bool = False
    save: bool = False
    stop: bool = False


class Trainer(Configurable):
    """Trains one model by one recipe."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """A whole run."""

        model: MultiEncoder.Config
        """Towers and shared space."""
        data: Batches.Config
        """Training shards."""
        objectives: dict[str, Objective.Config]
        """Name -> term of the loss."""
        steps: int
        """Optimizer steps."""
        global_batch: int
        """Samples per step over all ranks."""
        out: Path = Path("runs/run")
        """The run folder; a run that is there already goes on."""
        micro_batch: int = 256
        """Samples that a rank encodes at once; bounds memory and changes no gradient (with dropout, other masks)."""
        tower_micro_batch: dict[str, int] = field(default_factory=dict[str, int])
        """Modality -> the same for its tower, where it differs: a small text tower takes more at once."""
        keep_graphs: int = 1
        """Graphs, of one micro-batch in one tower each, that are kept and not made anew (all, if each tower has only
        one); changes no gradient."""
        keep_graph_bytes: int = 0
        """Further ones keep theirs as long as they fit into this, beside the one at work; changes no gradient."""
        block: int | None = 1024
        """Anchors whose scores a rank holds at once; bounds the loss's memory and changes no gradient."""
        keep_bytes: int = 256 << 20
        """Scores that fit into this are not computed twice; changes no gradient."""
        optimizer: Optimizer.Config = field(default_factory=AdamW.Config)
        """Optimizer."""
        schedule: Schedule.Config = field(default_factory=Cosine.Config)
        """Learning rate over the steps."""
        clip_norm: float | None = 1.0
        """Largest global norm of the gradient; None does not clip."""
        precision: Literal["fp32", "bf16"] = "fp32"
        """Arithmetic of the towers; objectives always run in float32."""
        parallel: Literal["ddp", "fsdp"] = "ddp"
        """On several ranks: whole weights on each, or a part on each; changes no gradient."""
        reshard: bool = False
        """With fsdp, let go of gathered weights between micro-batches: least memory, but each gathers them anew."""
        checkpoint_activations: tuple[str, ...] = ()
        """Modalities, or "all", of whose towers only the inputs of blocks are kept: less memory, a third more work."""
        compile: bool = False
        """Compile the towers' blocks by torch.compile; changes a gradient by rounding alone."""
        compile_mode: CompileMode = "default"
        """How hard the compiler tries."""
        not_finite: Literal["raise", "skip"] = "raise"
        """What to do where loss or gradient are not finite: end the run, or leave the step out."""
        max_not_finite: int = 10
        """Steps of a run that may be left out."""
        seed: int = 0
        """Of weights, order, augmentation and dropout."""
        checkpoint: Checkpoints.Config = field(default_factory=Checkpoints.Config)
        """When to save."""
        evaluators: dict[str, Configurable.Config] = field(default_factory=dict[str, Configurable.Config])
        """Name -> question asked while training."""
        eval_every: int | None = None
        """Steps between evaluations; None evaluates at the end only."""
        log_every: int = 10
        """Steps between lines of metrics.jsonl."""
        trackers: tuple[str, ...] = ()
        """Trackers of Accelerate: tensorboard, wandb, mlflow, trackio …; metrics.jsonl is always written."""
        ema: EMA.Config = field(default_factory=EMA.Config)
        """Moving average of the weights, evaluated and saved beside them."""
        health: Health.Config = field(default_factory=Health.Config)
        """What is watched while training."""

    def __init__(self, config: Config) -> None:
        """Build model, objectives, stream and optimizer on every rank.

        Raises:
            ConfigError: settings that cannot be used, or processes that do not know each other.
        """
        from accelerate import Accelerator

        check_config(config)
        self.config = config
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            project_dir=str(config.out),
        )
        check_launch(
            self.accelerator.num_processes, os.environ, launcher=launcher(), gpus=torch.accelerator.device_count()
        )
        self.world = World()
        self.device = self.accelerator.device
        if config.global_batch % self.world.size:
            raise ConfigError(f"global_batch {config.global_batch} must be a multiple of the ranks ({self.world.size})")
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.model: MultiEncoder = config.model.build()
        self.objectives = nn.ModuleDict({n: o.build() for n, o in config.objectives.items()}).to(self.device)
        check_model(self.model.train(), self.terms)
        self.micro_batches = micro_batches(self.model, config.micro_batch, config.tower_micro_batch)
        self.evaluators: dict[str, Evaluator] = {name: e.build() for name, e in config.evaluators.items()}
        self.stream: Batches = config.data.build(
            self.model.transforms(train=True),
            seed=config.seed,
            global_batch=config.global_batch,
            rank=self.world.rank,
            world=self.world.size,
        )
        # A copy, so before the wrapper and its hooks.
        self.ema: EMA | None = None if config.ema.decay is None else config.ema.build(self.model.to(self.device))
        optimizer: Optimizer = config.optimizer.build()
        self.layout = self._lay_out(optimizer)
        self.optimizer = optimizer.optimizer(self.model, self.objectives)
        self.state = RunState(model=self.model, objectives=self.objectives, optimizer=self.optimizer, ema=self.ema)
        self.schedule: Schedule = config.schedule.build()
        self.folder = RunFolder(config.out, config.checkpoint, self.world)
        self.tally = Tally()
        self.interrupts, self.agreed = Interrupts(), Agreed()
        self.skipped_steps = 0
        self._embedded: Mapping[str, Tensor] = {}
        self.health = self._health()
        self.pulse = Pulse(
            config.out,
            rank=self.world.rank,
            size=self.world.size,
            stalled_after=config.health.stalled_after,
            device=self.device,
        )
        self.measured: dict[str, float] = {}  # of the step that is done, now and then

    def _lay_out(self, optimizer: Optimizer) -> Layout:
        """Choose how towers run, and put the weights where they will be; one process has nothing to share."""
        towers = dict(self.model.encoders.items())  # each once, also one that several modalities share
        if self.config.compile:
            compile_blocks(towers, self.config.compile_mode)
        recompute(towers, self.config.checkpoint_activations)
        if self.config.parallel == "ddp" or self.world.size == 1:
            return Whole(self.accelerator, self.model)
        layout = Sharded(self.accelerator, self.model, reshard=self.config.reshard)
        check_optimizer(optimizer, layout.mesh)
        if self.ema is not None:
            layout.share(self.ema.model)
        return layout

    @property
    def terms(self) -> dict[str, Objective]:
        """Name -> objective."""
        return {name: cast(Objective, term) for name, term in self.objectives.items()}

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.world.rank == 0

    # -------------------------------------------------------------------------------------------- the run

    def fit(self) -> dict[str, Any]:
        """Train to the last step, from the newest checkpoint if there is one; returns the last values.

        Raises:
            ConfigError: the run folder belongs to other settings or data or to a run that goes on, or too many samples
                are damaged.
            FloatingPointError: the loss or a gradient is not finite; the weights are as before that step.
            Interrupted: SIGTERM came; the run has saved.
        """
        with self.folder.alone():
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        first = self._resume()
        steps = self.config.steps
        if self.is_main:
            print("\n".join(self.stream.describe(steps)), file=sys.stderr)
            if first:
                print(f"{self.config.out}: goes on at step {first} of {steps}", file=sys.stderr, flush=True)
        if self.config.trackers:
            self.accelerator.init_trackers("mmcontrast", config={"config": json.dumps(to_dict(self.config))})
        values: dict[str, Any] = {}
        progress = Progress(
            self.config.out / "metrics.jsonl",
            first=first,
            steps=steps,
            log_every=self.config.log_every,
            global_batch=self.config.global_batch,
            per_epoch=self.stream.per_epoch,
            main=self.is_main,
            data_values=self.data_values,
            track=self.accelerator.log if self.config.trackers else None,
            health=self.health,
            pulse=self.pulse,
            gather=self.world.gather_objects,
        )
        batches = progress.timed(self.stream.batches(first, steps, pin_memory=self.device.type == "cuda"))
        try:
            with self.interrupts, self.pulse:
                for step, batch in zip(range(first, steps), batches, strict=True):
                    values = self.step(step, batch.to(self.device))
                    self.tally.add(batch)
                    progress.after(step, values, self.measured)
                    # Before an evaluation, that may fail, and must not cost what was trained.
                    saved = self._due(self.config.checkpoint.every, step) or self.agreed.save or self.agreed.stop
                    if saved:
                        self._save(step + 1)
                    if self.agreed.stop and step + 1 < steps:
                        raise Interrupted(f"{self.config.out}: saved at step {step + 1}; start again to go on")
                    if self._due(self.config.eval_every, step):
                        self.pulse.enter("evaluate", step)
                        found = self._evaluate()
                        progress.write(step + 1, found)
                        self.folder.write_details(step + 1, self.evaluators, averaged=self.ema is not None)
                        if self.folder.improved(found):
                            if not saved:
                                self._save(step + 1)
                            self.folder.mark_best(step + 1, found)
        finally:
            self.folder.finish()
        progress.close()
        if self.ema is not None:
            average = self.ema.model
            tensors = whole(average.state_dict(), keep=self.is_main)
            self.folder.write_average(steps, to_dict(self.config.model), average.save_assets, tensors)
        if self.config.trackers:
            self.accelerator.end_training()
        return {name: float(value) for name, value in values.items()}

    def step(self, step: int, batch: Batch) -> dict[str, Tensor | float]:
        """One optimizer step on this rank's batch."""
        self.pulse.enter("encode", step)
        self.measured = {}
        self.model.train()
        state = [buffer.clone() for buffer in self.objectives.buffers()]
        with self.accelerator.autocast():
            pooled = self.model.pool_frozen(batch, self.micro_batches)
        result = forward_backward(
            self._encode,
            pooled,
            lambda z, present: self._loss(z, present, batch, step),
            micro_batch=self.micro_batches,
            keep=Keep(self.config.keep_graphs, self.config.keep_graph_bytes),
            weights=local([*self.model.parameters(), *self.model.buffers()]),
            seed=(self.config.seed, step),
            step=step,
            first_row=self.world.rank * len(batch),
            cotangent_scale=self.world.size,  # undoes the averaging of gradients over ranks
            heads=self.model.terms,
            encode_with_heads=self._encode_with_heads,
            world=self.world,
            no_sync=self.layout.accumulating,
            sync=self.layout.reducing,
        )
        if self.health.due(step):
            self.measured |= gradient_norms(self._towers())
        norm = clip_gradients(self.state.names, self.config.clip_norm)
        finite = math.isfinite(float(norm)) and math.isfinite(float(result.loss))
        self.agreed = self._agree(not finite)
        if self.agreed.not_finite:
            return self._leave_out(step, batch, result, norm, state)
        rate = self.config.optimizer.lr * self.schedule.factor(step, self.config.steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor | float] = {"loss": result.loss, "lr": rate, "grad_norm": norm}
        for name, term in self.terms.items():
            term.clamp()
            values |= {f"{name}.{key}": value for key, value in term.metrics().items()}
            if term.weight_schedule:
                values[f"{name}.weight"] = term.weight_at(step)
        values |= result.observed
        values |= {f"{name}.loss": value for name, value in result.terms.items()}
        return values

    def _agree(self, not_finite: bool) -> Agreed:
        """What any rank has found, or was asked for; the same on all of them, at the same step."""
        overdue = self.is_main and self.folder.checkpoints.overdue()
        flags = torch.tensor([not_finite, self.interrupts.save or overdue, self.interrupts.stop], device=self.device)
        self.interrupts.save = False
        return Agreed(*(bool(flag) for flag in self.world.max([flags.float()])[0].tolist()))

    def _leave_out(
        self, step: int, batch: Batch, result: Result, norm: Tensor, state: list[Tensor]
    ) -> dict[str, Tensor | float]:
        """Undo a step whose loss or gradient is not finite, on every rank, and raise if that is asked for."""
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.objectives.buffers(), state, strict=True):
            buffer.copy_(before)
        ranks = self.world.gather_objects(describe(batch, self._embedded, self.world.rank))
        text = write(self.config.out, step, result.loss, norm, ranks) if self.is_main else None
        text = self.world.gather_objects(text)[0]
        self.skipped_steps += 1
        if self.config.not_finite == "raise":
            raise FloatingPointError(f"{text}. Lower the rate, clip, or leave such steps out: not_finite skip")
        if self.skipped_steps > self.config.max_not_finite:
            raise FloatingPointError(
                f"{text}. It is the step {self.skipped_steps} of this kind; max_not_finite allows "
                f"{self.config.max_not_finite} to be left out"
            )
        if self.is_main:
            print(f"{text}; left out", file=sys.stderr)
        return {"loss": result.loss, "grad_norm": norm, "skipped_steps": float(self.skipped_steps)}

    def _encode(self, piece: MicroBatch) -> Mapping[str, Tensor]:
        with self.accelerator.autocast():
            return self.layout.model(piece.inputs, towers=piece.towers)

    def _encode_with_heads(self, piece: MicroBatch) -> Mapping[str, Tensor]:
        with self.accelerator.autocast():
            return self.layout.model(piece.inputs, piece.rows, towers=piece.towers)

    def _loss(self, z: Mapping[str, Tensor], present: Mapping[str, Tensor], batch: Batch, step: int) -> Result:
        self._embedded = z
        self.pulse.enter("exchange", step)
        if self.health.due(step):
            self.measured |= measure(z, present, batch, self.terms, self.world)
        return value_and_grad(
            self.terms,
            z,
            present,
            batch.ids,
            groups=batch.groups,
            block=self.config.block,
            keep_bytes=self.config.keep_bytes,
            step=step,
            world=self.world,
        )

    def _towers(self) -> dict[str, list[nn.Parameter]]:
        """Modality -> parameters of its tower and projection."""
        model = self.model
        return {m: [*model.encoder(m).parameters(), *model.projections[m].parameters()] for m in model.encoders}

    def _health(self) -> Health:
        config = self.config
        limits = {f"{name}.{m}": range_ for name, term in self.terms.items() for m, range_ in term.limits().items()}
        return config.health.build(
            global_batch=config.global_batch,
            settled=round(config.schedule.warmup * config.steps),
            weights={name: term.weight for name, term in self.terms.items()},
            limits=limits,
            labelled=any(getattr(objective, "never_negative", ()) for objective in config.objectives.values()),
        )

    # -------------------------------------------------------------------------------------------- evaluation

    def _due(self, every: int | None, step: int) -> bool:
        last = step + 1 == self.config.steps
        return last or (every is not None and (step + 1) % every == 0)

    def _evaluate(self) -> dict[str, float | None]:
        models = {"eval": self.layout.whole_model(self.model)}
        if self.ema is not None:
            models["eval_ema"] = self.layout.whole_model(self.ema.model)
        return ask(self.evaluators, models, self.world)

    # -------------------------------------------------------------------------------------------- checkpoints

    def _save(self, step: int) -> None:
        self.pulse.enter("save", step - 1)
        tally = self.tallied()
        tensors = self.state.tensors(keep=self.is_main)

        def content() -> Content:
            return tensors, {
                "stream": self.stream.state(),
                "tally": tally.state(),
                "optimizer": self.state.numbers(),
                "skipped_steps": self.skipped_steps,
            }

        self.folder.save(step, content)

    def _resume(self) -> int:
        """Prepare or check the run folder, load the newest checkpoint, and return the step to go on with."""
        newest = self.folder.open(to_dict(self.config), self.model.save_assets)
        if newest is None:
            return 0
        state = read_state(newest)
        for name, value in self.stream.state().items():
            if state["stream"].get(name) != value:
                raise ConfigError(
                    f"{newest} was trained with {name} {state['stream'].get(name)!r}, now it is {value!r}; "
                    "use the same data and settings, or another --out"
                )
        if self.is_main:  # for all: counts are summed over ranks
            self.tally.load(state["tally"])
        self.state.load(newest, state["optimizer"])
        self.skipped_steps = int(state["skipped_steps"])
        return int(state["step"])

    # -------------------------------------------------------------------------------------------- data

    def tallied(self) -> Tally:
        """What all ranks have read so far; every rank must ask."""
        return Tally.merged(self.world.gather_objects(self.tally))

    def data_values(self, step: int) -> Mapping[str, float]:
        """Counts of what was read before a step, by name.

        Raises:
            ConfigError: more damaged samples than `max_bad_fraction` of those seen.
        """
        tally, sizes = self.tallied(), {s.name: s.order.per_epoch for s in self.stream.sources}
        tally.check(step * self.config.global_batch, self.config.data.max_bad_fraction)
        return tally.values(self.stream.seen(step), sizes)
