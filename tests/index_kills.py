"""Writers of an index that are killed before each of their changes to the disk, one after the other.

    python -m tests.index_kills FOLDER

FOLDER holds a run, `shards` and `more` (further samples). For each operation a process is forked that dies, as if by
SIGKILL, before its n-th change to the index folder, for n = 1, 2, … until one gets through. After each death the index
must be whole, old or new, and the operation done again must give the new one and leave nothing else behind. Prints,
per operation, how often it was which. Nothing runs on threads here, so that forking is safe.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcontrast.eval.index import add, build_index, compact, delete, merge
from mmcontrast.eval.index.build import Asked
from mmcontrast.eval.index.segment import Segment
from mmcontrast.eval.index.store import read_manifest, verify

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
Content = tuple[tuple[str, bytes], ...]


def content(folder: Path) -> Content | None:
    """Key and vector of every sample of a whole index, in order of the keys; None where there is none yet."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_manifest(folder)
    verify(folder, manifest)
    found: list[tuple[str, bytes]] = []
    for entry in manifest["segments"]:
        segment = Segment(folder / entry["folder"], entry, manifest["dim"])
        live = range(len(segment)) if segment.live is None else segment.live.nonzero()[0]
        found += [(segment.keys[int(i)].as_py(), segment.vectors[i].tobytes()) for i in live]
    assert len(found) == manifest["count"]
    return tuple(sorted(found))


def names(folder: Path) -> list[str]:
    """Files and folders of an index."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def killed(operation: Callable[[], object], folder: Path, stage: int) -> bool:
    """Run an operation in a fork that dies before its n-th change below a folder; whether it died."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), f"the operation failed by itself: {code}"
        return code == 9
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or written:
            paths = [a for a in arguments if isinstance(a, str)] + [str(a) for a in arguments if isinstance(a, Path)]
            if any(p.startswith(str(folder)) for p in paths):
                seen += 1
                if seen == stage:
                    os._exit(9)

    sys.addaudithook(watch)
    try:
        operation()
    except BaseException as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def try_all(make: Callable[[Path], object], operation: Callable[[Path], object], at: Path) -> dict[str, int]:
    """Kill an operation at each stage; counts of old and new indices, and of stages."""
    start, done = at.with_name("start"), at.with_name("done")
    make(start)
    shutil.copytree(start, done) if start.exists() else None
    operation(done)
    old, new = content(start), content(done)
    assert old != new or names(start) != names(done), "the operation changes nothing, so nothing is tested"
    counts = {"old": 0, "new": 0, "stages": 0}
    alive = False
    while not alive:
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(start, at) if start.exists() else None
        counts["stages"] += 1
        alive = not killed(lambda: operation(at), at, counts["stages"])
        found, changed = content(at), read_manifest(at)["generation"] if content(at) else 0
        assert found in (old, new), f"stage {counts['stages']}: neither the old index nor the new one"
        counts["old" if changed == (read_manifest(start)["generation"] if old else 0) else "new"] += 1
        if found == old and old != new and counts["stages"] % 4 == 0:
            operation(at)
            assert content(at) == new, f"stage {counts['stages']}: done again, it is not what it should be"
            assert names(at) == names(done), f"stage {counts['stages']}: something half-made was left behind"
    assert names(at) == names(done), "what got through after all is not what it should be"
    shutil.rmtree(start, ignore_errors=True)
    shutil.rmtree(done)
    shutil.rmtree(at)
    return counts


def main(folder: Path) -> None:
    """All operations."""
    run, shards, more, at = folder / "run", str(folder / "shards"), str(folder / "more"), folder / "at"

    def base(out: Path) -> None:
        build_index(run, [shards], out)

    def larger(out: Path) -> None:
        base(out)
        add(out, [more])
        delete(out, ["000003", "000100"])

    def merged(out: Path) -> None:
        merge([folder / "one", folder / "two"], out)

    build_index(run, [shards], folder / "one")
    build_index(run, [more], folder / "two")
    found = {
        "build": try_all(lambda out: None, base, at),
        "overwrite": try_all(base, lambda out: build_index(run, [more], out, overwrite=True), at),
        "add": try_all(larger, lambda out: add(out, [more], replace=True), at),
        "delete": try_all(larger, lambda out: delete(out, ["000004", "000101"]), at),
        "compact": try_all(larger, lambda out: compact(out, asked=Asked("HNSW8")), at),
        "merge": try_all(lambda out: None, merged, at),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
