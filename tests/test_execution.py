"""Towers recomputed and compiled: the gradient of the plain ones, random masks included; less memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import harness
from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import forward_backward
from mmcontrast.config import ConfigError
from mmcontrast.encoders import BagOfWords, Encoder
from mmcontrast.encoders.depth import blocks
from mmcontrast.execution import compile_blocks, recompute
from mmcontrast.objectives import InfoNCE
from mmcontrast.sharding import Result, value_and_grad
from tests import tiny
from tests.towers import EVERY, Origins, inputs, make_origins


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


def gradients(tower: nn.Module, x: Any) -> dict[str, Tensor]:
    """Of a tower in training mode, with one seed."""
    tower.train()
    torch.manual_seed(3)
    pooled, _ = tower(x)
    weights = torch.linspace(-1, 1, pooled.numel()).reshape(pooled.shape)
    (pooled * weights).sum().backward()
    found = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad(set_to_none=True)
    return found


def drop(tower: nn.Module) -> None:
    """Let whatever can drop do so."""
    for layer in tower.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.3


def _note(calls: list[int]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        calls.append(0)

    return hook


@pytest.mark.parametrize("name", list(EVERY))
def test_a_recomputed_tower_has_the_same_gradient(origins: Origins, name: str) -> None:
    """Bit for bit, of every tower that is a stack of blocks."""
    torch.manual_seed(0)
    tower = EVERY[name](origins).build()
    if not blocks(tower):
        with pytest.raises(ConfigError, match=r"of 'm' is no stack of blocks"):
            recompute({"m": tower}, ("m",))
        return
    drop(tower)
    x = inputs(tower)
    want = gradients(tower, x)
    calls: list[int] = []
    for block in blocks(tower):
        block.register_forward_pre_hook(_note(calls))
        inner = block.forward

        def counted(*args: Any, inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        block.forward = counted
    recompute({"m": tower}, ("m",))
    found = gradients(tower, x)
    assert calls.count(1) == 2 * calls.count(0) > 0, "nothing was recomputed"
    assert found.keys() == want.keys() and any(bool(t.any()) for t in want.values())
    for key, t in want.items():
        torch.testing.assert_close(found[key], t, rtol=1e-6, atol=1e-8 + 1e-6 * float(t.abs().max()), msg=key)


def stacked(rows: int, *, again: bool) -> harness.Work:
    """Forward and backward of six layers."""
    tower = tiny.vit(image_size=64, width=64, layers=6).build()
    if again:
        recompute({"m": tower}, ("all",))
    x = torch.zeros(rows, 3, 64, 64, dtype=torch.uint8)

    def work() -> None:
        tower(x)[0].sum().backward()

    return work


def test_recomputing_takes_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is let go of goes back at once, as on a GPU
    kept, made = (harness.peak(partial(stacked, again=again), 96, threads=1).peak_mb for again in (False, True))
    assert 0 < made < 0.4 * kept


# ------------------------------------------------------------------------------------------------- compiled


class Perceptron(Encoder):
    """A tower of one block that drops half of what it sees."""

    kind = "timeseries"
    dim = 16

    def __init__(self) -> None:
        super().__init__(Encoder.Config())
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.5)) for _ in range(1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for layer in self.layers:
            x = x + layer(x)
        return x, None


def test_a_compiled_tower_has_the_same_gradient_through_the_cache() -> None:
    """Masks are those of the tower as it is, in both passes, and also of an odd last micro-batch of one row."""
    want = _cached(lambda towers: None)
    assert _cached(lambda towers: None, micro_batch=9).keys() == want.keys()
    other = _cached(lambda towers: None, micro_batch=9)
    assert any(float((t - other[n]).abs().max()) > 1e-3 for n, t in want.items()), "nothing was dropped"
    counters.clear()
    for change in (compile_blocks, _compile_and_recompute):
        found = _cached(change)
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, rtol=1e-4, atol=1e-5 * float(t.abs().max()), msg=name)
    assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"], "nothing was compiled"


def _compile_and_recompute(towers: Mapping[str, nn.Module]) -> None:
    compile_blocks(towers)
    recompute(towers, ("all",))


def _cached(change: Callable[[Mapping[str, nn.Module]], None], micro_batch: int = 4) -> dict[str, Tensor]:
    """Gradients of nine rows, in micro-batches of 4, 4 and 1, all but the first encoded twice."""
    torch.manual_seed(0)
    towers = {"a": Perceptron(), "b": Perceptron()}
    objective = InfoNCE.Config(pairs=(("a", "b"),)).build()
    change(towers)
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(9)
    batch = Batch({m: torch.randn(9, 16, generator=generator) for m in towers}, dict.fromkeys(towers, rows), rows)

    def encode(piece: MicroBatch) -> dict[str, Tensor]:
        return {m: nn.functional.normalize(towers[m](x)[0], dim=1) for m, x in piece.inputs.items()}

    def loss(z: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Result:
        return value_and_grad({"clip": objective}, z, present, batch.ids)

    forward_backward(encode, batch, loss, micro_batch=micro_batch, seed=(0,))
    return {f"{m}.{n}": cast(Tensor, p.grad) for m, tower in towers.items() for n, p in tower.named_parameters()}


def test_settings_that_cannot_work_are_refused() -> None:
    towers = {"image": tiny.vit().build(), "text": BagOfWords.Config(buckets=5, width=4).build()}
    with pytest.raises(ConfigError, match="checkpoint_activations names 'imag'; did you mean 'image'"):
        recompute(towers, ("imag",))
    recompute(towers, ("all",))  # those that have blocks
    with pytest.raises(ConfigError, match="compile: no tower is a stack of blocks"):
        compile_blocks({"text": towers["text"]})
