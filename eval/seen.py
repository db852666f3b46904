"""Which samples of a data set the model was trained on: a score over those says little about others.

Samples are the same where a picture, a sound or a signal is the same file, by its length and CRC-32. Of shards with a
manifest both stand in the index, so nothing of the training data is read. Texts do not count: names come back. Files
that were encoded anew are not found; `mmcontrast check shards` also compares how pictures look.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from mmcontrast.check.likeness import Marks, overlap
from mmcontrast.config import ConfigError
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Result
from mmcontrast.eval.sources import Files, Shards
from mmcontrast.shards import FORMATS, BadSample, ShardSet, open_shards

_POSITION = re.compile(r"\((\d+)\)(?: \d+)?")  # at the end of an item's name


def training_shards(config: Mapping[str, Any]) -> list[str]:
    """The shards on this machine that a run's `data` names, of one source or of several."""
    found: list[str] = []
    for name, value in config.items():
        if name == "shards" and isinstance(value, (list, tuple)):
            found += [str(pattern) for pattern in cast(Sequence[Any], value) if "://" not in str(pattern)]
        elif isinstance(value, Mapping):
            found += training_shards(cast(Mapping[str, Any], value))
    return found


def seen(data: Embedded, patterns: Sequence[str]) -> list[int]:
    """Positions of the samples that are among some training shards; none where those are not there any more."""
    kinds = [kind for kind in dict.fromkeys(data.kinds.values()) if kind != "text"]
    if not patterns or not kinds:
        return []
    try:
        trained = open_shards(patterns)
    except ConfigError:  # moved since: nothing can be told
        return []
    found: set[int] = set()
    for kind in kinds:
        theirs = np.concatenate([marks for extension in FORMATS[kind] for marks in _indexed(trained, extension)])
        positions, ours = _marks(data, kind)
        found |= {positions[place] for place in overlap(ours, theirs).first.tolist()}
    return sorted(found)


def _indexed(shards: ShardSet, extension: str) -> list[Marks]:
    """Per shard, the mark of each sample: 0 where it has no such member, or where the index has no checksum."""
    found: list[Marks] = []
    for shard in shards.shards:
        index = shard.load()
        columns = index.columns.get(extension)
        if columns is None:
            found.append(np.zeros(len(index.keys), np.uint64))
            continue
        known = (columns.offset >= 0) & (columns.crc32 >= 0)
        found.append(np.where(known, _mark(columns.size, columns.crc32), 0).astype(np.uint64))
    return found


def _mark(size: Any, crc32: Any) -> Any:
    return size * 2**32 + crc32


def _marks(data: Embedded, kind: str) -> tuple[list[int], Marks]:
    """Positions, and marks of all their files of a kind; a sample comes several times if it has several."""
    positions: list[int] = data.positions.tolist()
    source = data.source
    if isinstance(source, Shards):
        columns = [np.concatenate(_indexed(source.shards, extension))[positions] for extension in FORMATS[kind]]
        marks = np.max(np.stack(columns), axis=0)
        for place in np.flatnonzero(marks == 0).tolist():  # of shards without a manifest
            marks[place] = _read(source, positions[place], kind)
        return positions, marks
    if not isinstance(source, Files):
        return [], np.zeros(0, np.uint64)
    files = [(position, path) for position in positions for path in source.records[position].files.get(kind, ())]
    contents = [path.read_bytes() for _, path in files]
    marks = [_mark(len(content), zlib.crc32(content)) for content in contents]
    return [position for position, _ in files], np.array(marks, np.uint64)


def _read(source: Shards, position: int, kind: str) -> int:
    for extension in FORMATS[kind]:
        try:
            content = source.shards.read(position, extension)
        except (KeyError, BadSample):
            continue
        return _mark(len(content), zlib.crc32(content))
    return 0


def without(result: Result, positions: Sequence[int], total: int) -> Result:
    """The same with a warning, and with each score over the other items, if there are any, as METRIC_unseen."""
    known, unseen = set(positions), dict[str, float | None]()
    for items in result.items:
        weights = np.array([[float(_position(key) not in known) for key in items.keys]])
        for name, statistic in items.statistics.items() if weights.any() else ():
            value = float(statistic(weights)[0])
            unseen[f"{name}_unseen"] = None if np.isnan(value) else value
    first = next(((name, value) for name, value in unseen.items() if value is not None), None)
    said = f"{len(positions)} of {total} samples were trained on"
    if not unseen:
        said += ": the scores say nothing about others"
    if first is not None:
        name = first[0].removesuffix("_unseen")
        score = result.metrics[name].value
        said += f": without them {name} is {first[1]:.3f}, with them {score:.3f}"
    return replace(
        result,
        facts={**result.facts, **unseen},
        counts={**result.counts, "seen_in_training": len(positions)},
        warnings=[*result.warnings, said],
    )


def _position(key: str) -> int | None:
    found = list(_POSITION.finditer(key))
    return int(found[-1][1]) if found and found[-1].end() == len(key) else None
