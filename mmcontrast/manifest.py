"""Which shards a pattern means, and what the manifest beside them says of each."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError
from mmcontrast.remote import Address, Patience, checked, is_remote, list_tars, read_small
from mmcontrast.tar import FORMAT_VERSION

Place = Path | Address
"""Where a shard or a folder lies."""
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 30
_MOST = 1 << 53  # nothing is counted beyond


@dataclass(frozen=True)
class Description:
    """A manifest: the folder that it lies in, with the indices, and its entries by the shards' names.

    Shards may lie elsewhere than their manifest, if that says where by `root`: `mmcontrast prep index` makes such
    ones for shards in a place where one may only read.
    """

    folder: Place
    entries: Mapping[str, Mapping[str, Any]]


class Finder:
    """Patterns -> shards with their descriptions; every manifest is read once."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        # By the folder of the shards, parts of which may be described in several places.
        self._described: dict[Place, list[Description]] = {}

    def describe(self, shard: Place) -> tuple[Place, Mapping[str, Any] | None]:
        """The folder with the shard's index, and its entry in the manifest there; None where nothing names it."""
        if shard.parent not in self._described:
            self._read(shard.parent)
        for described in self._described[shard.parent]:
            if shard.name in described.entries:
                return described.folder, described.entries[shard.name]
        return shard.parent, None

    def find(self, pattern: str) -> list[Place]:
        """The shards that a pattern means, in order.

        Raises:
            ConfigError: it matches nothing, misses a shard that a range or a manifest names, or runs a command.
        """
        if pattern.startswith("pipe:"):
            raise ConfigError(f"{pattern!r} would run a command; shards are read from files and addresses only")
        pattern = pattern.removeprefix("file://")
        tars = self._remote(pattern) if is_remote(pattern) else self._local(pattern)
        if not tars:
            raise ConfigError(f"no shards match {pattern!r}; give a folder with .tar files, a glob or a range")
        return tars

    def _read(self, folder: Place) -> list[Place] | None:
        """The shards that a folder's manifest names; None where there is no manifest."""
        manifest = read_manifest(folder, self.patience)
        entries = {} if manifest is None else {entry["name"]: entry for entry in manifest["shards"]}
        root = folder if manifest is None or "root" not in manifest else checked(manifest["root"])
        self._described.setdefault(root, []).append(Description(folder, entries))
        return None if manifest is None else [root / name for name in sorted(entries)]

    def _remote(self, pattern: str) -> list[Place]:
        tars: list[Place] = []
        for piece in _braces(pattern):
            address = checked(piece)
            if re.search(r"[*]" if address.web else r"[*?\[]", address.url):
                tars += list_tars(address, self.patience)
            elif address.name.endswith(".tar"):
                tars.append(address)
            else:
                named = self._read(address)
                tars += list_tars(address, self.patience) if named is None else named
        return tars

    def _local(self, pattern: str) -> list[Place]:
        folder = Path(pattern)
        if folder.is_dir():
            named = self._read(folder) or []
            if named and isinstance(named[0], Address):
                return named
            tars = sorted(folder.glob("*.tar"))
            if missing := sorted({str(path) for path in named} - {str(path) for path in tars}):
                raise ConfigError(f"{missing[0]} is not there, but {MANIFEST} names it; {index_anew(folder)}")
            return [*tars]
        if folder.is_file():
            if not pattern.endswith(".tar"):
                raise ConfigError(f"{pattern!r} is no .tar file; unpack it if it is a compressed one")
            return [folder]
        found: list[Place] = []
        for piece in (pieces := _braces(pattern)):
            names = [piece] if Path(piece).is_file() else sorted(glob.glob(piece))
            if not names and len(pieces) > 1:  # reading on would train on less than was asked for
                raise ConfigError(f"{piece} of {pattern!r} is not there; correct the range")
            found += [Path(name) for name in names if name.endswith(".tar") and Path(name).is_file()]
        return found


def find_shards(patterns: Sequence[str]) -> list[Place]:
    """Folders, globs, `{00000..00007}` ranges, files and addresses of them -> tars, in order.

    Raises:
        ConfigError: a pattern that matches nothing, or a command.
    """
    finder = Finder()
    return list(dict.fromkeys(shard for pattern in patterns for shard in finder.find(pattern)))


def _braces(pattern: str) -> list[str]:
    match = re.search(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}", pattern)
    if not match:
        return [pattern]
    width, first, last = len(match[1]), int(match[1]), int(match[2])
    if last - first > 1_000_000:
        raise ConfigError(f"{pattern!r} names {last - first + 1} shards; the limit is 1000000")
    heads = [f"{pattern[: match.start()]}{i:0{width}d}" for i in range(first, last + 1)]
    return [h + tail for h in heads for tail in _braces(pattern[match.end() :])]


def index_anew(folder: Place) -> str:
    """The command that mends a folder's manifest and indices."""
    where = " where the shards are written" if isinstance(folder, Address) else ""
    return f"run `mmcontrast prep index {folder} --overwrite`{where}"


def read_manifest(folder: Place, patience: Patience | None = None) -> dict[str, Any] | None:
    """The manifest of a folder of shards; None where there is none.

    Raises:
        ConfigError: it is no manifest, or of a newer format.
    """
    path = folder / MANIFEST
    try:
        data = _content(path, patience or Patience())
        if data is None:
            return None
        manifest = json.loads(data)
        version = int(manifest["version"])
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format {version}; this version reads up to {FORMAT_VERSION}: upgrade mmcontrast"
            )
        if not isinstance(manifest.get("root", ""), str):
            raise ValueError("its root is no address")
        if "root" in manifest and isinstance(path, Address):  # or a stranger could send us anywhere
            raise ValueError("it lies on another machine and points to a third place")
        names = [_checked_entry(entry) for entry in manifest["shards"]]
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path} is not a manifest of shards ({error!r:.200}); {index_anew(folder)}") from None
    if len(set(names)) < len(names):
        raise ConfigError(f"{path} names a shard twice; {index_anew(folder)}")
    return cast(dict[str, Any], manifest)


def _content(path: Place, patience: Patience) -> bytes | None:
    if isinstance(path, Address):
        return read_small(path, patience, MAX_JSON_BYTES)
    return path.read_bytes() if path.is_file() else None


def _checked_entry(entry: Mapping[str, Any]) -> str:
    """The name of a shard whose entry has all that readers rely on."""
    name, index = entry["name"], entry.get("index", {"bytes": 0, "sha256": ""})
    if not isinstance(name, str) or not re.fullmatch(r"[^/\0]+\.tar", name, re.DOTALL):
        raise ValueError(f"{name!r} is no tar in its folder")
    for number in (entry["bytes"], entry["samples"], index["bytes"], *entry["members"].values()):
        if type(number) is not int or not 0 <= number < _MOST:
            raise ValueError(f"{number!r:.50} is no count")
    said = [text for key, reason in entry.get("damage", ()) for text in (key, reason)]
    if not all(isinstance(text, str) for text in (entry["sha256"], index["sha256"], *said)):
        raise ValueError("a checksum or a reason is no text")
    return name
