"""Files that were made to harm, and the damages of a disk or a wire, one by one: which samples are lost, and why."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcontrast import decode
from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Reader
from mmcontrast.data_prep.index import prepare
from mmcontrast.encoders.base import Transform
from mmcontrast.manifest import MANIFEST
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, index_path, open_shards
from mmcontrast.tar import scan, walk
from tests.tars import BLOCK, add, header, opened, plain, wav, whole_members

# -------------------------------------------------------------------------------------------- damages, one by one


def damaged(kind: str) -> bytes:
    """The tar of `plain`, with one damage near its sample 000004 (a picture and a caption)."""
    whole = bytearray(plain())
    picture, caption = (whole_members()["000004", e][0] for e in ("jpg", "txt"))
    match kind:
        case "cut within a header":
            del whole[picture.start * BLOCK + 200 :]
        case "cut within a picture":
            del whole[picture.start * BLOCK + 700 :]
        case "cut between picture and caption":
            del whole[caption.start * BLOCK :]
        case "cut within a caption":
            del whole[caption.start * BLOCK + 600 :]
        case "cut between samples":
            del whole[caption.stop * BLOCK :]
        case "cut within the zeros at the end":
            del whole[whole_members()["000011", "txt"][0].stop * BLOCK + 600 :]
        case "a flipped bit in the picture's header":
            whole[picture.start * BLOCK + 3] ^= 1
        case "a flipped bit in the caption's header":
            whole[caption.start * BLOCK + 3] ^= 1
        case "a flipped bit in the picture":
            whole[picture.start * BLOCK + 700] ^= 1
        case "a wiped caption's header":
            whole[caption.start * BLOCK : (caption.start + 1) * BLOCK] = bytes(BLOCK)
        case "a caption that comes twice":
            stretch = whole[caption.start * BLOCK : caption.stop * BLOCK]
            whole[caption.stop * BLOCK : caption.stop * BLOCK] = stretch
        case "a caption that comes back later":
            stretch = whole[caption.start * BLOCK : caption.stop * BLOCK]
            behind = whole_members()["000007", "txt"][0].stop * BLOCK
            whole[behind:behind] = stretch
        case _:
            raise AssertionError(kind)
    return bytes(whole)


BREAK = "at a break of the tar"


@pytest.mark.parametrize(
    ("kind", "lost", "reasons"),
    [
        ("cut within a header", range(3, 12), {3: BREAK}),
        ("cut within a picture", range(4, 12), {4: "truncated"}),
        ("cut between picture and caption", range(4, 12), {4: BREAK}),
        ("cut within a caption", range(4, 12), {4: "truncated"}),
        ("cut between samples", range(4, 12), {4: BREAK}),  # whether it had more members, nobody can know
        ("cut within the zeros at the end", (), {}),
        ("a flipped bit in the picture's header", (3, 4), {3: BREAK, 4: BREAK}),
        ("a flipped bit in the caption's header", (4, 5), {4: BREAK, 5: BREAK}),
        ("a flipped bit in the picture", (), {}),  # see below: only a checksum tells
        ("a wiped caption's header", (4, 5), {4: BREAK, 5: BREAK}),
        ("a caption that comes twice", (4,), {4: "member comes twice"}),
        ("a caption that comes back later", (4,), {4: "key comes back"}),
    ],
)
def test_each_damage_loses_these_samples_and_says_why(kind: str, lost: Any, reasons: dict[int, str]) -> None:
    index, delivered = opened(damaged(kind))
    want = {name: body for name, (_, body) in whole_members().items() if int(name[0]) not in lost}
    assert delivered.keys() == want.keys()
    assert dict(index.damage) == {f"{i:06d}": reason for i, reason in reasons.items()}
    other = [name for name, body in delivered.items() if body != want[name]]
    assert other == ([("000004", "jpg")] if kind == "a flipped bit in the picture" else [])


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("a flipped bit in the picture's header", set[str]()),
        ("a flipped bit in the caption's header", set[str]()),
        ("a flipped bit in the picture", {"jpg"}),
        ("cut within a picture", {"jpg", "txt"}),
        ("cut within a caption", {"txt"}),
    ],
)
def test_under_an_index_each_damage_loses_what_it_hit(tmp_path: Path, kind: str, refused: set[str]) -> None:
    """The index knows where everything lies, so a broken header loses nothing; a cut is filled up with zeros."""
    path = tmp_path / "a.tar"
    path.write_bytes(plain())
    prepare(tmp_path)
    path.write_bytes(damaged(kind).ljust(len(plain()), b"\0"))
    shards = open_shards([str(tmp_path)])
    assert len(shards) == 12 and not shards.damage
    for position in range(12):
        key = shards.name(position)[1]
        for extension in shards.extensions(position):
            behind = kind.startswith("cut") and position > 4
            if behind or (position == 4 and extension in refused):
                with pytest.raises(BadSample, match=f"checksum of {extension}"):
                    shards.read(position, extension)
            else:
                assert shards.read(position, extension) == whole_members()[key, extension][1]


def test_members_that_hold_nothing_or_nonsense_are_dropped_for_a_reason(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(picture, "PNG")
    whole = {"png": picture.getvalue(), "txt": b"a caption", "wav": wav(100), "json": b"{}"}
    faults = {
        ("png", b""): "image cannot be decoded (UnidentifiedImageError)",
        (
            "png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        ): "image cannot be decoded (UnidentifiedImageError)",
        ("png", whole["png"][:500]): "image cannot be decoded",
        ("txt", b""): "text is empty",
        ("txt", b"\xff"): "text is not UTF-8",
        ("wav", b""): "audio is not WAV, FLAC, Ogg or MP3",
        ("wav", wav(0)): "audio is empty",
        ("wav", whole["wav"][:20]): "audio cannot be decoded",
        ("json", b""): "json cannot be decoded",
        ("json", b"[]"): "json is not an object",
    }
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, (extension, data) in enumerate([("txt", whole["txt"]), *faults]):
            for name, content in (whole | {extension: data}).items():
                add(tar, f"{number:06d}.{name}", content)
    reader = Reader(open_shards([str(tmp_path)]), {kind: AsItIs(kind) for kind in ("image", "text", "audio")})
    assert set(reader.example(0).inputs) == {"image", "text", "audio"}
    for position, reason in enumerate(faults.values(), 1):
        with pytest.raises(BadSample) as caught:
            reader.example(position)
        assert str(caught.value).startswith(reason), position


@contextmanager
def memory_below(limit: int) -> Generator[None]:
    """Whatever happens inside takes less than so many bytes at any time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


class AsItIs(Transform):
    """Reads what it is given, in full."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, value: Any) -> Any:
        return value if self.kind == "text" else value.read()

    def collate(self, values: Any) -> list[Any]:
        return list(values)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_what_a_picture_hides_beside_its_pixels_is_not_inflated(kind: bytes) -> None:
    """40 MB of zeros in 40 kB, where a PNG has its comments and its colour profile."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    start = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    bomb = whole[:33] + chunk(kind, start + zlib.compress(bytes(40 << 20), 9)) + whole[33:]
    assert len(bomb) < 50_000 and decode.image(whole).shape == (3, 8, 8)
    with memory_below(8 << 20):
        try:
            assert decode.image(bomb).shape == (3, 8, 8)
        except BadSample as error:
            assert "image cannot be decoded" in str(error)


# -------------------------------------------------------------------------------------------- made to harm


def test_a_lost_name_of_an_extended_header_is_a_break() -> None:
    """The short name behind it is not the member's: `?` stands there for every letter that is not ASCII."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, extension in (("0é", "jpg"), ("0è", "jpg"), ("0è", "txt"), ("0ü", "txt"), ("1", "txt")):
            add(tar, f"{key}.{extension}", f"{key}.{extension}".encode())
    data = buffer.getvalue()
    assert len(opened(data)[1]) == 5
    for wrong in (b"XX path=", b"99 path=", b"12 path="):
        broken = data.replace(b"16 path=0\xc3\xa8.jpg", wrong + b"0\xc3\xa8.jpg", 1)
        assert broken != data
        index, delivered = opened(broken)
        assert set(delivered) == {("0ü", "txt"), ("1", "txt")}
        assert [key for key, _ in index.damage] == ["0è", "0é"]  # as for any break: on both sides of it


def test_pieces_of_a_sparse_file_are_no_content() -> None:
    """As GNU tar --sparse writes them: a map of the pieces stands where the content should."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "000000.txt", b"caption")
        facts = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "000001.npy"}
        facts |= {"GNU.sparse.realsize": "1000000"}
        add(tar, "GNUSparseFile.7/000001.npy", b"1\n999999\n1\n".ljust(BLOCK, b"\0") + b"x", pax_headers=facts)
        add(tar, "000001.txt", b"another")
    index, delivered = opened(buffer.getvalue())
    assert delivered == {("000000", "txt"): b"caption", ("000001", "txt"): b"another"}
    assert index.damage == [("GNUSparseFile.7/000001", "truncated")]


class Counting(io.FileIO):
    """A file that counts how often it is read."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        found = super().read(size)
        assert found is not None
        return found


def test_a_file_of_holes_is_read_in_large_steps(tmp_path: Path) -> None:
    """A terabyte of nothing takes no place on a disk; block by block it would take hours."""
    path = tmp_path / "holes.tar"
    path.write_bytes(plain())
    size = 256 << 20
    with open(path, "r+b") as file:
        file.truncate(size)
    with Counting(path) as counting:
        assert sum(entry is not None for entry in walk(counting, size)) == 20
        assert 256 < counting.reads < 400


@pytest.mark.timeout(20)
def test_many_small_records_take_no_time_that_grows_with_their_square() -> None:
    payload = b"6 a=b\n" * 170_000
    records = header(b"x", f"{len(payload):011o}\0".encode(), b"x") + payload.ljust(
        -(-len(payload) // 512) * 512, b"\0"
    )
    assert len(opened(records + plain())[1]) == 20


def test_keys_with_dots_do_not_take_the_square_of_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcontrast.tar._MAX_ENTRIES", 10_000)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(1000):
            add(tar, f"{i:04d}.x{i}.jpg", b"picture")
            add(tar, f"{i:04d}.txt", b"caption")
    index = scan(path)
    assert len(index.keys) == 1000 and "txt" in index.columns and len(index.columns) == 10
    assert dict(index.damage)[""] == "991 extensions beyond the first 10; do the keys have dots?"
    assert open_shards([str(path)]).read(999, "txt") == b"caption"


# -------------------------------------------------------------------------------------------- claims of size


def test_memory_is_taken_for_what_is_there_not_for_what_is_claimed(tmp_path: Path) -> None:
    """255 MiB by header, by extended header, by long name and by index; an hour by the header of a WAV."""
    claimed = 255 << 20
    big = f"{claimed:011o}\0".encode()
    tars = {
        "header": header(b"000000.txt", big, b"0"),
        "pax": (
            header(b"x", b"00000000022\0", b"x")
            + f"18 size={claimed}\n".encode().ljust(BLOCK, b"\0")
            + header(b"000000.txt", b"00000000005\0", b"0")
        ),
        "long name": header(b"x", big, b"L"),
    }
    folder = tmp_path / "indexed"
    with ShardWriter(folder) as writer:
        writer.write(Sample("000000", {"txt": "caption"}))
    index = json.loads(index_path(folder / "00000.tar").read_text("utf-8"))
    index["members"]["txt"]["size"] = [claimed]
    index_path(folder / "00000.tar").write_text(json.dumps(index))
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    del manifest["shards"][0]["index"]
    (folder / MANIFEST).write_text(json.dumps(manifest))

    sound = wav(frames=10, claims=3600 * 48_000)
    decode.audio(wav(frames=10))  # the library is loaded now
    with memory_below(8 << 20):
        for data in tars.values():
            assert opened(data + b"body\n".ljust(BLOCK, b"\0") + bytes(1024))[1] == {}
        with pytest.raises(BadSample, match="truncated"):
            open_shards([str(folder)]).read(0, "txt")
        with pytest.raises(BadSample):
            decode.audio(sound).read(0, 1000)


def test_gzip_is_never_inflated(tmp_path: Path) -> None:
    """What others chain into a decoder is here a member of a format that nothing reads."""
    bomb = zlib.compress(bytes(50 << 20), 9, 31)
    assert len(bomb) < 60_000
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.txt.gz", bomb)
        add(tar, "0.jpg", b"picture")
        add(tar, "1.txt", bomb)
        add(tar, "2.json", bomb)
    shards = open_shards([str(tmp_path)])
    assert shards.extensions(0) == ["jpg", "txt.gz"] and shards.counts["txt"] == 1
    for position, extension in ((1, "txt"), (2, "json")):
        read = decode.text if extension == "txt" else decode.metadata
        with memory_below(1 << 20), pytest.raises(BadSample, match="not UTF-8|cannot be decoded"):
            read(shards.read(position, extension))


def test_a_sound_whose_length_is_only_claimed_is_refused() -> None:
    for claims, channels in ((3601 * 16_000, 1), (3600 * 16_000, 8)):
        try:
            sound = decode.audio(wav(10, claims=claims, channels=channels))
        except BadSample as error:
            assert "above" in str(error)
        else:
            assert sound.frames == 10  # libsndfile looks how long the file is


def test_an_hour_of_silence_costs_what_its_crop_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(16_000 * 600, dtype=np.int16), 16_000, format="FLAC")
    data = buffer.getvalue()
    assert len(data) < 100_000
    with memory_below(2 << 20):
        sound = decode.audio(data)
        assert sound.frames == 9_600_000 and len(sound.read(16_000 * 300, 16_000)) == 16_000
    monkeypatch.setattr(decode, "_AUDIO_VALUES", 9_599_999)
    with pytest.raises(BadSample, match="audio above"):
        decode.audio(data)


def test_a_shard_that_goes_away_is_an_error_by_name(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write(Sample("000000", {"jpg": b"picture"}))
    shards = open_shards([str(tmp_path)])
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(ConfigError, match="00000.tar cannot be opened: No such file"):
        shards.read(0, "jpg")
    (tmp_path / "a.tar").mkdir()
    with pytest.raises(ConfigError, match="a.tar cannot be read: Is a directory"):
        scan(tmp_path / "a.tar")
