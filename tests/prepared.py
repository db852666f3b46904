"""What a preparation wrote, as tests look at it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.shards import open_shards, read_manifest


@dataclass(frozen=True)
class Written:
    """A sample: extension -> content, and its metadata."""

    split: str
    key: str
    members: dict[str, bytes]
    meta: dict[str, Any]

    @property
    def text(self) -> str:
        return self.members["txt"].decode()


def written(out: Path) -> list[Written]:
    """All samples of all splits, each in the shards' order."""
    found: list[Written] = []
    for folder in sorted(path.parent for path in out.glob("*/manifest.json")):
        manifest = read_manifest(folder)
        if manifest is None or not manifest["samples"]:
            continue
        shards = open_shards([str(folder)])
        for i in range(len(shards)):
            members = {e: shards.read(i, e) for e in shards.extensions(i)}
            meta = json.loads(members.pop("json", b"{}"))
            found.append(Written(folder.name, shards.name(i)[1], members, meta))
    return found


def about(out: Path, split: str = "train") -> dict[str, Any]:
    """What a split's manifest says of it."""
    manifest = read_manifest(out / split)
    assert manifest is not None
    return manifest["about"]
