"""The folder of an index: a crash at any moment leaves the old index or the new one, and readers go on.

    INDEX/manifest.json       what the index is, and its files, each with bytes and SHA-256
    INDEX/segment-000003/     what the third generation brought: vectors.npy, rows.parquet, index.faiss where there is
                              a structure to search by, and deleted-000005.npy with the rows deleted since
    INDEX/lock                held by the process that writes
    INDEX/partitions/         embeddings of a build that has not ended

No file is ever changed. A writer brings new ones under new names, syncs them, and replaces the manifest by one rename:
before it the index is the old one, after it the new. What no manifest names is removed afterwards. A reader that has
opened its files keeps them even then; one that comes too late for a file reads the manifest again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from mmcontrast.checkpoint import sync
from mmcontrast.config import ConfigError

VERSION = 2
MANIFEST = "manifest.json"
PARTITIONS = "partitions"
VECTORS, ROWS, STRUCTURE, QUERIES = "vectors.npy", "rows.parquet", "index.faiss", "queries.npy"
IDENTITY: Mapping[str, type] = {
    "model_hash": str,
    "modality": str,
    "preprocessing": dict,
    "dim": int,
    "metric": str,
    "normalisation": str,
}
"""Fields of the manifest that two indices, or an index and its model, must share to be of one space."""
_FIELDS: Mapping[str, type] = IDENTITY | {
    "version": int,
    "generation": int,
    "model": str,
    "joint": str,
    "count": int,
    "deleted": int,
    "type": str,
    "why": str,
    "quality": dict,
    "tried": list,
    "sources": list,
    "skipped": list,
    "libraries": dict,
    "segments": list,
}
_SEGMENT = re.compile(r"segment-\d{6}")
_FILE = re.compile(r"vectors\.npy|queries\.npy|rows\.parquet|index\.faiss|deleted-\d{6}\.npy")


class Update:
    """The one writer of an index folder: takes the lock, brings files, and puts a new manifest in place.

        with Update(folder) as update:
            write_files(update.segment())
            update.commit({**update.manifest, "segments": [...]})

    What was not committed when the block ends, by whatever end, changes nothing.
    """

    manifest: dict[str, Any] | None
    """What stands when the update begins; None where there is no index yet."""

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        """Name the folder.

        Args:
            folder: of the index.
            create: make the folder if it is not there, and take one without a manifest.
        """
        self.folder, self._create = folder, create

    def __enter__(self) -> Update:
        """Take the lock.

        Raises:
            ConfigError: no index, a folder with other things in it, or another process that writes.
        """
        if self._create:
            strangers = sorted(p.name for p in self.folder.glob("*") if not _is_ours(p.name))
            if strangers or (self.folder.exists() and not self.folder.is_dir()):
                name = strangers[0] if strangers else "a file"
                raise ConfigError(f"{self.folder} holds more than an index ({name}); choose another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder.parent)
        elif not (self.folder / MANIFEST).is_file():
            raise ConfigError(f"{self.folder} is not an index: it has no {MANIFEST}")
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(f"another process is writing to {self.folder}; wait until it has ended") from None
        self.manifest = read_manifest(self.folder) if (self.folder / MANIFEST).is_file() else None
        self._clean()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._clean()
        os.close(self._lock)

    @property
    def generation(self) -> int:
        """The number of the generation that is being written."""
        return 1 if self.manifest is None else self.manifest["generation"] + 1

    def segment(self) -> Path:
        """An empty folder for this generation's files."""
        folder = self.folder / f"segment-{self.generation:06d}"
        folder.mkdir(exist_ok=True)
        return folder

    def commit(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Make the manifest the one that counts; the files that it names are on the disk before.

        Each entry of its `segments` names its `folder` and its `files`; those that are new are hashed here.
        """
        segments: list[dict[str, Any]] = []
        for entry in cast(Sequence[Mapping[str, Any]], manifest["segments"]):
            folder = self.folder / entry["folder"]
            files = {name: facts or describe(folder / name) for name, facts in entry["files"].items()}
            for name in [n for n, facts in entry["files"].items() if not facts]:
                sync(folder / name)
            sync(folder)
            segments.append({**entry, "files": files})
        committed = {**manifest, "version": VERSION, "generation": self.generation, "segments": segments}
        sync(self.folder)
        temporary = self.folder / (MANIFEST + ".tmp")
        text = json.dumps(committed, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary.write_text(text, "utf-8", "backslashreplace")
        sync(temporary)
        temporary.replace(self.folder / MANIFEST)
        sync(self.folder)
        self.manifest = committed
        self._clean()
        return committed

    def _clean(self) -> None:
        """Remove what no manifest names: left by a writer that was killed, or replaced."""
        kept = {s["folder"]: s["files"] for s in (self.manifest or {}).get("segments", ())}
        (self.folder / (MANIFEST + ".tmp")).unlink(missing_ok=True)
        for path in self.folder.glob("segment-*"):
            if path.name not in kept:
                shutil.rmtree(path)
            else:
                for file in path.iterdir():
                    if file.name not in kept[path.name]:
                        file.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index, every field of which has its type and every file a name of ours.

    Raises:
        ConfigError: no index, or one of another version.
    """
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} is not an index: {str(error)[:200]}") from None
    manifest = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ConfigError(f"{path} has version {version}, this one reads {VERSION}: upgrade mmcontrast")
    if version == 1 and "quality" in manifest:
        raise ConfigError(f"{path} has version 1, which only the mmcontrast that built it reads; build it again")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong or not manifest["segments"] or not all(map(_is_segment, manifest["segments"])):
        raise ConfigError(f"{path} is not the manifest of an index; build it again")
    return manifest


def _is_segment(entry: Any) -> bool:
    """Whether it names its parts as a writer does: a manifest may come from a stranger."""
    try:
        whole = {VECTORS, ROWS} <= entry["files"].keys() and len([n for n in entry["files"] if "deleted" in n]) < 2
        named = _SEGMENT.fullmatch(entry["folder"]) and all(map(_FILE.fullmatch, entry["files"]))
        numbers = [entry["rows"], *entry["effort"].values(), *(f["bytes"] for f in entry["files"].values())]
        hashed = all(isinstance(f["sha256"], str) for f in entry["files"].values())
        counted = all(type(n) is int and 0 <= n < 1 << 53 for n in numbers) and set(entry["effort"]) == {
            "probe",
            "rerank",
        }
        return bool(whole and named and hashed and counted and isinstance(entry["type"], str))
    except (KeyError, TypeError, AttributeError):
        return False


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its hash.

    Raises:
        FileNotFoundError: a file is not there.
        ConfigError: a file is not what was written.
    """
    for segment in manifest["segments"]:
        for name, facts in segment["files"].items():
            path = folder / segment["folder"] / name
            if path.stat().st_size != facts["bytes"] or describe(path)["sha256"] != facts["sha256"]:
                raise ConfigError(f"{path} has changed since the index was written; build it again")


def describe(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first field of the identity in which two manifests differ."""
    return next((name for name in IDENTITY if ours[name] != theirs[name]), None)


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, MANIFEST + ".tmp", "lock", PARTITIONS) or bool(_SEGMENT.fullmatch(name))
