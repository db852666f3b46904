"""The cache of remote shards: bounded, shared by processes, and filled before it is asked."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.data.ahead import Ahead
from mmcontrast.remote import Address
from mmcontrast.shard_cache import BYTES_VARIABLE, FOLDER_VARIABLE, Cache
from mmcontrast.shards import open_shards
from tests.web import (
    QUICK,
    Length,
    Site,
    cut,
    everything,
    late,
    status,
    times,
    written,
)


def test_data_sets_of_one_base_name_do_not_mix(tmp_path: Path, site: Site, cache: Cache) -> None:
    """Equal in length too, and once on one path and with other queries."""
    sets = {at: site.put(written(tmp_path / at, mark=at), f"/{at}") for at in ("one", "two")}
    for _ in range(2):
        for at, address in sets.items():
            found = everything(open_shards([address], cache=cache))
            assert len(found) == 12 and all(f" {at}." in m["txt"].decode() for m in found.values())
    assert len(site.of("00000.tar")) == 2
    site.put(tmp_path / "two", "/one")  # another state under the old address
    found = everything(open_shards([sets["one"]], cache=cache))
    assert all(" two." in m["txt"].decode() for m in found.values())


def used(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.data")) + sum(p.stat().st_size for p in folder.glob("*.part"))


def test_the_cache_stays_within_its_limit(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 24, per_shard=2))])  # 12 shards
    address = site.put(tmp_path / "data")
    size = max(s.bytes for s in local.shards)
    small = replace(cache, limit=4 * size)
    remote = open_shards([address], cache=small)
    want = everything(local)
    for _ in range(3):
        for i in range(24):
            assert remote.read(i, "txt") == want[local.name(i)]["txt"]
            assert used(small.folder) <= small.limit
    assert len(site.of(".tar")) >= 24, "more shards than fit must have gone and come back"
    # The least recently used one goes: what is read in turn with others stays.
    before = len(site.of("00000.tar"))
    for shard in range(1, 12):
        for at in (0, shard):
            assert remote.read(2 * at, "txt") == want[local.name(2 * at)]["txt"]
    assert len(site.of("00000.tar")) <= before + 1
    with pytest.raises(ConfigError, match=rf"has \d+ bytes, the cache holds 1000; raise {BYTES_VARIABLE}"):
        open_shards([address], cache=replace(cache, limit=1000, folder=tmp_path / "tiny")).read(0, "txt")


@pytest.mark.parametrize("found", [False, True], ids=["brought", "found in the cache"])
def test_a_shard_that_is_read_stays(tmp_path: Path, site: Site, cache: Cache, found: bool) -> None:
    local = open_shards([str(written(tmp_path / "data", 24, per_shard=2))])
    address = site.put(tmp_path / "data")
    small = replace(cache, limit=3 * max(s.bytes for s in local.shards))
    if found:
        open_shards([address], cache=small).read(0, "txt")
    holder, other = open_shards([address], cache=small), open_shards([address], cache=small)
    assert holder.read(0, "txt") == local.read(0, "txt")
    first = cache.path(Address(f"{address}/00000.tar"), hashlib.sha256(site.files["/data/00000.tar"]).hexdigest())
    for i in range(2, 24):
        other.read(i, "txt")
        assert first.exists() and used(small.folder) <= small.limit
        assert holder.read(1, "txt") == local.read(1, "txt")
    assert len(site.of("00000.tar")) == 1
    del holder
    for i in range(2, 24):
        other.read(i, "txt")
    assert not first.exists(), "what nobody reads must make room"


def test_a_part_that_nobody_brings_any_more_makes_room(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 8, per_shard=2))])
    address = site.put(tmp_path / "data")
    small = replace(cache, limit=2 * max(s.bytes for s in local.shards) + 2000)
    path = "/data/00000.tar"
    site.faults[path] = [cut(site, path, 9000)] + [status(503)] * 2
    with pytest.raises(ConfigError):
        open_shards([address], cache=small).read(0, "txt")
    assert list(small.folder.glob("*.part"))
    remote = open_shards([address], cache=small)
    for i in range(2, 8):
        remote.read(i, "txt")
        assert used(small.folder) <= small.limit
    assert not list(small.folder.glob("*.part")) and not list(small.folder.glob("*.json"))


def test_a_file_that_another_hand_cut_is_brought_again(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 4))])
    address = site.put(tmp_path / "data")
    assert everything(open_shards([address], cache=cache)) == everything(local)
    for path in cache.folder.glob("*.data"):
        os.truncate(path, 100)
    assert everything(open_shards([address], cache=cache)) == everything(local)


def test_a_cache_that_cannot_be_is_named(
    tmp_path: Path, site: Site, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = site.put(written(tmp_path / "data", 4))
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=f"the cache {tmp_path}/file cannot hold .*{FOLDER_VARIABLE}"):
        open_shards([address]).read(0, "txt")
    for wrong in ("50GB", "-1", "0", "1.5", "²"):
        monkeypatch.setenv(BYTES_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{BYTES_VARIABLE} is '{re.escape(wrong)}'; give a number of bytes"):
            open_shards([address])
    monkeypatch.setenv(BYTES_VARIABLE, "123456789")
    assert Cache.from_environment() == Cache(tmp_path / "file", 123456789)
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.delenv(BYTES_VARIABLE)
    assert Cache.from_environment() == Cache(Path.home() / ".cache/mmcontrast/shards", 50_000_000_000)


def read_all(address: str, cache: Cache, gate: Any, answer: Any) -> None:
    gate.wait()
    shards = open_shards([address], cache=cache)
    answer.put([hashlib.sha256(shards.read(i, "txt")).hexdigest() for i in range(len(shards))])


def started(target: Any, *args: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


@pytest.mark.timeout(60)
def test_processes_that_want_one_shard_bring_it_once(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    for name in ("00000.tar", "00001.tar"):
        site.faults[f"/data/{name}"] = [late(0.2)]  # time enough to ask twice
    context = multiprocessing.get_context("fork")
    gate, answer = context.Barrier(3), context.SimpleQueue()
    patient = replace(cache, patience=replace(QUICK, timeout=5))
    processes = [started(read_all, address, patient, gate, answer) for _ in range(3)]
    want = [hashlib.sha256(local.read(i, "txt")).hexdigest() for i in range(12)]
    assert [answer.get() for _ in processes] == [want] * 3
    for process in processes:
        process.join(10)
    assert times(site, ".tar") == times(site, ".index.json") == {f"/data/{i:05d}": 1 for i in range(3)}


def test_who_waits_for_a_shard_has_it_while_the_one_that_brought_it_reads(
    tmp_path: Path, site: Site, cache: Cache
) -> None:
    address = Address(site.put(written(tmp_path / "data", 4)) + "/00000.tar")
    site.faults["/data/00000.tar"] = [late(0.3)]
    found: list[int] = []

    def read() -> None:
        found.append(replace(cache, patience=replace(QUICK, timeout=5)).open(address, "it"))

    threads = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 3, "one waits for the other to close what it reads"
    assert len({os.fstat(file).st_ino for file in found}) == 1 and times(site, ".tar") == {"/data/00000": 1}
    for file in found:
        os.close(file)


@pytest.mark.timeout(60)
def test_a_killed_process_leaves_its_part_to_the_next(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 4))])
    address = site.put(tmp_path / "data")
    path = "/data/00000.tar"
    arrived = threading.Event()

    def stuck(handler: Any) -> bool:
        data = site.files[path]
        handler.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()[:12]}"'}, cut=9000)
        handler.wfile.flush()
        while not [p for p in cache.folder.glob("*.part") if p.stat().st_size]:
            time.sleep(0.01)
        arrived.set()
        time.sleep(1)
        return True

    site.faults[path] = [stuck]
    context = multiprocessing.get_context("fork")
    patient = replace(cache, patience=replace(QUICK, timeout=30))
    victim = started(read_all, address, patient, context.Barrier(1), context.SimpleQueue())
    assert arrived.wait(20)
    victim.kill()
    victim.join(10)
    (part,) = cache.folder.glob("*.part")
    have = part.stat().st_size
    assert 0 < have <= 9000
    assert everything(open_shards([address], cache=cache)) == everything(local)
    assert [a.range for a in site.of("00000.tar")] == [None, f"bytes={have}-"]


# -------------------------------------------------------------------------------------------- ahead of time


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def tars_asked_for(site: Site) -> set[str]:
    return {a.path for a in site.of(".tar")}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_shards_come_while_the_first_are_read(tmp_path: Path, site: Site, cache: Cache, workers: int) -> None:
    address = site.put(written(tmp_path / "data", 24))  # 6 shards, 2 of them in each window
    stream = Stream.Config(shards=(address,), workers=workers, window=8).build(
        {"text": Length()}, seed=3, global_batch=4
    )
    order = stream.sources[0].order
    first, second, third = ({f"/data/{s:05d}.tar" for s in order.window_shards(0, turn)} for turn in (0, 8, 16))
    found = stream.batches(0, 6 if not workers else 2)
    next(found)
    wait_for(lambda: tars_asked_for(site) == first | second)
    if not workers:
        next(found)
        assert tars_asked_for(site) == first | second
        next(found)
        wait_for(lambda: tars_asked_for(site) == first | second | third)
    found.close()


def test_a_cache_without_room_for_two_windows_brings_one(tmp_path: Path, site: Site, cache: Cache) -> None:
    folder = written(tmp_path / "data", 24)
    sources = (
        Stream.Config(shards=(site.put(folder),), window=4).build({"text": Length()}, seed=3, global_batch=4).sources
    )
    shards = sources[0].shards
    first, second = (sources[0].order.window_shards(0, turn)[0] for turn in (0, 4))
    largest = max(shard.bytes for shard in shards.shards)
    for limit, want in ((3 * largest, {first}), (4 * largest + 1, {first, second})):
        site.asked.clear()
        shards.cache = replace(cache, limit=limit, folder=tmp_path / str(limit))
        for shard in shards.shards:
            object.__setattr__(shard.open, "cache", shards.cache)
        ahead = Ahead(sources, lanes=1)
        ahead.notice([(0, 0, 0), (0, 0, 1), (0, 0, 2)])
        wait_for(lambda want=want: tars_asked_for(site) >= {f"/data/{s:05d}.tar" for s in want})
        time.sleep(0.1)
        ahead.close()
        assert tars_asked_for(site) == {f"/data/{s:05d}.tar" for s in want}


def test_a_window_that_the_cache_cannot_hold_is_refused(
    tmp_path: Path, site: Site, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "data", 24)
    address = site.put(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    config = Stream.Config(shards=(address,), window=12)
    monkeypatch.setenv(BYTES_VARIABLE, str(size // 2))
    with pytest.raises(ConfigError, match=rf"draws from [\d.e-]+ GB of remote .* raise {BYTES_VARIABLE}, or lower"):
        config.build({"text": Length()}, seed=3, global_batch=4)
    monkeypatch.setenv(BYTES_VARIABLE, str(size))
    config.build({"text": Length()}, seed=3, global_batch=4)
