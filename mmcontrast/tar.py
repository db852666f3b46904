"""Walking through a tar by its headers, each of which is verified: what Python's tarfile does not offer.

`tarfile` ends an archive silently at the first broken header; this walk reports the break and goes on behind it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any

_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20


def walk(file: Any, end: int) -> Iterator[tuple[str, int, int, bool] | None]:
    """(name, offset, size, complete) of every regular member; None where headers are broken or missing."""
    position, name, size_override, in_break = 0, None, None, False
    while position + _BLOCK <= end:
        file.seek(position)
        head = file.read(_BLOCK)
        if not head.strip(b"\0"):
            position += _BLOCK
            continue
        try:
            info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not in_break:
                yield None
            position, name, size_override, in_break = position + _BLOCK, None, None, True
            continue
        in_break = False
        data = position + _BLOCK
        size = info.size if size_override is None else size_override
        following = data + -(-size // _BLOCK) * _BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if info.size > _MAX_HEADER_BYTES:
                yield None
                return
            payload = file.read(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                records = _pax_records(payload)
                name = records.get("path", name)
                size_override = int(records["size"]) if records.get("size", "").isdigit() else None
        else:
            if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield name or info.name, data, size, data + size <= end
            name, size_override = None, None
        position = following
    if position < end:
        yield None  # a header that was cut off


def _pax_records(payload: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE` lines of an extended header."""
    records: dict[str, str] = {}
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", payload):
        length = int(match[1])
        if length <= match.end():
            break
        records[match[2].decode("utf-8", "replace")] = payload[match.end() : length - 1].decode("utf-8", "replace")
        payload = payload[length:]
    return records
