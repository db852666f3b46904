"""A plan as a table for the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmcontrast.plan.count import Model
from mmcontrast.plan.predict import SPARE, Machine, Prediction


@dataclass(frozen=True)
class Plan:
    """What `mmcontrast plan` says.

    Attributes:
        recipe: its name.
        steps: optimizer steps.
        global_batch: samples of a step.
        precision: of the towers.
        parallel: how the weights lie.
        model: counted towers.
        machine: where it runs.
        step: what a step takes.
        remedies: where it does not fit: flags, and the bytes that they leave.
        sample_bytes: of a sample in the shards, as they lie; None where they are not there.
    """

    recipe: str
    steps: int
    global_batch: int
    precision: str
    parallel: str
    model: Model
    machine: Machine
    step: Prediction
    remedies: Sequence[tuple[str, float]] = field(default=())
    sample_bytes: float | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.step.bytes <= self.machine.device.memory

    @property
    def samples_per_second(self) -> float:
        """Of all ranks."""
        return self.global_batch / self.step.seconds

    def assumptions(self) -> list[str]:
        """All that is not counted."""
        machine, device = self.machine, self.machine.device
        inside = machine.gpus <= machine.per_node
        link = f"{device.link / 1e9:.0f} GB/s between the devices of a machine"
        network = f"{machine.network / 1e9:.0f} GB/s per device between machines of {machine.per_node}"
        counted = "on real weights, with their memory" if self.model.real else "on tensors without memory"
        return [
            f"{machine.mfu:.0%} of the published arithmetic is reached (--mfu), and none of the traffic is hidden",
            f"traffic goes at {link if inside else network}, by rings",
            f"FLOPs and graphs are counted in forward and backward passes {counted}; heads and decoding are not",
            "a graph on an accelerator keeps what one on a CPU keeps; kernels need no further memory",
            f"allocators lose {SPARE:.0%}; driver and libraries take {device.context / 1e9:.1f} GB",
            "every sample has every modality, and every text is as long as its tower takes",
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything, with assumptions."""
        seconds = self.step.seconds
        tokens = sum(t.tokens for t in self.model.towers)
        return {
            "recipe": self.recipe,
            "steps": self.steps,
            "global_batch": self.global_batch,
            "precision": self.precision,
            "parallel": self.parallel,
            "gpus": self.machine.gpus,
            "gpu": asdict(self.machine.device),
            "towers": [asdict(t) for t in self.model.towers],
            "parameters": self.model.parameters,
            "trained": self.model.trained,
            "memory_bytes": {**self.step.memory, "all": self.step.bytes},
            "fits": self.fits,
            "remedies": [{"flags": flags, "memory_bytes": taken} for flags, taken in self.remedies],
            "flops_per_rank_and_step": dict(self.step.flops),
            "sent_bytes_per_rank_and_step": {**self.step.sent, "all": sum(self.step.sent.values())},
            "step_seconds": {"compute": self.step.compute, "exchange": self.step.exchange, "all": seconds},
            "samples_per_second": self.samples_per_second,
            "read_bytes_per_second": None if self.sample_bytes is None else self.sample_bytes * self.samples_per_second,
            "samples": self.steps * self.global_batch,
            "text_tokens": self.steps * self.global_batch * tokens,
            "run_seconds": self.steps * seconds,
            "notes": list(self.step.notes),
            "assumptions": self.assumptions(),
        }

    def as_text(self) -> str:
        """The table."""
        step, machine = self.step, self.machine
        lines = [
            f"{self.recipe}: {self.steps:,} steps of {self.global_batch:,} samples on {machine.gpus} x "
            f"{machine.device.name}, {self.precision}, {self.parallel}",
            "",
            f"{'tower':14}{'parameters':>14}{'trained':>14}" + "".join(f"{head:>16}" for head in _HEADS),
        ]
        for t in self.model.towers:
            numbers = f"{t.parameters / 1e6:>12.1f} M{t.trained / 1e6:>12.1f} M{t.plain.forward / 1e9:>16.2f}"
            lines.append(f"{t.name:14}{numbers}{t.plain.kept / 1e6:>16.2f}{step.micro_batches[t.name]:>16}")
        lines += ["", *_lines("memory of a rank", step.memory, 1e9, "GB")]
        limit = machine.device.memory / 1e9
        verdict = "fits into" if self.fits else "DOES NOT FIT into"
        lines.append(f"{'':18}{step.bytes / 1e9:>12.2f} GB in all: {verdict} {limit:.0f} GB")
        lines += ["", *_lines("work of a rank", step.flops, 1e12, "TFLOP")]
        lines += ["", *_lines("sent by a rank", step.sent, 1e9, "GB")]
        lines += [
            "",
            f"{'step':18}{step.seconds:>12.3g} s  ({step.compute:.3g} arithmetic, {step.exchange:.3g} traffic)",
        ]
        rate = f"{self.samples_per_second:,.0f} samples/s"
        if self.sample_bytes is not None:
            rate += f", {self.sample_bytes * self.samples_per_second / 1e6:,.0f} MB/s from the shards"
        lines.append(f"{'data needed':18}{rate:>12}")
        tokens = sum(t.tokens for t in self.model.towers)
        seen = f"{self.steps * self.global_batch:.3g} samples"
        seen += f", {self.steps * self.global_batch * tokens:.3g} text tokens with padding" if tokens else ""
        lines.append(f"{'run':18}{_duration(self.steps * step.seconds):>12}: {seen}")
        lines += ["", *(f"note: {note}" for note in step.notes)] if step.notes else []
        if self.remedies:
            lines += ["", "to make it fit:"]
            for flags, taken in self.remedies:
                lines.append(f"  {flags:60}{taken / 1e9:>8.2f} GB{'  fits' if taken <= machine.device.memory else ''}")
            if self.remedies[-1][1] > machine.device.memory:
                lines.append("  not enough: take more devices with fsdp, a smaller global batch or smaller towers")
        return "\n".join([*lines, "", "assumed: " + "; ".join(self.assumptions()) + "."])


_HEADS = ("GFLOP forward", "MB kept a row", "micro-batches")


def _lines(title: str, parts: Mapping[str, float], unit: float, name: str) -> list[str]:
    shown = [f"{what + ':':24}{value / unit:>10.3g} {name}" for what, value in parts.items() if value]
    return [f"{title if i == 0 else '':18}  {line}" for i, line in enumerate(shown)] or [f"{title:18}  nothing"]


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"
