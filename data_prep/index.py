"""An index and a manifest for shards that others wrote (img2dataset's, say): opening them then needs no scan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.shard_writer import describe_shard, write_manifest
from mmcontrast.shards import MANIFEST, find_shards, read_manifest


def prepare(folder: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `NAME.index.json` beside every tar of a folder, and `manifest.json`; the tars stay as they are.

    Raises:
        ConfigError: no tars, no samples in them, or a manifest that is there already.
    """
    from tqdm import tqdm

    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    paths = find_shards([str(folder)])
    if (folder / MANIFEST).exists() and not overwrite:
        raise ConfigError(f"{folder / MANIFEST} exists; write it again with --overwrite")
    (folder / MANIFEST).unlink(missing_ok=True)  # while indices change there must be no manifest
    bar = tqdm(paths, desc="index", unit="shard", disable=not sys.stderr.isatty())
    entries = [describe_shard(path) for path in bar]
    samples, damaged = sum(e["samples"] for e in entries), sum(len(e["damage"]) for e in entries)
    if not samples:
        reasons = [f"; {e['name']}: {key} {reason}" for e in entries for key, reason in e["damage"][:1]]
        raise ConfigError(f"{folder}: the tars hold no samples{''.join(reasons[:3])}")
    write_manifest(folder, entries, {"source": "indexed"})
    print(f"{folder}: {len(entries)} shards, {samples} samples; left out {damaged} damaged", file=sys.stderr)
    for entry in entries:
        for key, reason in entry["damage"][:5]:
            print(f"left out {entry['name']}: {key or 'all'}: {reason}", file=sys.stderr)
    found = read_manifest(folder)
    assert found is not None
    return found
