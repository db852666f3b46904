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
from dataclasses import dataclass, field
from pathlib import Path
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


class BadSample(Exception):
    """A sample that cannot be used; the text is the reason, in few words that can be counted."""


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
        names = {entry["name"] for entry in entries}
        numbers = [n for e in entries for n in (e["bytes"], e["samples"], *e["members"].values())]
        if not all(isinstance(n, int) and n >= 0 for n in numbers) or not all(
            isinstance(e["sha256"], str) for e in entries
        ):
            raise ValueError("a count is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest of shards ({error!r}); {_index_anew(folder)}") from None
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade mmcontrast")
    if len(names) < len(entries):
        raise ConfigError(f"{path} names a shard twice; {_index_anew(folder)}")
    return cast(dict[str, Any], manifest)
