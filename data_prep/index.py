"""An index and a manifest for shards that others wrote (img2dataset's, say): opening them then needs no scan."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.img2dataset import statistics
from mmcontrast.manifest import MANIFEST, Place, find_shards, read_manifest
from mmcontrast.remote import Address, is_remote
from mmcontrast.shard_cache import Cache
from mmcontrast.shard_writer import clear_shards, describe_shard, write_manifest


def prepare(shards: Path | str, *, out: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write `NAME.index.json` for every tar, and `manifest.json`; the tars stay as they are.

    For shards on this machine both are written beside them, and the manifest keeps what img2dataset tells of its
    download. Remote ones are read once, through the cache, and described in a folder here, which can then be opened
    instead of them.

    Args:
        shards: a folder; or the address of one, of a shard, a glob or a range.
        out: the folder for the description of remote shards.
        overwrite: replace a manifest that is there.

    Raises:
        ConfigError: no tars, no samples in them, or a manifest that is there already.
    """
    shards = str(shards).removeprefix("file://")
    remote = is_remote(shards)
    if remote != (out is not None):
        if remote:
            raise ConfigError(f"{shards} is remote; say with --out FOLDER where its index and manifest shall go")
        raise ConfigError(f"{shards} is on this machine; its index and manifest lie beside it: leave --out away")
    folder = out or Path(shards)
    if not remote and not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    paths: Sequence[Place] = find_shards([shards]) if remote else sorted(folder.glob("*.tar"))
    if not paths:
        raise ConfigError(f"no shards match {str(folder)!r}; give a folder with .tar files")
    roots = list(dict.fromkeys(path.parent for path in paths))
    if len(roots) > 1:
        raise ConfigError(f"{shards} are shards of {roots[0]}, {roots[1]} …; index each folder by itself")
    if (folder / MANIFEST).exists() and not overwrite:
        raise ConfigError(f"{folder / MANIFEST} exists; write it again with --overwrite")
    if remote:
        if any(folder.glob("*.tar")):
            raise ConfigError(f"{folder} holds shards of its own; choose another folder to describe remote ones in")
        clear_shards(folder, overwrite=overwrite)
        folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)  # while indices change there must be no manifest
    entries = [_described(path, folder) for path in _watched(paths)]
    samples, damaged = sum(e["samples"] for e in entries), sum(len(e["damage"]) for e in entries)
    if not samples:
        reasons = [f"; {e['name']}: {key} {reason}" for e in entries for key, reason in e["damage"][:1]]
        raise ConfigError(f"{shards}: the tars hold no samples{''.join(reasons[:3])}")
    root = roots[0].url if isinstance(roots[0], Address) else None
    about, warnings = statistics(folder, entries)
    write_manifest(folder, entries, {"source": "indexed"} | about, root=root)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if about:
        print(f"{folder}: img2dataset got {about['successes']} of {about['count']} pictures", file=sys.stderr)
    print(f"{folder}: {len(entries)} shards, {samples} samples; left out {damaged} damaged", file=sys.stderr)
    for entry in entries:
        for key, reason in entry["damage"][:5]:
            print(f"left out {entry['name']}: {key or 'all'}: {reason}", file=sys.stderr)
    found = read_manifest(folder)
    assert found is not None
    return found


def _watched(paths: Sequence[Place]) -> Sequence[Place]:
    from tqdm import tqdm

    return tqdm(paths, desc="index", unit="shard", disable=not sys.stderr.isatty())  # pyright: ignore[reportReturnType]


def _described(path: Place, folder: Path) -> dict[str, Any]:
    if isinstance(path, Path):
        return describe_shard(path)
    cache = Cache.from_environment()
    # What lies in the cache from before may be of another state: nothing says yet what is to be expected.
    identity = f"indexed by {os.getpid()} at {time.time_ns()}"
    file = cache.open(path, identity)
    try:
        entry = describe_shard(cache.path(path, identity), folder / path.name)
        cache.rename(path, identity, entry["sha256"])  # so that training finds it
    finally:
        os.close(file)
    return entry
