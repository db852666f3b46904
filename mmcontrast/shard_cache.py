"""Remote shards on the local disk: each is brought once for all processes of the machine, within a limit.

    CACHE/<name>.data     a whole file, verified; a reader holds a shared lock on it
    CACHE/<name>.part     one that is arriving; who brings it holds the only lock
    CACHE/<name>.json     of a part: whence it comes, its length, and the version that the bytes are of
    CACHE/lock            held while room is made

The name is the SHA-256 of the full address and of the content that is expected there: shards of two data sets that
have one base name never meet, nor do two states of one shard. Locks are the kernel's, so they end with the process
that holds them, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.remote import Address, Again, Patience, open_body, patiently, read_some

FOLDER_VARIABLE, BYTES_VARIABLE = "MMCONTRAST_CACHE", "MMCONTRAST_CACHE_BYTES"
DEFAULT_BYTES = 50_000_000_000
_ENOUGH = 1 << 20  # an attempt that brings as many bytes more than any before starts the count of failures anew


class _Wrong(Exception):
    """What arrived is not what was expected."""


@dataclass(frozen=True)
class Cache:
    """A folder for remote files; the least recently used ones go when others need their room.

    Files that some process reads, and those that are arriving, stay: if they alone are above the limit, so is the
    cache. A process holds one remote shard at a time.
    """

    folder: Path
    limit: int = DEFAULT_BYTES
    patience: Patience = field(default_factory=Patience)

    @staticmethod
    def from_environment() -> Cache:
        """`MMCONTRAST_CACHE` (by default ~/.cache/mmcontrast/shards), `MMCONTRAST_CACHE_BYTES` (50 GB).

        Raises:
            ConfigError: the limit is no number of bytes.
        """
        folder = os.environ.get(FOLDER_VARIABLE) or "~/.cache/mmcontrast/shards"
        limit = os.environ.get(BYTES_VARIABLE) or str(DEFAULT_BYTES)
        if not limit.isascii() or not limit.isdigit() or int(limit) < 1:
            raise ConfigError(f"{BYTES_VARIABLE} is {limit!r}; give a number of bytes, such as {DEFAULT_BYTES}")
        return Cache(Path(folder).expanduser(), int(limit))

    def path(self, address: Address, identity: str) -> Path:
        """Where the file lies when it is whole."""
        return self.folder / (hashlib.sha256(f"{address.url}\n{identity}".encode()).hexdigest() + ".data")

    def open(self, address: Address, identity: str, *, size: int | None = None, sha256: str | None = None) -> int:
        """A descriptor of the whole file, which is brought if it is not there; it stays until that is closed.

        Args:
            address: where the file lies.
            identity: tells the states of the file apart; mostly its SHA-256.
            size: its length, if known; otherwise what the server says.
            sha256: of its content, if known.

        Raises:
            ConfigError: it cannot be had, is not what was expected, or there is no room for it.
        """
        path = self.path(address, identity)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                file = _held(path, size)
                if file is None:
                    file = self._brought(path, address, size, sha256)
                if file is not None:
                    return file
        except OSError as error:
            text = f"the cache {self.folder} cannot hold {address}: {error.strerror or error}"
            raise ConfigError(f"{text}; name another folder by {FOLDER_VARIABLE}, on a local disk with room") from None

    def rename(self, address: Address, identity: str, new: str) -> None:
        """Tell what a file turned out to be."""
        with suppress(OSError):
            self.path(address, identity).rename(self.path(address, new))

    def _brought(self, path: Path, address: Address, size: int | None, sha256: str | None) -> int | None:
        """Download a file, or wait for the process that does; None if it then has to be looked for again."""
        part = path.with_suffix(".part")
        file = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Whoever brings it goes on to read it with a shared lock on the same file. To wait for the only lock
                # would be to wait for that too, perhaps for one who waits for us.
                fcntl.flock(file, fcntl.LOCK_SH)
                os.close(file)
                return None
            if not _is(part, file):  # whoever had the lock has finished it, or it was thrown away
                os.close(file)
                return None
            if path.exists():  # finished just before our part was made
                part.unlink()
                os.close(file)
                return None
            self._filled(file, part, address, size, sha256)
            os.fsync(file)  # or a loss of power could leave a whole name with half a content
            part.rename(path)
            part.with_suffix(".json").unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_SH)
        except BaseException:
            os.close(file)
            raise
        return file

    def _filled(self, file: int, part: Path, address: Address, size: int | None, sha256: str | None) -> None:
        best = 0

        def attempt() -> None:
            nonlocal best
            try:
                self._go_on(file, part, address, size)
            except Again as error:
                # Only what is new counts: a server that keeps changing the file would be asked for ever.
                have = os.fstat(file).st_size
                error.moved, best = have > best + _ENOUGH, max(have, best)
                raise

        for last in (False, True):
            try:
                if sha256 is None or size is None or os.fstat(file).st_size != size:
                    patiently(address, self.patience, attempt)
                if sha256 is not None and (found := _sha256(file)) != sha256:
                    raise _Wrong(f"has the SHA-256 {found[:16]}…, its manifest says {sha256[:16]}…")
                return
            except _Wrong as error:
                os.ftruncate(file, 0)
                if last:
                    raise ConfigError(
                        f"{address} {error}, after 2 downloads; its manifest is of another state, or it is damaged: "
                        "index it again, or put the shard there again"
                    ) from None

    def _go_on(self, file: int, part: Path, address: Address, size: int | None) -> None:
        """Go on with a part where it ends, by its version; from its beginning where the file has changed."""
        have = os.fstat(file).st_size
        body = open_body(address, self.patience, have, _note(part).get("version"))
        try:
            total = body.total if size is None else size
            if total is None:
                raise ConfigError(f"{address}: the server does not say how long it is, so nothing would tell it whole")
            if body.total not in (None, total):
                raise _Wrong(f"has {body.total} bytes, its manifest says {total}")
            if have != body.start:
                os.ftruncate(file, body.start)
            self._make_room(part, {"url": str(address), "bytes": total, "version": body.version})
            place = body.start
            while place < total and (data := read_some(body, total - place)):
                os.pwrite(file, data, place)
                place += len(data)
        finally:
            body.close()
        if place < total:
            raise Again(f"it broke off after {place} of {total} bytes")

    def _make_room(self, part: Path, note: dict[str, Any]) -> None:
        """Reserve the length of a part, and remove what was not used for longest until it fits."""
        need = int(note["bytes"])
        if need > self.limit:
            raise ConfigError(
                f"{note['url']} has {need} bytes, the cache holds {self.limit}; raise {BYTES_VARIABLE} to a multiple"
            )
        with _only_one(self.folder / "lock"):
            part.with_suffix(".json").write_text(json.dumps(note), "utf-8")
            files = {path: s for path in self.folder.iterdir() if path != part and (s := _status(path)) is not None}
            sizes = {path: _reserved(path, s.st_size) for path, s in files.items()}
            for path in files:
                if path.suffix == ".json" and (its := path.with_suffix(".part")) not in files and its != part:
                    path.unlink(missing_ok=True)  # the part is gone
            on_disk = sum(s.st_size for s in files.values())
            room = min(self.limit, on_disk + shutil.disk_usage(self.folder).free + os.stat(part).st_size) - need
            for path in sorted(sizes, key=lambda p: files[p].st_mtime_ns):
                if sum(sizes.values()) <= room:
                    return
                if path.suffix in (".data", ".part") and _removed(path):
                    del sizes[path]


def _held(path: Path, size: int | None) -> int | None:
    """A descriptor that keeps a whole file from being removed; None where there is none."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        if size is not None and os.fstat(file).st_size != size:  # somebody else's hand: what we write is whole
            path.unlink(missing_ok=True)
        elif _is(path, file):
            os.utime(file)  # used now
            return file
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return None


def _is(path: Path, file: int) -> bool:
    """Whether a descriptor is still the file of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _removed(path: Path) -> bool:
    """Remove a file unless a process uses it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(path, file):
            path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed since
        return None


def _note(part: Path) -> dict[str, Any]:
    try:
        found = json.loads(part.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _reserved(path: Path, size: int) -> int:
    """Bytes that a file takes, or will when it has arrived."""
    coming = _note(path).get("bytes") if path.suffix == ".part" else None
    return max(size, coming) if isinstance(coming, int) else size


def _sha256(file: int) -> str:
    digest, place = hashlib.sha256(), 0
    while data := os.pread(file, 1 << 20, place):
        digest.update(data)
        place += len(data)
    return digest.hexdigest()


@contextmanager
def _only_one(path: Path) -> Generator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
