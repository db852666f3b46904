"""Shoulder exercises, recorded by a smartwatch -> shards: real time series of ten people, from pip (seglearn).

Ten people did seven exercises of physiotherapy, 20 times with each arm (Burns et al. 2018, arXiv:1802.01489). People
are divided, so nobody who is tested on was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, Source, numbered, signal_member
from mmcontrast.shard_writer import Sample

RATE = 50
CHANNELS = ("ax", "ay", "az", "wx", "wy", "wz")
UNITS = ("g", "g", "g", "rad/s", "rad/s", "rad/s")
EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation with a resistance band",
    "ER": "external rotation with a resistance band",
    "TRAP": "lower trapezius row with a resistance band",
    "ROW": "bent-over row with a dumbbell",
}
PEOPLE = range(1, 11)


@dataclass(frozen=True, kw_only=True)
class Watch(Source):
    """Shoulder exercises, recorded by a smartwatch, and their names (the extra [watch]).

    A sample is a recording of 19 to 52 seconds or a window of it (`npy`, three axes of acceleration and three of
    rotation at 50 Hz), the exercise (`txt`), and metadata: `label`, the exercise; `subject`, `side` and `recording`.
    """

    val_people: tuple[int, ...] = (8,)
    """Whom to validate on, of 1 to 10."""
    test_people: tuple[int, ...] = (9, 10)
    """Whom to test on."""
    window: float | None = None
    """Cut recordings into windows of so many seconds, side by side; the rest is dropped. None: leave them whole."""

    @property
    def splits(self) -> Sequence[str]:
        """Training, and what has people."""
        held = [*self.val_people, *self.test_people]
        if not set(held) < set(PEOPLE) or len(set(held)) < len(held):
            raise ConfigError(
                f"people {held} are held out; name some of 1 to 10, each once, and leave some to train on"
            )
        return ["train", *(["val"] if self.val_people else []), *(["test"] if self.test_people else [])]

    def about(self, split: str) -> Mapping[str, Any]:
        """Source, licence, and what the channels are."""
        return {
            "source": "seglearn watch",
            "licence": "BSD-3-Clause",
            "paper": "arXiv:1802.01489",
            "rate": RATE,
            "channels": CHANNELS,
            "units": UNITS,
        }

    def rows(self) -> Sequence[Row]:
        """One per recording."""
        try:
            from seglearn.datasets import load_watch
        except ImportError:
            raise ConfigError("the recordings are not installed: pip install 'mmcontrast[watch]'") from None
        found = load_watch()
        if tuple(found["X_labels"]) != CHANNELS or tuple(found["y_labels"]) != tuple(EXERCISES):
            raise ConfigError("seglearn has other recordings than those that are known; install seglearn 1.2.5")
        columns = zip(found["X"], found["y"], found["subject"], found["side"], strict=True)
        return numbered(
            (f"recording {number}", (values, found["y_labels"][int(y)], int(subject), bool(side)))
            for number, (values, y, subject, side) in enumerate(columns)
        )

    def encode(self, row: Row) -> Sequence[Item]:
        """A recording, or its windows."""
        values, exercise, subject, right = row.data
        length = len(values) if self.window is None else max(1, round(self.window * RATE))
        split = "test" if subject in self.test_people else "val" if subject in self.val_people else "train"
        meta = {
            "label": EXERCISES[exercise],
            "subject": subject,
            "side": "right" if right else "left",
            "recording": row.number,
            "rate": RATE,
            "channels": list(CHANNELS),
            "units": list(UNITS),
        }
        return [
            Item(
                split,
                Sample(
                    f"{row.number:03d}" + ("" if self.window is None else f"-{number:02d}"),
                    {**signal_member(values[start : start + length]), "txt": EXERCISES[exercise], "json": meta},
                ),
            )
            for number, start in enumerate(range(0, len(values) - length + 1, length))
        ]
