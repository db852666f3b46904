"""The living index: what comes, goes and is merged; crashes at every stage; readers during writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, add, build_index, compact, delete, merge, store
from mmcontrast.eval.index.build import Asked
from mmcontrast.shard_writer import Sample
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class World:
    """A run, 20 samples, 10 more, and an index of the first."""

    run: Path
    shards: str
    more: str
    index: Path
    pictures: dict[str, bytes]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("living")
    samples = tiny.samples(30)
    samples = samples[:20] + [Sample(f"{100 + i:06d}", s.members) for i, s in enumerate(samples[20:])]
    run = tiny.write_run(folder / "run")
    shards = tiny.write_shards(folder / "shards", samples[:20], per_shard=8)
    more = tiny.write_shards(folder / "more", samples[20:])
    build_index(run, [shards], folder / "index")
    pictures = {s.key: s.members["png"] for s in samples}
    return World(run, shards, more, folder / "index", pictures)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    shutil.copytree(template.index, tmp_path / "index")
    return World(template.run, template.shards, template.more, tmp_path / "index", template.pictures)


def _expected(world: World, keys: set[str], query: bytes) -> list[tuple[str, float]]:
    """Keys by falling cosine, one product at a time."""
    model = load(world.run)
    q = model.encode("image", [query])[0].tolist()
    scores = {k: sum(a * b for a, b in zip(q, _vector(model, world.pictures[k]), strict=True)) for k in keys}
    return sorted(scores.items(), key=lambda item: -item[1])


def _vector(model: Any, picture: bytes) -> list[float]:
    return model.encode("image", [picture])[0].tolist()


def _check(world: World, keys: set[str]) -> Index:
    """The index answers as an exact search over these samples does."""
    opened = Index(world.index)
    assert len(opened) == len(keys)
    for query in ("000002", "000105"):
        (hits,) = opened.search("image", [world.pictures[query]], top=100)
        want = _expected(world, keys, world.pictures[query])
        assert [h.key for h in hits] == [k for k, _ in want]
        assert [h.score for h in hits] == pytest.approx([s for _, s in want], abs=1e-5)
    return opened


FIRST = {f"{i:06d}" for i in range(20)}
MORE = {f"{100 + i:06d}" for i in range(10)}


def test_samples_come_and_go_by_their_keys(world: World) -> None:
    added = add(world.index, [world.more])
    assert (added["generation"], added["count"], len(added["segments"])) == (2, 30, 2)
    opened = _check(world, FIRST | MORE)
    (hits,) = opened.search("image", [world.pictures["000104"]], top=1)
    assert (hits[0].source, hits[0].position, hits[0].metadata["label"]) == (1, 4, "red")
    assert opened.member(hits[0], "image") == (world.pictures["000104"], "png")

    gone = delete(world.index, ["000002", "000104", "000104"])
    assert (gone["count"], gone["deleted"]) == (28, 2)
    left = (FIRST | MORE) - {"000002", "000104"}
    opened = _check(world, left)
    assert "000002" not in {h.key for h in opened.search("image", [world.pictures["000002"]], top=100)[0]}

    packed = compact(world.index)
    assert (packed["count"], packed["deleted"], len(packed["segments"])) == (28, 0, 1)
    assert packed["quality"]["queries_from"] == "texts of the samples"
    opened = _check(world, left)
    assert [h.source for h in opened.search("image", [world.pictures["000105"]], top=1)[0]] == [1]

    again = add(world.index, [world.more], replace=True)
    assert again["count"] == 29
    _check(world, left | MORE)


def test_a_key_that_is_there_is_replaced_only_when_asked(world: World) -> None:
    before = (world.index / "manifest.json").read_bytes()
    with pytest.raises(
        ConfigError, match="20 of the keys are in .* already, such as '000000': replace them with --repl"
    ):
        add(world.index, [world.shards])
    assert (world.index / "manifest.json").read_bytes() == before
    replaced = add(world.index, [world.shards], replace=True)
    assert (replaced["count"], replaced["deleted"], len(replaced["segments"])) == (20, 0, 1)
    _check(world, FIRST)


def test_small_additions_become_one_segment(world: World, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    for number in range(3):
        one = [Sample(f"new{number}", {"png": tiny.png("red", seed=number)})]
        found = add(world.index, [tiny.write_shards(tmp_path / f"s{number}", one)])
    assert [s["rows"] for s in found["segments"]] == [20, 3] and len(found["sources"]) == 4
    (hits,) = Index(world.index).search("image", [tiny.png("red", seed=1)], top=1)
    assert (hits[0].key, hits[0].source, hits[0].text) == ("new1", 2, None)


def test_indices_of_one_model_are_merged(world: World, tmp_path: Path) -> None:
    build_index(world.run, [world.more], tmp_path / "other")
    delete(tmp_path / "other", ["000101"])
    found = merge([world.index, tmp_path / "other"], tmp_path / "both")
    assert (found["count"], len(found["segments"]), found["quality"]["queries"]) == (29, 1, 30)
    opened = _check(World(world.run, "", "", tmp_path / "both", world.pictures), FIRST | MORE - {"000101"})
    (hits,) = opened.search("image", [world.pictures["000109"]], top=1)
    assert (hits[0].source, opened.member(hits[0], "image")) == (1, (world.pictures["000109"], "png"))
    with pytest.raises(ConfigError, match="the key '000000' is in .* and in another index"):
        merge([world.index, world.index], tmp_path / "twice")
    for folders, out, message in (
        ([world.index], tmp_path / "x", "merge takes two indices or more, got 1"),
        ([world.index, tmp_path / "other"], tmp_path / "both", "both exists; choose another folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(folders, out)


def test_another_space_is_neither_added_nor_merged(world: World, tmp_path: Path) -> None:
    other = tiny.write_run(tmp_path / "other_run", seed=1)
    build_index(other, [world.more], tmp_path / "other")
    build_index(world.run, [world.more], tmp_path / "texts", modality="text")
    for operation, message in (
        (lambda: add(world.index, [world.more], model=other), "was made with model_hash"),
        (lambda: merge([world.index, tmp_path / "other"], tmp_path / "out"), "was made with model_hash"),
        (
            lambda: merge([world.index, tmp_path / "texts"], tmp_path / "out"),
            "modality image, .* has text: their spaces",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            operation()
    assert not (tmp_path / "out").exists()
    _check(world, FIRST)


def test_what_cannot_be_deleted_is_said(world: World) -> None:
    before = (world.index / "manifest.json").read_bytes()
    for keys, message in (
        (["000001", "000O02"], "1 of the keys are not in .*, such as '000O02'; did you mean '0000"),
        (sorted(FIRST), "nothing would be left"),
    ):
        with pytest.raises(ConfigError, match=message):
            delete(world.index, keys)
    assert (world.index / "manifest.json").read_bytes() == before
    nowhere = world.index.parent / "nowhere"
    for operation in (lambda: delete(nowhere, ["a"]), lambda: compact(nowhere), lambda: add(nowhere, [world.more])):
        with pytest.raises(ConfigError, match="is not an index"):
            operation()


# ------------------------------------------------------------------------------------------------- crashes


def test_a_writer_killed_at_any_moment_leaves_the_old_index_or_the_new(template: World) -> None:
    """Before each change to the disk; see `index_kills`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.index_kills", str(template.run.parent)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 6
    for name, counts in found.items():
        assert counts["old"] >= 3 and counts["new"] >= 1 and counts["stages"] >= 8, f"{name}: {counts}"


def test_files_are_on_the_disk_before_the_manifest_names_them(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure keeps what was synced: every file, its folder, then the manifest, then its folder."""
    order: list[str] = []
    real_sync, real_replace = store.sync, Path.replace

    def sync(path: Path) -> None:
        order.append(f"sync {path.relative_to(world.index.parent)}")
        real_sync(path)

    def replace(path: Path, target: Path) -> Path:
        order.append(f"replace {target.relative_to(world.index.parent)}")
        return real_replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync", sync)
        patch.setattr(Path, "replace", replace)
        manifest = compact(world.index, asked=Asked("HNSW8"))
    switch = order.index("replace index/manifest.json")
    for name in manifest["segments"][0]["files"]:
        at = order.index(f"sync index/segment-000002/{name}")
        assert at < order.index("sync index/segment-000002") < switch
    assert "index.faiss" in manifest["segments"][0]["files"]
    assert order.index("sync index/manifest.json.tmp") < switch < len(order) - 1 - order[::-1].index("sync index")


def test_two_writers_do_not_meet(world: World) -> None:
    with store.Update(world.index), pytest.raises(ConfigError, match="another process is writing to .*; wait"):
        delete(world.index, ["000001"])
    delete(world.index, ["000001"])


def test_what_fails_leaves_nothing_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("faiss.write_index", full)
        compact(world.index, asked=Asked("HNSW8"))
    assert {p.name for p in world.index.iterdir()} == {"manifest.json", "lock", "segment-000001"}
    _check(world, FIRST)


# ------------------------------------------------------------------------------------------------- readers


def test_a_reader_goes_on_and_refreshes_when_it_likes(world: World) -> None:
    reader = Index(world.index)
    before = reader.search("text", ["red"], top=50)
    add(world.index, [world.more])
    delete(world.index, ["000000"])
    compact(world.index)
    assert not (world.index / "segment-000001").exists()
    assert reader.search("text", ["red"], top=50) == before and len(before[0]) == 20
    assert reader.refresh() and not reader.refresh()
    after = reader.search("text", ["red"], top=50)
    assert {h.key for h in after[0]} == (FIRST | MORE) - {"000000"}
    assert after == Index(world.index).search("text", ["red"], top=50)


def test_a_reader_is_not_refreshed_into_another_space(world: World, tmp_path: Path) -> None:
    reader = Index(world.index)
    build_index(tiny.write_run(tmp_path / "run", seed=1), [world.more], world.index, overwrite=True)
    with pytest.raises(ConfigError, match="made with model_hash .* what was opened has"):
        reader.refresh()


def test_readers_open_whole_indices_while_one_writes(world: World) -> None:
    """Every opening sees one of the generations, and never a mixture or an error."""
    seen: list[tuple[int, frozenset[str]]] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                opened = Index(world.index)
                (hits,) = opened.search("image", [world.pictures["000002"]], top=100)
                seen.append((opened.manifest["generation"], frozenset(h.key for h in hits)))
        except BaseException as error:
            errors.append(error)

    written: dict[int, frozenset[str]] = {1: frozenset(FIRST)}
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    keys: set[str] = set(FIRST)
    steps: list[Callable[[], tuple[dict[str, Any], set[str]]]] = [
        lambda: (delete(world.index, ["000005"]), keys - {"000005"}),
        lambda: (add(world.index, [world.more]), keys | MORE),
        lambda: (compact(world.index), keys),
        lambda: (delete(world.index, sorted(MORE)), keys - MORE),
    ]
    for _ in range(4):
        for step in steps:
            manifest, keys = step()
            written[manifest["generation"]] = frozenset(keys)
        manifest = add(world.index, [world.shards], replace=True)
        keys |= FIRST
        written[manifest["generation"]] = frozenset(keys)
    done.set()
    for reader in readers:
        reader.join()
    assert not errors, errors[0]
    assert len({generation for generation, _ in seen}) > 3
    for generation, found in seen:
        assert found == written[generation]


# ------------------------------------------------------------------------------------------------- the mask


def test_deleted_rows_are_avoided_by_every_structure(tmp_path: Path) -> None:
    from mmcontrast.eval.index import segment as module
    from mmcontrast.eval.index.structure import write_structure
    from mmcontrast.eval.index.vectors import nearest

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 32))
    v = (centres[rng.integers(0, 40, 3000)] + 0.5 * rng.standard_normal((3000, 32))).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    q = np.ascontiguousarray(v[:50] + 0.05)
    deleted = np.flatnonzero(rng.random(3000) < 0.7)
    allowed = rng.random(3000) < 0.5
    wanted, right = nearest(
        q, 10, [(np.setdiff1d(np.flatnonzero(allowed), deleted), v[np.setdiff1d(np.flatnonzero(allowed), deleted)])]
    )
    rows = module.metadata.table_of(
        {
            "key": [str(i) for i in range(3000)],
            "shard": ["s"] * 3000,
            "source": [0] * 3000,
            "position": [*range(3000)],
            "text": [None] * 3000,
        },
        [{}] * 3000,
    )
    for number, kind in enumerate(
        ("Flat", "HNSW16", "IVF16,Flat", "IVF16,SQ8", "OPQ16,IVF16,PQ16x4fs", "SQ8", "HNSW16,SQ8")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        module.write_parts(folder, [module.Part(v, rows)], 32)
        if kind != "Flat":
            write_structure(folder, kind)
        entry = module.entry_of(folder, 3000, kind=kind, effort=module.Effort(16, 1 if "Flat" in kind else 8))
        entry["files"][module.write_deleted(folder, 2, deleted)] = None
        segment = module.Segment(folder, entry, 32)
        for below in (0, 20_000):  # by the structure, and exactly
            module.EXACT_BELOW, kept = below, module.EXACT_BELOW
            try:
                scores, found = segment.search(q, 10, allowed)
                every = segment.search(q[:1], 3000, allowed)[1][0]
            finally:
                module.EXACT_BELOW = kept
            assert allowed[found].all() and not np.isin(found, deleted).any(), kind
            assert (found == right).mean() > (0.95 if below == 0 else 0.999), kind
            np.testing.assert_allclose(
                scores[found == right], wanted[found == right], atol=2e-2 if below == 0 else 1e-6
            )
            left = np.setdiff1d(np.flatnonzero(allowed), deleted)
            assert set(every[: len(left)].tolist()) == set(left.tolist()) and (every[len(left) :] == -1).all(), kind
