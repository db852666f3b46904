"""The shard format: WebDataset tars, an index of their members, and a manifest that describes the set.

A sample is a run of members that share a key (`000017.png`, `000017.txt`, `000017.json`). Reading goes
through an index of members, never through a sequential tar reader, so a damaged shard can lose samples but
never pair one sample's picture with another's caption. Nothing that is read is ever unpickled or executed:
members are bytes, and only members of known formats are looked at.

    OUT/00000.tar               the samples
    OUT/00000.index.json        keys, and per format the offset, size and CRC-32 of every member
    OUT/manifest.json           shards with counts, bytes and SHA-256; formats per modality
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.tar import FORMAT_VERSION, ShardIndex, scan

K = TypeVar("K")
V = TypeVar("V")

FORMATS: Mapping[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "text": ("txt",),
    "audio": ("flac", "wav", "ogg", "mp3"),
    "timeseries": ("npy",),
}
"""kind of modality -> member extensions that hold it."""
METADATA = "json"
"""Member with the sample's labels and groups, a JSON object."""
MANIFEST = "manifest.json"
MAX_MEMBER_BYTES = 256 << 20
MAX_KEY_BYTES = 90


class BadSample(Exception):
    """A sample that cannot be used; the text is the reason, in few words that can be counted."""


@dataclass(frozen=True)
class Sample:
    """What a writer takes: a key without dots, and extension -> content (str as UTF-8, mappings as JSON)."""

    key: str
    members: Mapping[str, bytes | str | Mapping[str, Any]]


# -------------------------------------------------------------------------------------------- a set of shards


@dataclass(frozen=True)
class Shard:
    """One tar: its path, its number of samples, and its index, read when it is first needed."""

    path: Path
    samples: int
    load: Callable[[], ShardIndex]


@dataclass
class ShardSet:
    """Samples 0..N-1 of some shards, read at random and in any process.

    Attributes:
        shards: in the order that numbers the samples; a sample's position is its stable id.
        counts: extension -> samples that have it.
        damage: shard path -> what a scan left out, as (key, reason).
        fingerprint: changes when the content or the order of the shards does.
    """

    shards: Sequence[Shard]
    counts: Mapping[str, int]
    damage: Mapping[str, Sequence[tuple[str, str]]]
    fingerprint: str
    _starts: NDArray[np.int64] = field(init=False)
    _indices: OrderedDict[int, ShardIndex] = field(init=False, default_factory=OrderedDict[int, ShardIndex])
    _files: OrderedDict[int, int] = field(init=False, default_factory=OrderedDict[int, int])

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(s.samples for s in self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        # Open files and loaded indices stay behind: a spawned worker opens its own.
        return self.__dict__ | {"_indices": OrderedDict(), "_files": OrderedDict()}

    def locate(self, position: int) -> tuple[int, int]:
        """Sample -> (shard number, place in the shard)."""
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return shard, position - int(self._starts[shard])

    def name(self, position: int) -> tuple[str, str]:
        """Sample -> (shard file name, key)."""
        shard, place = self.locate(position)
        return self.shards[shard].path.name, self._index(shard).keys[place]

    def extensions(self, position: int) -> list[str]:
        """Which members the sample has."""
        shard, place = self.locate(position)
        return [name for name, c in self._index(shard).columns.items() if c.offset[place] >= 0]

    def read(self, position: int, extension: str) -> bytes:
        """The content of one member.

        Raises:
            BadSample: the member is too large, cut off, or not what the index says.
            KeyError: the sample has no such member.
        """
        shard, place = self.locate(position)
        columns = self._index(shard).columns.get(extension)
        if columns is None or columns.offset[place] < 0:
            raise KeyError(extension)
        offset, size, crc = (int(c[place]) for c in (columns.offset, columns.size, columns.crc32))
        if not 0 <= size <= MAX_MEMBER_BYTES:
            raise BadSample(f"{extension} member above {MAX_MEMBER_BYTES >> 20} MiB")
        data = os.pread(self._open(shard), size, offset)
        if len(data) < size:
            raise BadSample("truncated")
        if crc >= 0 and zlib.crc32(data) != crc:
            raise BadSample(f"checksum of {extension}")
        return data

    def _index(self, shard: int) -> ShardIndex:
        return _recent(self._indices, shard, lambda: self.shards[shard].load(), limit=64)

    def _open(self, shard: int) -> int:
        return _recent(self._files, shard, lambda: os.open(self.shards[shard].path, os.O_RDONLY), 64, os.close)


def _recent(
    cache: OrderedDict[K, V],
    key: K,
    make: Callable[[], V],
    limit: int,
    drop: Callable[[V], None] = lambda value: None,
) -> V:
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            drop(cache.popitem(last=False)[1])
    cache.move_to_end(key)
    return cache[key]


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """Folders, globs, `{00000..00007}` ranges and files -> existing tars, in order.

    Raises:
        ConfigError: a pattern that matches nothing, a remote address, or a command.
    """
    found: list[Path] = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise ConfigError(f"{pattern!r} would run a command; shards are read from files only")
        if "://" in pattern:
            raise ConfigError(f"{pattern!r} is remote; copy the shards to this machine and give their folder")
        if Path(pattern).is_dir():
            tars = sorted(Path(pattern).glob("*.tar"))
        elif Path(pattern).is_file():
            if not pattern.endswith(".tar"):
                raise ConfigError(f"{pattern!r} is no .tar file; unpack it if it is a compressed one")
            tars = [Path(pattern)]
        else:
            tars = []
            for piece in (pieces := _braces(pattern)):
                names = [piece] if Path(piece).is_file() else sorted(glob.glob(piece))
                if not names and len(pieces) > 1:  # reading on would train on less than was asked for
                    raise ConfigError(f"{piece} of {pattern!r} is not there; correct the range")
                tars += [Path(name) for name in names if name.endswith(".tar") and Path(name).is_file()]
        if not tars:
            raise ConfigError(f"no shards match {pattern!r}; give a folder with .tar files, a glob or a range")
        found += tars
    return list(dict.fromkeys(found))


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    width, first, last = len(match[1]), int(match[1]), int(match[2])
    if last - first > 1_000_000:
        raise ConfigError(f"{pattern!r} names {last - first + 1} shards; the limit is 1000000")
    heads = [f"{pattern[: match.start()]}{i:0{width}d}" for i in range(first, last + 1)]
    return [h + tail for h in heads for tail in _braces(pattern[match.end() :])]


def open_shards(patterns: Sequence[str]) -> ShardSet:
    """Shards with a manifest are opened by it; others (img2dataset's, say) by a scan of their headers.

    Raises:
        ConfigError: nothing matches, a manifest cannot be read, or a tar is not what its manifest says.
    """
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    damage: dict[str, Sequence[tuple[str, str]]] = {}
    fingerprint = hashlib.sha256()
    paths = find_shards(patterns)
    manifests = {folder: _entries(folder) for folder in dict.fromkeys(path.parent for path in paths)}
    for folder in (Path(pattern) for pattern in patterns):
        if missing := manifests.get(folder, {}).keys() - {p.name for p in paths if p.parent == folder}:
            raise ConfigError(f"{folder / min(missing)} is not there, but {MANIFEST} names it; {_index_anew(folder)}")
    for path in paths:
        entry = manifests[path.parent].get(path.name)
        size = path.stat().st_size
        if entry is not None:
            if size != entry["bytes"]:
                raise ConfigError(
                    f"{path} has {size} bytes, its manifest says {entry['bytes']}: write it again, "
                    f"or to accept it as it is {_index_anew(path.parent)}"
                )
            shards.append(Shard(path, entry["samples"], _IndexFile(index_path(path), entry["samples"])))
            counts.update(entry["members"])
            left_out = [(key, reason) for key, reason in entry.get("damage", ())]
            fingerprint.update(f"{path.name!r} {entry['sha256']} ".encode())
        else:
            index = scan(path)
            shards.append(Shard(path, len(index.keys), _Kept(index)))
            counts.update({name: int((c.offset >= 0).sum()) for name, c in index.columns.items()})
            left_out = index.damage
            fingerprint.update(f"{path.name!r} {size} {index.to_json()} ".encode())
        if left_out:
            damage[str(path)] = left_out
    if not any(shard.samples for shard in shards):
        reasons = [f"{key or path.name}: {why}" for path in paths for key, why in damage.get(str(path), ())[:1]]
        raise ConfigError(f"{paths[0]} and {len(paths) - 1} more hold no samples; {'; '.join(reasons[:3]) or 'empty'}")
    return ShardSet(shards, dict(counts), damage, fingerprint.hexdigest()[:16])


def _index_anew(folder: Path) -> str:
    return f"run `mmcontrast prep index {folder} --overwrite`"


@dataclass(frozen=True)
class _IndexFile:
    path: Path
    samples: int

    def __call__(self) -> ShardIndex:
        try:
            index = ShardIndex.from_json(json.loads(self.path.read_text("utf-8")))
            if len(index.keys) != self.samples:
                raise ValueError(f"{len(index.keys)} samples, the manifest says {self.samples}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ConfigError(f"{self.path} cannot be read ({error}); {_index_anew(self.path.parent)}") from None
        return index


@dataclass(frozen=True)
class _Kept:
    index: ShardIndex

    def __call__(self) -> ShardIndex:
        return self.index


def index_path(shard: Path) -> Path:
    """Where the index of a tar lies."""
    return shard.with_suffix(".index.json")


def _entries(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {} if manifest is None else {entry["name"]: entry for entry in manifest["shards"]}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder of shards; None where there is none.

    Raises:
        ConfigError: it is no manifest, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, entries = int(manifest["version"]), manifest["shards"]
        names = {
            e["name"] for e in entries if e["sha256"] and e["bytes"] + e["samples"] + sum(e["members"].values()) >= 0
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest of shards ({error!r}); {_index_anew(folder)}") from None
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade mmcontrast")
    if len(names) < len(entries):
        raise ConfigError(f"{path} names a shard twice; {_index_anew(folder)}")
    return cast(dict[str, Any], manifest)


# -------------------------------------------------------------------------------------------- writing


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
    ) -> None:
        """Open a folder for writing.

        Args:
            out: the folder, made if needed.
            max_samples: samples per tar, at most.
            max_bytes: bytes of content per tar after which the next begins.
            overwrite: replace shards that are there; otherwise they are an error.
            about: facts to keep in the manifest, such as source and licence.

        Raises:
            ConfigError: the folder holds shards already.
        """
        self.out, self.max_samples, self.max_bytes = out, max_samples, max_bytes
        self.about = dict(about or {})
        self._keys: set[str] = set()
        self._shards: list[dict[str, Any]] = []
        self._samples = self._bytes = 0
        self._tar: Any = None
        self._file: Any = None
        clear_shards(out, overwrite=overwrite)
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
        return self.out / f"{len(self._shards):05d}.tar"

    def _finish_shard(self) -> None:
        self._tar.close()
        self._file.close()
        path = self._path()
        path.with_suffix(".tar.tmp").rename(path)
        self._shards.append(describe_shard(path))
        assert self._shards[-1]["samples"] == self._samples, f"{path} does not give back what was written"
        self._tar = self._file = None
        self._samples = self._bytes = 0

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        if self._tar is not None:
            self._finish_shard()
        write_manifest(self.out, self._shards, self.about)


def clear_shards(folder: Path, *, overwrite: bool) -> None:
    """Make room for new shards in a folder.

    Raises:
        ConfigError: there are some, and they are not to be replaced.
    """
    old = [path for end in ("*.tar", "*.index.json", "*.tar.tmp") for path in folder.glob(end)]
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


def describe_shard(path: Path) -> dict[str, Any]:
    """Index a tar, write the index beside it, and return the tar's entry in the manifest."""
    index = scan(path, checksum=True)
    _replace(index_path(path), json.dumps(index.to_json(), separators=(",", ":")))
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": path.name,
        "samples": len(index.keys),
        "bytes": path.stat().st_size,
        "sha256": digest,
        "members": {name: int((c.offset >= 0).sum()) for name, c in index.columns.items()},
        "damage": [list(entry) for entry in index.damage],
    }


def write_manifest(folder: Path, shards: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write `manifest.json`: totals, formats per modality, and the shards' entries."""
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
        "about": dict(about),
        "shards": [dict(s) for s in shards],
    }
    _replace(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8", "backslashreplace")  # file names need not be Unicode
    temporary.replace(path)
