"""The index: finds what an exact search finds, says when it is not what was built, and shows it on a page."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, build_index
from mmcontrast.eval.index.pages import search_page
from mmcontrast.eval.index.store import describe
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import open_shards
from tests import tiny

HOSTILE = "<script>alert(\"x\")</script> & 'quotes'"


@dataclass(frozen=True)
class Built:
    """A run, shards and an index of their pictures."""

    run: Path
    shards: str
    index: Path
    samples: list[Sample]


def _content() -> list[Sample]:
    """Pictures with texts, one text without a picture, one hostile caption, one picture without a text."""
    samples = tiny.samples(30)
    first, second, third = (dict(s.members) for s in samples[:3])
    del first["png"], third["txt"]
    second["txt"] = HOSTILE
    return [Sample(s.key, m) for s, m in zip(samples, (first, second, third), strict=False)] + samples[3:]


def _build(folder: Path) -> Built:
    run = tiny.write_run(folder / "run")
    samples = _content()
    shards = tiny.write_shards(folder / "shards", samples, per_shard=12)
    build_index(run, [shards], folder / "index")
    return Built(run, shards, folder / "index", samples)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return _build(tmp_path_factory.mktemp("index"))


@pytest.fixture
def built(template: Built, tmp_path: Path) -> Built:
    """An index of one's own; its run and shards are shared and must not be changed."""
    shutil.copytree(template.index, tmp_path / "index")
    return replace(template, index=tmp_path / "index")


@pytest.fixture
def own(tmp_path: Path) -> Built:
    """Run, shards and index of one's own."""
    return _build(tmp_path)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _one_sentence(error: pytest.ExceptionInfo[ConfigError]) -> bool:
    return "\n" not in str(error.value) and 20 < len(str(error.value)) < 500


# ------------------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("modality", ["text", "image"])
def test_search_finds_what_a_slow_exact_search_finds(built: Built, modality: str) -> None:
    queries = (
        ["a red square", "blue", "white corner"] if modality == "text" else [tiny.png("red"), tiny.png("blue", "bar")]
    )
    model = load(built.run)
    having = [i for i, s in enumerate(built.samples) if "png" in s.members]
    vectors = [model.encode("image", [built.samples[i].members["png"]])[0].tolist() for i in having]
    answers = Index(built.index).search(modality, queries, top=7)
    for query, hits in zip(queries, answers, strict=True):
        z = model.encode(modality, [query])[0].tolist()
        scores = {i: sum(a * b for a, b in zip(z, v, strict=True)) for i, v in zip(having, vectors, strict=True)}
        want = sorted(having, key=lambda i: -scores[i])[:7]
        assert [h.key for h in hits] == [built.samples[i].key for i in want]
        assert [h.score for h in hits] == pytest.approx([scores[i] for i in want], abs=1e-5)
        for hit, i in zip(hits, want, strict=True):
            text = built.samples[i].members.get("txt")
            assert (hit.position, hit.shard, hit.text) == (i, f"{i // 12:05d}.tar", text)
    assert answers[0] != answers[1]


def test_a_picture_finds_itself_first(built: Built) -> None:
    opened = Index(built.index)
    pictures = [s.members["png"] for s in built.samples if "png" in s.members]
    for picture, hits in zip(pictures, opened.search("image", pictures, top=2), strict=True):
        assert opened.member(hits[0], "image") == (picture, "png"), "the stored bytes must come back as they were"
        assert hits[0].score == pytest.approx(1, abs=1e-5) and hits[1].score < hits[0].score


def test_top_may_be_larger_than_the_index(built: Built) -> None:
    opened = Index(built.index)
    (hits,) = opened.search("text", ["red"], top=1000)
    assert len(hits) == 29 == len({h.key for h in hits}) and hits == sorted(hits, key=lambda h: -h.score)
    assert len(opened.search("text", ["red"], top=1)[0]) == 1
    with pytest.raises(ConfigError, match="top is 0; ask for at least 1"):
        opened.search("text", ["red"], top=0)


def test_texts_can_be_indexed_and_come_back_with_their_text(built: Built, tmp_path: Path) -> None:
    manifest = build_index(built.run, [built.shards], tmp_path / "texts", modality="text")
    assert (manifest["modality"], manifest["count"]) == ("text", 29)
    ((hit,),) = Index(tmp_path / "texts").search("text", [HOSTILE], top=1)
    assert (hit.key, hit.text, round(hit.score, 4)) == ("000001", HOSTILE, 1.0)


def test_pictures_alone_can_be_indexed(built: Built, tmp_path: Path) -> None:
    alone = [Sample(s.key, {"png": s.members["png"]}) for s in tiny.samples(5)]
    shards = tiny.write_shards(tmp_path / "alone", alone)
    manifest = build_index(built.run, [shards], tmp_path / "alone_index")
    assert manifest["quality"]["recall_at_10"] == 1.0 and manifest["quality"]["queries"] == 5
    assert manifest["quality"]["queries_from"] == "vectors of the index, each left out of its own answers"
    (hits,) = Index(tmp_path / "alone_index").search("text", ["red"])
    assert len(hits) == 5 and all(h.text is None for h in hits)


def test_a_query_that_cannot_be_read_is_named(built: Built, tmp_path: Path) -> None:
    opened = Index(built.index)
    (tmp_path / "notes.png").write_text("no picture")
    for modality, query, message in (
        ("image", str(tmp_path / "gone.png"), r"^a query cannot be used: [^ ]*gone.png cannot be read: No such file"),
        ("image", str(tmp_path / "notes.png"), r"^a query cannot be used: [^ ]*notes.png: image cannot be decoded"),
        ("image", str(tmp_path), r"cannot be read: Is a directory"),
        ("imge", "red", r"no modality 'imge'; did you mean 'image'\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened.search(modality, [query])


# ------------------------------------------------------------------------------------------------- building


def test_the_manifest_says_what_was_indexed(built: Built) -> None:
    manifest = json.loads((built.index / "manifest.json").read_text())
    facts = {k: manifest[k] for k in ("version", "generation", "modality", "dim", "metric", "normalisation", "joint")}
    assert facts == {
        "version": 2,
        "generation": 1,
        "modality": "image",
        "dim": 8,
        "metric": "inner product",
        "normalisation": "unit length",
        "joint": "sum",
    }
    facts = {k: manifest[k] for k in ("count", "deleted", "type", "skipped", "skipped_count")}
    assert facts == {"count": 29, "deleted": 0, "type": "Flat", "skipped": [], "skipped_count": 0}
    assert manifest["preprocessing"] == {"image": {"transform": "ImageTransform", "size": 16}}
    assert manifest["sources"] == [{"shards": [built.shards], "data": open_shards([built.shards]).fingerprint}]
    assert (manifest["quality"]["recall_at_10"], manifest["quality"]["queries"]) == (1.0, 28)
    assert manifest["libraries"].keys() >= {"faiss-cpu", "torch", "pyarrow"}
    assert Path(manifest["model"]) == built.run / "step-000001"
    for name, facts in manifest["segments"][0]["files"].items():
        data = (built.index / "segment-000001" / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert set(manifest["segments"][0]["files"]) == {"vectors.npy", "rows.parquet", "queries.npy"}


def test_an_index_that_is_there_is_replaced_only_when_asked(built: Built, tmp_path: Path) -> None:
    before = _files(built.index)
    other = tiny.write_run(tmp_path / "other", seed=1)
    with pytest.raises(
        ConfigError, match="index exists; choose another folder, or replace it with --overwrite"
    ) as error:
        build_index(other, [built.shards], built.index)
    assert _one_sentence(error) and _files(built.index) == before
    build_index(other, [built.shards], built.index, overwrite=True)
    assert len(_files(built.index)) == len(before) and not _files(built.index).items() <= before.items()
    assert Index(built.index).manifest["model"] == str(other / "step-000001")
    assert {p.name for p in tmp_path.iterdir()} == {"other", "index"}


def test_overwriting_deletes_nothing_but_an_index(built: Built) -> None:
    """`--overwrite` with a wrong folder must not cost a run."""
    before = sorted(p for p in built.run.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds more than an index \(assets\); choose another"):
        build_index(built.run, [built.shards], built.run, overwrite=True)
    assert sorted(p for p in built.run.rglob("*")) == before


def test_what_cannot_be_indexed_is_refused(built: Built, tmp_path: Path) -> None:
    texts = tiny.write_shards(tmp_path / "texts", [Sample("a", {"txt": "one"}), Sample("b", {"txt": "two"})])
    for arguments, message in (
        ((built.run, [built.shards], "audio"), "the model has no modality 'audio'; known: image, text"),
        ((built.run, [texts], "image"), "no sample has the modality 'image'"),
        ((built.run, [str(tmp_path / "none")], "image"), "no shards match"),
        ((tmp_path / "none", [built.shards], "image"), "there is no run folder"),
    ):
        model, shards, modality = arguments
        with pytest.raises(ConfigError, match=message) as error:
            build_index(model, shards, tmp_path / "out", modality=modality)
        assert _one_sentence(error) and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- opening


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest; `...` removes a field."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest = {k: v for k, v in manifest.items() if v is not ...}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _entry(index: Path, **changes: Any) -> None:
    """Change what the manifest says of the segment."""
    entry = json.loads((index / "manifest.json").read_text())["segments"][0]
    _rewrite(index, segments=[{k: v for k, v in (entry | changes).items() if v is not ...}])


def _sign(folder: Path, **changes: Any) -> None:
    """Give changed files their hashes, as somebody would who means harm or well."""
    files = {p.name: describe(p) for p in _segment(folder).iterdir()}
    _entry(folder, files=files, **changes)


def _segment(folder: Path) -> Path:
    return folder / "segment-000001"


def _replace_rows(folder: Path, **columns: Any) -> None:
    table = pq.read_table(_segment(folder) / "rows.parquet").to_pydict() | columns
    pq.write_table(pa.table(table), _segment(folder) / "rows.parquet")
    _sign(folder)


def _fewer_rows(folder: Path, n: int) -> None:
    path = _segment(folder) / "rows.parquet"
    pq.write_table(pq.read_table(path).slice(0, n), path)
    _sign(folder)


def _replace_vectors(folder: Path, array: Any) -> None:
    np.save(_segment(folder) / "vectors.npy", array)
    _sign(folder)


def _replace_structure(folder: Path, n: int, d: int, metric: int = faiss.METRIC_INNER_PRODUCT) -> None:
    index: Any = faiss.IndexFlat(d, metric)
    index.add(np.zeros((n, d), np.float32))
    faiss.write_index(index, str(_segment(folder) / "index.faiss"))
    _sign(folder, type="IDMap,Flat")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _garbage(folder: Path, name: str, **changes: Any) -> None:
    (_segment(folder) / name).write_bytes(b"nothing of the kind")
    _sign(folder, **changes)


def _files_of(folder: Path, **names: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["segments"][0]["files"]
    _entry(folder, files={names.get(n.partition(".")[0], n): f for n, f in files.items()})


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: _flip(_segment(f) / "vectors.npy"), "vectors.npy has changed since the index was written"),
    (lambda f: _flip(_segment(f) / "rows.parquet"), "rows.parquet has changed since the index was written"),
    (lambda f: (_segment(f) / "vectors.npy").unlink(), "the index is incomplete: .*vectors.npy"),
    (lambda f: (_segment(f) / "rows.parquet").unlink(), "the index is incomplete: .*rows.parquet"),
    (lambda f: shutil.rmtree(_segment(f)), "the index is incomplete"),
    (lambda f: (f / "manifest.json").unlink(), "is not an index"),
    (lambda f: (f / "manifest.json").write_text("{"), "is not an index"),
    (lambda f: (f / "manifest.json").write_text("[" * 100_000), "is not an index"),
    (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest of an index"),
    (lambda f: (f / "manifest.json").write_text("null"), "is not the manifest of an index"),
    (lambda f: _rewrite(f, segments=[]), "is not the manifest of an index"),
    (lambda f: _rewrite(f, segments=["segment-000001"]), "is not the manifest of an index"),
    (lambda f: _rewrite(f, quality=...), "is not the manifest of an index"),
    (lambda f: _rewrite(f, sources="x"), "is not the manifest of an index"),
    (lambda f: _entry(f, folder="../index/segment-000001"), "is not the manifest of an index"),
    (lambda f: _entry(f, rows=-1), "is not the manifest of an index"),
    (lambda f: _entry(f, effort={"probe": 1}), "is not the manifest of an index"),
    (lambda f: _entry(f, effort={"probe": "1", "rerank": 1}), "is not the manifest of an index"),
    (lambda f: _entry(f, files={}), "is not the manifest of an index"),
    (lambda f: _files_of(f, queries="../../model.safetensors"), "is not the manifest of an index"),
    (lambda f: _rewrite(f, version=3), "has version 3, this one reads 2: upgrade mmcontrast"),
    (lambda f: _rewrite(f, version=1), "has version 1, .*build it again"),
    (lambda f: _rewrite(f, model_hash="0" * 16), "was made with model_hash 0000.*their spaces differ"),
    (lambda f: _rewrite(f, preprocessing={}), "was made with preprocessing {}, .*their spaces differ"),
    (lambda f: _rewrite(f, normalisation="none"), "was made with normalisation none, .*their spaces differ"),
    (lambda f: _rewrite(f, metric="L2"), "scores by 'L2', searches by 'inner product'"),
    (lambda f: _rewrite(f, model="/gone/step-000001"), "needs the model /gone/.*say where with --model"),
    (lambda f: _rewrite(f, dim=9), "do not belong together"),
    (lambda f: _rewrite(f, count=3), "do not belong together"),
    (lambda f: _entry(f, rows=3), "do not belong together"),
    (lambda f: _entry(f, type="HNSW32"), "do not belong together"),
    (lambda f: _fewer_rows(f, 28), "do not belong together"),
    (lambda f: _replace_rows(f, extra=[[1]] * 29), "has other columns than an index has"),
    (lambda f: _replace_vectors(f, np.zeros((28, 8), "<f4")), "do not belong together"),
    (lambda f: _replace_vectors(f, np.zeros((29, 4), "<f4")), "do not belong together"),
    (lambda f: _replace_vectors(f, np.zeros((29, 8), "<f8")), "is no .npy of vectors"),
    (lambda f: _replace_vectors(f, np.array([{}] * 29, object)), "is no .npy of vectors"),
    (lambda f: _replace_structure(f, 28, 8), "do not belong together"),
    (lambda f: _replace_structure(f, 29, 4), "do not belong together"),
    (lambda f: _replace_structure(f, 29, 8, faiss.METRIC_L2), "does not score by the inner product"),
    (lambda f: _garbage(f, "index.faiss", type="HNSW32"), "cannot be read"),
    (lambda f: _garbage(f, "rows.parquet"), "cannot be read"),
    (lambda f: _garbage(f, "vectors.npy"), "is no .npy of vectors"),
    (lambda f: _garbage(f, "deleted-000002.npy"), "cannot be read"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_an_index_that_is_not_what_was_built_is_refused(
    built: Built, change: Callable[[Path], object], message: str
) -> None:
    change(built.index)
    with pytest.raises(ConfigError, match=message) as error:
        Index(built.index)
    assert _one_sentence(error)


def test_the_model_may_move_but_not_change(own: Built, tmp_path: Path) -> None:
    want = Index(own.index).search("text", ["red"])
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(own.run, moved)
    with pytest.raises(ConfigError, match="say where with --model"):
        Index(own.index)
    assert Index(own.index, model=moved).search("text", ["red"]) == want
    for name, config, seed in (("seed", None, 1), ("dim", tiny.model_config(dim=4), 0)):
        other = tiny.write_run(tmp_path / name, config, seed=seed)
        with pytest.raises(
            ConfigError, match="their spaces differ; give the right --model, or build it again"
        ) as error:
            Index(own.index, model=other)
        assert _one_sentence(error)


# ------------------------------------------------------------------------------------------------- the page


class _Page(HTMLParser):
    """Tags, texts and pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_every_hit(built: Built) -> None:
    import base64

    opened = Index(built.index)
    queries = ["a red square", HOSTILE]
    answers = opened.search("text", queries, top=29)
    page = search_page(opened, queries, answers)
    seen = _Page(page)
    assert len(seen.pictures) == 58 == seen.tags.count("li")
    sources = [p["src"] or "" for p in seen.pictures]
    assert all(s.startswith("data:image/webp;base64,") for s in sources), "drawn anew: no stored byte is handed on"
    first = cast(bytes, built.samples[answers[0][0].position].members["png"])
    shown = [Image.open(io.BytesIO(data)) for data in (base64.b64decode(sources[0].partition(",")[2]), first)]
    drawn, stored = (np.asarray(image.convert("RGB"), np.float64) for image in shown)
    assert drawn.shape == stored.shape and np.abs(drawn - stored).mean() < 20
    rest = re.sub(r'data:image/webp;base64,[^"]*', "", page)
    assert not re.search(r"https?:|//|url\(|@import|<link|<iframe", rest), "the page would ask the network"
    assert "no picture" not in seen.text

    assert "script" not in seen.tags and "<script" not in page.lower()
    assert seen.text.count(HOSTILE) == 3  # the query, and the caption under each query
    assert [p["alt"] for p in seen.pictures].count(HOSTILE) == 2
    assert "recall@10 against exact search 1.000" in seen.text and str(opened.manifest["model_hash"]) in seen.text


@pytest.mark.parametrize("fate", ["gone", "changed", "truncated"])
def test_without_its_shards_the_page_says_so(own: Built, fate: str) -> None:
    folder = Path(own.shards)
    if fate == "truncated":  # the first shard only: the manifest still agrees with none of it
        (folder / "00000.tar").write_bytes(b"")
    else:
        shutil.rmtree(folder)
    if fate == "changed":
        tiny.write_shards(folder, tiny.samples(30, seed=5), per_shard=12)
    opened = Index(own.index)
    answers = opened.search("text", ["red"], top=4)
    seen = _Page(search_page(opened, ["red"], answers))
    assert not seen.pictures and seen.text.count("no picture") == 4 == seen.tags.count("li")
    assert all((hit.text or hit.key) in seen.text for hit in answers[0])
