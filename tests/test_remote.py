"""Remote shards: whatever the network does, the samples are those of the local set, or an error says what happened.

A real server on this machine's loopback serves them, and misbehaves as it is told.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data_prep import index as prep_index
from mmcontrast.manifest import MANIFEST, find_shards
from mmcontrast.remote import Address, Patience
from mmcontrast.shard_cache import Cache
from mmcontrast.shards import ShardSet, open_shards
from tests.web import (
    QUICK,
    Site,
    cut,
    everything,
    instead,
    keys_of,
    late,
    status,
    times,
    written,
)

# -------------------------------------------------------------------------------------------- the same as the local set


def test_remote_samples_are_those_of_the_local_set(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    for pattern in (address, address + "/", address + "/{00000..00002}.tar"):
        remote = open_shards([pattern], cache=cache)
        assert remote.fingerprint == local.fingerprint and remote.counts == local.counts and len(remote) == 12
        assert [s.samples for s in remote.shards] == [4, 4, 4]
    assert {a.path for a in site.asked} == {f"/data/{MANIFEST}"}, "opening a set may read its manifest and no more"
    assert everything(remote) == everything(local)
    assert times(site, ".tar") == times(site, ".index.json") == {f"/data/{i:05d}": 1 for i in range(3)}
    assert str(remote.shards[1].path) == f"{address}/00001.tar" and remote.name(5) == ("00001.tar", "000005")

    asked = len(site.asked)
    again = open_shards([address], cache=cache)
    assert everything(again, [11, 0, 7, 3]) == everything(local, [11, 0, 7, 3])
    assert [a.path for a in site.asked[asked:]] == [f"/data/{MANIFEST}"], "what is in the cache is not asked for again"
    part = open_shards([f"{address}/00001.tar"], cache=cache)
    assert everything(part) == everything(local, range(4, 8))


def test_a_set_travels_to_another_process(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    remote = open_shards([site.put(tmp_path / "data")], cache=cache)
    assert remote.read(0, "txt") == local.read(0, "txt")
    moved: ShardSet = pickle.loads(pickle.dumps(remote))
    assert everything(moved) == everything(local)


def test_damage_and_a_manifest_without_checksums_of_indices_come_along(
    tmp_path: Path, site: Site, cache: Cache
) -> None:
    path = written(tmp_path / "data") / "00001.tar"
    path.write_bytes(path.read_bytes()[:-12_000])
    prep_index.prepare(tmp_path / "data", overwrite=True)
    local = open_shards([str(tmp_path / "data")])
    address = site.put(tmp_path / "data")
    manifest = json.loads(site.files[f"/data/{MANIFEST}"])
    for entry in manifest["shards"]:
        del entry["index"]
    site.files[f"/data/{MANIFEST}"] = json.dumps(manifest).encode()
    remote = open_shards([address], cache=cache)
    assert everything(remote) == everything(local) and 8 < len(remote) < 12
    assert list(remote.damage.values()) == list(local.damage.values()) and list(remote.damage) == [
        f"{address}/00001.tar"
    ]


def test_names_and_queries_go_through_an_address(tmp_path: Path, site: Site, cache: Cache) -> None:
    folder = written(tmp_path / "data", 4)
    for old in ("00000.tar", "00000.index.json"):
        (folder / old).rename(folder / f"a b#%é{old[5:]}")
    prep_index.prepare(folder, overwrite=True)
    site.put(folder)
    site.files = {path.replace("a b#%é", "a%20b%23%25%C3%A9"): data for path, data in site.files.items()}
    shards = open_shards([f"{site.url}/data?token=secret"], cache=cache)
    assert everything(shards) == everything(open_shards([str(folder)]))
    assert shards.name(0)[0] == "a b#%é.tar" and all(a.path.endswith("?token=secret") for a in site.asked)
    assert len(open_shards([f"{site.url}/data/a b%23%25é.tar?token=secret"], cache=cache)) == 4, "as a person types it"
    del site.files["/data/a%20b%23%25%C3%A9.tar"]
    shutil.rmtree(cache.folder)
    with pytest.raises(ConfigError, match="HTTP 404") as caught:
        open_shards([f"{site.url}/data?token=secret"], cache=cache).read(0, "txt")
    assert "secret" not in str(caught.value), "what lets one in must not reach a log"


# -------------------------------------------------------------------------------------------- transfers that fail


def test_a_dropped_transfer_goes_on_where_it_stopped(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    path = "/data/00001.tar"
    size = len(site.files[path])
    site.faults[path] = [cut(site, path, 9000), cut(site, path, 5000)]
    remote = open_shards([address], cache=cache)
    assert remote.read(4, "txt") == local.read(4, "txt")
    tag = f'"{hashlib.sha256(site.files[path]).hexdigest()[:12]}"'
    assert [(a.range, a.if_range, a.status) for a in site.of("00001.tar")] == [
        (None, None, 200),
        ("bytes=9000-", tag, 206),
        ("bytes=14000-", tag, 206),
    ]
    assert size > 14000 and everything(remote) == everything(local)


def test_a_part_that_an_earlier_run_left_is_gone_on_with(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    path = "/data/00000.tar"
    site.faults[path] = [cut(site, path, 7000)] + [status(503)] * 2
    with pytest.raises(ConfigError) as caught:
        open_shards([address], cache=cache).read(0, "txt")
    text = str(caught.value)
    assert f"{address}/00000.tar" in text and "after 3 attempts: HTTP 503" in text and "start again" in text
    assert [p.stat().st_size for p in cache.folder.glob("*.part")] == [7000]
    assert open_shards([address], cache=cache).read(0, "txt") == local.read(0, "txt")
    assert [a.range for a in site.of("00000.tar")] == [None, "bytes=7000-", "bytes=7000-", "bytes=7000-"]
    assert not [p for p in cache.folder.iterdir() if p.suffix in (".part", ".json")]


@pytest.mark.parametrize("case", ["no validators", "no ranges", "changed"])
def test_what_cannot_be_gone_on_with_starts_anew(tmp_path: Path, site: Site, cache: Cache, case: str) -> None:
    """Half of one state and half of another would be a shard that nobody wrote."""
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    path = "/data/00000.tar"
    site.validators, site.ranges = case != "no validators", case != "no ranges"
    other = bytes(len(site.files[path]))
    site.faults[path] = [instead(other, cut=9000) if case == "changed" else cut(site, path, 9000)]
    assert everything(open_shards([address], cache=cache)) == everything(local)
    asked = site.of("00000.tar")
    assert [a.status for a in asked] == [200, 200]
    assert asked[1].range == (None if case == "no validators" else "bytes=9000-")


def test_failures_that_pass_are_waited_for(
    tmp_path: Path, site: Site, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("mmcontrast.remote.time.sleep", pauses.append)
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    cache = replace(cache, patience=Patience(attempts=8, timeout=0.5, pause=0.5))
    site.faults["/data/00000.tar"] = [
        status(500),
        status(503, Retry_After="7"),
        status(429, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"),
        status(503, Retry_After="99999"),
        status(502),
    ]
    site.faults[f"/data/{MANIFEST}"] = [status(503)]
    state = torch.get_rng_state()
    assert everything(open_shards([address], cache=cache)) == everything(local)
    assert torch.equal(torch.get_rng_state(), state)
    bounds = [(0.25, 0.5), (0.25, 0.5), (7, 7), (1, 2), (300, 300), (4, 8)]
    assert len(pauses) == len(bounds)
    assert all(low <= pause <= high for pause, (low, high) in zip(pauses, bounds, strict=True)), pauses
    assert capsys.readouterr().err.count("trying again") == 6


def test_a_silent_server_is_not_waited_for_without_end(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 4))])
    address = site.put(tmp_path / "data")
    cache = replace(cache, patience=replace(QUICK, timeout=0.1))
    site.faults["/data/00000.tar"] = [late(0.4)]
    assert everything(open_shards([address], cache=cache)) == everything(local)
    shutil.rmtree(cache.folder)
    site.faults["/data/00000.tar"] = [late(0.4)] * 3
    with pytest.raises(ConfigError, match="00000.tar cannot be read after 3 attempts: TimeoutError"):
        open_shards([address], cache=cache).read(0, "txt")


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 501])
def test_failures_that_do_not_pass_are_told_at_once(tmp_path: Path, site: Site, cache: Cache, code: int) -> None:
    address = site.put(written(tmp_path / "data", 4))
    site.faults["/data/00000.tar"] = [status(code)] * 9
    with pytest.raises(ConfigError, match=rf"{address}/00000.tar cannot be read: HTTP {code} .*address"):
        open_shards([address], cache=cache).read(0, "txt")
    assert len(site.of("00000.tar")) == 1


def test_a_part_that_nobody_asked_for_is_no_answer(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data", 4))])
    address = site.put(tmp_path / "data")
    path = "/data/00000.tar"

    def wrong(handler: Any) -> bool:
        handler.answer(206, site.files[path][512:], {"Content-Range": f"bytes 512-{len(site.files[path]) - 1}/99999"})
        return True

    site.faults[path] = [wrong]
    assert everything(open_shards([address], cache=cache)) == everything(local)
    shutil.rmtree(cache.folder)
    site.faults[path] = [wrong] * 3
    with pytest.raises(ConfigError, match="after 3 attempts: the server sends the file from 512 on"):
        open_shards([address], cache=cache).read(0, "txt")


@pytest.mark.parametrize("url", ["http://[::1/00000.tar", "http:///00000.tar", "http://127.0.0.1:port/00000.tar"])
def test_what_is_no_address_is_told(cache: Cache, url: str) -> None:
    with pytest.raises(ConfigError, match=r"\.tar|manifest.json"):
        open_shards([url], cache=cache)


def test_nobody_there_is_told(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"127.0.0.1:9/manifest.json cannot be read after 3 attempts: .*errno 111"):
        open_shards(["http://127.0.0.1:9/{0..3}.tar"], cache=cache)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/data/elsewhere.tar"])
def test_redirects_stay_on_the_web(tmp_path: Path, site: Site, cache: Cache, target: str) -> None:
    local = open_shards([str(written(tmp_path / "data", 4))])
    address = site.put(tmp_path / "data")
    site.files["/data/elsewhere.tar"] = site.files["/data/00000.tar"]
    site.faults["/data/00000.tar"] = [status(302, Location=target)]
    remote = open_shards([address], cache=cache)
    if target.startswith("/"):
        assert everything(remote) == everything(local)
    else:
        with pytest.raises(ConfigError, match="HTTP 302"):
            remote.read(0, "txt")
        assert not list(cache.folder.glob("*.data"))[1:]


def test_a_redirect_into_the_clear_is_refused() -> None:
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request

    from mmcontrast.remote import _opener  # pyright: ignore[reportPrivateUsage]

    (handler,) = [h for h in _opener().handlers if isinstance(h, HTTPRedirectHandler)]

    def follow(old: str, new: str) -> Any:
        redirect: Any = handler.redirect_request
        return redirect(Request(old), None, 302, "Found", {}, new)

    assert follow("https://a.org/x", "https://b.org/y").full_url == "https://b.org/y"
    assert follow("http://a.org/x", "https://a.org/x").full_url == "https://a.org/x"
    for target in ("http://a.org/x", "ftp://a.org/x"):
        with pytest.raises(HTTPError, match="not followed"):
            follow("https://a.org/x", target)
    assert not {"file", "ftp", "data"} & set(_opener().handle_open), "urllib's usual opener has handlers for these"


def test_a_corrupted_body_is_brought_again_and_then_refused(tmp_path: Path, site: Site, cache: Cache) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    address = site.put(tmp_path / "data")
    path = "/data/00001.tar"
    broken = bytearray(site.files[path])
    broken[600] ^= 1
    site.faults[path] = [instead(bytes(broken))]
    remote = open_shards([address], cache=cache)
    assert everything(remote) == everything(local) and len(site.of("00001.tar")) == 2

    shutil.rmtree(cache.folder)
    site.files[path] = bytes(broken)
    with pytest.raises(ConfigError, match=r"00001.tar has the SHA-256 .* its manifest says .* after 2 downloads"):
        everything(open_shards([address], cache=cache))
    assert len(site.of("00001.tar")) == 4


@pytest.mark.parametrize("case", ["shorter", "longer", "says less", "says more"])
def test_a_body_of_another_length_is_refused(tmp_path: Path, site: Site, cache: Cache, case: str) -> None:
    address = site.put(written(tmp_path / "data", 4))
    path = "/data/00000.tar"
    whole = site.files[path]
    wrong = {
        "shorter": instead(whole[:-100]),
        "longer": instead(whole + bytes(100)),
        "says less": instead(whole, length=len(whole) - 100),
        "says more": instead(whole, length=len(whole) + 100),
    }
    site.faults[path] = [wrong[case]]
    assert open_shards([address], cache=cache).read(0, "json") == b'{"number": 0}'
    shutil.rmtree(cache.folder)
    site.faults[path] = [wrong[case]] * 2
    with pytest.raises(ConfigError, match=r"00000.tar has \d+ bytes, its manifest says \d+"):
        open_shards([address], cache=cache).read(0, "json")


def test_a_body_without_a_length_is_whole_only_if_the_manifest_says_so(
    tmp_path: Path, site: Site, cache: Cache
) -> None:
    address = site.put(written(tmp_path / "data", 4))
    path = "/data/00000.tar"

    def unsized(cut: int | None) -> Callable[[Any], bool]:
        def fault(handler: Any) -> bool:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(site.files[path][:cut])
            return True

        return fault

    site.faults[path] = [unsized(5000), unsized(None)]
    assert open_shards([address], cache=cache).read(0, "json") == b'{"number": 0}'
    site.faults[path] = [unsized(None)]
    with pytest.raises(ConfigError, match="does not say how long it is"):
        cache.open(Address(f"{address}/00000.tar"), "anything")


# -------------------------------------------------------------------------------------------- indexing from afar


def test_shards_without_a_manifest_are_indexed_into_a_folder_here(
    tmp_path: Path, site: Site, cache: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    local = open_shards([str(written(tmp_path / "data"))])
    want = everything(local)
    for path in [*(tmp_path / "data").glob("*.json")]:
        if path.name != MANIFEST:
            path.unlink()
    address = site.put(tmp_path / "data", "/foreign")
    del site.files[f"/foreign/{MANIFEST}"]
    pattern = address + "/{00000..00002}.tar"
    with pytest.raises(ConfigError, match="`mmcontrast prep index PATTERN --out FOLDER`"):
        open_shards([pattern], cache=cache)
    with pytest.raises(ConfigError, match="cannot be listed over HTTP; give a range"):
        open_shards([address], cache=cache)
    assert not site.of(".tar"), "nothing is brought without being asked for"

    here = tmp_path / "here"
    with pytest.raises(SystemExit) as ended:
        main(["prep", "index", pattern])
    assert ended.value.code != 0 and "--out FOLDER" in capsys.readouterr().err
    main(["prep", "index", pattern, "--out", str(here)])
    assert "3 shards, 12 samples; left out 0" in capsys.readouterr().err
    shards = open_shards([str(here)], cache=cache)
    assert shards.fingerprint == local.fingerprint and everything(shards) == want
    assert times(site, ".tar") == {f"/foreign/{i:05d}": 1 for i in range(3)}, "the cache keeps what was indexed"
    shutil.rmtree(cache.folder)
    assert everything(open_shards([str(here)], cache=cache)) == want
    halves = [str(tmp_path / name) for name in ("first", "rest")]
    for half, numbers in zip(halves, ("{00000..00000}", "{00001..00002}"), strict=True):
        prep_index.prepare(f"{address}/{numbers}.tar", out=Path(half))
    assert everything(open_shards(halves, cache=cache)) == want
    with pytest.raises(ConfigError, match="--overwrite"):
        prep_index.prepare(pattern, out=here)
    assert prep_index.prepare(pattern, out=here, overwrite=True)["samples"] == 12
    for folder, out in ((str(tmp_path / "data"), here), (pattern, tmp_path / "data")):
        with pytest.raises(ConfigError, match="leave --out away|shards of its own"):
            prep_index.prepare(folder, out=out, overwrite=True)
    assert len(list((tmp_path / "data").glob("*.tar"))) == 3


def test_a_remote_manifest_may_not_send_us_to_a_third_place(tmp_path: Path, site: Site, cache: Cache) -> None:
    address = site.put(written(tmp_path / "data", 4))
    manifest = json.loads(site.files[f"/data/{MANIFEST}"])
    for changed in (
        manifest | {"root": "http://169.254.169.254/"},
        manifest | {"shards": [manifest["shards"][0] | {"name": "../other/00000.tar"}]},
    ):
        site.files[f"/data/{MANIFEST}"] = json.dumps(changed).encode()
        with pytest.raises(ConfigError, match="is not a manifest of shards"):
            open_shards([address], cache=cache)
    assert {a.path for a in site.asked} == {f"/data/{MANIFEST}"}


# -------------------------------------------------------------------------------------------- other stores


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    files: Any = fsspec.filesystem("memory")
    for path in written(tmp_path / "data").iterdir():
        files.pipe_file(f"/bucket/train/{path.name}", path.read_bytes())
    yield "memory://bucket/train"
    files.rm("/bucket", recursive=True)


def test_a_store_is_read_through_fsspec(tmp_path: Path, memory: str, cache: Cache) -> None:
    local = open_shards([str(tmp_path / "data")])
    for pattern in (memory, memory + "/", memory + "/*.tar", memory + "/{00000..00002}.tar"):
        remote = open_shards([pattern], cache=cache)
        assert remote.fingerprint == local.fingerprint and everything(remote) == everything(local), pattern
    files: Any = fsspec.filesystem("memory")
    files.rm("/bucket/train/manifest.json")
    names = [str(p) for p in find_shards([memory])]
    assert [name.rpartition("/")[2] for name in names] == ["00000.tar", "00001.tar", "00002.tar"]
    prep_index.prepare(memory, out=tmp_path / "here")
    shutil.rmtree(cache.folder)
    assert everything(open_shards([str(tmp_path / "here")], cache=cache)) == everything(local)
    with pytest.raises(ConfigError, match="no shards match"):
        open_shards(["memory://bucket/none/*.tar"], cache=cache)
    with pytest.raises(ConfigError, match="bucket/train/00000.tar cannot be read: FileNotFoundError"):
        files.rm("/bucket/train/00000.tar")
        shutil.rmtree(cache.folder)
        open_shards([str(tmp_path / "here")], cache=cache).read(0, "txt")


def test_a_store_that_breaks_off_is_gone_on_with(
    tmp_path: Path, memory: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    ranges: list[tuple[str, int]] = []
    whole = MemoryFileSystem.cat_file

    def flaky(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        if path.endswith("00000.tar"):
            ranges.append((path, start))
            if len(ranges) in (2, 4):
                raise OSError(104, "Connection reset by peer")
            return whole(self, path, start=start, end=min(end, start + 8000), **options)
        return whole(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    local = open_shards([str(tmp_path / "data")])
    assert everything(open_shards([memory], cache=cache)) == everything(local)
    assert [start for _, start in ranges] == [0, 8000, 8000, 16000, 16000, 24000]


def test_a_store_whose_package_is_missing_says_which(cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"s3:// needs another package: .*s3fs"):
        open_shards(["s3://bucket/{000..003}.tar"], cache=cache)


def test_a_local_file_address_is_a_path(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", 4)
    assert everything(open_shards([f"file://{folder}"])) == everything(open_shards([str(folder)]))
    assert prep_index.prepare(f"file://{folder}", overwrite=True)["samples"] == 4


# -------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_the_network_sees_the_keys_of_the_local_run(
    tmp_path: Path, site: Site, cache: Cache, workers: int
) -> None:
    folder = written(tmp_path / "data")
    address = site.put(folder)
    path = "/data/00002.tar"
    site.faults[path] = [cut(site, path, 6000)]
    want = keys_of(str(folder), 0)
    assert len({key for step in want for key in step}) == 12
    assert keys_of(address, workers) == want
    assert keys_of(address, workers, first=4) == want[4:]  # resumed from the other copy
    assert times(site, ".tar") == {"/data/00000": 1, "/data/00001": 1, "/data/00002": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_ends_a_run_with_one_sentence(
    tmp_path: Path, site: Site, cache: Cache, workers: int
) -> None:
    address = site.put(written(tmp_path / "data"))
    del site.files["/data/00001.tar"]
    with pytest.raises(ConfigError, match=rf"{address}/00001.tar cannot be read: HTTP 404") as caught:
        keys_of(address, workers)
    assert "Traceback" not in str(caught.value)
