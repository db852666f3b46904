"""What of a preparation is finished, so that one that was cut off goes on at its last whole shards.

A file of JSON lines beside the splits: the settings; then, in the order in which it happened, what became of each row
([where, splits of its samples] or [where, reason]) and each shard that was finished. Lines reach the disk when a shard
does; what stands behind the last finished shard is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError

NAME = "prep.journal"
Outcome = tuple[str, list[str] | str]
"""Where a row stands, and the splits of its samples or the reason why it was refused."""


class Journal:
    """An open journal, with what a run that was cut off left in it.

    Attributes:
        resumed: there was such a run.
        shards: split -> entries of the tars that it finished.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Open the journal of a folder.

        Raises:
            ConfigError: another preparation was begun there.
        """
        self.path = out / NAME
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self._head = json.dumps(settings, sort_keys=True)
        self._lines: list[str] = []
        self._good = self._bytes = 0  # lines and bytes up to the last finished shard
        if self.path.is_file() and not overwrite:
            self._read()
        self.resumed = self._good > 0

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                place += len(line)
                if number == 1 and line.decode("utf-8", "replace") != f"{self._head}\n":
                    raise ConfigError(
                        f"{self.path.parent} holds a preparation that was cut off, of other settings; give the same "
                        "command to go on with it, or start anew with --overwrite"
                    )
                try:
                    entry = json.loads(line)
                except ValueError:
                    break  # cut off in the middle of a line
                if number == 1:
                    self._good, self._bytes = number, place
                elif isinstance(entry, dict):
                    shard = cast(dict[str, Any], entry)
                    self.shards.setdefault(shard["split"], []).append(shard["shard"])
                    self._good, self._bytes = number, place

    def outcomes(self) -> Iterator[Outcome]:
        """What became of the first rows, up to the last finished shard."""
        if self._good > 1:
            with open(self.path, encoding="utf-8") as file:
                for line in islice(file, 1, self._good):
                    entry = json.loads(line)
                    if isinstance(entry, list):
                        yield entry[0], entry[1]

    def begin(self) -> None:
        """Keep what was finished, and from now on write behind it."""
        if self.resumed:
            os.truncate(self.path, self._bytes)
        else:
            self.path.write_text(f"{self._head}\n", "utf-8")

    def row(self, where: str, outcome: Sequence[str] | str) -> None:
        """A row was written or refused."""
        self._lines.append(json.dumps([where, outcome]))

    def shard(self, split: str, entry: Mapping[str, Any]) -> None:
        """A shard was finished."""
        self._lines.append(json.dumps({"split": split, "shard": entry}))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n".join(self._lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.clear()

    def close(self) -> None:
        """All is finished."""
        self.path.unlink(missing_ok=True)
