"""From a tar to an index of its samples, by headers, each of which is verified.

Python's `tarfile` ends an archive silently at the first broken header; this walk reports the break and goes
on behind it.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError

FORMAT_VERSION = 1
_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20
_MAX_ENTRIES = 1 << 22  # of an index, over all its extensions: about 100 MB
_ZEROS = bytes(1 << 20)
_BREAK = "at a break of the tar"
_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_ABOUT_THE_NEXT = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE, *_PAX)


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
        """The reverse of `to_json`, for what was scanned with checksums.

        Raises:
            ValueError: keys that are not distinct strings, columns that are not one whole number per key, or a member
                without a checksum.
        """
        keys = data["keys"]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in cast(list[Any], keys)):
            raise ValueError("its keys are no list of strings")
        names = cast(list[str], keys)
        if len(set(names)) < len(names):
            raise ValueError("a key comes twice")
        columns: dict[str, Columns] = {}
        for name, found in data["members"].items():
            offset, size, crc32 = (_whole_numbers(found[k], len(names), name) for k in ("offset", "size", "crc32"))
            present = offset >= 0
            if (crc32[present] < 0).any() or (crc32 >> 32 > 0).any():
                raise ValueError(f"{name} lacks checksums")
            columns[name] = Columns(offset, size, crc32)
        return ShardIndex(names, columns)


def _whole_numbers(values: Any, count: int, name: str) -> NDArray[np.int64]:
    found = np.asarray(values if values else np.zeros(0, np.int64))  # an empty list would be of floats
    if found.shape != (count,) or found.dtype != np.int64:
        raise ValueError(f"{name} has other than {count} whole numbers")
    return found


def split_name(name: str) -> tuple[str, str]:
    """Member name -> (key, extension): as in WebDataset, a key ends at the first dot of the file name.

    The extension is empty for what belongs to no sample: names without a dot, and hidden files (macOS's `._x`).
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def scan(path: Path, *, checksum: bool = False) -> ShardIndex:
    """Index a tar by its headers, every one of which is verified.

    Where a header is broken, the scan goes on at the next good one and leaves out the samples on both sides of
    the break, since it cannot know what they lost. Keys that come back later in the shard are left out as well.
    Contents that changed or moved under whole headers are seen by the checksums of an older index alone, and so are
    changed letters in a name of more than 100 bytes, which a tar protects by no checksum.

    Args:
        path: the tar.
        checksum: also read all contents and note their CRC-32.

    Raises:
        ConfigError: the file cannot be opened or read.
    """
    try:
        return _scan(path, checksum)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; mend that, or leave it out") from None


def _scan(path: Path, checksum: bool) -> ShardIndex:
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
                    bad.setdefault(last, _BREAK)
                continue
            name, offset, size, complete = entry
            key, extension = split_name(name)
            if not extension:
                continue
            if key != last:
                if key in members:
                    bad[key] = "key comes back"
                else:
                    order.append(key)
                    members[key] = {}
                last = key
            if broken:
                bad[key], broken = _BREAK, False
            if not complete:
                bad[key] = "truncated"
            if extension in members[key]:
                bad.setdefault(key, "member comes twice")
            crc = _crc32(file, offset, size) if checksum and complete else -1
            members[key][extension] = (offset, size, crc)
    if broken and not order:
        bad[""] = "not a tar"
    keys = [k for k in order if k not in bad]
    columns: dict[str, Columns] = {}
    common = Counter(e for k in keys for e in members[k])
    # With dots in the keys every member is an extension of its own: a column for each would take their square.
    kept = [e for e, _ in common.most_common(max(1, _MAX_ENTRIES // max(1, len(keys))))]
    if len(kept) < len(common):
        bad[""] = f"{len(common) - len(kept)} extensions beyond the first {len(kept)}; do the keys have dots?"
    for extension in sorted(kept):
        entries = [members[k].get(extension, (-1, 0, -1)) for k in keys]
        offset, size, crc32 = np.array(entries, dtype=np.int64).T.copy()
        columns[extension] = Columns(offset, size, crc32)
    return ShardIndex(keys, columns, sorted(bad.items()))


def _crc32(file: Any, offset: int, size: int) -> int:
    file.seek(offset)
    crc = 0
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc


def walk(file: Any, end: int) -> Iterator[tuple[str, int, int, bool] | None]:
    """(name, offset, size, complete) of every regular member; None where something is broken or missing."""
    position, about = 0, _Next()
    lost = zeros = False
    while position + _BLOCK <= end:
        file.seek(position)
        head = file.read(_BLOCK)
        position += _BLOCK
        if not head.strip(b"\0"):
            position = _behind_zeros(file, position)
            about, zeros = _Next(), True
            continue
        info = _header(head)
        # Zeros end an archive: a header behind them means that a stretch was wiped, or two tars joined.
        if (info is None or zeros) and not lost:
            yield None
        lost, zeros = info is None, False
        if info is None:
            about = _Next()
        elif info.type in _ABOUT_THE_NEXT:
            payload = file.read(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                about.name = _text(payload.partition(b"\0")[0])
            elif info.type in _PAX:
                records = _pax_records(payload)
                if records is None:  # the name may be what is lost: whose member comes next is unknown
                    yield None
                    about.nameless = True
                else:
                    about.take(records)
            position += _padded(info.size)
        elif info.type in tarfile.REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES:
            size = info.size if about.size is None else about.size
            stored = info.type != tarfile.GNUTYPE_SPARSE and not about.sparse  # a sparse file lies there in pieces
            if not about.nameless:
                yield about.name or info.name, position, size, stored and position + size <= end
            position += _padded(size)
            about = _Next()
        else:  # folders and links have no content: to skip what their size says could skip members
            about = _Next()
    if not zeros:
        yield None  # a cut between members leaves no other trace than that the closing zeros are missing


@dataclass
class _Next:
    """What extended headers say of the member that follows them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    nameless: bool = False

    def take(self, records: Mapping[str, str]) -> None:
        self.name = records.get("path", self.name)
        self.size = int(s) if re.fullmatch("[0-9]{1,19}", s := records.get("size", "")) else None
        self.sparse = any(record.startswith("GNU.sparse.") for record in records)


def _behind_zeros(file: Any, position: int) -> int:
    """The next block that is not all zeros; in large steps, since a file of holes may be larger than any disk."""
    file.seek(position)
    while chunk := file.read(len(_ZEROS)):
        if chunk != _ZEROS and (rest := len(chunk.lstrip(b"\0"))):
            return position + (len(chunk) - rest) // _BLOCK * _BLOCK
        position += len(chunk)
    return position


def _header(head: bytes) -> tarfile.TarInfo | None:
    try:
        # Undecodable names stay distinct: a replacement character could merge neighbours into one key.
        info = tarfile.TarInfo.frombuf(head, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    if info.size < 0 or (info.type in _ABOUT_THE_NEXT and info.size > _MAX_HEADER_BYTES):
        return None  # a negative size would walk backwards, for ever
    return info


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax_records(payload: bytes) -> dict[str, str] | None:
    """`LENGTH KEY=VALUE` lines of an extended header; None where they are not such lines to the end."""
    records: dict[str, str] = {}
    place, end = 0, len(payload.rstrip(b"\0"))
    while place < end:
        match = _PAX_RECORD.match(payload, place, end)
        stop = place + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= end or payload[stop - 1 : stop] != b"\n":
            return None
        records[_text(match[2])] = _text(payload[match.end() : stop - 1])
        place = stop
    return records
