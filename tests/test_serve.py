"""The API of served indices: what it finds, tells and shows, asked in-process through all that a request passes."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.eval.index.build import build_index
from mmcontrast.eval.index.change import add, delete
from mmcontrast.eval.serve import shelf
from mmcontrast.eval.serve.app import create_app, open_shelves, run
from mmcontrast.shard_writer import Sample
from tests import tiny
from tests.served import HOSTILE, RATE, Served, b64, build, npy, series, wav


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return build(tmp_path_factory.mktemp("serve"))


# ------------------------------------------------------------------------------------------------- searching


def _slow(served: Served, vector: Any, modality: str = "image") -> dict[str, float]:
    """Key -> inner product with a vector, by the model alone."""
    extension = {"image": "png", "text": "txt"}[modality]
    model = load(served.run)
    scores: dict[str, float] = {}
    for sample in served.samples:
        value = sample.members.get(extension)
        if value is not None and not (modality == "image" and sample.key == "000007"):
            own = model.encode(modality, [value])[0].tolist()
            scores[sample.key] = sum(a * b for a, b in zip(own, vector, strict=True))
    return scores


def _agrees(hits: list[dict[str, Any]], scores: dict[str, float]) -> None:
    want = sorted(scores, key=lambda key: -scores[key])[: len(hits)]
    assert len(hits) > 1 and [h["key"] for h in hits] == want
    assert [h["score"] for h in hits] == pytest.approx([scores[key] for key in want], abs=1e-5)


def test_words_a_picture_a_sound_and_a_signal_find_what_a_slow_search_finds(served: Served) -> None:
    model = load(served.run)
    values = series(3)
    asked: list[tuple[dict[str, Any], Any]] = [
        ({"text": "a red square"}, model.encode("text", ["a red square"])),
        (
            {"modality": "image", "data": b64(tiny.png("blue", "bar"))},
            model.encode("image", [tiny.png("blue", "bar")]),
        ),
        ({"modality": "audio", "data": b64(wav())}, model.encode("audio", [wav()])),
        ({"modality": "ecg", "data": b64(npy(values))}, model.encode("ecg", [(values, 100, ("I", "II"))])),
        (
            {"modality": "ecg", "data": b64(npy(values)), "rate": 50, "channels": ["II", "I"]},
            model.encode("ecg", [(values, 50, ("II", "I"))]),
        ),
    ]
    orders = set[tuple[str, ...]]()
    for part, z in asked:
        hits = served.hits(part, top=7)
        _agrees(hits, _slow(served, z[0].tolist()))
        orders.add(tuple(h["key"] for h in hits))
    assert len(orders) == len(asked), "other queries must have other answers, or nothing is compared"


def test_parts_are_added_by_weight(served: Served) -> None:
    model = load(served.run)
    red, bar = (model.encode("text", [t])[0].numpy() for t in ("red", "bar"))
    blue = model.encode("image", [tiny.png("blue")])[0].numpy()
    total = 2 * red - 0.5 * bar + blue
    total /= np.sqrt((total * total).sum())
    parts = (
        {"text": "red", "weight": 2},
        {"text": "bar", "weight": -0.5},
        {"modality": "image", "data": b64(tiny.png("blue"))},
    )
    _agrees(served.hits(*parts, top=9), _slow(served, total.tolist()))
    answer = served.search({"text": "red"}, {"text": "red", "weight": -1})
    assert answer.status_code == 400 and "cancel each other" in answer.json()["error"]


def test_more_like_a_sample_leaves_it_out(served: Served) -> None:
    first = served.hits({"text": "red"}, top=1)[0]
    z = load(served.run).encode("image", [dict(served.samples[int(first["key"])].members)["png"]])[0].tolist()
    hits = served.hits({"like": first["id"]}, top=100)
    scores = _slow(served, z)
    assert scores.pop(first["key"]) == pytest.approx(1, abs=1e-5)
    assert len(hits) == len(scores)
    _agrees(hits, scores)


def test_more_like_a_sample_of_another_index(served: Served) -> None:
    """A text's own picture among pictures: asked by what the other index is of, since this model knows it."""
    own = next(h for h in served.hits({"text": "red"}, index="texts", top=100) if h["key"] == "000009")
    z = load(served.run).encode("text", [served.samples[9].members["txt"]])[0].tolist()
    _agrees(served.hits({"like": own["id"], "of": "texts"}, top=100), _slow(served, z))


def test_answers_pass_the_filter(served: Served) -> None:
    unfiltered = served.hits({"text": "a red square"}, top=100)
    answer = served.search(
        {"text": "a red square"}, top=100, where="label in ('red', 'blue') and shape != 'bar'"
    ).json()
    want = [h for h in unfiltered if h["metadata"].get("label") in ("red", "blue") and h["metadata"]["shape"] != "bar"]
    assert answer["hits"] == want and answer["passing"] == len(want) > 2 and answer["joint"] == "sum"
    assert served.search({"text": "a"}, where="label = 'none'").json()["hits"] == []
    (like, *_) = want
    hits = served.hits({"like": like["id"]}, where="label = 'red'")
    assert like["id"] not in {h["id"] for h in hits} and {h["metadata"]["label"] for h in hits} == {"red"}
    some = served.get("/api/indices/pictures/samples?count=100&where=label%20%3D%20'red'").json()
    assert {s["id"] for s in some} == {h["id"] for h in unfiltered if h["metadata"].get("label") == "red"}
    assert served.get("/api/indices/pictures/samples?where=label%20is").status_code == 400


def test_columns_tell_what_a_filter_may_ask_for(served: Served) -> None:
    found = {c["name"]: c for c in served.get("/api/indices/pictures/columns").json()}
    seen = [h["metadata"] for h in served.hits({"text": "a"}, top=100)]
    labels = [m.get("label") for m in seen]
    assert {v["value"]: v["count"] for v in found["label"]["values"]} == {
        name: labels.count(name) for name in set(labels) - {None}
    }
    assert found["label"]["lacking"] == labels.count(None) and found["label"]["kind"] == "text"
    assert (found["rate"]["low"], found["rate"]["high"], found["rate"]["values"]) == (100, 100, [])
    for name, column in found.items():  # what is told can be asked for
        for value in column["values"]:
            where = f"{name} = '{value['value']}'"
            assert served.search({"text": "a"}, where=where).json()["passing"] == value["count"]


def test_near_duplicates_come_in_groups(served: Served) -> None:
    model = load(served.run)
    pictures = {s.key: s.members["png"] for s in served.samples if s.key != "000007"}
    z = {key: model.encode("image", [png])[0] for key, png in pictures.items()}
    scores = {a: max(float(z[a] @ z[b]) for b in z if b != a) for a in z}
    threshold = sorted(scores.values())[-5]
    found = served.get(f"/api/indices/pictures/duplicates?threshold={threshold - 1e-4}").json()
    members = {s["key"]: s["score"] for g in found["groups"] for s in g["samples"]}
    want = {key: score for key, score in scores.items() if score >= threshold - 1e-4}
    assert members == pytest.approx(want, abs=1e-5) and 4 < len(want) < 19
    assert found["count"] == len(found["groups"]) and found["looked_at"] == 19
    assert found["redundant"] == len(want) - found["count"] == sum(g["count"] - 1 for g in found["groups"])
    assert served.get(f"/api/indices/pictures/duplicates?threshold={threshold - 1e-4}").json() == found
    only = served.get("/api/indices/pictures/duplicates?threshold=-1&where=label%20%3D%20'red'").json()
    assert {s["metadata"]["label"] for g in only["groups"] for s in g["samples"]} == {"red"} and only["count"] == 1
    for query, says in (
        ("threshold=2", "threshold: Input should be less than or equal to 1"),
        ("where=x", "ends where"),
    ):
        answer = served.get(f"/api/indices/pictures/duplicates?{query}")
        assert answer.status_code == 400 and says in answer.json()["error"]


def test_too_many_samples_are_not_compared_while_one_waits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcontrast.eval.serve.shelf._COMPARED", 10)
    answer = served.get("/api/indices/pictures/duplicates?threshold=0.12")
    assert (
        answer.status_code == 400 and "19 samples are too many to compare while you wait, 10" in answer.json()["error"]
    )
    assert served.get("/api/indices/pictures/duplicates?threshold=0.12&where=label%20%3D%20'red'").status_code == 200


def test_a_product_is_asked_where_the_model_was_trained_by_it(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.folders[0], tmp_path / "pictures")
    manifest = json.loads((tmp_path / "pictures" / "manifest.json").read_text())
    (tmp_path / "pictures" / "manifest.json").write_text(json.dumps(manifest | {"joint": "product"}))
    own = replace(served, app=create_app(open_shelves([tmp_path / "pictures"])))
    model = load(served.run)
    parts = [
        {"text": "red"},
        {"modality": "audio", "data": b64(wav())},
        {"modality": "ecg", "data": b64(npy(series(3)))},
    ]
    values = [("text", "red"), ("audio", wav()), ("ecg", (series(3), 100, ("I", "II")))]
    z = [model.encode(m, [v])[0].numpy() for m, v in values]
    answer = own.search(*parts, top=9).json()
    assert answer["joint"] == "product" and own.get("/api/indices").json()[0]["joint"] == "product"
    _agrees(answer["hits"], _slow(served, (z[0] * z[1] * z[2]).tolist()))
    total = z[0] + z[1] + z[2]
    answer = own.search(*parts, top=9, joint="sum").json()
    assert answer["joint"] == "sum"
    _agrees(answer["hits"], _slow(served, (total / np.sqrt((total * total).sum())).tolist()))
    answer = own.search(*parts[:2], joint="product")
    assert answer.status_code == 400 and "there is no ecg" in answer.json()["error"]


def test_answers_tell_what_a_sample_is_and_holds(served: Served) -> None:
    hits = {h["key"]: h for h in served.hits({"text": "red"}, index="texts", top=100)}
    assert len(hits) == 20
    plain = hits["000000"]
    assert {k: plain[k] for k in ("id", "shard", "text", "metadata")} == {
        "id": "0-0",
        "shard": "00000.tar",
        "text": "a red square",
        "metadata": {"label": "red", "shape": "square"},
    }
    kinds = {key: [(m["modality"], m["kind"]) for m in h["media"]] for key, h in hits.items()}
    assert kinds["000000"] == [("image", "image")] and kinds["000004"] == [("image", "image"), ("audio", "audio")]
    assert kinds["000003"] == [("image", "image"), ("audio", "audio"), ("ecg", "timeseries")]
    assert hits["000001"]["text"] == HOSTILE
    odd = hits["000002"]["metadata"]
    assert (odd["label"], odd["big"], odd["half"]) == ("odd", "inf", "?") and "null" not in json.dumps(odd)
    assert served.get("/api/indices/texts/samples/0-0").json() == {k: v for k, v in plain.items() if k != "score"}


def test_indices_tell_which_model_made_them(served: Served) -> None:
    pictures, texts = served.get("/api/indices").json()
    manifest = json.loads((served.folders[0] / "manifest.json").read_text())
    assert pictures["model"]["hash"] == manifest["model_hash"] and pictures["model"]["name"] == "run/step-000001"
    assert (pictures["name"], pictures["kind"], pictures["count"], pictures["readable"]) == (
        "pictures",
        "image",
        19,
        True,
    )
    assert (texts["name"], texts["kind"], texts["count"], texts["recall_at_10"]) == ("texts", "text", 20, 1.0)
    ecg = next(t for t in pictures["model"]["towers"] if t["name"] == "ecg")
    assert ecg == {"name": "ecg", "kind": "timeseries", "rate": 100.0, "channels": ["I", "II"]}
    assert str(served.run.parent) not in json.dumps([pictures, texts]), "where it lies on the disk is nobody's business"


def test_samples_at_random_are_those_of_the_seed(served: Served) -> None:
    def some(seed: int) -> list[str]:
        return [s["id"] for s in served.get(f"/api/indices/pictures/samples?count=8&seed={seed}").json()]

    assert some(1) == some(1) != some(2) and len(set(some(1))) == 8
    assert len(served.get("/api/indices/pictures/samples?count=100").json()) == 19


# ------------------------------------------------------------------------------------------------- media


def test_a_picture_is_drawn_anew(served: Served) -> None:
    answer = served.get("/api/indices/pictures/samples/0-0/media/image?side=16")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    with Image.open(io.BytesIO(answer.content)) as seen:
        assert (seen.format, seen.size) == ("WEBP", (16, 16))
    whole = served.get("/api/indices/pictures/samples/0-0/media/image").content
    with Image.open(io.BytesIO(whole)) as seen, Image.open(io.BytesIO(tiny.png("red"))) as stored:
        assert np.array_equal(np.array(seen.convert("RGB")), np.array(stored))
    assert whole != tiny.png("red")


def test_a_sound_is_played_in_parts(served: Served) -> None:
    path = "/api/indices/pictures/samples/0-4/media/audio"
    whole = served.get(path)
    assert whole.headers["content-type"] == "audio/wav" and whole.headers["accept-ranges"] == "bytes"
    with wave.open(io.BytesIO(whole.content)) as heard:
        assert (heard.getframerate(), heard.getnframes(), heard.getnchannels()) == (RATE, RATE // 2, 1)
        samples = np.frombuffer(heard.readframes(RATE), "<i2") / 32767
    want, _ = soundfile.read(io.BytesIO(wav(tone=1200.0)))
    assert np.abs(want).max() > 0.4 and np.abs(samples - want).max() < 1e-4
    part = served.get(path, range="bytes=100-199")
    assert part.status_code == 206 and part.content == whole.content[100:200]
    assert part.headers["content-range"] == f"bytes 100-199/{len(whole.content)}"
    assert served.get(path, range="bytes=8000-").content == whole.content[8000:]
    assert served.get(path, range="bytes=9999999-").status_code == 416
    assert served.get(path, range="bytes=5-", if_range='"other"').status_code == 200


def test_what_the_browser_has_is_not_sent_again(served: Served) -> None:
    path = "/api/indices/pictures/samples/0-0/media/image"
    tag = served.get(path).headers["etag"]
    again = served.get(path, if_none_match=tag)
    assert again.status_code == 304 and not again.content
    assert len({served.get(f"{path}?side={s}").headers["etag"] for s in (64, 128)} | {tag}) == 3


def test_a_plot_keeps_every_peak(served: Served) -> None:
    plot = served.get("/api/indices/pictures/samples/0-3/plot/ecg").json()
    assert (plot["rate"], plot["units"], [c["name"] for c in plot["channels"]]) == (100, "mV", ["I", "II"])
    for channel, line in zip(plot["channels"], series(3).astype(np.float32).T, strict=True):
        assert channel["low"] == channel["high"] == pytest.approx(line.tolist(), rel=1e-4)
    sound = served.get("/api/indices/pictures/samples/0-3/plot/audio").json()
    (line,) = sound["channels"]
    assert sound["seconds"] == 0.5 and len(line["low"]) == 600
    samples, _ = soundfile.read(io.BytesIO(wav(tone=900.0)))
    for i in (0, 17, 599):  # each column, by hand
        part = samples[4000 * i // 600 : 4000 * (i + 1) // 600]
        assert (line["low"][i], line["high"][i]) == (
            pytest.approx(part.min(), abs=1e-4),
            pytest.approx(part.max(), abs=1e-4),
        )


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("pictures/samples/0-99", "the index pictures has no sample 0-99"),
        ("pictures/samples/1-0", "the index pictures has no sample 1-0"),
        ("pictures/samples/0-7", "the index pictures has no sample 0-7"),  # in the shards, but not indexed
        ("pictures/samples/0-7/media/image", "the index pictures has no sample 0-7"),
        ("texts/samples/0-7/media/image", "image of sample 0-7 cannot be shown: image cannot be decoded"),
        ("pictures/samples/0-0/media/audio", "sample 0-0 has nothing of 'audio'"),
        ("pictures/samples/0-0/media/text", "sample 0-0 has nothing of 'text'"),
        ("pictures/samples/0-0/media/..%2f..%2fetc%2fpasswd", "Not Found"),
        ("pictures/samples/0-0/plot/image", "sample 0-0 has nothing of 'image'"),
        ("pictured/samples/0-0", "there is no index 'pictured'; did you mean 'pictures'?"),
        ("..%2f..%2fetc/samples/0-0", "Not Found"),
    ],
)
def test_nothing_but_media_of_indexed_samples_is_shown(served: Served, path: str, says: str) -> None:
    answer = served.get(f"/api/indices/{path}")
    assert answer.status_code == 404 and says in answer.json()["error"] and "\n" not in answer.json()["error"]


# ------------------------------------------------------------------------------------------------- opening


def test_indices_have_short_names_of_their_own(served: Served, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "pictures").symlink_to(served.folders[0])
    copies = [tmp_path / place / "a b" for place in ("one", "two")]
    for copy in copies:
        shutil.copytree(served.folders[0], copy)
    shelves = open_shelves([served.folders[1], *copies])
    assert list(shelves) == ["texts", "one-a-b", "two-a-b"]
    assert len({id(s.index.model) for s in shelves.values()}) == 1, "one model, held once"
    for folders, models, says in (
        ([], [], "serve needs at least one index"),
        ([served.folders[0]] * 2, [], "is named twice"),
        ([served.folders[0], tmp_path / "one" / "pictures"], [], "is named twice"),
        (served.folders, [served.run] * 3, "3 models for 2 indices; give one for all, or one for each"),
        ([tmp_path / "nowhere"], [], "is not an index"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_shelves(folders, models=models)


def test_without_its_shards_an_index_answers_and_says_so(served: Served, tmp_path: Path) -> None:
    shards = tiny.write_shards(tmp_path / "shards", tiny.samples(4))
    build_index(served.run, [shards], tmp_path / "index")
    (tmp_path / "shards").rename(tmp_path / "gone")
    shelves = open_shelves([tmp_path / "index"])
    other = Served(create_app(shelves), served.run, [tmp_path / "index"], [])
    assert other.get("/api/indices").json()[0]["readable"] is False
    hits = other.hits({"text": "red"}, index="index")
    assert len(hits) == 4 and all(h["media"] == [] and h["text"] for h in hits)
    assert other.get("/api/indices/index/samples/0-0/media/image").status_code == 404


def test_what_is_written_meanwhile_is_seen(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_FRESH_SECONDS", 0)
    folder = tmp_path / "index"
    shutil.copytree(served.folders[0], folder)
    other = Served(create_app(open_shelves([folder])), served.run, [folder], [])

    def found() -> list[str]:
        return [h["key"] for h in other.hits({"text": "red"}, index="index", top=100)]

    before = found()
    delete(folder, [before[0]])
    assert found() == before[1:]
    gone = f"/api/indices/index/samples/0-{int(before[0])}"
    for path in (gone, f"{gone}/media/image"):
        assert other.get(path).status_code == 404, "what was deleted is not shown either"
    new = Sample("new", {"png": tiny.png("white", seed=99), "txt": "brand new", "json": {"label": "fresh"}})
    add(folder, [tiny.write_shards(tmp_path / "more", [new])])
    assert set(found()) == {*before[1:], "new"} and len(found()) == len(before)
    (description,) = other.get("/api/indices").json()
    assert description["count"] == len(before)
    sample = other.get("/api/indices/index/samples/1-0").json()
    assert (sample["key"], sample["text"], sample["metadata"]) == ("new", "brand new", {"label": "fresh"})
    with Image.open(io.BytesIO(other.get("/api/indices/index/samples/1-0/media/image").content)) as seen:
        assert seen.size == (20, 20)
    z = load(served.run).encode("image", [new.members["png"]])[0].tolist()
    scores = _slow(served, z)
    hits = other.hits({"like": "1-0"}, index="index", top=100)
    assert [h["key"] for h in hits] == sorted((k for k in scores if k != before[0]), key=lambda k: -scores[k])
    (folder / "manifest.json").write_text("{}")
    assert set(found()) == {*before[1:], "new"}, "an index that was spoilt is served as it was"


def test_the_command_serves_until_it_is_interrupted(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} cannot be listened at: .*; choose another --port"):
            run(served.folders[:1], host="127.0.0.1", port=port)
    arguments = [sys.executable, "-m", "mmcontrast", "index", "serve", str(served.folders[0]), "--port", "0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert "pictures: 19 of image, made by the model run/step-000001" in lines[0]
        address = lines[1].split()[0]
        answer = httpx.post(f"{address}/api/search", json={"index": "pictures", "parts": [{"text": "red"}]}, timeout=30)
        assert answer.status_code == 200 and len(answer.json()["hits"]) == 19
        assert httpx.get(address, headers={"host": "evil.example"}, timeout=30).status_code == 421
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
