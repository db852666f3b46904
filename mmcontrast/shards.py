"""The shard format: WebDataset tars, an index of their members, and a manifest that describes the set.

A sample is a run of members that share a key (`000017.png`, `000017.txt`, `000017.json`). Reading goes through an
index of members, never through a sequential tar reader, so a damaged shard can lose samples but never pair one
sample's picture with another's caption. Nothing that is read is ever unpickled or executed: members are bytes, and
only members of known formats are looked at.

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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.tar import walk

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
FORMAT_VERSION = 1
MAX_MEMBER_BYTES = 256 << 20


class BadSample(Exception):
    """A sample that cannot be used; the text is the reason, in few words that can be counted."""


@dataclass(frozen=True)
class Sample:
    """What a writer takes: a key without dots, and member extension -> content (str as UTF-8, mappings as JSON)."""

    key: str
    members: Mapping[str, bytes | str | Mapping[str, Any]]


@dataclass(frozen=True)
class Columns:
    """Where the members of one extension lie, one entry per sample; offset -1 where the sample has none."""

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    crc32: NDArray[np.int64]  # -1 where unknown


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard. `damage` names the keys that a scan had to leave out, with the reason."""

    keys: Sequence[str]
    columns: Mapping[str, Columns]
    damage: Sequence[tuple[str, str]] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for the index file."""
        columns = {
            name: {"offset": c.offset.tolist(), "size": c.size.tolist(), "crc32": c.crc32.tolist()}
            for name, c in self.columns.items()
        }
        return {"version": FORMAT_VERSION, "keys": list(self.keys), "members": columns}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ShardIndex:
        """The reverse of `to_json`."""
        columns = {
            name: Columns(*(np.asarray(c[k], dtype=np.int64) for k in ("offset", "size", "crc32")))
            for name, c in data["members"].items()
        }
        return ShardIndex(keys=data["keys"], columns=columns)


# ------------------------------------------------------------------------------------------------ reading a tar


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, extension): the key ends at the first dot of the last path component, as in WebDataset."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan(path: Path, *, checksum: bool = False) -> ShardIndex:
    """Index a tar by its headers, every one of which is verified.

    Where a header is broken, the scan goes on at the next good one and leaves out the samples on both sides of the
    break, since it cannot know what they lost. Keys that come back later in the shard are left out as well.

    Args:
        path: the tar.
        checksum: also read all contents and note their CRC-32.
    """
    order: list[str] = []
    members: dict[str, dict[str, tuple[int, int, int]]] = {}
    bad: dict[str, str] = {}
    last: str | None = None
    broken = False
    with open(path, "rb") as file:
        for entry in walk(file, path.stat().st_size):
            if entry is None:  # a break: the sample before it is suspect, and so is the one after it
                broken = True
                if last is not None:
                    bad[last] = "broken tar header"
                continue
            name, offset, size, complete = entry
            key, extension = split_name(name)
            if key != last:
                if key in members:
                    bad[key] = "key comes back"
                else:
                    order.append(key)
                    members[key] = {}
                last = key
            if broken:
                bad[key], broken = "broken tar header", False
            if not complete:
                bad[key] = "truncated"
            if extension in members[key]:
                bad[key] = "member comes twice"
            crc = _crc32(file, offset, size) if checksum and complete else -1
            members[key][extension] = (offset, size, crc)
    keys = [k for k in order if k not in bad]
    columns: dict[str, Columns] = {}
    for extension in sorted({e for k in keys for e in members[k]}):
        table = np.array([members[k].get(extension, (-1, 0, -1)) for k in keys], dtype=np.int64).reshape(-1, 3)
        columns[extension] = Columns(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())
    return ShardIndex(keys, columns, sorted(bad.items()))


def _crc32(file: Any, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc


# ------------------------------------------------------------------------------------------------ a set of shards


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
        damage: shard name -> what a scan left out.
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
            tars = [Path(pattern)]
        else:
            tars = [Path(p) for piece in _braces(pattern) for p in sorted(glob.glob(piece))]
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
    """Shards with a manifest are opened by it; others (img2dataset's, say) are indexed by a scan of their headers.

    Raises:
        ConfigError: nothing matches, a manifest cannot be read, or a tar is not what its manifest says.
    """
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    damage: dict[str, Sequence[tuple[str, str]]] = {}
    fingerprint = hashlib.sha256()
    manifests: dict[Path, dict[str, Any]] = {}
    for path in find_shards(patterns):
        manifest = manifests.setdefault(path.parent, _entries(path.parent))
        entry = manifest.get(path.name)
        if entry is not None:
            if path.stat().st_size != entry["bytes"]:
                raise ConfigError(
                    f"{path} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}: "
                    f"write it again, or run `mmcontrast prep index {path.parent}` to accept it as it is"
                )
            shards.append(Shard(path, entry["samples"], _IndexFile(index_path(path))))
            counts.update(entry["members"])
            fingerprint.update(f"{path.name} {entry['sha256']} ".encode())
        else:
            index = scan(path)
            shards.append(Shard(path, len(index.keys), _Kept(index)))
            counts.update({name: int((c.offset >= 0).sum()) for name, c in index.columns.items()})
            if index.damage:
                damage[path.name] = index.damage
            fingerprint.update(f"{path.name} {path.stat().st_size} {index.to_json()} ".encode())
    return ShardSet(shards, dict(counts), damage, fingerprint.hexdigest()[:16])


@dataclass(frozen=True)
class _IndexFile:
    path: Path

    def __call__(self) -> ShardIndex:
        try:
            return ShardIndex.from_json(json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path} cannot be read ({error}); run `mmcontrast prep index {self.path.parent}` to write it again"
            ) from None


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
        version, names = manifest["version"], [(e["name"], e["bytes"], e["samples"], e["sha256"]) for e in manifest["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a manifest of shards ({error}); delete it or write it again") from None
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade mmcontrast")
    if len({name for name, *_ in names}) < len(names):
        raise ConfigError(f"{path} names a shard twice; write it again")
    return cast(dict[str, Any], manifest)


# ------------------------------------------------------------------------------------------------ writing


class ShardWriter:
    """Writes samples into numbered tars with their indices; the manifest comes last, so a folder with one is whole.

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
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} is a file; give a folder to write shards to")
        old = [*out.glob("*.tar"), *out.glob("*.index.json"), *out.glob("*.tar.tmp")] if out.exists() else []
        if (old or (out / MANIFEST).exists()) and not overwrite:
            raise ConfigError(f"{out} holds shards already; choose another folder, or replace them with --overwrite")
        (out / MANIFEST).unlink(missing_ok=True)  # first: while tars change there must be no manifest
        for path in old:
            path.unlink()
        out.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            ConfigError: a key with a dot or one that came before, an extension that no reader knows, no members.
        """
        if not sample.key or "." in sample.key.rpartition("/")[2] or sample.key.startswith(("/", "..", "_")):
            raise ConfigError(f"the key {sample.key!r} cannot name a sample: no dots, not empty, no leading / or _")
        if sample.key in self._keys:
            raise ConfigError(f"the key {sample.key!r} comes twice; keys must be unique in a set of shards")
        known = {METADATA, *(e for extensions in FORMATS.values() for e in extensions)}
        unknown = [e for e in sample.members if e not in known]
        if unknown or not sample.members:
            raise ConfigError(
                f"sample {sample.key!r} has members {sorted(sample.members)}; known are {', '.join(sorted(known))}"
            )
        contents = {name: _encode(content) for name, content in sample.members.items()}
        size = sum(map(len, contents.values()))
        if self._tar is not None and (self._samples >= self.max_samples or self._bytes + size > self.max_bytes):
            self._finish_shard()
        if self._tar is None:
            self._start_shard()
        self._tar.write({"__key__": sample.key, **contents})
        self._keys.add(sample.key)
        self._samples += 1
        self._bytes += size

    def _start_shard(self) -> None:
        from webdataset.writer import TarWriter

        self._file = open(self._path().with_suffix(".tar.tmp"), "wb")
        # A fixed time makes the same samples the same bytes, so a checksum says whether data changed.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _path(self) -> Path:
        return self.out / f"{len(self._shards):05d}.tar"

    def _finish_shard(self) -> None:
        self._tar.close()
        self._file.close()
        path = self._path()
        path.with_suffix(".tar.tmp").rename(path)
        self._shards.append(describe_shard(path))
        self._tar = self._file = None
        self._samples = self._bytes = 0

    def close(self) -> None:
        """Finish the last shard and write the manifest."""
        if self._tar is not None:
            self._finish_shard()
        write_manifest(self.out, self._shards, self.about)


def _encode(content: bytes | str | Mapping[str, Any]) -> bytes:
    if isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False, sort_keys=True)
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
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
