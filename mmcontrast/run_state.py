"""What training changes, as a checkpoint holds it: weights, their average, and the optimizer's moments and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.checkpoint import load_optimizer, names_of, optimizer_tensors, read_tensors
from mmcontrast.ema import EMA
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.optim import load_optimizer_numbers, optimizer_numbers
from mmcontrast.parallel import load_whole, part_like, whole


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Every rank has it, with whole weights or a part of them; on the disk they are whole, for any number of ranks."""

    model: MultiEncoder
    objectives: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    ema: EMA | None

    @cached_property
    def names(self) -> dict[Tensor, str]:
        """Parameter -> its name, the same in every process and run."""
        return names_of(("model", self.model), ("objectives", self.objectives))

    def tensors(self, *, keep: bool) -> dict[str, Mapping[str, Tensor]]:
        """File -> name -> whole tensor, where `keep` says that this rank wants them. Every rank must ask."""
        parts = {
            "model": self.model.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.names),
        }
        if self.ema is not None:
            parts["ema"] = self.ema.model.state_dict()
        return {name: whole(content, keep=keep) for name, content in parts.items()}

    def numbers(self) -> dict[str, Any]:
        """What the optimizer has beside tensors."""
        return optimizer_numbers(self.optimizer, self.names)

    def load(self, checkpoint: Path, numbers: Mapping[str, Any]) -> None:
        """Go back to a checkpoint.

        Args:
            checkpoint: its folder.
            numbers: what `numbers` was at that step.
        """
        load_whole(self.model, read_tensors(checkpoint, "model"))
        self.objectives.load_state_dict(read_tensors(checkpoint, "objectives"))
        load_optimizer(self.optimizer, self.names, read_tensors(checkpoint, "optimizer"), part_like)
        if self.ema is not None:
            load_whole(self.ema.model, read_tensors(checkpoint, "ema"))
        load_optimizer_numbers(self.optimizer, self.names, numbers)
