"""What `check grads` says: a table, a verdict in plain words, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from mmcontrast.check.arms import Comparison
from mmcontrast.check.diagnose import Fault


@dataclass
class Compared:
    """One batch: the reference, and the arms beside it.

    Attributes:
        present: modality -> rows that have it.
        loss: the reference's.
        largest: part of the model -> largest entry of the reference's gradient.
        arms: name -> comparison.
    """

    present: Mapping[str, int]
    loss: float
    largest: Mapping[str, float]
    arms: dict[str, Comparison] = field(default_factory=dict[str, Comparison])


@dataclass
class Proof:
    """All that was found. `failed` says why an arm gave no numbers, `forward` how far pieces are from the whole."""

    rows: int
    micro_batch: int
    block: int
    ranks: tuple[int, ...]
    tolerance: float
    modalities: list[str] = field(default_factory=list[str])
    frozen: list[str] = field(default_factory=list[str])
    skipped: int = 0
    batches: dict[str, Compared] = field(default_factory=dict[str, Compared])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    forward: dict[str, float] = field(default_factory=dict[str, float])
    lowered: list[str] = field(default_factory=list[str])
    faults: list[Fault] = field(default_factory=list[Fault])

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it so far; NaN does."""
        return not self.faults and not self.failed and self.largest <= self.tolerance

    @property
    def largest(self) -> float:
        """The largest relative error of all arms and of the forward in pieces."""
        arms = [c.largest for batch in self.batches.values() for c in batch.arms.values()]
        return max([0.0, *arms, *self.forward.values()])

    def as_text(self) -> str:
        """What was done, the table, and the verdict."""
        told = (
            f"{self.rows} samples of its stream in float64, micro-batches of {self.micro_batch}, blocks of {self.block}"
        )
        if self.skipped:
            told += f" ({self.skipped} damaged samples replaced)"
        if len(self.modalities) == 1:
            told += "; with one modality, none is dropped"
        if not self.batches:
            return f"{told}\n\n{self.verdict()}"
        notes = "largest error relative to the largest entry, per part; reference: the loss, the largest entry"
        return f"{told}\n\n{self.as_table()}\n{notes}\n\n{self.verdict()}"

    def as_table(self) -> str:
        """Part by part, the reference's size and every arm's largest relative error."""
        arms = list(dict.fromkeys(arm for batch in self.batches.values() for arm in batch.arms))
        lines = [["", "reference", *arms]]
        for name, batch in self.batches.items():
            counts = ", ".join(f"{count} {m}" for m, count in batch.present.items())
            lines.append([f"{name}: {counts} of {self.rows} rows"])
            found = [batch.arms[arm] for arm in arms if arm in batch.arms]
            lines.append(["  loss", f"{batch.loss:.6g}", *(f"{c.loss_error:.1e}" for c in found)])
            for part in [*self.modalities, *(p for p in batch.largest if p not in self.modalities)]:
                lines.append([f"  {self._title(part, batch)}", *self._cells(part, batch, found)])
        width = max(len(line[0]) for line in lines if len(line) > 1)
        return "\n".join(
            line[0] if len(line) == 1 else f"{line[0]:<{width}}" + "".join(f"{c:>12}" for c in line[1:])
            for line in lines
        )

    def _title(self, part: str, batch: Compared) -> str:
        return f"{part} (tower frozen)" if part in self.frozen and part in batch.largest else part

    def _cells(self, part: str, batch: Compared, found: list[Comparison]) -> list[str]:
        if part not in batch.largest:
            return ["frozen", *("-" for _ in found)]
        return [f"{batch.largest[part]:.1e}", *(f"{c.errors.get(part, math.nan):.1e}" for c in found)]

    def verdict(self) -> str:
        """In plain words: proved, or why not."""
        if self.passed:
            *most, last = ("1", *map(str, self.ranks))
            counts = f"{', '.join(most)} and {last} processes" if most else "1 process"
            return (
                f"The gradient is the same. With {counts}, micro-batches of {self.micro_batch} and blocks of "
                f"{self.block} it differs from plain autograd of the full batch by at most {self.largest:.1e} "
                f"(tolerance {self.tolerance:.0e})."
            )
        lines = ["The gradient is NOT shown to be the same:"]
        lines += [f"- {fault.text}." for fault in self.faults]
        lines += [f"- {arm}: {text}" for arm, text in self.failed.items()]
        if not self.faults and self.largest > self.tolerance:
            lines.append(f"- {self._worst()}")
            if self.lowered:
                names = ", ".join(self.lowered[:3])
                more = f" and {len(self.lowered) - 3} more" if len(self.lowered) > 3 else ""
                lines.append(
                    f"- {names}{more} computes in less than float64 inside: errors up to 1e-6 may be its rounding; "
                    "--tolerance 1e-6 tells"
                )
        return "\n".join(lines)

    def _worst(self) -> str:
        found = [(error, f"the forward of {m} in pieces") for m, error in self.forward.items()]
        for name, batch in self.batches.items():
            for arm, c in batch.arms.items():
                where = "the loss" if c.loss_error == c.largest else c.worst
                found.append((c.largest, f"{where} ({arm}, {name})"))
        size, where = max(found)
        return (
            f"{where} differs by {size:.1e}, more than the tolerance {self.tolerance:.0e}. No layer, randomness or "
            "objective was found that explains it"
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, with null for what is not finite."""
        found = asdict(self) | {"passed": self.passed, "largest": self.largest, "verdict": self.verdict()}
        return cast(dict[str, Any], _finite(found))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in cast(dict[str, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
