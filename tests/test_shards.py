"""Shards: what is written comes back, and damage loses samples but never pairs one's picture with another's caption.

Contents name their key, so that a wrong pair is seen: sample k holds the picture "k/jpg/k/jpg…" and a caption alike.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast.config import ConfigError
from mmcontrast.data_prep import index as prep_index
from mmcontrast.manifest import MANIFEST, find_shards
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, ShardSet, index_path, open_shards, scan

BLOCK = 512


def content(key: str, extension: str, size: int = 700) -> bytes:
    return (f"{key}/{extension}/".encode() * size)[:size]


def plain_tar(path: Path, keys: list[str], extensions: tuple[str, ...] = ("jpg", "txt"), **options: Any) -> Path:
    """A tar as others write it, with Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for key in keys:
            for extension in extensions:
                add(tar, f"{key}.{extension}", content(key, extension))
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes, **facts: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(data))


def member(path: Path, name: str) -> tuple[int, int, int]:
    """(header offset, data offset, size) of a member, from Python's tarfile."""
    with tarfile.open(path) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data, info.size


def contents(shards: ShardSet) -> dict[tuple[str, str], dict[str, bytes]]:
    """(shard, key) -> its members, all of which can be read."""
    return {shards.name(i): {e: shards.read(i, e) for e in shards.extensions(i)} for i in range(len(shards))}


def readable(shards: ShardSet) -> dict[str, set[str]]:
    """Key -> the members that can be read; fails where a member's content belongs to another sample or shard."""
    found: dict[str, set[str]] = {}
    for i in range(len(shards)):
        key = shards.name(i)[1]
        found[key] = set()
        for extension in shards.extensions(i):
            try:
                data = shards.read(i, extension)
            except BadSample:
                continue
            assert owner(data) == (key, extension), f"{key}.{extension} holds {data[:40]!r}"
            found[key].add(extension)
    return found


def owner(data: bytes) -> tuple[str, str]:
    """Whose content it is, by what it names most often: single flipped bytes do not change that."""
    (key, extension), _ = Counter(re.findall(rb"(\d{6})/(jpg|txt|png)/", data)).most_common(1)[0]
    return key.decode(), extension.decode()


def keys(count: int) -> list[str]:
    return [f"{i:06d}" for i in range(count)]


def write(out: Path, samples: Mapping[str, Mapping[str, Any]], **options: Any) -> Path:
    with ShardWriter(out, **options) as writer:
        for key, members in samples.items():
            writer.write(Sample(key, members))
    return out


def some(count: int = 10) -> dict[str, dict[str, Any]]:
    """Samples of which some lack a picture or a caption."""
    samples: dict[str, dict[str, Any]] = {}
    for i, key in enumerate(keys(count)):
        samples[key] = {"json": {"label": f"Käse {i}", "number": i}}
        if i % 3:
            samples[key]["jpg"] = content(key, "jpg", 300 + 100 * i)
        if i % 4 != 1:
            samples[key]["txt"] = f"une légende {i} 猫"
    return samples


# -------------------------------------------------------------------------------------------- writing and reading


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    samples = some()
    shards = open_shards([str(write(tmp_path, samples, max_samples=4))])
    assert len(shards) == 10 and len(shards.shards) == 3 and not shards.damage
    for i, (key, members) in enumerate(samples.items()):
        assert shards.name(i) == (f"{i // 4:05d}.tar", key)
        assert set(shards.extensions(i)) == set(members)
        assert json.loads(shards.read(i, "json")) == members["json"]
        for extension, text in members.items():
            if extension != "json":
                want = text.encode() if isinstance(text, str) else text
                assert shards.read(i, extension) == want
    assert shards.counts == {"json": 10, "jpg": 6, "txt": 7}
    with pytest.raises(KeyError):
        shards.read(0, "jpg")


def test_webdataset_reads_the_same_bytes(tmp_path: Path) -> None:
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    shards = open_shards([str(write(tmp_path, some(), max_samples=4))])
    theirs: list[dict[str, Any]] = []
    for shard in shards.shards:
        theirs += list(WebDataset(str(shard.path), shardshuffle=False))
    assert len(theirs) == 10
    for i, sample in enumerate(theirs):
        assert sample["__key__"] == shards.name(i)[1]
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        assert members == {e: shards.read(i, e) for e in shards.extensions(i)}


def test_the_manifest_tells_what_the_tars_hold(tmp_path: Path) -> None:
    write(tmp_path, some(), max_samples=4, about={"licence": "CC0 ©"})
    manifest = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    tars = sorted(tmp_path.glob("*.tar"))
    assert [s["name"] for s in manifest["shards"]] == [t.name for t in tars]
    for entry, path in zip(manifest["shards"], tars, strict=True):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert entry["bytes"] == path.stat().st_size
        assert entry["samples"] == len({n.partition(".")[0] for n in names})
        assert entry["members"] == Counter(n.partition(".")[2] for n in names)
        assert entry["damage"] == []
    assert manifest["samples"] == 10 and manifest["bytes"] == sum(t.stat().st_size for t in tars)
    assert manifest["modalities"]["image"] == {"members": ["jpg"], "samples": 6}
    assert manifest["modalities"]["text"] == {"members": ["txt"], "samples": 7}
    assert manifest["about"] == {"licence": "CC0 ©"}


def test_the_same_samples_are_the_same_bytes(tmp_path: Path) -> None:
    def digest(name: str, samples: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in write(tmp_path / name, samples, max_samples=4).iterdir()}

    first, second, other = digest("a", some()), digest("b", some()), digest("c", some(11))
    assert len(first) == 7 and first == second
    assert first[MANIFEST] != other[MANIFEST] and first["00002.tar"] != other["00002.tar"]


def test_offsets_are_those_of_tarfile(tmp_path: Path) -> None:
    write(tmp_path, some())
    index = json.loads(index_path(tmp_path / "00000.tar").read_text("utf-8"))
    checked = 0
    with tarfile.open(tmp_path / "00000.tar") as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            column, place = index["members"][extension], index["keys"].index(key)
            assert (column["offset"][place], column["size"][place]) == (info.offset_data, info.size)
            file = tar.extractfile(info)
            assert file is not None and column["crc32"][place] == zlib.crc32(file.read())
            checked += 1
    present = sum(offset >= 0 for column in index["members"].values() for offset in column["offset"])
    assert checked == present == 10 + 6 + 7


def test_a_shard_ends_at_its_limits(tmp_path: Path) -> None:
    samples = {k: {"jpg": content(k, "jpg", 1000)} for k in keys(10)}
    shards = open_shards([str(write(tmp_path / "bytes", samples, max_bytes=3500))])
    assert [s.samples for s in shards.shards] == [3, 3, 3, 1]
    shards = open_shards([str(write(tmp_path / "large", samples, max_bytes=10))])
    assert [s.samples for s in shards.shards] == [1] * 10


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_and_foreign_names_are_read(tmp_path: Path, form: int) -> None:
    long = "folder/" + "x" * 150
    names = [f"{long}/000001", f"{long}/000002", "bücher/猫", "d.ot/000003"]
    path = plain_tar(tmp_path / "a.tar", names, format=form)
    assert {k: v["jpg"] for (_, k), v in contents(open_shards([str(path)])).items()} == {
        name: content(name, "jpg") for name in names
    }


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_names_that_are_not_unicode_stay_apart(tmp_path: Path, form: int) -> None:
    """Two names that differ in undecodable bytes alone must not become one sample with one's picture."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        add(tar, "caf\udce8.jpg", b"one")
        add(tar, "caf\udce9.txt", b"two")
        add(tar, "caf\udce9.jpg", b"two")
    found = contents(open_shards([str(path)]))
    assert [set(m.values()) for m in found.values()] == [{b"one"}, {b"two"}]
    prep_index.prepare(tmp_path)
    assert contents(open_shards([str(path)])) == found


def test_folders_links_and_hidden_files_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "folder/._000000.jpg", b"resource fork")
        add(tar, "folder/000000.jpg", b"picture")
        add(tar, "folder/000000.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "folder/._000000.txt", b"resource fork")
        add(tar, "folder/000000.txt", b"caption")
        add(tar, "folder/000001.webp", b"", type=tarfile.LNKTYPE, linkname="folder/000000.jpg")
        add(tar, "README", b"no sample")
    assert contents(open_shards([str(path)])) == {("a.tar", "folder/000000"): {"jpg": b"picture", "txt": b"caption"}}


def test_a_link_that_states_a_size_hides_no_member(tmp_path: Path) -> None:
    """Some tars give a hard link the size of its target; content there is none."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "000000.jpg", b"picture")
        link = tarfile.TarInfo("000001.jpg")
        link.type, link.linkname, link.size = tarfile.LNKTYPE, "000000.jpg", 700
        assert tar.fileobj is not None
        tar.fileobj.write(link.tobuf())
        tar.offset += BLOCK
        add(tar, "000002.jpg", b"another")
    assert [name for _, name in contents(open_shards([str(path)]))] == ["000000", "000002"]


def img2dataset(folder: Path) -> Path:
    """Two shards as img2dataset writes them, keys %05d%04d, with their parquet and statistics beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(2):
        names = [f"{shard:05d}{i:04d}" for i in range(5)]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for name in names:
                add(tar, f"{name}.jpg", content(name, "jpg"))
                add(
                    tar,
                    f"{name}.json",
                    json.dumps({"key": name, "url": f"https://example.org/{name}"}).encode(),
                )
                add(tar, f"{name}.txt", content(name, "txt"))
        pq.write_table(pa.table({"key": names}), folder / f"{shard:05d}.parquet")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 5}')
    return folder


def test_img2dataset_shards_are_read_as_they_are_and_indexed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = img2dataset(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    scanned = open_shards([str(folder)])
    found = contents(scanned)
    assert len(found) == 10 and scanned.counts == {"jpg": 10, "json": 10, "txt": 10}
    for (shard, key), members in found.items():
        assert shard == f"{key[:5]}.tar" and json.loads(members["json"])["key"] == key
        assert members["jpg"] == content(key, "jpg") and members["txt"] == content(key, "txt")

    manifest = prep_index.prepare(folder)
    assert manifest["samples"] == 10 and "2 shards, 10 samples; left out 0" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in before} == before
    indexed = open_shards([str(folder)])
    assert contents(indexed) == found and indexed.counts == scanned.counts
    assert open_shards([f"{folder}/*"]).fingerprint == indexed.fingerprint != scanned.fingerprint

    with pytest.raises(ConfigError, match="--overwrite"):
        prep_index.prepare(folder)
    plain_tar(folder / "00002.tar", ["000020000"])
    assert prep_index.prepare(folder, overwrite=True)["samples"] == 11


def test_the_fingerprint_tells_content_and_order(tmp_path: Path) -> None:
    write(tmp_path / "a", some(4))
    write(tmp_path / "b", some(4))
    changed = some(4)
    changed["000002"]["txt"] = "une légende 9 猫"
    write(tmp_path / "c", changed)
    prints = [
        open_shards([str(tmp_path / name) for name in names]).fingerprint for names in ("a", "b", "c", "ac", "ca")
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 4


# -------------------------------------------------------------------------------------------- damage


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_cut_within_a_member(tmp_path: Path) -> None:
    path = plain_tar(tmp_path / "a.tar", keys(20))
    cut(path, member(path, "000010.txt")[1] + 100)
    shards = open_shards([str(path)])
    assert readable(shards) == {key: {"jpg", "txt"} for key in keys(10)}
    assert shards.damage == {str(path): [("000010", "truncated")]}


def test_cut_exactly_between_picture_and_caption(tmp_path: Path) -> None:
    """Only the missing zeros at the end tell that something is gone; what stands last is not served as half."""
    path = plain_tar(tmp_path / "a.tar", keys(20))
    cut(path, member(path, "000010.txt")[0])
    shards = open_shards([str(path)])
    assert readable(shards) == {key: {"jpg", "txt"} for key in keys(10)}
    assert [key for key, _ in shards.damage[str(path)]] == ["000010"]


@pytest.mark.parametrize(("broken", "lost"), [("000010.jpg", (9, 10)), ("000010.txt", (10, 11))])
def test_a_flipped_byte_in_a_header(tmp_path: Path, broken: str, lost: tuple[int, int]) -> None:
    path = plain_tar(tmp_path / "a.tar", keys(20))
    flip(path, member(path, broken)[0] + 5)
    shards = open_shards([str(path)])
    kept = [key for i, key in enumerate(keys(20)) if i not in lost]
    assert readable(shards) == {key: {"jpg", "txt"} for key in kept}
    assert [key for key, _ in shards.damage[str(path)]] == [keys(20)[i] for i in lost]


def test_a_flipped_byte_in_a_body_under_an_index(tmp_path: Path) -> None:
    write(tmp_path, {k: {"jpg": content(k, "jpg"), "txt": "caption"} for k in keys(20)})
    flip(tmp_path / "00000.tar", member(tmp_path / "00000.tar", "000010.jpg")[1] + 99)
    shards = open_shards([str(tmp_path)])
    for i, key in enumerate(keys(20)):
        if i == 10:
            with pytest.raises(BadSample, match="checksum of jpg"):
                shards.read(i, "jpg")
        else:
            assert shards.read(i, "jpg") == content(key, "jpg")
        assert shards.read(i, "txt") == b"caption"


@pytest.mark.parametrize("at", [0, 100], ids=["before the body", "within the body"])
def test_a_cut_caption_takes_none_from_the_next_shard(tmp_path: Path, at: int) -> None:
    """Keys restart in every shard: the next one begins with the key that the cut one ends in."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"r{shard}.tar", "w") as tar:
            for key in keys(3):
                add(tar, f"{key}.jpg", f"{shard}/{key}/jpg".encode())
                add(tar, f"{key}.txt", f"{shard}/{key}/txt".encode() * 40)
    cut(tmp_path / "r0.tar", member(tmp_path / "r0.tar", "000000.txt")[1] + at)
    shards = open_shards([str(tmp_path)])
    found = contents(shards)
    assert list(found) == [("r1.tar", key) for key in keys(3)]
    for (shard, key), members in found.items():
        assert members["jpg"] == f"{shard[1]}/{key}/jpg".encode()
        assert members["txt"].startswith(f"{shard[1]}/{key}/txt".encode())
    assert list(shards.damage) == [str(tmp_path / "r0.tar")]


def test_a_wiped_stretch_is_a_break(tmp_path: Path) -> None:
    """A sector of zeros over a caption and the next picture: neither half is served."""
    path = plain_tar(tmp_path / "a.tar", keys(6))
    data = bytearray(path.read_bytes())
    start, stop = member(path, "000002.txt")[0], member(path, "000003.txt")[0]
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    shards = open_shards([str(path)])
    assert readable(shards) == {key: {"jpg", "txt"} for key in ("000000", "000001", "000004", "000005")}


def test_keys_that_come_back_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in (
            "0.jpg",
            "0.txt",
            "1.jpg",
            "2.jpg",
            "2.txt",
            "1.txt",
            "3.jpg",
            "3.txt",
            "0.jpg",
            "4.txt",
            "4.txt",
        ):
            add(tar, name, name.encode())
    shards = open_shards([str(path)])
    assert contents(shards) == {
        ("a.tar", "2"): {"jpg": b"2.jpg", "txt": b"2.txt"},
        ("a.tar", "3"): {"jpg": b"3.jpg", "txt": b"3.txt"},
    }
    assert dict(shards.damage[str(path)]) == {
        "0": "key comes back",
        "1": "key comes back",
        "4": "member comes twice",
    }


def raw_header(name: str, size_field: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with any size field, its checksum right."""
    info = tarfile.TarInfo(name)
    info.type = kind
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    head[124:136] = size_field.ljust(12, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(b"\x80" + struct.pack(">3xQ", 1 << 62), id="huge"),
        pytest.param(b"\x80" + b"\xff" * 11, id="beyond 64 bits"),
        pytest.param(b"\xff" * 10 + b"\xfc\x00", id="negative"),
        pytest.param(b"77777777777\0", id="8 GiB"),
    ],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.timeout(20)
def test_an_absurd_size_in_a_header(tmp_path: Path, size: bytes, kind: bytes) -> None:
    path = plain_tar(tmp_path / "a.tar", keys(4))
    start = member(path, "000002.jpg")[0]
    data = path.read_bytes()
    path.write_bytes(data[:start] + raw_header("000002.jpg", size, kind) + data[start:])
    shards = open_shards([str(path)])
    found = readable(shards)
    assert found["000000"] == {"jpg", "txt"} and set(found) <= {"000000", "000001", "000003"}
    assert shards.damage


@pytest.mark.parametrize("size", ["²", "9" * 5000, "-5", "1e3"])
def test_an_absurd_size_in_an_extended_header(tmp_path: Path, size: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "000000.jpg", content("000000", "jpg"), pax_headers={"comment": "x", "size": size})
        add(tar, "000001.jpg", content("000001", "jpg"))
    assert readable(open_shards([str(path)])) == {"000000": {"jpg"}, "000001": {"jpg"}}


def test_what_is_no_tar_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(ConfigError, match="a.tar.*not a tar"):
        open_shards([str(path)])
    plain_tar(tmp_path / "b.tar", keys(2))
    shards = open_shards([str(tmp_path)])
    assert len(shards) == 2 and shards.damage == {str(path): [("", "not a tar")]}


def mutated(data: bytes, seed: int, *, moved: bool) -> bytes:
    """One to three of: flipped bits, a cut, a wiped stretch; with `moved` also stretches lost, doubled or swapped."""
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed))
        other, block = BLOCK * draw.randrange(-(-len(changed) // BLOCK)), at // BLOCK * BLOCK
        length = BLOCK * draw.randint(1, 8)
        stretch = bytes(changed[block : block + length])
        match draw.randrange(7 if moved else 4):
            case 0 | 1:
                changed[at] ^= 1 << draw.randrange(8)
            case 2:
                del changed[max(at, BLOCK) :]
            case 3:
                changed[block : block + length] = bytes(len(stretch))
            case 4:
                changed[block : block + length] = b"" if len(stretch) < len(changed) else bytes(BLOCK)
            case 5:
                changed[block:block] = stretch
            case _:
                first, second = changed[block : block + BLOCK], changed[other : other + BLOCK]
                if len(first) == len(second):
                    changed[block : block + BLOCK], changed[other : other + BLOCK] = second, first
    return bytes(changed)


def varied(path: Path) -> bytes:
    """Samples of several sizes, of which some have a picture or a caption alone."""
    with tarfile.open(path, "w") as tar:
        for i, key in enumerate(keys(12)):
            for extension in ("jpg", "txt") if i % 3 else (("jpg",) if i % 2 else ("txt",)):
                add(tar, f"{key}.{extension}", content(key, extension, 200 + 170 * i))
    return path.read_bytes()


def test_random_damage_never_pairs_wrongly_without_an_index(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = varied(path)
    everything = contents_of_scan(path)
    kept: list[int] = []
    for seed in range(400):
        path.write_bytes(mutated(whole, seed, moved=False))
        try:
            found = contents_of_scan(path)
        except ConfigError:  # no sample is left
            found = {}
        for key, members in found.items():
            for extension, data in members.items():
                assert owner(data) == (key, extension), f"seed {seed}: {key}.{extension} holds {data[:40]!r}"
        kept.append(len(found))
    # The damage is real, and it does not just lose everything.
    assert len(everything) == 12 and kept.count(12) < 200 and sum(kept) > 400 * 12 / 4


@pytest.mark.timeout(60)
def test_random_damage_with_moved_stretches_never_stops_a_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = varied(path)
    kept: list[int] = []
    for seed in range(300):
        path.write_bytes(mutated(whole, seed, moved=True))
        try:
            shards = open_shards([str(path)])
        except ConfigError:
            kept.append(0)
            continue
        kept.append(sum(len(shards.read(i, e)) > 0 for i in range(len(shards)) for e in shards.extensions(i)))
    assert kept.count(20) < 150 and sum(kept) > 300 * 20 / 4 and max(kept) == 20


def contents_of_scan(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> its members, without those that the damage left without any owner's name."""
    shards = open_shards([str(path)])
    found: dict[str, dict[str, bytes]] = {}
    for i in range(len(shards)):
        members = {e: shards.read(i, e) for e in shards.extensions(i)}
        found[shards.name(i)[1]] = {e: d for e, d in members.items() if re.search(rb"\d{6}/(jpg|txt)/", d)}
    return {key: members for key, members in found.items() if members}


def test_random_damage_never_passes_an_index(tmp_path: Path) -> None:
    """With offsets and checksums from before the damage, every byte that is served is the one that was written.

    Moved stretches belong here: without an index, nothing in a tar tells that two bodies changed places.
    """
    samples = {k: {"jpg": content(k, "jpg", 900), "txt": content(k, "txt", 60).decode()} for k in keys(12)}
    path = write(tmp_path, samples) / "00000.tar"
    whole = path.read_bytes()
    served = refused = 0
    for seed in range(300):
        path.write_bytes(mutated(whole, seed, moved=True).ljust(len(whole), b"\0")[: len(whole)])
        shards = open_shards([str(path)])
        for i, key in enumerate(samples):
            for extension, size in (("jpg", 900), ("txt", 60)):
                try:
                    data = shards.read(i, extension)
                except BadSample:
                    refused += 1
                    continue
                assert data == content(key, extension, size), f"seed {seed}: {key}.{extension}"
                served += 1
    assert served > 1000 and refused > 1000, (served, refused)


# -------------------------------------------------------------------------------------------- manifest and index


def test_a_tar_of_another_size_than_its_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path, some())
    path = tmp_path / "00000.tar"
    cut(path, path.stat().st_size - BLOCK)
    with pytest.raises(ConfigError, match=rf"{path} has \d+ bytes, its manifest says \d+") as caught:
        open_shards([str(tmp_path)])
    command = re.search(r"`mmcontrast prep index (\S+)( --overwrite)?`", str(caught.value))
    assert command is not None
    prep_index.prepare(Path(command[1]), overwrite=bool(command[2]))  # the remedy that the message names
    assert len(open_shards([str(tmp_path)])) == 10


def test_a_tar_that_the_manifest_names_must_be_there(tmp_path: Path) -> None:
    write(tmp_path, some(), max_samples=4)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ConfigError, match="00001.tar is not there"):
        open_shards([str(tmp_path)])
    assert len(open_shards([f"{tmp_path}/00000.tar", f"{tmp_path}/00002.tar"])) == 6


GONE = "gone"


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (("version",), 2, "upgrade mmcontrast"),
        (("version",), "new", "not a manifest"),
        (("shards",), GONE, "not a manifest"),
        (("shards",), [1], "not a manifest"),
        (("shards", 0, "members"), GONE, "not a manifest"),
        (("shards", 0, "samples"), "ten", "not a manifest"),
        (("shards", 1, "name"), "00000.tar", "twice"),
        (("shards", 0, "samples"), 4, "5 samples, the manifest says 4"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path: Path, place: tuple[Any, ...], value: Any, text: str) -> None:
    write(tmp_path, some(), max_samples=5)
    manifest = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    node = manifest
    for step in place[:-1]:
        node = node[step]
    node[place[-1]] = value
    if value == GONE:
        del node[place[-1]]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=text) as caught:
        open_shards([str(tmp_path)]).name(0)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"keys": ["a"], "members": []}', '{"keys": 5, "members": {}}']
    + [
        json.dumps({"keys": keys(10), "members": {"jpg": {"offset": o, "size": [1], "crc32": [1]}}})
        for o in ([], [1], [10**30], "x")
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, some())
    index_path(tmp_path / "00000.tar").write_text(text)
    with pytest.raises(ConfigError, match="00000.index.json cannot be read"):
        open_shards([str(tmp_path)]).name(0)


def test_an_index_that_points_elsewhere_gives_nothing(tmp_path: Path) -> None:
    write(tmp_path, {k: {"jpg": content(k, "jpg")} for k in keys(4)})
    path = index_path(tmp_path / "00000.tar")
    index = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(index))  # the same in other bytes
    with pytest.raises(ConfigError, match="not the one that the manifest describes"):
        open_shards([str(tmp_path)]).read(0, "jpg")
    manifest = json.loads((tmp_path / MANIFEST).read_text("utf-8"))
    del manifest["shards"][0]["index"]  # as it was written by earlier versions
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    column = index["members"]["jpg"]
    column["offset"][0], column["offset"][1] = column["offset"][1], 10**15
    column["size"][2], column["size"][3] = 1 << 40, -3
    path.write_text(json.dumps(index))
    shards = open_shards([str(tmp_path)])
    for position, reason in enumerate(["checksum", "truncated", "above 256 MiB", "above 256 MiB"]):
        with pytest.raises(BadSample, match=reason):
            shards.read(position, "jpg")


# -------------------------------------------------------------------------------------------- the writer


@pytest.mark.parametrize(
    "key",
    [
        "",
        "a.b",
        "a/b.c",
        "/a",
        "../a",
        "a/../b",
        "a/",
        "a//b",
        "_a",
        "a\0b",
        "a\nb",
        "a\ud800",
        "x" * 91,
        "é" * 46,
    ],
)
def test_keys_that_a_tar_would_not_give_back_are_refused(tmp_path: Path, key: str) -> None:
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ConfigError, match="cannot name a sample"):
            writer.write(Sample(key, {"txt": "a caption"}))
        writer.write(Sample("good", {"txt": "a caption"}))
    assert list(contents(open_shards([str(tmp_path)]))) == [("00000.tar", "good")]


def test_every_other_key_comes_back(tmp_path: Path) -> None:
    names = ["a b", "a/b", "ünï/猫", "x" * 90, "é" * 45, "A", "a", "a=b,c", "👨‍🚀", "-", "back\\slash"]
    write(tmp_path, {name: {"txt": name} for name in names})
    assert [k for _, k in contents(open_shards([str(tmp_path)]))] == names


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({}, "known are"),
        ({"exe": b"MZ"}, "known are"),
        ({"pkl": b"x"}, "known are"),
        ({"JPG": b"x"}, "known are"),
        ({"txt": "\ud800"}, "cannot be written"),
        ({"json": {"x": float("nan")}}, "cannot be written"),
        ({"json": {"x": object()}}, "cannot be written"),
    ],
)
def test_members_that_no_reader_would_take_are_refused(tmp_path: Path, members: Any, text: str) -> None:
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ConfigError, match=text) as caught:
            writer.write(Sample("a", members))
        assert "'a'" in str(caught.value)
        writer.write(Sample("a", {"txt": "the key is still free"}))
        with pytest.raises(ConfigError, match="'a' comes twice"):
            writer.write(Sample("a", {"txt": "again"}))


def test_a_member_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcontrast.shard_writer.MAX_MEMBER_BYTES", 1 << 20)
    with ShardWriter(tmp_path) as writer, pytest.raises(ConfigError, match="jpg is above 1 MiB"):
        writer.write(Sample("a", {"jpg": bytes((1 << 20) + 1)}))


def test_shards_that_are_there_are_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path, some(), max_samples=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="--overwrite"):
        ShardWriter(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write(tmp_path, {"only": {"txt": "one"}}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.index.json", "00000.tar", MANIFEST]
    assert list(contents(open_shards([str(tmp_path)]))) == [("00000.tar", "only")]


def test_a_writer_that_dies_leaves_no_manifest(tmp_path: Path) -> None:
    write(tmp_path, some())
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, max_samples=2, overwrite=True) as writer:
        for key, members in some(5).items():
            writer.write(Sample(key, members))
        raise ZeroDivisionError
    assert not (tmp_path / MANIFEST).exists()
    assert sorted(p.name for p in tmp_path.glob("*.tar*")) == ["00000.tar", "00001.tar", "00002.tar.tmp"]
    assert len(open_shards([str(tmp_path)])) == 4  # what was finished can be read, the rest is not taken for a shard
    write(tmp_path, some(), overwrite=True)
    assert not list(tmp_path.glob("*.tmp")) and len(open_shards([str(tmp_path)])) == 10


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"{out} cannot be made"):
            ShardWriter(out)


# -------------------------------------------------------------------------------------------- finding shards


def test_folders_globs_ranges_and_files_are_found_in_order(tmp_path: Path) -> None:
    for i in range(12):
        plain_tar(tmp_path / "data" / f"{i:05d}.tar", [f"{i}"])
    plain_tar(tmp_path / "other[1]" / "x-3.tar", ["x"])
    (tmp_path / "data" / "00003.parquet").write_text("no tar")
    (tmp_path / "data" / "00003.tar.gz").write_text("no tar")

    def names(*patterns: str) -> list[str]:
        return [p.name for p in find_shards([f"{tmp_path}/{p}" for p in patterns])]

    every = [f"{i:05d}.tar" for i in range(12)]
    assert names("data") == names("data/*.tar") == names("data/*") == every
    assert names("data/{00000..00011}.tar") == every
    assert names("data/000{0..1}{0..1}.tar") == ["00000.tar", "00001.tar", "00010.tar", "00011.tar"]
    assert names("data/{00002..00003}*") == ["00002.tar", "00003.tar"]
    assert names("data/00007.tar", "data/00002.tar", "data/00007.tar") == ["00007.tar", "00002.tar"]
    assert names("other[1]", "data/0000{9..9}.tar") == ["x-3.tar", "00009.tar"]
    assert names("other[1]/x-{3..3}.tar") == ["x-3.tar"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("pipe:cat {folder}/00000.tar; touch {folder}/ran", "would run a command"),
        ("file://pipe:cat", "no shards match"),
        ("reference://{folder}/00000.tar", "cannot be read; known are http"),
        ("simplecache::s3://bucket/00000.tar", "cannot be read; known are http"),
        ("http://someone:secret@example.org/00000.tar", "address of example.org/00000.tar holds a password"),
        ("{folder}/none", "no shards match"),
        ("{folder}/*.zip", "no shards match"),
        ("{folder}/{{5..0}}.tar", "no shards match"),
        ("{folder}/{{00000..00002}}.tar", "00001.tar of .* is not there"),
        ("{folder}/{{0..9999999}}.tar", "limit is 1000000"),
        ("{folder}/00000.tar.gz", "is no .tar file"),
    ],
)
def test_what_cannot_be_read_as_shards_is_refused(tmp_path: Path, pattern: str, text: str) -> None:
    plain_tar(tmp_path / "00000.tar", keys(1))
    (tmp_path / "00000.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ConfigError, match=text):
        open_shards([pattern.format(folder=tmp_path)])
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------- many shards


def test_more_shards_than_may_be_open_are_read_at_random_and_closed(tmp_path: Path) -> None:
    for i in range(80):
        plain_tar(tmp_path / f"{i:03d}.tar", [f"{i:06d}"], ("jpg",))

    def opened() -> int:
        return sum(str(tmp_path) in str(p.resolve()) for p in Path("/proc/self/fd").iterdir())

    shards = open_shards([str(tmp_path)])
    for position in np.random.default_rng(0).permutation(np.repeat(np.arange(80), 2)):
        assert shards.read(int(position), "jpg") == content(f"{position:06d}", "jpg")
    assert opened() == 64
    del shards
    assert opened() == 0


def test_a_scan_with_checksums_equals_the_index(tmp_path: Path) -> None:
    path = write(tmp_path, some()) / "00000.tar"
    assert scan(path, checksum=True).to_json() == json.loads(index_path(path).read_text("utf-8"))
    assert all((c.crc32 == -1).all() for c in scan(path).columns.values())
