"""The shard format: WebDataset tars, an index of their members, and a manifest that describes the set.

A sample is a run of members that share a key (`000017.png`, `000017.txt`, `000017.json`). Reading goes
through an index of members, never through a sequential tar reader, so a damaged shard can lose samples but
never pair one sample's picture with another's caption. Nothing that is read is ever unpickled or executed:
members are bytes, and only members of known formats are looked at.

    OUT/00000.tar               the samples
    OUT/00000.index.json        keys, and per format the offset, size and CRC-32 of every member
    OUT/manifest.json           shards with counts, bytes and SHA-256; formats per modality

The three may lie on another machine: then a shard is brought to this one when it is first read (`shard_cache.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.manifest import MANIFEST, MAX_JSON_BYTES, Finder, Place, index_anew
from mmcontrast.manifest import read_manifest as read_manifest  # whoever opens shards may look at it
from mmcontrast.remote import Address
from mmcontrast.shard_cache import Cache
from mmcontrast.tar import ShardIndex, scan

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
MAX_MEMBER_BYTES = 256 << 20


class BadSample(Exception):
    """A sample that cannot be used; the text is the reason, in few words that can be counted."""


@dataclass(frozen=True)
class Shard:
    """One tar: where it lies, its samples and its length, and how its index and a descriptor to read from are had."""

    path: Place
    samples: int
    bytes: int
    load: Callable[[], ShardIndex]
    open: Callable[[], int]


@dataclass
class ShardSet:
    """Samples 0..N-1 of some shards, read at random and in any process.

    Attributes:
        shards: in the order that numbers the samples; a sample's position is its stable id.
        counts: extension -> samples that have it.
        damage: shard path -> what a scan left out, as (key, reason).
        fingerprint: changes when the content or the order of the shards does.
        cache: where remote shards are kept; None where all lie on this machine.
    """

    shards: Sequence[Shard]
    counts: Mapping[str, int]
    damage: Mapping[str, Sequence[tuple[str, str]]]
    fingerprint: str
    cache: Cache | None = None
    _starts: NDArray[np.int64] = field(init=False)
    _most_open: int = field(init=False)
    _indices: OrderedDict[int, ShardIndex] = field(init=False, default_factory=OrderedDict[int, ShardIndex])
    _files: OrderedDict[int, int] = field(init=False, default_factory=OrderedDict[int, int])

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(s.samples for s in self.shards)])
        # What is open in the cache cannot make room for other shards, and opening it again costs next to nothing.
        self._most_open = 64 if self.cache is None else 1

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
        file = self._open(shard)
        try:
            if offset + size > os.fstat(file).st_size:  # before memory is taken for what is not there
                raise BadSample("truncated")
            data = os.pread(file, size, offset)
        except OSError as error:  # a sector, a network disk
            raise BadSample(f"cannot be read (errno {error.errno})") from None
        if len(data) < size:
            raise BadSample("truncated")
        if crc >= 0 and zlib.crc32(data) != crc:
            raise BadSample(f"checksum of {extension}")
        return data

    def _index(self, shard: int) -> ShardIndex:
        return _recent(self._indices, shard, lambda: self.shards[shard].load(), limit=64)

    def _open(self, shard: int) -> int:
        return _recent(self._files, shard, lambda: self.shards[shard].open(), self._most_open, os.close)


def _recent(
    cache: OrderedDict[K, V],
    key: K,
    make: Callable[[], V],
    limit: int,
    drop: Callable[[V], None] = lambda value: None,
) -> V:
    if key not in cache:
        while len(cache) >= limit:  # first, since what is held may be in the way of what is to come
            drop(cache.popitem(last=False)[1])
        cache[key] = make()
    cache.move_to_end(key)
    return cache[key]


def open_shards(patterns: Sequence[str], *, cache: Cache | None = None) -> ShardSet:
    """Shards with a manifest are opened by it; local others (img2dataset's, say) by a scan of their headers.

    Remote shards without a manifest are refused: a scan would bring the whole set to every machine before the first
    step of each run. `mmcontrast prep index` does it once, and keeps what it found.

    Args:
        patterns: folders, globs, ranges, files, and addresses of them.
        cache: where remote shards are kept; by default as the environment says.

    Raises:
        ConfigError: nothing matches, a manifest cannot be read, or a tar is not what its manifest says.
    """
    shards: list[Shard] = []
    counts: Counter[str] = Counter()
    damage: dict[str, Sequence[tuple[str, str]]] = {}
    fingerprint = hashlib.sha256()
    finder = Finder(cache.patience if cache else None)
    paths = list(dict.fromkeys(path for pattern in patterns for path in finder.find(pattern)))
    if not any(isinstance(path, Address) for path in paths):
        cache = None
    elif cache is None:
        cache = Cache.from_environment()
    for path in paths:
        folder, entry = finder.describe(path)
        if entry is not None:
            if isinstance(path, Path) and (size := path.stat().st_size) != entry["bytes"]:
                raise ConfigError(
                    f"{path} has {size} bytes, its manifest says {entry['bytes']}: write it again, "
                    f"or to accept it as it is {index_anew(folder)}"
                )
            load = _IndexFile(folder / _index_name(path.name), entry, cache)
            shards.append(Shard(path, entry["samples"], entry["bytes"], load, _Opened(path, entry, cache)))
            counts.update(entry["members"])
            left_out = [(key, reason) for key, reason in entry.get("damage", ())]
            fingerprint.update(f"{path.name!r} {entry['sha256']} ".encode())
        elif isinstance(path, Address):
            raise ConfigError(
                f"no {MANIFEST} beside it names {path}: run `mmcontrast prep index PATTERN --out FOLDER`, which reads "
                "every shard once, and give FOLDER instead of the pattern"
            )
        else:
            index, size = scan(path), path.stat().st_size
            shards.append(Shard(path, len(index.keys), size, _Kept(index), _Opened(path, {}, None)))
            counts.update({name: int((c.offset >= 0).sum()) for name, c in index.columns.items()})
            left_out = index.damage
            fingerprint.update(f"{path.name!r} {size} {index.to_json()} ".encode())
        if left_out:
            damage[str(path)] = left_out
    if not any(shard.samples for shard in shards):
        reasons = [f"{key or path.name}: {why}" for path in paths for key, why in damage.get(str(path), ())[:1]]
        raise ConfigError(f"{paths[0]} and {len(paths) - 1} more hold no samples; {'; '.join(reasons[:3]) or 'empty'}")
    return ShardSet(shards, dict(counts), damage, fingerprint.hexdigest()[:16], cache)


@dataclass(frozen=True)
class _Opened:
    """Makes a descriptor of a shard; a remote one is brought into the cache first."""

    path: Place
    entry: Mapping[str, Any]
    cache: Cache | None

    def __call__(self) -> int:
        if isinstance(self.path, Address):
            assert self.cache is not None
            digest = self.entry["sha256"]
            return self.cache.open(self.path, digest, size=self.entry["bytes"], sha256=digest)
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be opened: {error.strerror}; put it back, or start again") from None


@dataclass(frozen=True)
class _IndexFile:
    path: Place
    entry: Mapping[str, Any]
    cache: Cache | None

    def __call__(self) -> ShardIndex:
        samples = self.entry["samples"]
        try:
            index = ShardIndex.from_json(json.loads(self._content()))
            if len(index.keys) != samples:
                raise ValueError(f"{len(index.keys)} samples, the manifest says {samples}")
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            remedy = index_anew(self.path.parent)
            raise ConfigError(f"{self.path} cannot be read ({str(error)[:200]}); {remedy}") from None
        return index

    def _content(self) -> bytes:
        described = self.entry.get("index", {})
        if isinstance(self.path, Address):
            assert self.cache is not None
            size, digest = described.get("bytes"), described.get("sha256")
            identity = digest or f"index of {self.entry['sha256']}"
            file = self.cache.open(self.path, identity, size=size, sha256=digest)
            with os.fdopen(file, "rb") as opened:
                if os.fstat(file).st_size > MAX_JSON_BYTES:
                    raise ValueError(f"above {MAX_JSON_BYTES >> 20} MiB")
                return opened.read()
        data = self.path.read_bytes()
        if described and hashlib.sha256(data).hexdigest() != described["sha256"]:
            raise ValueError("not the one that the manifest describes")
        return data


@dataclass(frozen=True)
class _Kept:
    index: ShardIndex

    def __call__(self) -> ShardIndex:
        return self.index


def index_path(shard: Path) -> Path:
    """Where the index of a tar lies."""
    return shard.with_name(_index_name(shard.name))


def _index_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".index.json"
