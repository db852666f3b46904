"""One training per run folder, at any time: two would write each other's checkpoints.

The lock is the kernel's (flock) and ends with the process, however that ends; NFS and most cluster file systems pass it
on to other machines. The file says who holds it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError

NAME = "lock"


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Within this context no other process enters it for the same folder, which is made.

    Raises:
        ConfigError: another is within it.
        OSError: the folder cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    handle = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go of: whoever waits for it then looks again
        os.close(handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except BlockingIOError:
            text = _holder(handle)
            os.close(handle)
            remedy = "wait for its end, stop it, or name another folder with --out"
            raise ConfigError(f"{path.parent} is being trained by {text}: {remedy}") from None
        except OSError as error:
            print(f"{path} cannot be locked ({error}): see that nobody else trains there", file=sys.stderr)
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            break
        os.close(handle)  # it was removed between open and lock
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    job = os.environ.get("SLURM_JOB_ID")
    os.truncate(handle, 0)
    os.pwrite(handle, (json.dumps(me | ({"job": job} if job else {})) + "\n").encode(), 0)
    return handle


def _lock(handle: int) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(handle: int) -> str:
    try:
        found: dict[str, Any] = json.loads(os.pread(handle, 4096, 0))
        job = f", SLURM job {found['job']}" if "job" in found else ""
        return f"process {found['pid']} on {found['host']} since {found['since']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
