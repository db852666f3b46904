"""Signals that ask a run to save: a scheduler sends them before it takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from mmcontrast.config import RunError


class Interrupted(RunError):
    """The run was asked to end, has saved, and goes on when it is started again."""

    code = 128 + signal.SIGTERM
    """Exit code of a process that SIGTERM ended: schedulers know it."""


class Interrupts:
    """Within this context SIGTERM asks for a checkpoint and the end of the run, SIGUSR1 for a checkpoint.

    A second SIGTERM ends the process at once.

    Attributes:
        stop: SIGTERM has come.
        save: SIGUSR1 has come; whoever has saved sets it back.
    """

    def __init__(self) -> None:
        self.stop = self.save = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Loader workers are forks: they inherit this handler, and must end when they are told to.
        if os.getpid() != self._process or (number == signal.SIGTERM and self.stop):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == signal.SIGTERM:
            self.stop = True
        else:
            self.save = True
