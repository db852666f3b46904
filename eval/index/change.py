"""An index lives: samples come and go by their keys, indices of one space are merged, and what was deleted is dropped.

None of it needs more than what lies in the index folders, but for `add`, which embeds. Adding writes a small segment
beside the others, deleting a list of rows; `compact` makes one segment of all, with a structure for what is there now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmcontrast.config import ConfigError, suggest
from mmcontrast.eval.index.build import SKIPPED_KEPT, Asked, Queries, stored_queries, write_base
from mmcontrast.eval.index.identity import check_same, identity_of, libraries, open_model
from mmcontrast.eval.index.intake import Encoding, Intake
from mmcontrast.eval.index.segment import FLAT, Part, Segment, entry_of, write_deleted, write_parts
from mmcontrast.eval.index.store import MANIFEST, Update, read_manifest, verify
from mmcontrast.eval.index.vectors import Ints

MERGED_BELOW = 10_000
"""A last segment without structure that has fewer rows is written again with those that are added, so that many small
additions do not become many segments."""


def add(
    folder: Path,
    shards: Sequence[str],
    *,
    model: str | Path | None = None,
    replace: bool = False,
    encoding: Encoding | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed the samples of some shards into an index; returns the manifest.

    Args:
        folder: of the index.
        shards: as for `build_index`.
        model: where the model lies now, if it moved; its hash must be the index's.
        replace: samples take the place of those of the same key; otherwise a key that is there is an error.
        encoding: how samples are embedded.
        progress: show bars on standard error.

    Raises:
        ConfigError: no index, another model, shards that cannot be read, or keys that are there.
    """
    encoding = encoding or Encoding()
    before = read_manifest(folder)
    origin = open_model(model or before["model"], trust=encoding.trust)
    identity = identity_of(origin, before["modality"])
    check_same(before, identity, str(folder), origin.place)
    intake = Intake(shards, origin, before["modality"], encoding, source=len(before["sources"]))
    if intake.ranks.rank:
        intake.helps(folder, identity)
        return read_manifest(folder)
    with Update(folder) as update:
        old = _standing(update)
        if old != before:
            raise ConfigError(f"{folder} was changed while its model was loaded; add again")
        parts, skipped = intake.take(folder, identity, progress=progress)
        _check_new(parts)
        keys = pa.chunked_array([chunk for part in parts for chunk in part.rows.column("key").chunks])
        segments, entries = _opened(folder, old)
        taken = [segment.find(keys) for segment in segments]
        if any(map(len, taken)) and not replace:
            count = sum(map(len, taken))
            first = next(s.keys[int(rows[0])] for s, rows in zip(segments, taken, strict=True) if len(rows))
            raise ConfigError(
                f"{count} of the keys are in {folder} already, such as {str(first)!r}: replace them with --replace"
            )
        entries = _without(update, segments, entries, taken)
        if len(entries) > 1 and entries[-1]["type"] == FLAT and entries[-1]["rows"] < MERGED_BELOW:
            last = entries.pop()
            parts.insert(0, Segment(folder / last["folder"], last, old["dim"]).part())
        new = update.segment()
        entries.append(entry_of(new, write_parts(new, parts, old["dim"])))
        found = _commit(
            update,
            {
                **old,
                "sources": [*old["sources"], intake.entry],
                "skipped": [*old["skipped"], *(list(s) for s in skipped)][:SKIPPED_KEPT],
                "skipped_count": old.get("skipped_count", 0) + len(skipped),
                "libraries": libraries(),
            },
            entries,
        )
        intake.clean(folder)
    return found


def delete(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Delete samples by their keys; returns the manifest.

    All samples of a key are deleted, where shards have it several times.

    Raises:
        ConfigError: no index, a key that is not in it, or nothing would be left.
    """
    wanted = list(dict.fromkeys(keys))
    with Update(folder) as update:
        old = _standing(update)
        segments, entries = _opened(folder, old)
        gone: list[Ints] = []
        missing = set(wanted)
        for segment in segments:
            gone.append(segment.find(pa.array(wanted, pa.string())))
            missing -= set(segment.keys.take(pa.array(gone[-1])).to_pylist())
        if missing:
            first = next(key for key in wanted if key in missing)
            known = segments[0].keys.slice(0, 10_000).to_pylist()
            raise ConfigError(
                f"{len(missing)} of the keys are not in {folder}, such as {first!r}{suggest(first, known)}"
            )
        if sum(map(len, gone)) == old["count"]:
            raise ConfigError(f"nothing would be left of {folder}; remove the folder instead")
        return _commit(update, old, _without(update, segments, entries, gone))


def compact(folder: Path, *, asked: Asked | None = None, progress: bool = False) -> dict[str, Any]:
    """Write what is not deleted as one segment, with a structure chosen and measured anew; returns the manifest.

    Args:
        folder: of the index.
        asked: what is wanted of the structure; by default what was asked for when the index was built.
        progress: show bars on standard error.

    Raises:
        ConfigError: no index, or files that have changed.
    """
    with Update(folder) as update:
        old = _standing(update)
        segments, _ = _opened(folder, old)
        queries = stored_queries(folder, old)
        return write_base(
            update, [s.part() for s in segments], old, asked or Asked(**old["asked"]), queries, progress=progress
        )


def merge(folders: Sequence[Path], out: Path, *, asked: Asked | None = None, progress: bool = False) -> dict[str, Any]:
    """Make one index of several of the same space; returns its manifest.

    Args:
        folders: of the indices; they stay as they are.
        out: the new one.
        asked: what is wanted of the structure; by default what was asked for the first one.
        progress: show bars on standard error.

    Raises:
        ConfigError: fewer than two, different spaces, a key that is in two of them, or `out` exists.
    """
    if len(folders) < 2:
        raise ConfigError(f"merge takes two indices or more, got {len(folders)}")
    if (out / MANIFEST).exists():
        raise ConfigError(f"{out} exists; choose another folder")
    manifests = [read_manifest(folder) for folder in folders]
    parts: list[Part] = []
    sources: list[Any] = []
    queries: list[Queries] = []
    seen = pa.chunked_array([], pa.string())
    for folder, manifest in zip(folders, manifests, strict=True):
        check_same(manifests[0], manifest, str(folders[0]), str(folder))
        try:
            segments, _ = _opened(folder, manifest)
        except FileNotFoundError as error:
            raise ConfigError(f"{folder} was changed while it was read ({error}); merge again") from None
        for segment in segments:
            part = segment.part()
            rows = part.rows
            shifted = pc.call_function("add", [rows.column("source"), pa.scalar(len(sources), pa.int32())])
            rows = rows.set_column(rows.column_names.index("source"), "source", shifted)
            parts.append(Part(part.vectors, rows, part.keep))
        for segment in segments:
            if len(rows := segment.find(seen)):
                key = segment.keys[int(rows[0])].as_py()
                raise ConfigError(f"the key {key!r} is in {folder} and in another index; delete it from one of them")
        keys = [chunk for part in parts[-len(segments) :] for chunk in part.table().column("key").chunks]
        seen = pa.chunked_array([*seen.chunks, *keys], pa.string())
        sources += manifest["sources"]
        found = stored_queries(folder, manifest)
        queries += [found] if found else []
    together = (
        Queries(np.concatenate([q.z for q in queries]), " and ".join(dict.fromkeys(q.origin for q in queries)))
        if queries
        else None
    )
    first = manifests[0]
    about = {
        **first,
        "sources": sources,
        "skipped": [s for m in manifests for s in m["skipped"]][:SKIPPED_KEPT],
        "skipped_count": sum(m.get("skipped_count", 0) for m in manifests),
    }
    with Update(out, create=True) as update:
        return write_base(update, parts, about, asked or Asked(**first["asked"]), together, progress=progress)


def _standing(update: Update) -> dict[str, Any]:
    assert update.manifest is not None  # or the update could not have begun
    return update.manifest


def _opened(folder: Path, manifest: Mapping[str, Any]) -> tuple[list[Segment], list[dict[str, Any]]]:
    """The segments of an index and their entries, verified."""
    verify(folder, manifest)
    entries = [dict(entry) for entry in manifest["segments"]]
    return [Segment(folder / entry["folder"], entry, manifest["dim"]) for entry in entries], entries


def _without(
    update: Update, segments: Sequence[Segment], entries: Sequence[dict[str, Any]], gone: Sequence[Ints]
) -> list[dict[str, Any]]:
    """Entries whose segments have more rows deleted; segments of which nothing is left fall away."""
    found: list[dict[str, Any]] = []
    for segment, entry, rows in zip(segments, entries, gone, strict=True):
        deleted = np.union1d(segment.deleted, rows)
        if len(deleted) == len(segment):
            continue
        files = {
            name: facts for name, facts in entry["files"].items() if not (len(rows) and name.startswith("deleted"))
        }
        if len(rows):
            files[write_deleted(segment.folder, update.generation, deleted)] = None
        found.append({**entry, "files": files})
    return found


def _commit(update: Update, manifest: Mapping[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put changed segments in place, and count what they hold."""
    segments = [Segment(update.folder / entry["folder"], entry, manifest["dim"]) for entry in entries]
    deleted = sum(len(segment.deleted) for segment in segments)
    count = sum(map(len, segments)) - deleted
    return update.commit({**manifest, "count": count, "deleted": deleted, "segments": list(entries)})


def _check_new(parts: Sequence[Part]) -> None:
    """Refuse additions that have a key twice: which one would count?"""
    counted = Counter(key for part in parts for key in part.rows.column("key").to_pylist())
    key, times = counted.most_common(1)[0]
    if times > 1:
        raise ConfigError(f"the key {key!r} comes {times} times in what is added; give each sample a key of its own")
