"""The index benchmark: its data have neighbours, its recall is counted, and the peer's choice is the peer's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import index, index_arms
from benchmarks.index_data import Clusters
from mmcontrast.eval.index.choice import building_cost, lists_of

SMALL = index.Plan(n=12_000, dim=32, queries=60, peers=("graph",), rounds=1, singles=3, threads=1)


def test_the_data_have_neighbours() -> None:
    clusters = Clusters(64)
    x = np.concatenate([*clusters.vectors(3000)])
    again = np.concatenate([*Clusters(64).vectors(3000)])
    assert x.dtype == np.float32 and x.shape == (3000, 64) and np.array_equal(x, again)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    queries = np.concatenate([*clusters.vectors(50, stream=1)])
    other = np.concatenate([*clusters.vectors(50, stream=1, other_modality=True)])
    assert not np.isin(queries[:, 0], x[:, 0]).any(), "queries are in no index"
    noise = np.random.default_rng(0).standard_normal((3050, 64))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    # Isotropic noise has no such neighbours.
    tenth, alone = (np.sort(scores, axis=1) for scores in (queries @ x.T, noise[:50] @ noise[50:].T))
    assert tenth[:, -10].mean() > alone[:, -10].mean() + 0.15
    assert (other @ x.T).mean() < (queries @ x.T).mean() - 0.2, "another modality has a cone of its own"


@pytest.mark.parametrize(
    ("n", "dim", "share", "key"),
    [  # as autofaiss 2.18.0 itself answers for these
        (999, 512, 4, "Flat"),
        (5000, 512, 0.1, "HNSW15"),
        (1_000_000, 512, 1.5, "HNSW32"),
        (100_000, 64, 1.5, "HNSW16"),
        (100_000, 512, 1.02, "IVF1024,Flat"),
        (50_000, 512, 1.02, "OPQ256_768,IVF1024_HNSW32,PQ256x8"),
        (1_000_000, 512, 0.5, "OPQ256_768,IVF16384_HNSW32,PQ256x8"),
        (1_000_000, 512, 0.05, "OPQ64_448,IVF16384_HNSW32,PQ64x8"),
        (20_000_000, 768, 0.1, "OPQ256_1024,IVF65536_HNSW32,PQ256x8"),
    ],
)
def test_the_peer_chooses_as_autofaiss_does(n: int, dim: int, share: float, key: str) -> None:
    assert index_arms.autofaiss_key(n, dim, int(4 * n * dim * share)) == key


def test_recall_is_the_share_that_is_found() -> None:
    exact = np.array([[1, 2, 3], [4, 5, 6]])
    assert index_arms.recall(exact[:, ::-1], exact) == 1
    assert index_arms.recall(np.array([[1, 9, 8], [4, 6, -1]]), exact) == pytest.approx(0.5)


def test_everything_is_built_searched_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(function: Callable[..., Any], *arguments: Any, **_: Any) -> list[Any]:
        return [function(*arguments)]

    monkeypatch.setattr(index, "in_processes", here)
    report = index.run(SMALL)
    report.write(tmp_path / "index.json")
    arms = json.loads((tmp_path / "index.json").read_text())["arms"]
    built = {a["arm"]: a for a in arms if a["arm"].startswith("build/")}
    assert (built["build/ours"]["key"], built["build/ours_few"]["key"]) == ("IVF512,SQ8", "Flat")
    assert built["build/graph"]["key"] == "HNSW8" and built["build/graph"]["file_mb"] > 1.5
    for kind in index.KINDS:
        for arm in ("ours", "graph"):
            points = [a for a in arms if a["arm"] == f"{kind}/{arm}" and a["setting"] != "chosen"]
            recalls = [a["recall_at_10"] for a in points]
            assert recalls[0] < 0.9 < 0.95 <= recalls[-1] and recalls[1:] == sorted(recalls[1:]), (kind, arm, recalls)
    for name in ("rate_across", "rate_within", "rate_across_graph", "single", "few_searches"):
        assert report.ratios[name] > 0
    assert 0.8 < report.ratios["recall_chosen_across"] <= 1
    few = {a["arm"]: a["seconds"] for a in arms if a["arm"].startswith("at_0.95/across/")}
    flat, ours = (few[f"at_0.95/across/{name}"] / SMALL.queries for name in ("flat", "ours"))
    lists = built["build/ours"]["seconds"] - built["build/ours_few"]["seconds"]
    want = building_cost(SMALL.n, lists_of(SMALL.n)) * (flat - ours) / lists
    assert report.ratios["break_even"] == pytest.approx(want, rel=1e-3)
    drawn = ElementTree.fromstring(index.chart(report, SMALL))
    texts = {node.text for node in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"mmcontrast", "graph", "queries/s"} <= texts
    capsys.readouterr()


def test_where_no_setting_finds_enough_nothing_is_compared() -> None:
    from benchmarks.harness import Report

    report = Report()
    index._compare("across", {"flat": [1.0], "ours": [0.1]}, SMALL, report)  # pyright: ignore[reportPrivateUsage]
    assert report.ratios == {"rate_across": 10.0}
    assert report.left_out == {"rate_across_graph": "no setting of graph finds 95%"}
