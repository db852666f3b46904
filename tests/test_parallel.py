"""Weights on several ranks: whole or in parts, on 1, 2 or 4 processes, one run has the same losses and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmcontrast.checkpoint import load, read_tensors
from tests import fleet
from tests.fleet import STEPS
from tests.shapes import write_shapes
from tests.test_trainer import assert_equal

ON_TWO = (
    "shapes:ddp:ddp2",
    "shapes:fsdp:fsdp2",
    "shapes:lean:lean2",
    "captions:fsdp:captions2",
    "adapted:fsdp:adapted2",
    "averaged:fsdp:averaged2",
    "lars:fsdp:lars2",
    "lamb:fsdp:lamb2",
    "bf16:fsdp:bf16_fsdp2",
    "shapes:fsdp:from_ddp2:ddp2",
    "averaged:ddp:from_fsdp2:averaged2",
)
ON_FOUR = ("shapes:fsdp:fsdp4", "averaged:fsdp:from_fsdp2_on_4:averaged2")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: in this process, on two ranks, on four."""
    folder = tmp_path_factory.mktemp("fleet")
    write_shapes(folder / "data", missing=True)
    for kind in ("bf16", "shapes", "captions", "adapted", "averaged", "lars"):
        name = "one" if kind == "shapes" else kind
        fleet.start(folder, f"{kind}:ddp:{name}").fit()
    fleet.launch(folder, 2, *ON_TWO)
    fleet.launch(folder, 4, *ON_FOUR)
    return folder


def losses(run: Path) -> Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64)


def stored(run: Path, step: int = STEPS, files: tuple[str, ...] = ("model", "objectives")) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        found |= {f"{file}/{name}": t for name, t in read_tensors(run / f"step-{step:06d}", file).items()}
    return found


@pytest.mark.parametrize(
    ("name", "want"),
    [
        *((name, "one") for name in ("ddp2", "fsdp2", "lean2", "fsdp4", "from_ddp2")),
        *((f"{name}2", name) for name in ("captions", "adapted", "averaged", "lars")),
        *((name, "averaged") for name in ("from_fsdp2", "from_fsdp2_on_4")),
    ],
)
def test_a_run_is_the_same_however_its_weights_lie(runs: Path, name: str, want: str) -> None:
    """Loss curve, weights, the optimizer's state and the average of the weights, also after another beginning."""
    files = ("model", "objectives", "optimizer", *(["ema"] if want == "averaged" else []))
    found, wanted = stored(runs / name, files=files), stored(runs / want, files=files)
    assert_equal(found, wanted, 1e-5)
    curve = losses(runs / want)
    torch.testing.assert_close(losses(runs / name), curve[-len(losses(runs / name)) :], rtol=1e-5, atol=1e-5)
    start = stored(runs / want, STEPS // 2)
    moved = {k: float((wanted[k] - t).abs().max()) for k, t in start.items()}
    assert max(moved.values()) > 1e-3 and float((curve[0] - curve[-1]).abs()) > 0.01, "nothing was trained"


def test_weights_are_spread(runs: Path) -> None:
    """Or else all of the above could be replicas."""
    for name, ranks in (("fsdp2", 2), ("lean2", 2), ("captions2", 2), ("fsdp4", 4)):
        count, share = (runs / name / "share.txt").read_text().split()
        assert int(count) > 10 and float(share) == pytest.approx(1 / ranks, rel=0.1)
    assert (runs / "ddp2" / "share.txt").read_text().startswith("0 ")


def test_evaluations_are_of_the_whole_model_and_average(runs: Path) -> None:
    found, want = (
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("averaged2", "averaged")
    )
    # The second question is one that all ranks answer together.
    for key in (
        f"{kind}/{name}" for kind in ("eval", "eval_ema") for name in ("w/sum", "pairs/image_to_text_recall@5")
    ):
        a, b = ([line[key] for line in lines if key in line] for lines in (found, want))
        assert len(b) == 2 and a == pytest.approx(b, rel=1e-6) and (b[0] != b[1] or "pairs" in key)
    model, average = load(runs / "averaged2"), load(runs / "averaged2" / "ema")
    assert not torch.equal(model.encode("text", ["a red bar"]), average.encode("text", ["a red bar"]))


def test_bfloat16_in_parts_is_near_bfloat16_in_replicas(runs: Path) -> None:
    """Weights are gathered in bfloat16; what is kept and reduced is float32."""
    found, want, exact = (stored(runs / name) for name in ("bf16_fsdp2", "bf16", "one"))
    assert all(t.dtype == torch.float32 for t in found.values())

    def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(float((a[k] - b[k]).abs().max()) for k in b)

    assert 0 < apart(want, exact) and apart(found, exact) < 2 * apart(want, exact)
    torch.testing.assert_close(losses(runs / "bf16_fsdp2"), losses(runs / "one"), rtol=0, atol=0.02)


def test_a_rule_that_looks_at_whole_parameters_is_refused(runs: Path) -> None:
    text = (runs / "lamb2.txt").read_text()
    assert "the optimizer lamb does not work on parts of parameters" in text and "use parallel ddp" in text
