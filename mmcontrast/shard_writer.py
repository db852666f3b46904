"""Writing shards: tars by `webdataset`, their indices, and the manifest that makes a folder whole.

What is written is scanned again with the reader's own eyes, so an index can only say what reading will find.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.manifest import MANIFEST
from mmcontrast.shards import FORMATS, MAX_MEMBER_BYTES, METADATA, index_path
from mmcontrast.tar import FORMAT_VERSION, ShardIndex, scan

MAX_KEY_BYTES = 90


@dataclass(frozen=True)
class Sample:
    """What a writer takes: a key without dots, and extension -> content (str as UTF-8, mappings as JSON)."""

    key: str
    members: Mapping[str, bytes | str | Mapping[str, Any]]


class ShardWriter:
    """Writes samples into numbered tars with their indices.

    The manifest comes last, so a folder that has one is whole.

        with ShardWriter(out) as writer:
            writer.write(Sample("000000", {"png": png, "txt": "a caption", "json": {"label": "cat"}}))
    """

    def __init__(
        self,
        out: Path,
        *,
        max_samples: int = 10_000,
        max_bytes: int = 500_000_000,
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
        finished: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Open a folder for writing.

        Args:
            out: the folder, made if needed.
            max_samples: samples per tar, at most.
            max_bytes: bytes of content per tar after which the next begins.
            overwrite: replace shards that are there; otherwise they are an error.
            about: facts to keep in the manifest, such as source and licence.
            finished: entries of the first tars, as an earlier writer's `shards` had them, which stay; what else is
                there of a writer that was cut off is removed.

        Raises:
            ConfigError: the folder holds shards already, or one of the finished ones is not there as it was.
        """
        if max_samples < 1:
            raise ConfigError(f"max_samples is {max_samples}; a tar holds at least 1 sample")
        self.out, self.max_samples, self.max_bytes = out, max_samples, max_bytes
        self.about = dict(about or {})
        self.shards: list[dict[str, Any]] = [dict(entry) for entry in finished]
        """The finished tars' entries in the manifest."""
        self._keys = {key for entry in finished for key in _keys(out, entry)}
        self._samples = self._bytes = 0
        self._tar: Any = None
        self._file: Any = None
        clear_shards(out, overwrite=overwrite or bool(finished), keep=[entry["name"] for entry in finished])
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{out} cannot be made: {error.strerror}; give a folder to write shards to") from None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            with suppress(OSError):  # a full disk may be why we are here
                self._tar.close()
                self._file.close()

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            ConfigError: a key that a tar would not give back or that came before, an extension that no reader
                knows, content that cannot be written, no members.
        """
        if flaw := _flaw(sample.key):
            raise ConfigError(f"the key {sample.key!r} cannot name a sample: {flaw}")
        if sample.key in self._keys:
            raise ConfigError(f"the key {sample.key!r} comes twice; keys must be unique in a set of shards")
        known = {METADATA, *(e for extensions in FORMATS.values() for e in extensions)}
        unknown = [e for e in sample.members if e not in known]
        if unknown or not sample.members:
            raise ConfigError(
                f"sample {sample.key!r} has members {sorted(sample.members)}; known are {', '.join(sorted(known))}"
            )
        try:
            contents = {name: _encode(content) for name, content in sample.members.items()}
        except (ValueError, TypeError) as error:
            raise ConfigError(f"sample {sample.key!r} has content that cannot be written: {error}") from None
        if large := [name for name, content in contents.items() if len(content) > MAX_MEMBER_BYTES]:
            raise ConfigError(f"sample {sample.key!r}: {large[0]} is above {MAX_MEMBER_BYTES >> 20} MiB")
        size = sum(map(len, contents.values()))
        if self._tar is not None and (self._samples >= self.max_samples or self._bytes + size > self.max_bytes):
            self._finish_shard()
        if self._tar is None:
            self._tar = self._start_shard()
        self._tar.write({"__key__": sample.key, **contents})
        self._keys.add(sample.key)
        self._samples += 1
        self._bytes += size

    def _start_shard(self) -> Any:
        from webdataset.writer import TarWriter

        self._file = open(self._path().with_suffix(".tar.tmp"), "wb")
        # A fixed time makes the same samples the same bytes, so a checksum says whether data changed.
        return TarWriter(self._file, encoder=False, mtime=0)

    def _path(self) -> Path:
        return self.out / f"{len(self.shards):05d}.tar"

    def _finish_shard(self) -> None:
        self._tar.close()
        self._file.close()
        path = self._path()
        path.with_suffix(".tar.tmp").rename(path)
        self.shards.append(describe_shard(path))
        assert self.shards[-1]["samples"] == self._samples, f"{path} does not give back what was written"
        self._tar = self._file = None
        self._samples = self._bytes = 0

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        if self._tar is not None:
            self._finish_shard()
        write_manifest(self.out, self.shards, self.about)


def _keys(folder: Path, entry: Mapping[str, Any]) -> Sequence[str]:
    """The keys of a finished tar, which must be as long as its entry says."""
    tar = folder / entry["name"]
    try:
        if tar.stat().st_size != entry["bytes"]:
            raise ValueError(f"{tar.stat().st_size} bytes instead of {entry['bytes']}")
        return ShardIndex.from_json(json.loads(index_path(tar).read_bytes())).keys
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{tar} was finished and has changed ({error}); start anew with --overwrite") from None


def clear_shards(folder: Path, *, overwrite: bool, keep: Collection[str] = ()) -> None:
    """Make room for new shards in a folder, beside the tars that are kept.

    Raises:
        ConfigError: there are some, and they are not to be replaced.
    """
    kept = {folder / name for name in keep} | {index_path(folder / name) for name in keep}
    old = [path for end in ("*.tar", "*.index.json", "*.tar.tmp") for path in folder.glob(end) if path not in kept]
    if (old or (folder / MANIFEST).exists()) and not overwrite:
        raise ConfigError(f"{folder} holds shards already; choose another folder, or replace them with --overwrite")
    for path in [folder / MANIFEST, *old]:  # the manifest first: while tars change there must be none
        if path.is_file():
            path.unlink()


def _flaw(key: str) -> str | None:
    """What would make a tar give back another key than the one that was written."""
    if "." in key.rpartition("/")[2] or key.startswith("_") or {"", ".", ".."} & set(key.split("/")):
        return "no dots, not empty, no leading _, no empty part between /"
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in key):
        return "no control characters, nothing that UTF-8 cannot hold"
    if len(key.encode()) > MAX_KEY_BYTES:  # longer names need headers that no checksum protects
        return f"at most {MAX_KEY_BYTES} bytes"
    return None


def _encode(content: bytes | str | Mapping[str, Any]) -> bytes:
    if isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return content.encode("utf-8") if isinstance(content, str) else content


def describe_shard(path: Path, name: Path | None = None) -> dict[str, Any]:
    """Index a tar, write the index beside it, and return the tar's entry in the manifest.

    Args:
        path: the tar.
        name: where it would lie, if it is only kept at `path` under another name.
    """
    name = name or path
    index = scan(path, checksum=True)
    text = json.dumps(index.to_json(), separators=(",", ":"))
    _replace(index_path(name), text)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": name.name,
        "samples": len(index.keys),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "index": {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "members": {name: int((c.offset >= 0).sum()) for name, c in index.columns.items()},
        "damage": [list(entry) for entry in index.damage],
    }


def write_manifest(
    folder: Path, shards: Sequence[Mapping[str, Any]], about: Mapping[str, Any], *, root: str | None = None
) -> None:
    """Write `manifest.json`: totals, formats per modality, and the shards' entries.

    `root` is the address of their folder, where they do not lie beside it.
    """
    members: Counter[str] = Counter()
    for shard in shards:
        members.update(shard["members"])
    modalities = {
        kind: {"members": present, "samples": sum(members[e] for e in present)}
        for kind, extensions in FORMATS.items()
        if (present := [e for e in extensions if members[e]])
    }
    manifest = {
        "version": FORMAT_VERSION,
        "samples": sum(s["samples"] for s in shards),
        "bytes": sum(s["bytes"] for s in shards),
        "modalities": modalities,
        **({} if root is None else {"root": root}),
        "about": dict(about),
        "shards": [dict(s) for s in shards],
    }
    _replace(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8", "backslashreplace")  # file names need not be Unicode
    temporary.replace(path)
