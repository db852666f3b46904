"""Geometry: each measure equals what a slow loop finds, and says what it should of spaces that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.geometry import Geometry
from tests import tiny

MODEL: Any = None  # geometry looks at embeddings alone


def _data(folder: Path, x: Tensor, y: Tensor, missing: int | None = None) -> Embedded:
    """Embeddings of our own behind real shards; row `missing` has no text."""
    run, shards = (
        tiny.write_run(folder / "run"),
        tiny.write_shards(folder / "shards", tiny.samples(len(x)), per_shard=99),
    )
    from dataclasses import replace

    from mmcontrast import load

    data = embed(load(run), [shards])
    rows = torch.arange(len(x))
    has_text = rows[rows != missing] if missing is not None else rows
    return replace(data, z={"image": x, "text": y[has_text]}, rows={"image": rows, "text": has_text})


def _units(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def test_measures_equal_slow_loops(tmp_path: Path) -> None:
    x, y = _units(11, 5, 0), _units(11, 5, 1)
    found = Geometry.Config(data=("unused",), t=3.0).build().score(MODEL, _data(tmp_path, x, y, missing=4)).flat()
    kept = [i for i in range(11) if i != 4]
    n = len(kept)

    def squared(a: Tensor, b: Tensor) -> float:
        return sum((float(a[k]) - float(b[k])) ** 2 for k in range(5))

    def cosine(a: Tensor, b: Tensor) -> float:
        return sum(float(a[k]) * float(b[k]) for k in range(5))

    def spread(a: Tensor, b: Tensor) -> float:
        return math.log(sum(math.exp(-3 * squared(a[i], b[j])) for i in kept for j in kept if i != j) / (n * (n - 1)))

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(cosine(a[i], b[j]) for i in kept for j in kept if i != j) / (n * (n - 1))

    centroids = [[sum(float(z[i, k]) for i in kept) / n for k in range(5)] for z in (x, y)]
    want = {
        "samples": n,
        "centroid_distance": math.dist(*centroids),
        "matched_cosine": sum(cosine(x[i], y[i]) for i in kept) / n,
        "mismatched_cosine": mean(x, y),
        "alignment": sum(squared(x[i], y[i]) for i in kept) / n,
        "cross_uniformity": spread(x, y),
        "uniformity_image": spread(x, x),
        "uniformity_text": spread(y, y),
        "cosine_within_image": mean(x, x),
        "cosine_within_text": mean(y, y),
    }
    assert want["alignment"] > 0.5 and want["cross_uniformity"] < -1
    assert found == pytest.approx(found | want, abs=1e-6)


def test_known_spaces(tmp_path: Path) -> None:
    one = _units(40, 8, 0)
    gap = torch.zeros(8)
    gap[0] = 3.0
    apart = nn.functional.normalize(one + gap, dim=1), nn.functional.normalize(one - gap, dim=1)
    geometry = Geometry.Config(data=("unused",)).build()
    together = geometry.score(MODEL, _data(tmp_path / "a", one, one)).flat()
    divided = geometry.score(MODEL, _data(tmp_path / "b", *apart)).flat()
    assert together["centroid_distance"] == pytest.approx(0, abs=1e-6)
    assert together["linear_separability"] == pytest.approx(0.5)  # both sides of a pair are the same point
    assert together["alignment"] == pytest.approx(0, abs=1e-6)
    assert divided["linear_separability"] == 1.0
    distance = divided["centroid_distance"]
    assert distance is not None and distance > 1.5

    line = torch.zeros(12, 6)
    line[:, 2] = torch.tensor([1.0, -1.0] * 6)
    other = nn.functional.normalize(torch.eye(12)[:, :6] + 1e-9, dim=1)
    ranks = geometry.score(MODEL, _data(tmp_path / "c", line, other)).flat()
    assert ranks["effective_rank_image"] == pytest.approx(1.0, abs=1e-6)


def test_a_task_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shards = (
        tiny.write_run(tmp_path / "run"),
        tiny.write_shards(tmp_path / "shards", tiny.samples(12), per_shard=6),
    )
    main(["eval", str(run), shards, "--tasks", "geometry", "--json", str(tmp_path / "found.json")])
    (result,) = json.loads((tmp_path / "found.json").read_text())
    assert result["task"] == "geometry" and "centroid_distance" in capsys.readouterr().out
    assert 0 <= result["metrics"]["linear_separability"] <= 1


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="geometry t is 0"):
        Geometry.Config(data=("x",), t=0).build()
    with pytest.raises(ConfigError, match="1 samples have both image and text"):
        one = _data(tmp_path, _units(2, 4, 0), _units(2, 4, 1), missing=1)
        Geometry.Config(data=("x",)).build().score(MODEL, one)
