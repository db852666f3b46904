"""Work on the disk in parts: what was ended, however it ended, goes on where it was.

    FOLDER/plan.json      what is worked on; parts of another plan are removed first
    FOLDER/000003.lock    held by the process that works on a part
    FOLDER/000003.json    written last and at once: a part that has it is whole

Several processes, also of several machines on one disk, may work in a folder. Locks are the kernel's: they end with the
process that holds them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import sync
from mmcontrast.config import ConfigError


class Parts:
    """The parts of one piece of work."""

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        """Go on with what is there of this plan.

        Raises:
            ConfigError: the folder cannot be written.
        """
        self.folder = folder
        file, text = folder / "plan.json", json.dumps(plan)
        try:
            if not file.is_file() or file.read_text("utf-8") != text:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
                _replace(file, text)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror or error}; name another folder") from None

    def path(self, number: int, suffix: str) -> Path:
        """A file of a part."""
        return self.folder / f"{number:06d}{suffix}"

    def done(self, number: int) -> bool:
        """Whether the part is whole."""
        return self.path(number, ".json").is_file()

    @contextmanager
    def claim(self, number: int) -> Generator[bool]:
        """Whether the part is left to do, and nobody else is at it: within, nobody else will be."""
        if self.done(number):
            yield False
            return
        lock = os.open(self.path(number, ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.done(number)
        finally:
            os.close(lock)

    def finish(self, number: int, said: Mapping[str, Any], *suffixes: str) -> None:
        """Note that a part is whole: its other files, of these suffixes, are on the disk before it is said."""
        for suffix in suffixes:
            sync(self.path(number, suffix))
        _replace(self.path(number, ".json"), json.dumps(said))

    def read(self, number: int) -> dict[str, Any]:
        """What was said of a whole part."""
        return json.loads(self.path(number, ".json").read_text("utf-8"))


def write_at_once(path: Path, write: Callable[[Path], None]) -> None:
    """A file under another name first, so that a name never stands for half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, "utf-8", "backslashreplace")
        sync(temporary)

    write_at_once(path, write)
