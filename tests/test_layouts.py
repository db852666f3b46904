"""Data as others lay them out, and what a spec file says about them: read as they are, refused by name."""

from __future__ import annotations

import json
import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import BagOfWords, MelConvNet, MultiEncoder
from mmcontrast.eval.embed import embed
from mmcontrast.eval.layouts import LAYOUTS, Reading, open_data
from mmcontrast.eval.published import PUBLISHED, published
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.sources import Files, Source
from mmcontrast.eval.spec import Spec, read_spec
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample
from tests import tiny


def sound(path: Path, pitch: int, seconds: float = 0.2) -> None:
    """A tone as 16-bit mono WAV at 8 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 20000 * np.sin(np.arange(int(8000 * seconds)) * pitch / 50)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.astype("<i2").tobytes())


def picture(path: Path, colour: str, shape: str = "square", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.png(colour, shape, seed=seed))


def text(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def records(source: Source) -> list[tuple[str, list[str], dict[str, Any]]]:
    assert isinstance(source, Files)
    return [(r.key, list(r.texts), dict(r.meta)) for r in source.records]


@pytest.fixture(scope="module")
def model() -> MultiEncoder:
    torch.manual_seed(0)
    config = tiny.model_config(
        encoders={
            "image": tiny.vit(),
            "audio": MelConvNet.Config(sample_rate=8000, seconds=0.2, mels=8, width=8, layers=1),
            "text": BagOfWords.Config(buckets=64, width=8),
        }
    )
    return config.build()


# --------------------------------------------------------------------------------------------------- captions


def test_all_captions_of_shards(tmp_path: Path, model: MultiEncoder) -> None:
    """What `prep coco` writes: the first caption as text, all of them in the metadata."""
    samples = tiny.samples(12)
    captions = {s.key: [f"{i} {j}" for j in range(1 + i % 3)] for i, s in enumerate(samples)}
    shards = tiny.write_shards(
        tmp_path / "set" / "test",
        [
            Sample(s.key, {"png": s.members["png"], "txt": captions[s.key][0], "json": {"captions": captions[s.key]}})
            for s in samples
        ],
    )
    first, all_of_them = open_data(shards), open_data(shards, Reading(texts=["json:captions"]))
    assert first.values(2, "text", "text") == ("2 0",) and all_of_them.values(2, "text", "text") == [
        "2 0",
        "2 1",
        "2 2",
    ]
    assert open_data(shards, Reading(texts=["txt", "json:captions"])).values(1, "text", "text") == ["1 0", "1 0", "1 1"]
    assert first.fingerprint != all_of_them.fingerprint
    data = embed(model, all_of_them, modalities=["image", "text"])
    assert data.rows["text"].tolist() == [i for i in range(12) for _ in range(1 + i % 3)]
    got = Retrieval.Config(data=(), k=(1, 3)).build().score(model, data).flat()
    # A picture has found its text if any of its captions is among the first; a caption has one picture.
    scores = (data.z["image"].double() @ data.z["text"].double().T).numpy()
    owner = data.rows["text"].numpy()
    for k in (1, 3):
        found = [(owner[np.argsort(-scores[i])[:k]] == i).any() for i in range(12)]
        assert got[f"image_to_text_recall@{k}"] == np.mean(found)
        found = [owner[j] in np.argsort(-scores[:, j])[:k] for j in range(len(owner))]
        assert got[f"text_to_image_recall@{k}"] == np.mean(found)
    spec: Spec = read_spec(f"coco:{tmp_path / 'set'}").build()
    assert spec.open().fingerprint == all_of_them.fingerprint and spec.config.tasks == {"retrieval": {}}
    for place in ("json", "capt", "txt:x"):
        with pytest.raises(ConfigError, match=f"texts: '{place}' is no text member and no field json:NAME"):
            open_data(shards, Reading(texts=[place]))


# --------------------------------------------------------------------------------------------------- folders


def test_a_folder_per_class(tmp_path: Path, model: MultiEncoder) -> None:
    for split, count in (("train", 1), ("val", 2)):
        for colour in ("red", "dark_blue"):
            for i in range(count):
                picture(tmp_path / split / colour / f"{i}.png", colour.removeprefix("dark_"), seed=i)
    text(tmp_path / "val" / "red" / "0.txt", "a  red", "square")
    with pytest.raises(ConfigError, match="has no 'test'; it has val, train: choose one with split"):
        open_data(str(tmp_path))
    source = open_data(str(tmp_path), Reading(split="val"))
    assert records(source) == [
        ("dark_blue/0.png", [], {"label": "dark blue", "folder": "dark_blue", "folder_number": 0}),
        ("dark_blue/1.png", [], {"label": "dark blue", "folder": "dark_blue", "folder_number": 0}),
        ("red/0.png", ["a red square"], {"label": "red", "folder": "red", "folder_number": 1}),
        ("red/1.png", [], {"label": "red", "folder": "red", "folder_number": 1}),
    ]
    assert source.classes == ["dark blue", "red"] and source.questions == ("zero_shot",)
    assert records(open_data(str(tmp_path / "val"))) == records(source)
    data = embed(model, source, modalities=["image", "text"])
    assert data.rows["text"].tolist() == [2] and len(data.z["image"]) == 4
    torch.testing.assert_close(data.z["image"][3:], model.encode("image", [tmp_path / "val/red/1.png"]))


def test_a_damaged_file_is_left_out_and_named(tmp_path: Path, model: MultiEncoder) -> None:
    picture(tmp_path / "red" / "0.png", "red")
    text(tmp_path / "red" / "1.png", "no picture")
    source = open_data(str(tmp_path))
    data = embed(model, source, modalities=["image"])
    assert list(data.keys) == ["red/0.png"] and data.skipped[0][1] == "red/1.png"
    (tmp_path / "red" / "0.png").unlink()
    with pytest.raises(ConfigError, match="none of the 2 samples of .*could be read: .*cannot be read"):
        embed(model, source, modalities=["image"])
    with pytest.raises(ConfigError, match="no sample has the modality 'audio': there are no files of audio"):
        embed(model, source, modalities=["audio"])
    with pytest.raises(BadSample, match="files of kind timeseries are not read"):
        Files(tmp_path, [replace_files(source, "timeseries")]).values(0, "x", "timeseries")


def replace_files(source: Source, kind: str) -> Any:
    from dataclasses import replace

    assert isinstance(source, Files)
    return replace(source.records[1], files={kind: source.records[1].files["image"]})


def test_the_fingerprint_is_of_the_files(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        picture(tmp_path / colour / "0.png", colour)
    first = open_data(str(tmp_path)).fingerprint
    assert open_data(str(tmp_path)).fingerprint == first
    os.utime(tmp_path / "red" / "0.png", ns=(1, 1))
    changed = open_data(str(tmp_path)).fingerprint
    picture(tmp_path / "red" / "1.png", "red")
    assert len({first, changed, open_data(str(tmp_path)).fingerprint}) == 3


# ---------------------------------------------------------------------------------------------------- tables


def test_tables_of_every_kind(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "caption": "one", "label": "x", "patient": "p1"},
        {"file_name": "b.png", "caption": "two", "label": "", "patient": "p1"},
        {"file_name": "a.png", "caption": "three", "label": "x", "patient": "p1"},
    ]
    want = [
        ("a.png", ["one", "three"], {"label": "x", "patient": "p1"}),
        ("b.png", ["two"], {"patient": "p1"}),
    ]
    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        lines = [separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]
        source = open_data(str(text(tmp_path / name, *lines)))
        assert records(source) == want and source.questions == ["zero_shot", "retrieval"]
    assert records(open_data(str(text(tmp_path / "t.jsonl", *(json.dumps(row) for row in rows))))) == want
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert records(open_data(str(tmp_path / "t.parquet"))) == want
    listed = text(tmp_path / "lists.jsonl", json.dumps({"image": "a.png", "captions": ["one", " two ", ""]}))
    assert records(open_data(str(listed))) == [("a.png", ["one", "two"], {})]
    home = tmp_path / "home"
    for name in ("other.csv", "metadata.csv"):
        text(home / name, "file_name,caption", f"{name}.png,x")
    assert records(open_data(str(home)))[0][0] == "metadata.csv.png"


def test_a_table_says_what_it_lacks(tmp_path: Path) -> None:
    table = text(tmp_path / "t.csv", "picture,words,kind", "a.png,one,x", "b.txt,two,y")
    with pytest.raises(ConfigError, match=r"no column of files .*name it in a spec: files"):
        open_data(str(table))
    with pytest.raises(ConfigError, match="has no column 'pictur'; did you mean 'picture'"):
        open_data(str(table), Reading(files="pictur"))
    with pytest.raises(ConfigError, match=r"row 2: b.txt is of no known kind: flac, jpeg"):
        open_data(str(table), Reading(files="picture"))
    with pytest.raises(ConfigError, match="row 1: nothing stands in the column 'picture'"):
        open_data(str(text(tmp_path / "gap.csv", "picture", '""')), Reading(files="picture"))
    for name, content, said in (
        ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("b.jsonl", b"{\n", "cannot be read as jsonl"),
        ("c.parquet", b"PAR1", "cannot be read as parquet"),
        ("d.csv", b"file\n\xff\xfe", "not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            open_data(str(tmp_path / name))


# ---------------------------------------------------------------------------------------------------- sounds


def test_esc50(tmp_path: Path) -> None:
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for i, (category, fold) in enumerate([("dog", 1), ("crying_baby", 5), ("dog", 5)]):
        sound(tmp_path / "audio" / f"{fold}-{i}-A.wav", i + 1)
        lines.append(f"{fold}-{i}-A.wav,{fold},{i},{category},False,{100 + i},A")
    text(tmp_path / "meta" / "esc50.csv", *lines)
    source = open_data(str(tmp_path))
    assert source.classes == ["crying baby", "dog"] and [m["label"] for _, _, m in records(source)] == [
        "dog",
        "crying baby",
        "dog",
    ]
    kept = read_spec(f"esc50:{tmp_path}")
    assert (kept.layout, kept.templates) == ("esc50", ("This is a sound of {c}.",))
    kept.where = {"fold": (5,)}
    assert [key for key, _, _ in records(kept.build().open())] == ["5-1-A", "5-2-A"]
    kept.where = {"fold": (7,)}
    with pytest.raises(ConfigError, match=r"no sample has fold \['7'\]"):
        kept.build().open()
    kept.where = {"flod": (5,)}
    with pytest.raises(ConfigError, match="no sample has 'flod'; did you mean 'fold'"):
        kept.build().open()


def test_clotho(tmp_path: Path, model: MultiEncoder) -> None:
    head = "file_name," + ",".join(f"caption_{i}" for i in range(1, 6))
    for part, names in (("evaluation", ["rain, heavy.wav", "bell.wav"]), ("development", ["x.wav"])):
        rows = [f'"{name}",' + ",".join(f"{name[:4]} {i}" for i in range(1, 6)) for name in names]
        text(tmp_path / f"clotho_captions_{part}.csv", head, *rows)
        for i, name in enumerate(names):
            sound(tmp_path / part / name, i + 1)
    source = open_data(str(tmp_path))
    assert records(source)[0][:2] == ("rain, heavy.wav", [f"rain {i}" for i in range(1, 6)])
    assert len(open_data(str(tmp_path), Reading(split="train"))) == 1
    with pytest.raises(ConfigError, match="has no captions of 'validation'; it has clotho_captions_development.csv"):
        open_data(str(tmp_path), Reading(split="val"))
    data = embed(model, source, modalities=["audio", "text"], batch_size=1)
    assert data.rows["text"].tolist() == [0] * 5 + [1] * 5 and data.rows["audio"].tolist() == [0, 1]
    torch.testing.assert_close(data.z["text"][6], model.encode("text", ["bell 2"])[0])
    found = Retrieval.Config(data=(), pair=("audio", "text")).build().score(model, data)
    assert found.counts == {"samples": 2, "audio_items": 2, "text_items": 10}


def test_audiocaps(tmp_path: Path) -> None:
    text(
        tmp_path / "dataset" / "test.csv",
        "audiocap_id,youtube_id,start_time,caption",
        "1,abc,30,a dog barks",
        "2,abc,30,barking",
        "3,gone,10,nothing is left",
        "4,def,0,rain",
    )
    sound(tmp_path / "dataset" / "audio" / "test" / "abc.wav", 1)
    sound(tmp_path / "dataset" / "audio" / "test" / "Ydef.wav", 2)
    source = open_data(str(tmp_path))
    assert records(source) == [("abc", ["a dog barks", "barking"], {}), ("def", ["rain"], {})]
    assert source.has("audio") and not source.has("image") and source.questions == ("retrieval",)
    for path in (tmp_path / "dataset" / "audio" / "test").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="none of the sounds that .*test.csv names lie in"):
        open_data(str(tmp_path))


def test_what_is_of_no_layout(tmp_path: Path) -> None:
    text(tmp_path / "notes.md", "nothing")
    with pytest.raises(ConfigError, match="is not laid out as anything that is known"):
        open_data(str(tmp_path))
    with pytest.raises(ConfigError, match="no layout 'esc51'; did you mean 'esc50'"):
        open_data(str(tmp_path), layout="esc51")
    with pytest.raises(ConfigError, match="no shards match"):
        open_data(str(tmp_path / "gone"))
    for name in LAYOUTS:
        with pytest.raises(ConfigError, match=f"is not laid out as {name}: there "):
            open_data(str(tmp_path), layout=name)
    shards = tiny.write_shards(tmp_path / "set" / "test", tiny.samples(4))
    assert len(open_data(str(tmp_path / "set"))) == len(open_data(shards)) == len(open_data([shards, shards])) == 4


# ----------------------------------------------------------------------------------------------------- specs


def test_spec_files_say_the_same_in_yaml_and_toml(tmp_path: Path) -> None:
    text(tmp_path / "names.txt", "red", "", "blue")
    yaml = text(
        tmp_path / "a.yaml",
        "data: pictures",
        "name: colours",
        "split: val",
        "classes: names.txt",
        'templates: ["a {c} thing"]',
        "prompts: {blue: [a sea, a sky], red: a rose}",
        "where: {folder: red}",
        "bootstrap_by: folder",
        "tasks: {zero_shot: , retrieval: {k: [1, 2]}}",
    )
    toml = text(
        tmp_path / "a.toml",
        'data = "pictures"',
        'name = "colours"',
        'split = "val"',
        'classes = ["red", "blue"]',
        'templates = ["a {c} thing"]',
        'prompts = {blue = ["a sea", "a sky"], red = ["a rose"]}',
        'where = {folder = ["red"]}',
        'bootstrap_by = "folder"',
        "tasks.zero_shot = {}",
        "tasks.retrieval.k = [1, 2]",
    )
    found = read_spec(str(yaml))
    assert found == read_spec(str(toml))
    assert (found.name, found.data, found.classes) == ("colours", (str(tmp_path / "pictures"),), ("red", "blue"))
    assert found.prompts == {"blue": ("a sea", "a sky"), "red": ("a rose",)}
    plain = read_spec(str(text(tmp_path / "b.yml", "data: [s3://bucket/a.tar, /abs/b.tar]", "tasks: [geometry]")))
    assert (plain.name, plain.data, plain.tasks) == ("b", ("s3://bucket/a.tar", "/abs/b.tar"), {"geometry": {}})


def test_a_spec_says_what_is_wrong(tmp_path: Path, model: MultiEncoder) -> None:
    for content, said in (
        ("name: x", "needs 'data'"),
        ("data: x\ntaks: [zero_shot]", "no field 'taks'; did you mean 'tasks'"),
        ("data: x\nsplit: 3", "split: expected str, got 3"),
        ("data: x\nclasses: gone.txt", "gone.txt cannot be read"),
        ("data: x\npublished: imagnet", "known as 'imagnet'; did you mean 'imagenet'"),
        ("- 1", "must say `data: …`"),
        ("data: [", "is not YAML"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_spec(str(text(tmp_path / "bad.yaml", content)))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(str(text(tmp_path / "bad.toml", "data = ")))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spec(str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="there is no task 'zero-shot'; did you mean 'zero_shot'"):
        Spec.Config(data=("x",), name="x", tasks={"zero-shot": {}}).build()
    picture(tmp_path / "set" / "red" / "0.png", "red")
    spec: Spec = Spec.Config(data=(str(tmp_path / "set"),), name="x", tasks={"retrieval": {"kk": [1]}}).build()
    with pytest.raises(ConfigError, match="x: retrieval: .* has no field 'kk'"):
        spec.questions(model, spec.open())
    wordless: MultiEncoder = tiny.model_config(encoders={"image": tiny.vit()}).build()
    with pytest.raises(ConfigError, match="the model has image: say with pair"):
        spec.questions(wordless, spec.open())


def test_well_known_data_sets() -> None:
    sizes = {"imagenet": (1000, 80), "cifar10": (10, 18), "cifar100": (100, 18)}
    for name in PUBLISHED:
        found = published(name)
        if name in sizes:
            assert (len(found["classes"]), len(found["templates"])) == sizes[name]
            assert len(set(found["templates"])) == sizes[name][1]
        assert all("{c}" in template for template in found.get("templates", ()))
    assert published("cifar10")["classes"][:3] == ["airplane", "automobile", "bird"]
    assert sorted(set(published("cifar100")["classes"])) == published("cifar100")["classes"]
    assert "a bad photo of a {c}." in published("imagenet")["templates"]
    assert published("imagenet")["classes"][0] == "tench"


def test_imagenet_folders_are_numbered_as_their_names(tmp_path: Path, model: MultiEncoder) -> None:
    for number, name in enumerate(("n01440764", "n01443537")):
        picture(tmp_path / "val" / name / "0.png", ("red", "blue")[number])
    config = read_spec(f"imagenet:{tmp_path / 'val'}")
    spec: Spec = config.build()
    source = spec.open()
    (task,) = spec.questions(model, source).values()
    found = task.score(model, embed(model, source, modalities=["image"]))
    assert (
        found.counts == {"classes": 1000, "samples": 2} and "998 of 1000 classes have no sample" in found.warnings[-1]
    )


def test_the_command_on_sounds_and_pictures(
    tmp_path: Path, model: MultiEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first modality that the data have is the one that is asked about."""
    run = tiny.write_run(tmp_path / "run", model.config)
    for i, name in enumerate(("low", "high")):
        for take in range(3):
            sound(tmp_path / "sounds" / name / f"{take}.wav", 5 * i + take + 1)
            picture(tmp_path / "pictures" / name / f"{take}.png", ("red", "blue")[i], seed=take)
    text(tmp_path / "sounds.yaml", "data: sounds", 'templates: ["the sound of {c}"]', "language: en")
    main(["eval", str(run), str(tmp_path / "sounds.yaml"), str(tmp_path / "pictures"), "--json", str(tmp_path / "f")])
    sounds, pictures = json.loads((tmp_path / "f").read_text())
    assert (sounds["dataset"], sounds["language"]) == ("sounds", "en") and pictures["language"] is None
    for found, modality in ((sounds, "audio"), (pictures, "image")):
        assert found["task"] == "zeroshot_classification" and found["metrics"]["samples"] == 6, modality
    names: Sequence[str] = ["the sound of high", "the sound of low"]
    from mmcontrast import load

    loaded = load(run)
    scores = loaded.encode("audio", sorted((tmp_path / "sounds").rglob("*.wav"))) @ loaded.encode("text", names).T
    assert sounds["metrics"]["acc1"] == float((scores.argmax(1) == torch.tensor([0, 0, 0, 1, 1, 1])).double().mean())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["eval", str(run), str(tmp_path / "gone.yaml")])
    assert "cannot be read" in capsys.readouterr().err
