"""Structures: which one is chosen and why, what it takes, and that what is said of its recall is so."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, build_index, quality
from mmcontrast.eval.index.build import Asked
from mmcontrast.eval.index.choice import Choice, building_cost, choose, lists_of, size_of
from mmcontrast.eval.index.quality import Questions, ask, measure, tune
from mmcontrast.eval.index.rows import table_of
from mmcontrast.eval.index.segment import Effort, Part, Segment, entry_of, write_parts
from mmcontrast.eval.index.structure import write_structure
from tests import tiny

MB = 10**6
Floats = NDArray[np.float32]


# ------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("n", "settings", "factory", "says"),
    [
        (9_999, {}, "Flat", "9999 vectors are fewer than 10000"),
        (10_000, {"memory": 8000 * MB}, "IVF512,SQ8", "a byte per dimension"),
        (1_000_000, {"memory": 8000 * MB}, "IVF4096,SQ8", "1000000 vectors of 512 dimensions in 8000 MB"),
        (1_000_000, {"memory": 8000 * MB, "recall": 0.999}, "HNSW32", "comes close to recall 1"),
        (1_000_000, {"memory": 1000 * MB, "recall": 0.999}, "IVF4096,SQ8", r"HNSW32 \(23\d\d MB\) would take more"),
        (1_000_000, {"memory": 500 * MB}, "OPQ256,IVF4096,PQ256x4fs", r"128 bytes.*; IVF4096,SQ8 \(5\d\d MB\) would"),
        (1_000_000, {"memory": 100 * MB}, "OPQ128,IVF4096,PQ128x4fs", "64 bytes per vector"),
        (1_000_000, {"memory": 1 * MB}, "Flat", "no structure for 1000000 vectors fits 1 MB"),
        (
            1_000_000,
            {"memory": 8000 * MB, "searches": 1000},
            "Flat",
            "1000 searches will come, and building lists costs",
        ),
        (1_000_000, {"memory": 8000 * MB, "searches": 100_000}, "IVF4096,SQ8", "a byte per dimension"),
        (100_000_000, {"memory": 80_000 * MB}, "IVF32768_HNSW32,SQ8", "a byte per dimension"),
        (1_000_000, {"given": "HNSW16"}, "HNSW16", "as it was asked for"),
        (5, {"given": "auto"}, "Flat", "5 vectors"),
    ],
)
def test_the_choice_follows_size_memory_recall_and_searches(
    n: int, settings: dict[str, Any], factory: str, says: str
) -> None:
    found = choose(n, 512, **settings)
    assert found.factory == factory
    assert re.search(says, found.why), found.why
    assert found.memory <= settings.get("memory", 1 << 60)


def test_a_choice_that_makes_no_sense_is_refused() -> None:
    for settings, message in (
        ({"recall": 0}, "recall is 0; ask for a share"),
        ({"recall": 1.5}, "recall is 1.5; ask for a share"),
        ({"memory": 0}, "memory is 0 bytes"),
        ({"given": "HNSW32", "memory": MB}, r"HNSW32 takes about 23\d MB for 100000 vectors, above the 1 MB given"),
        ({"given": "HNWS32"}, "FAISS cannot make 'HNWS32' for 512 dimensions: "),
        ({"given": "IVF64,PQ7"}, "FAISS cannot make 'IVF64,PQ7' for 512 dimensions: "),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(100_000, 512, **settings)  # pyright: ignore[reportArgumentType]


def test_flat_is_worth_as_many_searches_as_the_lists_cost() -> None:
    """Counted in inner products of D dimensions: a search takes n, an iteration of the training rows x lists."""
    n, lists = 1_000_000, lists_of(1_000_000)
    products = n * lists + 10 * (64 * lists) * lists
    assert building_cost(n, lists) == pytest.approx(products / n, rel=1e-3)
    assert choose(n, 64, searches=products // n - 10, memory=1 << 40).factory == "Flat"
    assert choose(n, 64, searches=products // n + 10, memory=1 << 40).factory != "Flat"


# ------------------------------------------------------------------------------------------------- structures


def _clusters(n: int, dim: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((50, dim))
    x = centres[rng.integers(0, 50, n)] + 0.6 * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


VECTORS, QUERIES = _clusters(3000, 32, 0), _clusters(80, 32, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Segment]:
    """A segment of each type over the same vectors."""
    n = len(VECTORS)
    columns = {"key": [*map(str, range(n))], "shard": ["s"] * n, "source": [0] * n, "position": [*range(n)]}
    rows = table_of({**columns, "text": [None] * n}, [{}] * n)
    found: dict[str, Segment] = {}
    for kind in ("Flat", "HNSW8", "IVF64,Flat", "IVF64,SQ8", "OPQ16,IVF32,PQ16x4fs", "SQ8", "HNSW8,SQ8"):
        folder = tmp_path_factory.mktemp("segment")
        write_parts(folder, [Part(VECTORS, rows)], 32)
        if kind != "Flat":
            write_structure(folder, kind)
        found[kind] = Segment(folder, entry_of(folder, n, kind=kind), 32)
    return found


def _slow_recall(found: NDArray[np.int64], vectors: Floats, queries: Floats, k: int) -> float:
    """By sorting every score of every query, in float64."""
    shares: list[float] = []
    for query, answers in zip(queries, found, strict=True):
        scores = [float(query.astype(np.float64) @ v.astype(np.float64)) for v in vectors]
        exact = sorted(range(len(vectors)), key=lambda i: -scores[i])[:k]
        shares.append(len({*exact} & {*answers[:k].tolist()}) / k)
    return float(np.mean(shares))


def test_recall_is_what_sorting_all_scores_says(made: dict[str, Segment]) -> None:
    few = QUERIES[:20]
    for kind, effort in (("HNSW8", Effort(1)), ("IVF64,Flat", Effort(1)), ("OPQ16,IVF32,PQ16x4fs", Effort(64))):
        segment = made[kind]
        questions = ask(segment, few, "here")
        seen: list[float] = []
        for k in (1, 10, 100):
            _, found = segment.search(few, k, effort=effort)
            want = _slow_recall(found, VECTORS, few, k)
            assert questions.recall(found, segment.vectors, k) == pytest.approx(want)
            seen.append(want)
        assert min(seen) < 0.97, f"{kind} finds everything: nothing is compared"


def test_a_query_that_is_in_the_index_is_no_answer_to_itself(made: dict[str, Segment]) -> None:
    segment, own = made["Flat"], np.array([5, 17, 2000])
    questions = ask(segment, VECTORS[own], "own", own)
    for row, number in enumerate(own):
        others = np.delete(VECTORS @ VECTORS[number], number)
        np.testing.assert_allclose(questions.scores[row], np.sort(others)[::-1][:100], atol=1e-6)
    assert questions.scores.max() < 0.99
    _, found = segment.search(VECTORS[own], 11)
    assert (found[:, 0] == own).all() and questions.recall(found, segment.vectors, 10) == 1
    wrong = np.concatenate([own[:, None], np.argsort(VECTORS[own] @ VECTORS.T, 1)[:, :10]], 1)
    assert questions.recall(wrong, segment.vectors, 10) == 0


def test_equal_vectors_are_equally_right() -> None:
    vectors = np.repeat(np.eye(4, dtype=np.float32), 5, 0)
    questions = Questions(vectors[:1], None, "here", np.ones((1, 3), np.float32))
    for answers in ([0, 1, 2], [2, 3, 4]):
        assert questions.recall(np.array([answers]), vectors, 3) == 1
    assert questions.recall(np.array([[0, 5, 6]]), vectors, 3) == pytest.approx(1 / 3)


def test_an_exact_index_is_measured_quickly(made: dict[str, Segment], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its single queries reads all vectors: as many are timed as the time allows."""
    monkeypatch.setattr(quality, "_SECONDS", 1e-9)
    found = measure(made["Flat"], ask(made["Flat"], QUERIES[:20], "here"))
    assert [found[f"recall_at_{k}"] for k in (1, 10, 100)] == [1, 1, 1]
    assert found["latency_queries"] == 1 and found["latency_ms_p50"] > 0


@pytest.mark.parametrize("kind", ["HNSW8", "IVF64,Flat", "IVF64,SQ8", "OPQ16,IVF32,PQ16x4fs", "SQ8", "HNSW8,SQ8"])
def test_the_setting_taken_reaches_the_recall_asked_for(made: dict[str, Segment], kind: str) -> None:
    segment = made[kind]
    questions = ask(segment, QUERIES[:40], "here")
    effort, tried = tune(segment, questions, 0.95)
    taken = [t for t in tried if (t.probe, t.rerank) == (effort.probe, effort.rerank)]
    assert len(taken) == 1 and taken[0].recall_at_10 >= 0.95
    assert taken[0].queries_per_second == max(t.queries_per_second for t in tried if t.recall_at_10 >= 0.95)
    if kind != "SQ8":
        assert min(t.recall_at_10 for t in tried) < 0.95, "every setting reaches it: nothing is chosen"
    scores, found = segment.search(QUERIES[40:], 10, effort=effort)
    assert _slow_recall(found, VECTORS, QUERIES[40:], 10) > 0.9
    products = np.einsum("qd,qkd->qk", QUERIES[40:], VECTORS[found])
    np.testing.assert_allclose(scores, products, atol=1e-6)  # codes choose, vectors give the scores
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_recall_out_of_reach_takes_the_best_there_is(made: dict[str, Segment]) -> None:
    segment = made["HNSW8"]
    questions = ask(segment, QUERIES, "here")
    unreachable = replace(questions, scores=questions.scores + 2)
    effort, tried = tune(segment, unreachable, 0.95)
    assert {t.recall_at_10 for t in tried} == {0.0} and effort.probe >= 1


def test_quality_is_measured_at_each_depth(made: dict[str, Segment]) -> None:
    segment = made["IVF64,SQ8"]
    segment.effort = Effort(2)
    found = measure(segment, ask(segment, QUERIES[:20], "here"))
    for k in (1, 10, 100):
        answers = segment.search(QUERIES[:20], k)[1]
        assert found[f"recall_at_{k}"] == pytest.approx(_slow_recall(answers, VECTORS, QUERIES[:20], k))
    assert found["recall_at_100"] < found["recall_at_1"]
    assert 0 < found["latency_ms_p50"] <= found["latency_ms_p99"] and found["latency_queries"] == 20
    assert found["memory_mb"] == pytest.approx((segment.folder / "index.faiss").stat().st_size / 1e6)
    assert found["vectors_mb"] == pytest.approx(3000 * 32 * 4 / 1e6)


@pytest.mark.parametrize("kind", ["HNSW8", "IVF64,Flat", "IVF64,SQ8", "OPQ16,IVF32,PQ16x4fs", "SQ8", "HNSW8,SQ8"])
def test_the_size_said_before_is_about_the_size_written(made: dict[str, Segment], kind: str) -> None:
    written = (made[kind].folder / "index.faiss").stat().st_size
    assert size_of(kind, 3000, 32) == pytest.approx(written, rel=0.1)


def test_what_faiss_cannot_build_is_said_in_one_line(tmp_path: Path) -> None:
    rows = table_of({"key": ["a"], "shard": ["s"], "source": [0], "position": [0], "text": [None]}, [{}])
    write_parts(tmp_path, [Part(VECTORS[:1], rows)], 32)
    with pytest.raises(ConfigError, match="FAISS cannot build 'IVF64,SQ8' of 1 vectors of 32 dimensions: ") as error:
        write_structure(tmp_path, "IVF64,SQ8")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- a whole build


def test_a_structure_can_be_asked_for_and_its_story_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmcontrast.cli import main

    run = tiny.write_run(tmp_path / "run")
    shards = tiny.write_shards(tmp_path / "shards", tiny.samples(60))
    manifest = build_index(run, [shards], tmp_path / "graph", asked=Asked("HNSW8", recall=0.9))
    assert (manifest["type"], manifest["why"]) == ("HNSW8", "as it was asked for")
    assert manifest["quality"]["queries"] == 30 and len(manifest["tried"]) >= 1  # half of them choose the setting
    opened = Index(tmp_path / "graph")
    build_index(run, [shards], tmp_path / "flat")
    assert opened.search("text", ["red"], top=3) == Index(tmp_path / "flat").search("text", ["red"], top=3)

    capsys.readouterr()
    main(["index", "show", str(tmp_path / "graph")])
    said = capsys.readouterr().out
    for part in (
        "HNSW8: as it was asked for",
        "recall against exact search @1 ",
        "latency ",
        "generation 1, 1 segments",
    ):
        assert part in said
    main(["index", "compact", str(tmp_path / "graph"), "--type", "auto", "--recall", "0.9"])
    assert "Flat: 60 vectors are fewer than 10000" in capsys.readouterr().out


def test_queries_of_ones_own_measure_the_index(tmp_path: Path) -> None:
    run = tiny.write_run(tmp_path / "run")
    shards = tiny.write_shards(tmp_path / "shards", tiny.samples(20))
    (tmp_path / "queries.txt").write_text("a red thing\n\nblue\n")
    found = build_index(run, [shards], tmp_path / "a", queries=str(tmp_path / "queries.txt"))
    assert (found["quality"]["queries"], found["quality"]["queries_from"]) == (2, str(tmp_path / "queries.txt"))
    held_out = tiny.write_shards(tmp_path / "held_out", tiny.samples(7, seed=50))
    found = build_index(run, [shards], tmp_path / "b", queries=held_out, query_modality="image")
    assert (found["quality"]["queries"], found["quality"]["recall_at_10"]) == (7, 1.0)
    (tmp_path / "none.txt").write_text("\n")
    for queries, message in (
        (str(tmp_path / "none.txt"), "none.txt holds no queries"),
        (str(tmp_path / "nowhere"), "no shards match"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_index(run, [shards], tmp_path / "c", queries=queries)
    assert not (tmp_path / "c").exists()


def test_a_choice_is_a_fact() -> None:
    assert choose(10, 8) == Choice("Flat", 0, "10 vectors are fewer than 10000: an exact search is fast enough")
