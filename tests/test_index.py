"""The index: finds what an exact search finds, says when it is not what was built, and shows it on a page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mmcontrast.eval.index as index_module
from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, build_index
from mmcontrast.eval.report import search_page
from mmcontrast.shard_writer import Sample
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
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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
        assert opened.picture(hits[0]) == picture, "the stored bytes must come back as they were"
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
    assert manifest["quality"] == {"recall_at_10": 1.0, "queries": 5.0}
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
    facts = {k: manifest[k] for k in ("version", "modality", "dim", "count", "type", "shards", "skipped")}
    assert facts == {
        "version": 1,
        "modality": "image",
        "dim": 8,
        "count": 29,
        "type": "flat",
        "shards": [built.shards],
        "skipped": [],
    }
    assert manifest["quality"] == {"recall_at_10": 1.0, "queries": 29.0}
    assert Path(manifest["model"]) == built.run / "step-000001"


def _shared(index: Any, vectors: Any, queries: Any, k: int) -> float:
    """recall@k by sorting every query's scores."""
    _, found = index.search(queries, k)
    shares: list[float] = []
    for query, places in zip(queries, found, strict=True):
        scores = [float(np.dot(query.astype(np.float64), v.astype(np.float64))) for v in vectors]
        exact = sorted(range(len(vectors)), key=lambda i: -scores[i])[:k]
        shares.append(len({*exact} & {*places.tolist()}) / k)
    return float(np.mean(shares))


def test_a_large_index_is_a_graph_whose_recall_is_measured(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "_FLAT_BELOW", 29)
    manifest = build_index(built.run, [built.shards], tmp_path / "graph")
    assert manifest["type"] == "hnsw32"
    opened = Index(tmp_path / "graph")
    model = load(built.run)
    vectors = model.encode("image", [s.members["png"] for s in built.samples if "png" in s.members]).numpy()
    texts = model.encode("text", [s.members["txt"] for s in built.samples if "txt" in s.members]).numpy()
    assert manifest["quality"]["recall_at_10"] == pytest.approx(_shared(opened.index, vectors, texts, 10))
    assert manifest["quality"]["queries"] == len(texts) == 29
    assert opened.search("text", ["red"], top=3) == Index(built.index).search("text", ["red"], top=3)
    monkeypatch.setattr(index_module, "_FLAT_BELOW", 30)
    assert build_index(built.run, [built.shards], tmp_path / "flat")["type"] == "flat"


def test_a_bad_graph_is_seen() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((n, 16)).astype(np.float32) for n in (600, 40))
    poor = faiss.IndexHNSWFlat(16, 2, faiss.METRIC_INNER_PRODUCT)
    poor.hnsw.efConstruction = poor.hnsw.efSearch = 1
    poor.add(vectors)  # pyright: ignore[reportCallIssue]
    measured = index_module._recall(poor, vectors, queries)  # pyright: ignore[reportPrivateUsage]
    assert measured == {"recall_at_10": pytest.approx(_shared(poor, vectors, queries, 10)), "queries": 40.0}
    assert 0.01 < measured["recall_at_10"] < 0.9


def test_an_index_that_is_there_is_replaced_only_when_asked(built: Built, tmp_path: Path) -> None:
    before = _files(built.index)
    other = tiny.write_run(tmp_path / "other", seed=1)
    with pytest.raises(
        ConfigError, match="index exists; choose another folder, or replace it with --overwrite"
    ) as error:
        build_index(other, [built.shards], built.index)
    assert _one_sentence(error) and _files(built.index) == before
    build_index(other, [built.shards], built.index, overwrite=True)
    assert _files(built.index).keys() == before.keys() and _files(built.index) != before
    assert Index(built.index).manifest["model"] == str(other / "step-000001")
    assert {p.name for p in tmp_path.iterdir()} == {"other", "index"}


def test_overwriting_deletes_nothing_but_an_index(built: Built) -> None:
    """`--overwrite` with a wrong folder must not cost a run."""
    before = sorted(p for p in built.run.rglob("*"))
    with pytest.raises(ConfigError, match="holds more than an index, and --overwrite would delete it"):
        build_index(built.run, [built.shards], built.run, overwrite=True)
    assert sorted(p for p in built.run.rglob("*")) == before


@pytest.mark.parametrize("where", ["faiss.write_index", "pyarrow.parquet.write_table", "json.dumps"])
def test_a_crash_while_building_leaves_the_old_index(built: Built, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _files(built.index)

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, crash)
        build_index(built.run, [built.shards], built.index, overwrite=True)
    assert _files(built.index) == before and len(Index(built.index).search("text", ["red"])[0]) == 5
    assert not [p for p in built.index.parent.iterdir() if p.suffix], "something half-made was left behind"


def test_what_a_killed_build_left_is_no_obstacle(built: Built) -> None:
    for end in (".old", ".tmp"):
        shutil.copytree(built.index, built.index.with_name("index" + end))
        (built.index.with_name("index" + end) / "junk").touch()
    build_index(built.run, [built.shards], built.index, overwrite=True)
    assert not [p for p in built.index.parent.iterdir() if p.suffix] and "junk" not in _files(built.index)
    assert len(Index(built.index).search("text", ["red"])[0]) == 5


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


def _sign(folder: Path) -> None:
    """Give changed files their hashes, as somebody would who means harm or well."""
    names = ("index.faiss", "rows.parquet")
    digest: Callable[[Path], str] = index_module._hash  # pyright: ignore[reportPrivateUsage]
    _rewrite(folder, files={name: digest(folder / name) for name in names})


def _replace_rows(folder: Path, **columns: Any) -> None:
    table = pq.read_table(folder / "rows.parquet").to_pydict() | columns
    pq.write_table(pa.table(table), folder / "rows.parquet")
    _sign(folder)


def _replace_vectors(folder: Path, n: int, d: int) -> None:
    index = faiss.IndexFlatIP(d)
    index.add(np.zeros((n, d), np.float32))  # pyright: ignore[reportCallIssue]
    faiss.write_index(index, str(folder / "index.faiss"))
    _sign(folder)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _no_faiss_file(folder: Path) -> None:
    (folder / "index.faiss").write_bytes(b"no index at all")
    _sign(folder)


def _no_parquet_file(folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(b"no table at all")
    _sign(folder)


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: _flip(f / "index.faiss"), "index.faiss has changed since the index was built"),
    (lambda f: _flip(f / "rows.parquet"), "rows.parquet has changed since the index was built"),
    (lambda f: (f / "index.faiss").unlink(), "the index is incomplete: .*index.faiss"),
    (lambda f: (f / "rows.parquet").unlink(), "the index is incomplete: .*rows.parquet"),
    (lambda f: (f / "manifest.json").unlink(), "is not an index"),
    (lambda f: (f / "manifest.json").write_text("{"), "is not an index"),
    (lambda f: (f / "manifest.json").write_text("[]"), "is not the manifest of an index"),
    (lambda f: (f / "manifest.json").write_text("null"), "is not the manifest of an index"),
    (lambda f: _rewrite(f, files={}), "is not the manifest of an index"),
    (lambda f: _rewrite(f, files=["index.faiss", "rows.parquet"]), "is not the manifest of an index"),
    (lambda f: _rewrite(f, quality=...), "is not the manifest of an index"),
    (lambda f: _rewrite(f, shards="x"), "is not the manifest of an index"),
    (lambda f: _rewrite(f, version=2), "has version 2, this one reads 1: upgrade mmcontrast"),
    (lambda f: _rewrite(f, model_hash="0" * 16), "was made by the model 0000.*their spaces differ"),
    (lambda f: _rewrite(f, model="/gone/step-000001"), "needs the model /gone/.*say where with --model"),
    (lambda f: _rewrite(f, dim=9), "do not belong together"),
    (lambda f: _rewrite(f, count=3), "do not belong together"),
    (lambda f: _replace_rows(f, position=["0"] * 29), "do not belong together"),
    (lambda f: _replace_rows(f, extra=[1] * 29), "do not belong together"),
    (lambda f: _replace_vectors(f, 28, 8), "do not belong together"),
    (lambda f: _replace_vectors(f, 29, 4), "do not belong together"),
    (_no_faiss_file, "cannot be read"),
    (_no_parquet_file, "cannot be read"),
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
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    first = built.samples[answers[0][0].position].members["png"]
    assert base64.b64decode(sources[0].partition(",")[2]) == first
    rest = re.sub(r"data:image/png;base64,[^']*", "", page)
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
