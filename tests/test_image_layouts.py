"""Corpora of pictures, each as a small copy of the real layout that the test writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.coco import COCO
from mmcontrast.data_prep.flickr30k import Flickr30k
from mmcontrast.data_prep.imagefolder import ImageFolder
from mmcontrast.data_prep.prepare import SUMMARY, prepare
from tests.prepared import about, written


def write_picture(path: Path, shade: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (shade, len(path.name), 90)).save(path, "JPEG" if path.suffix != ".png" else "PNG")
    return path.read_bytes()


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def refused(out: Path) -> dict[str, str]:
    return dict(json.loads((out / SUMMARY).read_text())["refused"])


# -------------------------------------------------------------------------------------------- captions


def karpathy(number: int, split: str, file: str, **more: Any) -> dict[str, Any]:
    said = [f" A {file} seen {k}. " for k in range(5)]
    sentences = [{"tokens": s.split(), "raw": s, "imgid": number, "sentid": 5 * number + k} for k, s in enumerate(said)]
    ids = [s["sentid"] for s in sentences]
    return {"sentids": ids, "imgid": number, "sentences": sentences, "split": split, "filename": file, **more}


def test_flickr30k(tmp_path: Path) -> None:
    folder, files = tmp_path / "flickr30k", [f"10000{k}.jpg" for k in range(6)]
    pictures = {file: write_picture(folder / "flickr30k-images" / file, 40 * k) for k, file in enumerate(files[:4])}
    (folder / "flickr30k-images" / files[5]).write_bytes(pictures[files[0]][:200])
    splits = ("train", "val", "test", "train", "train", "test")
    images = [karpathy(k, split, file) for k, (split, file) in enumerate(zip(splits, files, strict=True))]
    images[3]["sentences"] = []
    write_json(folder / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    out = tmp_path / "out"
    assert prepare(Flickr30k(folder=folder), out).samples == {"train": 1, "val": 1, "test": 1}
    for sample in written(out):
        file = sample.meta["file"]
        assert sample.split == splits[files.index(file)] and sample.members["jpg"] == pictures[file]
        assert sample.meta["captions"] == [f"A {file} seen {k}." for k in range(5)]
        assert sample.text == f"A {file} seen 0." and sample.meta["id"] == files.index(file)
    found = refused(out)
    assert found["dataset_flickr30k.json, row 4, 100003.jpg"] == "no caption"
    assert found["dataset_flickr30k.json, row 5, 100004.jpg"] == "cannot be read: No such file or directory"
    assert found["dataset_flickr30k.json, row 6, 100005.jpg"].startswith("image cannot be decoded")
    assert "research" in about(out)["licence"]
    with pytest.raises(ConfigError, match="has none of dataset_flickr30k.json"):
        prepare(Flickr30k(folder=tmp_path), tmp_path / "none")
    write_json(folder / "dataset_flickr30k.json", {"images": ["x"]})
    with pytest.raises(ConfigError, match="no list of objects 'images'"):
        prepare(Flickr30k(folder=folder), tmp_path / "none")


def test_coco_in_karpathy_s_splits(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    images: list[dict[str, Any]] = []
    for number, (split, part) in enumerate(
        [("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014"), ("dev", "val2014")]
    ):
        file = f"COCO_{part}_{number:012d}.jpg"
        write_picture(folder / part / file, 30 * number)
        images.append(karpathy(number, split, file, filepath=part, cocoid=1000 + number))
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    out = tmp_path / "out"
    assert prepare(COCO(folder=folder), out).samples == {"train": 2, "val": 1, "test": 1}
    for sample in written(out):
        entry = images[sample.meta["id"] - 1000]
        assert sample.split == ("train" if entry["split"] == "restval" else entry["split"])
        assert sample.members["jpg"] == (folder / entry["filepath"] / entry["filename"]).read_bytes()
        assert sample.meta["captions"][4] == f"A {entry['filename']} seen 4."
    assert list(refused(out).values()) == ["no split that is known"]


def test_coco_as_it_is_divided(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    url = "http://creativecommons.org/licenses/by/2.0/"
    for split, first in (("train", 10), ("val", 20)):
        images = [{"license": 4, "file_name": f"{first + k:012d}.jpg", "id": first + k} for k in range(3)]
        for entry in images[:2]:
            write_picture(folder / f"{split}2017" / str(entry["file_name"]), first)
        # Annotations come in no order.
        said = [
            {"image_id": first + k, "id": 100 * j + k, "caption": f"{j} of {first + k}"}
            for j in range(5)
            for k in (1, 0)
        ]
        licences = [{"url": url, "id": 4, "name": "Attribution License"}]
        value = {"info": {}, "licenses": licences, "images": images, "annotations": said}
        write_json(folder / "annotations" / f"captions_{split}2017.json", value)
    out = tmp_path / "out"
    assert prepare(COCO(folder=folder, division="2017"), out).samples == {"train": 2, "val": 2}
    for sample in written(out):
        assert sample.meta["captions"] == [f"{j} of {sample.meta['id']}" for j in range(5)]
        assert sample.meta["licence"] == url
        assert sample.members["jpg"] == (folder / f"{sample.split}2017" / sample.meta["file"]).read_bytes()
    assert list(refused(out)) == [
        "captions_train2017.json, row 3, 000000000012.jpg",
        "captions_val2017.json, row 3, 000000000022.jpg",
    ]


# -------------------------------------------------------------------------------------------- classes

NAMES = {"n01440764": "tench", "n01443537": "goldfish", "n02012849": "crane bird"}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for k, kind in enumerate(NAMES):
            write_picture(folder / split / kind / f"{kind}_{split}.JPEG", 50 * k)
    (folder / "val" / "n01440764" / "broken.JPEG").write_bytes(b"no picture")
    (folder / "train" / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    return folder


def test_imagefolder(imagenet: Path, tmp_path: Path) -> None:
    lines = "".join(f"{kind} {name}, Another name\n" for kind, name in NAMES.items()) + "n99999999 not there\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(lines)
    words = {"tench": {"synset_id": "n01440764", "ar": "التنش", "en": "tench", "cls_id": 0}}
    write_json(tmp_path / "translations.json", words)
    source = ImageFolder(
        folder=imagenet, names=str(tmp_path / "LOC_synset_mapping.txt"), translations=tmp_path / "translations.json"
    )
    out = tmp_path / "out"
    assert prepare(source, out).samples == {"train": 3, "val": 3}
    for sample in written(out):
        kind = sample.meta["class"]
        assert sample.text == sample.meta["label"] == NAMES[kind]
        assert sample.members["jpeg"] == (imagenet / sample.split / kind / f"{kind}_{sample.split}.JPEG").read_bytes()
        assert sample.meta.get("names") == ({"ar": "التنش", "en": "tench"} if kind == "n01440764" else None)
    assert list(refused(out)) == ["val/n01440764/broken.JPEG"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("words.txt", "".join(f"{kind}\t{name}\n" for kind, name in NAMES.items())),
        ("classnames.txt", "".join(f"{name}\n" for name in NAMES.values())),
        ("imagenet_class_index.json", json.dumps({str(k): [*pair] for k, pair in enumerate(NAMES.items())})),
        ("names.json", json.dumps({kind: name.replace(" ", "_") for kind, name in NAMES.items()})),
    ],
)
def test_names_of_classes_in_all_their_forms(imagenet: Path, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    rows = ImageFolder(folder=imagenet, names=str(tmp_path / file)).rows()
    assert {row.data[2]["class"]: row.data[2]["label"] for row in rows} == NAMES


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("few.txt", "tench\ngoldfish\n", "2 names for 3 folders"),
        ("lacks.json", '{"n01440764": "tench"}', "no name for 2 of 3 classes, such as 'n01443537'"),
        ("twice.txt", "crane\ntench\ncrane\n", "call both n01440764 and others 'crane'"),
        ("odd.json", "[1, 2]", "cannot be read as names"),
        ("odd2.json", '{"a": 3}', "neither a name"),
    ],
)
def test_names_that_do_not_fit_are_refused(imagenet: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=message):
        ImageFolder(folder=imagenet, names=str(tmp_path / file)).rows()


def test_what_is_no_imagefolder_is_told(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has none of train, val, test.*prep folder"):
        prepare(ImageFolder(folder=imagenet / "train"), tmp_path / "out")
    with pytest.raises(ConfigError, match="ImageNet has 1000 names for 3 folders"):
        ImageFolder(folder=imagenet, names="imagenet").rows()
    (tmp_path / "translations.json").write_text('{"tench": "x"}')
    with pytest.raises(ConfigError, match="cannot be read as translations"):
        ImageFolder(folder=imagenet, translations=tmp_path / "translations.json").rows()
