"""Hostile and broken files: a reader may refuse them, but it never crashes, hangs, takes memory that they only claim to
need, or pairs one sample's picture with another's caption.

Contents name their key and extension over and over, so that every piece of them tells whose it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmcontrast.config import ConfigError
from mmcontrast.decode import DECODERS, Sound, metadata
from mmcontrast.manifest import MANIFEST
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, open_shards
from mmcontrast.tar import split_name
from tests.tars import BLOCK, add, content, header, mostly, opened, owners, plain, read_everything, wav, whole_members

settings.register_profile(
    "quick", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("quick")


# -------------------------------------------------------------------------------------------- broken tars


@dataclass
class Piece:
    """A block of a tar, and which block of the whole one it was."""

    data: bytes
    origin: int | None


def pieces(data: bytes) -> list[Piece]:
    return [Piece(data[i : i + BLOCK], i // BLOCK) for i in range(0, len(data), BLOCK)]


SPOT = st.integers(0, 10_000)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "wipe", "insert", "delete", "duplicate", "swap"]),
        SPOT,
        SPOT,
        st.integers(1, 9),
        st.binary(min_size=1, max_size=64),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: list[tuple[str, int, int, int, bytes]]) -> list[Piece]:
    found = pieces(data)
    for kind, at, spot, length, noise in changes:
        if not found:
            break
        at, other = at % len(found), spot % len(found)
        piece = found[at]
        match kind:
            case "flip":
                spot %= max(1, len(piece.data))
                byte = bytes([piece.data[spot] ^ (1 << length % 8)]) if piece.data else b""
                found[at] = Piece(piece.data[:spot] + byte + piece.data[spot + 1 :], piece.origin)
            case "cut":
                del found[max(at, 1) :]
                found[-1] = Piece(found[-1].data[: spot % (BLOCK + 1)], found[-1].origin)
            case "wipe":
                found[at : at + length] = [Piece(bytes(len(p.data)), p.origin) for p in found[at : at + length]]
            case "insert":
                filler = (noise * BLOCK)[: BLOCK * length] if spot % 2 else (noise * BLOCK)[: 100 * length]
                found[at:at] = [Piece(filler, None)]
            case "delete":
                del found[at : at + length]
            case "duplicate":
                found[other:other] = found[at : at + length]
            case _:
                found[at], found[other] = found[other], found[at]
    return found


def origins(found: list[Piece], start: int, stop: int) -> set[int | None]:
    """Which blocks of the whole tar lie between two offsets of a changed one."""
    place, names = 0, set[int | None]()
    for piece in found:
        if place < stop and place + len(piece.data) > start:
            names.add(piece.origin)
        place += len(piece.data)
    return names


@cache
def headers() -> set[bytes]:
    """Those of the whole tar."""
    return {plain()[blocks.start * BLOCK :][:BLOCK] for blocks, _ in whole_members().values()}


@settings(max_examples=150)
@given(CHANGES)
def test_a_broken_tar_never_mispairs(changes: list[tuple[str, int, int, int, bytes]]) -> None:
    """What is delivered belongs to its key, unless another member's blocks were moved to just there.

    Nothing in a tar tells of that, nor of two flipped bits in one header that cancel in its checksum, which is a sum;
    with an index of before, everything does (see below).
    """
    found = changed(plain(), changes)
    data = b"".join(p.data for p in found)
    index, delivered = opened(data)
    assert len(index.keys) == len(set(index.keys))
    for (key, extension), body in delivered.items():
        place = index.keys.index(key)
        offset = int(index.columns[extension].offset[place])
        assert body == data[offset : offset + len(body)]
        head = data[offset - BLOCK : offset]
        if head not in headers():
            differences = min(sum(a != b for a, b in zip(head, other, strict=True)) for other in headers())
            assert differences >= 2, "a header is under a checksum"
            continue
        blocks, truth = whole_members()[key, extension]
        assert len(body) == len(truth)
        if origins(found, offset, offset + len(body)) <= {*blocks, None}:
            assert mostly(body) in (None, (key, extension))


def test_the_fuzzing_finds_what_it_looks_for() -> None:
    """Python's own tarfile, asked the same, loses what comes behind a break; and there is much to be found."""
    assert len(opened(plain())[1]) == len(whole_members()) == 20
    header = whole_members()["000004", "jpg"][0].start
    _, ours = opened(b"".join(p.data for p in changed(plain(), [("flip", header, 5, 1, b"x")])))
    assert len(ours) == 20 - 3  # the broken sample, and the one before, which may have lost a member to it
    body = whole_members()["000005", "jpg"][0]
    moved = changed(plain(), [("swap", body.start + 1, whole_members()["000008", "jpg"][0].start + 1, 1, b"x")])
    _, ours = opened(b"".join(p.data for p in moved))
    assert owners(ours["000005", "jpg"]).keys() == {("000005", "jpg"), ("000008", "jpg")}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexed")
    with ShardWriter(folder, max_samples=6) as writer:
        for i in range(12):
            key = f"{i:06d}"
            members = {"jpg": content(key, "jpg", 150 + 170 * i), "txt": content(key, "txt", 90)}
            writer.write(Sample(key, members))
    return folder


class Truth(dict[tuple[str, str], bytes]):
    """(key, extension) -> content; short where a failing test prints it."""

    def __repr__(self) -> str:
        return f"{len(self)} members"


@pytest.fixture(scope="module")
def truth(indexed: Path) -> Truth:
    return Truth(read_everything(open_shards([str(indexed)])))


@settings(max_examples=100)
@given(changes=CHANGES)
def test_a_broken_tar_never_passes_its_index(
    changes: list[tuple[str, int, int, int, bytes]], indexed: Path, truth: Truth
) -> None:
    """Moved blocks included: every byte that is served is the one that was written."""
    path = indexed / "00000.tar"
    whole = path.read_bytes()
    try:
        data = b"".join(p.data for p in changed(whole, changes))
        path.write_bytes(data.ljust(len(whole), b"\0")[: len(whole)])
        served = read_everything(open_shards([str(indexed)]))
    finally:
        path.write_bytes(whole)
    assert served.items() <= truth.items()
    assert len([key for key, _ in served if key >= "000006"]) == 12, "the other shard is whole"


# -------------------------------------------------------------------------------------------- hostile tars


SIZES = st.one_of(
    st.integers(0, 3000).map(lambda n: f"{n:011o}\0".encode()),
    st.sampled_from(
        [
            b"77777777777\0",
            b"777777777777",
            b"-0000000001\0",
            b"99999999999\0",
            b"0x200\0",
            b"",
            b"\x80" + struct.pack(">3xQ", 1 << 62),
            b"\x80" + struct.pack(">3xQ", (1 << 63) + 5),
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,
            b"\xff" * 10 + b"\xfc\x00",
        ]
    ),
)
KINDS = st.sampled_from([bytes([c]) for c in b"0\0" + b"1234567LKSxXgVMNDAZ"])
NAMES = st.one_of(
    st.sampled_from(
        [
            b"000003.jpg",
            b"000003.txt",
            b"../../etc/passwd.txt",
            b"/etc/passwd.txt",
            b"000003\n.jpg",
            b"00\xff\xfe3.jpg",
            b"a.b.c.jpg",
            b".jpg",
            b"._000003.jpg",
            b"000003",
            b"",
            b"x" * 100,
            b"/",
            b"000003.JPG",
        ]
    ),
    st.binary(max_size=100),
)
PAX = st.lists(
    st.tuples(
        st.sampled_from(["path", "size", "linkpath", "GNU.sparse.major", "hdrcharset", "GNU.sparse.name", "mtime"]),
        st.one_of(NAMES, st.sampled_from([b"-5", b"9" * 30, b"1e9", b"12", b"\xc2\xb2", b"000003.jpg\0.txt"])),
    ),
    max_size=4,
)
HOSTILE = st.lists(st.tuples(st.integers(0, 30), NAMES, SIZES, KINDS, PAX, st.integers(-2, 2)), min_size=1, max_size=4)


def pax_payload(records: list[tuple[str, bytes]], lie: int) -> bytes:
    found = b""
    for name, value in records:
        line = b" " + name.encode() + b"=" + value + b"\n"
        length = len(line) + len(str(len(line) + 3))
        found += str(max(0, length + lie)).encode() + line
    return found


@settings(max_examples=150)
@given(HOSTILE)
def test_hostile_headers_never_break_a_reader(hostile: list[Any]) -> None:
    """Whatever is put between the members of a whole tar, what is delivered under their names is theirs."""
    starts = sorted(blocks.start * BLOCK for blocks, _ in whole_members().values())
    data = plain()
    for at, name, size, kind, records, lie in sorted(hostile, key=lambda h: -h[0]):
        start = starts[at % len(starts)]
        payload = pax_payload(records, lie) if kind in b"xXg" else name + b"\0"
        if kind in b"xXgLK" and lie >= 0:  # a size that is right, more often than not
            size = f"{len(payload):011o}\0".encode()
        body = payload.ljust(-(-len(payload) // BLOCK) * BLOCK, b"\0") if kind in b"xXgLK" else b""
        data = data[:start] + header(name, size, kind, b"000003.jpg", b"p" if lie > 1 else b"") + body + data[start:]
    index, delivered = opened(data)
    for (key, extension), body in delivered.items():
        assert int(index.columns[extension].size.max()) <= len(data)
        if (key, extension) in whole_members() and set(owners(body)) - {(key, extension)}:
            # Only a hostile header that takes this very name may have put another content under it.
            names = [n for _, n, _, _, r, _ in hostile for n in (n, *(v for _, v in r))]
            assert any(split_name(n.decode("latin-1"))[0].endswith(key) for n in names), (key, extension, body[:40])


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_a_broken_extended_header_never_breaks_a_reader(form: int) -> None:
    names = [f"{'folder/' * 20}{i:06d}é" for i in range(6)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in names:
            for extension in ("jpg", "txt"):
                add(tar, f"{name}.{extension}", content(name[-7:-1], extension, 300))
    whole = buffer.getvalue()
    assert len(opened(whole)[1]) == 12

    @settings(max_examples=50)
    @given(changes=CHANGES)
    def check(changes: list[tuple[str, int, int, int, bytes]]) -> None:
        _, delivered = opened(b"".join(p.data for p in changed(whole, changes)))
        assert all(len(body) == 300 for body in delivered.values())

    check()


# -------------------------------------------------------------------------------------------- decoders


@cache
def media() -> dict[str, list[bytes]]:
    """Kind -> small whole files of every format."""
    import soundfile

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    pictures: list[bytes] = []
    for form, mode in (("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("PNG", "P"), ("JPEG", "CMYK")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(buffer, form)
        pictures.append(buffer.getvalue())
    sounds = [wav(400), wav(200, channels=2)]
    for form in ("FLAC", "OGG", "MP3"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.sin(np.arange(3000) / 7), 16_000, format=form)
        sounds.append(buffer.getvalue())
    texts = ["ein Käse, 猫".encode(), b"\xef\xbb\xbfwith a mark"]
    return {"image": pictures, "audio": sounds, "text": texts, "json": [b'{"a": [1, {"b": null}], "c": "\\u00e9"}']}


def decoded(kind: str, data: bytes) -> bool:
    """Whether it can be decoded, in full; anything but a refusal by name is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value: Any = metadata(data) if kind == "json" else DECODERS[kind](data)
            if isinstance(value, Sound):
                value.read(0, min(value.frames, 5000))
                value.read(value.frames - 1, 1)
            elif kind == "image":
                value.read()
                value.crop((0, 0, min(5, value.height), min(5, value.width)), (4, 4), half_scale=True)
    except BadSample as error:
        assert str(error)
        return False
    return True


def test_whole_files_are_decoded() -> None:
    assert all(decoded(kind, data) for kind, files in media().items() for data in files)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(["image", "audio", "audio", "text", "json"]),
    which=st.integers(0, 10),
    edits=st.lists(
        st.tuples(st.sampled_from(["set", "cut", "insert", "delete"]), st.floats(0, 1), st.binary(max_size=8)),
        min_size=1,
        max_size=5,
    ),
    near=st.booleans(),
)
def test_broken_members_are_refused_by_name(
    kind: str, which: int, edits: list[tuple[str, float, bytes]], near: bool
) -> None:
    files = media()[kind]
    data = bytearray(files[which % len(files)])
    for edit, where, noise in edits:
        at = int(where * (min(len(data), 64) if near else len(data)))  # most of what can go wrong is in the header
        match edit:
            case "set":
                data[at : at + len(noise)] = noise
            case "cut":
                del data[max(at, 1) :]
            case "insert":
                data[at:at] = noise
            case _:
                del data[at : at + len(noise)]
    decoded(kind, bytes(data))


@settings(max_examples=100)
@given(st.sampled_from(["image", "audio", "text", "json"]), st.binary(max_size=200))
@example("json", b"[" * 100_000)
@example("json", b"1" * 100_000)
@example("json", b"NaN")
@example("text", b"\0" * 1000)
@example("audio", b"ID3" + b"\xff" * 100)
@example("image", b"\xff\xd8\xff" * 100)
def test_any_bytes_are_refused_by_name(kind: str, data: bytes) -> None:
    for start in (
        b"",
        b"RIFF\xff\xff\xff\xffWAVE",
        b"fLaC",
        b"OggS",
        b"ID3",
        b"\xff\xd8\xff\xe0",
        b"\x89PNG\r\n\x1a\n",
    ):
        decoded(kind, start + data)


# -------------------------------------------------------------------------------------------- index and manifest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**25)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["00000.tar", "../x.tar", "http://127.0.0.1:9/", 1 << 63, -1, "jpg", 1e300]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def altered(value: Any, path: list[int], new: Any, how: str) -> Any:
    """A copy of a JSON value, in which what the path leads to is replaced, left out or doubled."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    step = path[0]
    if isinstance(value, dict):
        items: dict[str, Any] = dict(value)  # pyright: ignore[reportUnknownArgumentType]
        key = sorted(items)[step % len(items)]
        if len(path) > 1:
            items[key] = altered(items[key], path[1:], new, how)
        elif how == "drop":
            del items[key]
        else:
            items[key] = new
        return items
    entries: list[Any] = list(value)  # pyright: ignore[reportUnknownArgumentType]
    place = step % len(entries)
    if len(path) > 1:
        entries[place] = altered(entries[place], path[1:], new, how)
    elif how == "drop":
        del entries[place]
    elif how == "double":
        entries.insert(place, entries[-1])
    else:
        entries[place] = new
    return entries


PATHS = st.lists(st.integers(0, 11), min_size=1, max_size=5)
NOISE = st.none() | st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4))
HOW = st.sampled_from(["set", "set", "drop", "double"])


@settings(max_examples=120)
@given(path=PATHS, new=JSON, how=HOW, noise=NOISE)
def test_a_broken_manifest_is_refused_by_name(
    path: list[int], new: Any, how: str, noise: Any, indexed: Path, truth: Truth
) -> None:
    check_file(indexed, indexed / MANIFEST, truth, lambda value: altered(value, path, new, how), noise)


@settings(max_examples=120)
@given(path=PATHS, new=JSON, how=HOW, noise=NOISE)
def test_a_broken_index_is_refused_by_name(
    path: list[int], new: Any, how: str, noise: Any, indexed: Path, truth: Truth
) -> None:
    """Without the checksum that newer manifests have of it, which no change gets past."""
    manifest = indexed / MANIFEST
    described = manifest.read_text("utf-8")
    older = json.loads(described)
    for entry in older["shards"]:
        del entry["index"]
    manifest.write_text(json.dumps(older))
    try:
        served = check_file(
            indexed, indexed / "00000.index.json", truth, lambda value: altered(value, path, new, how), noise
        )
    finally:
        manifest.write_text(described)
    if served:
        assert {key for key, _ in served} >= {f"{i:06d}" for i in range(6, 12)}


def check_file(
    folder: Path, file: Path, truth: Truth, change: Callable[[Any], Any], noise: Any
) -> dict[tuple[str, str], bytes]:
    """What is served with a changed description: never a content that is not some member's of that extension."""
    whole = file.read_bytes()
    if noise is None:
        data = json.dumps(change(json.loads(whole))).encode()
    else:
        at = noise[0] % len(whole)
        data = whole[:at] + noise[1] + whole[at + len(noise[1]) :]
    file.write_bytes(data)
    try:
        served = read_everything(open_shards([str(folder)]))
    except ConfigError as error:
        assert str(folder) in str(error) or "no samples" in str(error)
        return {}
    finally:
        file.write_bytes(whole)
    assert set(served.values()) <= set(truth.values())
    return served


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "NaN", "Infinity", '{"version": Infinity}'])
def test_json_that_is_no_description_is_refused_by_name(indexed: Path, text: str) -> None:
    for file in (indexed / MANIFEST, indexed / "00000.index.json"):
        whole = file.read_bytes()
        file.write_bytes(text.encode("latin-1"))
        try:
            with pytest.raises(ConfigError, match=file.name) as caught:
                read_everything(open_shards([str(indexed)]))
            assert len(str(caught.value)) < 600
        finally:
            file.write_bytes(whole)


def test_every_changed_byte_of_an_index_is_seen(indexed: Path) -> None:
    file = indexed / "00000.index.json"
    whole = file.read_bytes()
    assert (
        hashlib.sha256(whole).hexdigest()
        == json.loads((indexed / MANIFEST).read_text())["shards"][0]["index"]["sha256"]
    )
    for at in range(0, len(whole), 37):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match="not the one that the manifest describes"):
            open_shards([str(indexed)]).extensions(0)
    file.write_bytes(whole)
