"""Raw data -> shards: what can be used is written, what cannot is refused by name, and no group is on two sides."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data_prep import emoji, index
from mmcontrast.data_prep.emoji import OpenMoji
from mmcontrast.data_prep.folder import Folder
from mmcontrast.data_prep.prepare import prepare
from mmcontrast.data_prep.table import Table
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import MANIFEST, open_shards

SPLITS = ("train", "val", "test")


def picture(number: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def written(out: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, list[dict[str, Any]]]:
    """Split -> its samples: member -> content, JSON decoded."""
    found: dict[str, list[dict[str, Any]]] = {}
    for split in splits:
        found[split] = []
        if not list((out / split).glob("*.tar")):
            continue
        shards = open_shards([str(out / split)])
        for i in range(len(shards)):
            members: dict[str, Any] = {e: shards.read(i, e) for e in shards.extensions(i)}
            if "json" in members:
                members["json"] = json.loads(members["json"])
            found[split].append(members | {"key": shards.name(i)[1]})
    return found


def everything(out: Path) -> list[dict[str, Any]]:
    return [sample for samples in written(out).values() for sample in samples]


# -------------------------------------------------------------------------------------------- folder


def test_captions_come_from_text_files_or_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    put(source / "dog.jpg", picture(1, "JPEG"))
    put(source / "dog.txt", "\ufeffa  dog\non grass\n")
    put(source / "golden_retriever" / "0001.PNG", picture(2))
    put(source / "golden_retriever" / "0002.webp", picture(3, "WEBP"))
    put(source / "golden_retriever" / "0002.txt", "ein Käse")
    put(source / "golden_retriever" / "0003.png", picture(4))
    put(source / "golden_retriever" / "0003.txt", "  \n")
    put(source / "golden_retriever" / "broken.jpg", picture(5, "JPEG")[:200])
    put(source / "golden_retriever" / "latin.jpg", picture(6, "JPEG"))
    put(source / "golden_retriever" / "latin.txt", "Käse".encode("latin-1"))
    put(source / "alone.png", picture(7))
    put(source / "notes.pdf", "no picture")
    summary = prepare(Folder(folder=source, val=0.0, test=0.0), tmp_path / "out")
    found = {s["json"]["file"]: s for s in everything(tmp_path / "out")}
    assert {file: s["txt"].decode() for file, s in found.items()} == {
        "dog.jpg": "a dog on grass",
        "golden_retriever/0001.PNG": "golden retriever",
        "golden_retriever/0002.webp": "ein Käse",
        "golden_retriever/0003.png": "golden retriever",
    }
    assert found["dog.jpg"]["jpg"] == picture(1, "JPEG")
    assert found["golden_retriever/0001.PNG"]["png"] == picture(2)
    assert found["golden_retriever/0002.webp"]["webp"] == picture(3, "WEBP")
    assert [s["json"].get("label") for s in found.values()] == [None] + ["golden retriever"] * 3
    refused = {r.where: r.reason for r in summary.refused}
    assert set(refused) == {"alone.png", "golden_retriever/broken.jpg", "golden_retriever/latin.jpg"}
    assert "no caption" in refused["alone.png"] and "cannot be decoded" in refused["golden_retriever/broken.jpg"]
    assert refused["golden_retriever/latin.jpg"] == "text is not UTF-8"
    assert "refused golden_retriever/broken.jpg" in capsys.readouterr().err


def test_equal_captions_stay_on_one_side(tmp_path: Path) -> None:
    for i in range(60):
        put(tmp_path / "in" / f"{i}.png", picture(i))
        put(tmp_path / "in" / f"{i}.txt", f"caption {i // 3}")
    prepare(Folder(folder=tmp_path / "in", val=0.25, test=0.25), tmp_path / "out")
    captions = {split: {s["txt"] for s in samples} for split, samples in written(tmp_path / "out").items()}
    assert len(everything(tmp_path / "out")) == 60 and min(map(len, captions.values())) > 0
    assert len(set.union(*captions.values())) == sum(map(len, captions.values())) == 20


def test_a_class_without_captions_is_divided(tmp_path: Path) -> None:
    for i in range(60):
        put(tmp_path / "in" / ("cat" if i % 2 else "dog") / f"{i}.png", picture(i))
    prepare(Folder(folder=tmp_path / "in", val=0.25, test=0.25), tmp_path / "out")
    labels = {split: {s["json"]["label"] for s in samples} for split, samples in written(tmp_path / "out").items()}
    assert labels == {split: {"cat", "dog"} for split in ("train", "val", "test")}


def test_file_names_that_are_not_unicode_do_not_stop_it(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path / "in") + b"/caf\xe9"
    os.makedirs(place)
    with open(place + b"/\xe8.png", "wb") as file:
        file.write(picture(1))
    prepare(Folder(folder=tmp_path / "in", val=0.0, test=0.0), tmp_path / "out")
    (sample,) = everything(tmp_path / "out")
    assert sample["txt"] == rb"caf\udce9" and sample["json"]["file"] == r"caf\udce9/\udce8.png"


def test_a_folder_that_gives_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        prepare(Folder(folder=tmp_path / "none", val=0.0, test=0.0), tmp_path / "out")
    put(tmp_path / "in" / "a.txt", "text alone")
    with pytest.raises(ConfigError, match="has no pictures; looked for jpg"):
        prepare(Folder(folder=tmp_path / "in", val=0.0, test=0.0), tmp_path / "out")
    put(tmp_path / "in" / "c" / "1.jpg", b"no picture")
    with pytest.raises(ConfigError, match=r"no usable sample.*1 refused.*c/1\.jpg: image cannot be decoded"):
        prepare(Folder(folder=tmp_path / "in", val=0.0, test=0.0), tmp_path / "out")


# -------------------------------------------------------------------------------------------- table


def pictures(where: Path, count: int) -> None:
    for i in range(count):
        put(where / "pics" / f"{i}.png", picture(i))


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {sample["key"]: sample for sample in everything(out)}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, 3)
    rows: list[dict[str, Any]] = [
        {"image": "pics/0.png", "text": 'a, "quoted"  caption', "patient": "p1", "label": "Käse"},
        {"image": "pics/1.png", "text": "two\nlines", "patient": "p1", "label": None},
        {"image": None, "text": "text alone", "patient": "p2", "label": "猫"},
        {"image": "pics/2.png", "text": None, "patient": "p3", "label": "x"},
        {"image": None, "text": None, "patient": "p3", "label": "x"},
        {"image": "pics/9.png", "text": "gone", "patient": "p3", "label": "x"},
        {"image": "pics/0.gif", "text": "no such format", "patient": "p3", "label": "x"},
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        put(path, "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows))
    else:
        import csv

        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        put(path, "\ufeff" + buffer.getvalue())
    summary = prepare(Table(table=path, val=0.0, test=0.0), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert found == {
        "00000001": {
            "key": "00000001",
            "png": picture(0),
            "txt": b'a, "quoted" caption',
            "json": {"patient": "p1", "label": "Käse"},
        },
        "00000002": {"key": "00000002", "png": picture(1), "txt": b"two lines", "json": {"patient": "p1"}},
        "00000003": {"key": "00000003", "txt": b"text alone", "json": {"patient": "p2", "label": "猫"}},
        "00000004": {"key": "00000004", "png": picture(2), "json": {"patient": "p3", "label": "x"}},
    }
    refused = {r.where: r.reason for r in summary.refused}
    assert set(refused) == {"row 5", "row 6, pics/9.png", "row 7, pics/0.gif"}
    assert refused["row 5"] == "neither image nor text"
    assert refused["row 6, pics/9.png"] == "cannot be read: No such file or directory"
    assert "not one of jpg" in refused["row 7, pics/0.gif"]


def test_a_group_stays_on_one_side_and_must_be_known(tmp_path: Path) -> None:
    lines = ["caption,patient,site"] + [f"caption {i},{i // 5 if i != 7 else ''},A" for i in range(300)]
    path = put(tmp_path / "t.csv", "\n".join(lines))
    with pytest.raises(ConfigError, match="no column 'image'"):
        prepare(Table(table=path, val=0.2, test=0.2, text_column="caption"), tmp_path / "out")
    with_image = [f"{line},{'' if i else 'image'}" for i, line in enumerate(lines)]
    path = put(tmp_path / "t.csv", "\n".join(with_image))
    summary = prepare(
        Table(table=path, val=0.2, test=0.2, text_column="caption", group_column="patient"), tmp_path / "out"
    )
    groups = {split: {s["json"]["patient"] for s in samples} for split, samples in written(tmp_path / "out").items()}
    assert min(map(len, groups.values())) > 3
    assert len(set.union(*groups.values())) == sum(map(len, groups.values())) == 60
    assert [(r.where, r.reason) for r in summary.refused] == [("row 8", "no patient, which decides its split")]
    # Without the column, each caption is a group, and patients would be on several sides.
    prepare(Table(table=path, val=0.2, test=0.2, text_column="caption"), tmp_path / "plain")
    sides = {
        split: {s["json"].get("patient") for s in samples} for split, samples in written(tmp_path / "plain").items()
    }
    assert sides["train"] & sides["test"]


def test_bad_lines_of_json_are_refused_by_their_number(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    lines = [
        '{"text": "half',
        '{"text": "a caption", "rare": 1}',
        "",
        "[1, 2]",
        '{"image": "pics/0.png", "text": "with picture"}',
        '{"image": ["pics/0.png"], "text": "b"}',
        '{"image": {"bytes": "..."}, "text": "c"}',
        '{"image": "pics/0\\u0000.png", "text": "d"}',
        '{"text": "lone surrogate \\ud83d"}',
        '{"text": "e", "label": NaN, "nested": {"a": 1}, "empty": " ", "ok": true}',
        "[" * 100_000,
    ]
    summary = prepare(Table(table=put(tmp_path / "t.jsonl", "\n".join(lines)), val=0.0, test=0.0), tmp_path / "out")
    found = rows_of(tmp_path / "out")
    assert found["00000005"]["png"] == picture(0)
    assert {key: (s["txt"], s.get("json")) for key, s in found.items()} == {
        "00000002": (b"a caption", {"rare": 1}),
        "00000005": (b"with picture", None),
        "00000010": (b"e", {"ok": True}),
    }
    reasons = {r.where: r.reason for r in summary.refused}
    assert reasons["row 1"] == reasons["row 4"] == reasons["row 11"] == "not a JSON object"
    assert reasons["row 6"] == "image must be the path of a file, not list"
    assert reasons["row 7"] == "image must be the path of a file, not dict"
    assert "null" in reasons["row 8, pics/0\0.png"] and "UTF-8" in reasons["row 9"] and len(reasons) == 7


@pytest.mark.parametrize(
    ("name", "data", "options", "text"),
    [
        ("t.csv", "image,txet\na.png,b\n", {}, "no column 'text'; did you mean 'txet'"),
        ("t.csv", "image;text\na.png;b\n", {}, "no column 'image'; .*image;text"),
        ("t.csv", "image,text\na.png,b\n", {"group_column": "patient"}, "no column 'patient'"),
        ("t.csv", "image,text\n", {}, "has no rows"),
        ("t.csv", "", {}, "has no rows"),
        ("t.csv", "image,text\nx.png,K\xe4se\n".encode("latin-1"), {}, "is not UTF-8; save it as UTF-8"),
        ("t.csv", "image,text\nx.png,b\n".encode("utf-16"), {}, "is not UTF-8"),
        ("t.csv", 'image,text\nx.png,"' + "x" * 200_000, {}, "cannot be read as csv"),
        ("t.jsonl", '{"image": "half\n[]\n', {}, "no column 'image'"),
        ("t.jsonl", "", {}, "has no rows"),
        ("t.parquet", "no parquet", {}, "cannot be read as parquet"),
        ("t.xlsx", "PK", {}, "no table that can be read: use .csv"),
        ("t.csv", "image,text\ngone.png,b\n", {}, "no usable sample.*row 1, gone.png: cannot be read: No such file"),
    ],
)
def test_a_table_that_cannot_be_used_is_an_error(
    tmp_path: Path, name: str, data: bytes | str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        prepare(Table(table=put(tmp_path / name, data), val=0.0, test=0.0, **options), tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no table"):
        prepare(Table(table=tmp_path / "none.csv", val=0.0, test=0.0), tmp_path / "out")
    assert not list(tmp_path.rglob("*.tar"))


# -------------------------------------------------------------------------------------------- emoji


def test_variants_of_a_concept_are_one_concept() -> None:
    assert {emoji.concept(n) for n in ("astronaut", "man astronaut", "woman astronaut")} == {"astronaut"}
    assert emoji.concept("person walking facing right") == emoji.concept("Woman walking") == "walking"
    assert emoji.concept("woman") == "woman" and emoji.concept("left arrow") == "left arrow"


def test_the_list_of_emoji_is_plausible() -> None:
    known = emoji.emojis()
    names = {e.name for e in known}
    assert 1_500 < len(known) < 2_500 and len({e.characters for e in known}) == len(known)
    assert {"astronaut", "woman astronaut", "red apple", "cat face", "pirate flag"} <= names
    assert not {"France", "Scotland", "England", "Wales"} & names
    assert not any("skin tone" in name or "_" in name or ":" in name for name in names)


def test_a_drawing_has_the_lines_and_no_colours() -> None:
    def pixels(color: bool) -> Any:
        data = emoji.render("🍎", color=color)
        assert data is not None
        return np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    coloured, drawn = pixels(True), pixels(False)
    assert coloured.shape == drawn.shape == (96, 96, 3)
    assert np.ptp(coloured, axis=2).max() > 100 and np.ptp(drawn, axis=2).max() < 10
    assert drawn.min() < 60 and drawn.mean() > 150
    assert (drawn[0] == 255).all() and emoji.render("\U0010fffd") is None
    (button,) = (e for e in emoji.emojis() if e.name == "NEW button")
    assert emoji.render(button.characters) and emoji.render(button.characters, color=False) is None  # no lines


CONCEPTS = ("astronaut", "firefighter", "walking", "new button")


@pytest.fixture(scope="module")
def emoji_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji")
    some = emoji.emojis()[::20] + [e for e in emoji.emojis() if e.concept in CONCEPTS]
    some = list(dict.fromkeys(some))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "emojis", lambda: some)
        summary = prepare(OpenMoji(val=0.15, test=0.2), out)
    found = written(out, (*SPLITS, "style"))
    assert {split: len(samples) for split, samples in found.items()} == summary.samples
    assert 0.9 * len(some) < sum(summary.samples[split] for split in SPLITS) <= len(some)
    return out


def test_emoji_concepts_are_on_one_side(emoji_shards: Path) -> None:
    found = written(emoji_shards)
    concepts = {split: {s["json"]["concept"] for s in samples} for split, samples in found.items()}
    assert min(map(len, concepts.values())) > 3
    assert len(set.union(*concepts.values())) == sum(map(len, concepts.values()))
    variants = [s["json"]["emoji"] for s in everything(emoji_shards) if s["json"]["concept"] == "astronaut"]
    assert len(variants) == 3
    for sample in everything(emoji_shards):
        assert sample["txt"].decode() == sample["json"]["label"]
        assert emoji.concept(sample["json"]["label"]) == sample["json"]["concept"]
        assert Image.open(io.BytesIO(sample["png"])).size == (96, 96)
    assert json.loads((emoji_shards / "train" / MANIFEST).read_text())["about"]["licence"] == "CC BY-SA 4.0"


def test_the_drawings_are_of_training_concepts_in_another_style(emoji_shards: Path) -> None:
    found = written(emoji_shards, (*SPLITS, "style"))
    coloured = {s["key"]: s for s in found["train"]}
    assert 0.5 * len(coloured) < len(found["style"]) <= len(coloured)
    for drawing in found["style"]:
        twin = coloured[drawing["key"]]
        assert drawing["json"] == twin["json"] and drawing["txt"] == twin["txt"]
        assert drawing["png"] != twin["png"]
        assert np.array(Image.open(io.BytesIO(drawing["png"])).convert("L")).min() < 128  # not a blank page


def test_wrong_shares_replace_no_emoji(emoji_shards: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in emoji_shards.rglob("*") if p.is_file())
    with pytest.raises(ConfigError, match="must be 0 or more"):
        prepare(OpenMoji(val=2.0), emoji_shards, overwrite=True)
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare(OpenMoji(), emoji_shards)
    assert sorted((p, p.stat().st_mtime_ns) for p in emoji_shards.rglob("*") if p.is_file()) == before


# -------------------------------------------------------------------------------------------- index, and the command


def test_an_index_tells_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        index.prepare(tmp_path / "none")
    with pytest.raises(ConfigError, match="no shards match"):
        index.prepare(tmp_path)
    put(tmp_path / "wrong" / "x.tar", "hello")
    with pytest.raises(ConfigError, match=r"no samples; x\.tar: .*not a tar"):
        index.prepare(tmp_path / "wrong")
    assert not (tmp_path / "wrong" / MANIFEST).exists()
    with ShardWriter(tmp_path / "train") as writer:
        for i in range(20):
            writer.write(Sample(f"{i:04d}", {"txt": f"caption {i}"}))
    shard = tmp_path / "train" / "00000.tar"
    data = shard.read_bytes()
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    shard.write_bytes(data[: 512 * 21])  # ten samples, and the header of another
    manifest = index.prepare(tmp_path / "train")
    assert manifest["samples"] == 10 and manifest["shards"][0]["damage"] == [["0010", "truncated"]]
    said = capsys.readouterr().err
    assert "left out 1 damaged" in said and "00000.tar: 0010: truncated" in said
    opened = open_shards([str(tmp_path / "train")])
    assert len(opened) == 10 and opened.damage == {str(shard): [("0010", "truncated")]}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["folder", "none", "out"], "there is no folder 'none'"),
        (["table", "none.csv", "out"], "there is no table 'none.csv'"),
        (["index", "none"], "there is no folder 'none'"),
        (["folder", "in", "file"], "cannot be made"),
        (["folder", "in", "out", "--val", "1"], "leave a share for training"),
    ],
)
def test_the_command_ends_with_one_line(
    tmp_path: Path,
    words: list[str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(tmp_path / "in" / "a" / "1.png", picture(1))
    put(tmp_path / "file", "a file")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["prep", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and text in said
    assert said.startswith("mmcontrast: error: ") and said.count("\n") == 1
