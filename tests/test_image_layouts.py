"""Corpora of pictures, each as a small copy of the real layout that the test writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data_prep.coco import COCO
from mmcontrast.data_prep.flickr30k import Flickr30k
from mmcontrast.data_prep.imagefolder import ImageFolder
from mmcontrast.data_prep.prepare import SUMMARY, prepare
from mmcontrast.shards import open_shards, read_manifest
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


# -------------------------------------------------------------------------------------------- img2dataset


def img2dataset(folder: Path, shard: int, good: int, **failed: int) -> None:
    """As it writes them: keys of shard and number, the json with what is known of a picture, a parquet, statistics."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = [f"{shard:05d}{number:04d}" for number in range(good)]
    rows = [{"url": f"http://x/{k}", "caption": f"caption {k}", "key": k, "status": "success"} for k in keys]
    with TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
        for key, row in zip(keys, rows, strict=True):
            jpg = write_picture(folder / "picture.jpg", shard)
            tar.write({"__key__": key, "jpg": jpg, "txt": row["caption"], "json": row})
    (folder / "picture.jpg").unlink()
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    statuses = {"success": good, "HTTP Error 404: Not Found": sum(failed.values())}
    counts = {"count": good + sum(failed.values()), "successes": good, **failed}
    times = {"duration": 3.5, "start_time": 1.0, "end_time": 4.5}
    write_json(folder / f"{shard:05d}_stats.json", {**counts, **times, "status_dict": statuses})


def test_img2dataset_s_output_gets_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    img2dataset(tmp_path, 0, 5, failed_to_download=3, failed_to_resize=0)
    img2dataset(tmp_path, 1, 4, failed_to_download=1, failed_to_resize=0)
    tars = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    main(["prep", "index", str(tmp_path)])
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["samples"] == 9
    assert manifest["about"] == {
        "source": "img2dataset",
        "count": 13,
        "successes": 9,
        "failed_to_download": 4,
        "failed_to_resize": 0,
        "failures": {"HTTP Error 404: Not Found": 4},
    }
    assert "got 9 of 13 pictures" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == tars
    shards = open_shards([str(tmp_path)])
    assert [shards.read(i, "txt") for i in (0, 8)] == [b"caption 000000000", b"caption 000010003"]

    # A tar that was cut off has no statistics; one that lost samples has other ones.
    (tmp_path / "00000_stats.json").unlink()
    write_json(
        tmp_path / "00001_stats.json", json.loads((tmp_path / "00001_stats.json").read_text()) | {"successes": 7}
    )
    main(["prep", "index", str(tmp_path), "--overwrite"])
    said = capsys.readouterr().err
    assert "1 tars were not finished: no _stats.json, such as 00000.tar" in said
    assert "00001.tar has 4 samples, 00001_stats.json says 7" in said
    (tmp_path / "00001_stats.json").write_text("[]")
    main(["prep", "index", str(tmp_path), "--overwrite"])
    assert "00001_stats.json cannot be read" in capsys.readouterr().err
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["about"] == {"source": "indexed"}
