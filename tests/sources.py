"""A source for tests, in a module that other processes can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.data_prep.source import Grouped, Item, Row, numbered
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample


@dataclass(frozen=True, kw_only=True)
class Letters(Grouped):
    """Rows in groups of four, of which every seventh is bad; every third one of training gives two more samples."""

    count: int = 60
    files: Path | None = None
    """Where `stop` is looked for: a row whose number is in it kills the process that encodes it, once."""
    changed: int = -1
    """A row whose name changed."""

    @property
    def splits(self) -> Sequence[str]:
        return [*super().splits, "extra"]

    def about(self, split: str) -> Mapping[str, Any]:
        return {"licence": "CC0", "of": split}

    def rows(self) -> Sequence[Row]:
        return numbered((f"row {i}{'x' if i == self.changed else ''}", f"text {i}") for i in range(self.count))

    def encode(self, row: Row) -> Sequence[Item]:
        stop = self.files / "stop" if self.files else None
        if stop and stop.is_file() and int(stop.read_text()) == row.number:
            stop.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if row.number % 7 == 6:
            raise BadSample("broken" if row.number % 2 else "of no use")
        if row.number == 9:
            return []
        if row.number == 10:
            raise FileNotFoundError(2, "No such file or directory")
        if row.number == 11:
            b"\xe4".decode()
        split = self.split_of(f"g{row.number // 4}")
        items = [Item(split, Sample(f"{row.number:04d}", {"txt": row.data, "json": {"number": row.number}}))]
        if split == "train" and row.number % 3 == 0:
            items += [Item("extra", Sample(f"{row.number:04d}-{k}", {"txt": f"{row.data} {k}"})) for k in range(2)]
        return items
