"""What a step costs, counted and not timed: collectives and their bytes, and memory at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmcontrast.objectives import Alignment, InfoNCE, MultiPositive, Objective, SigLIP, Symile, pairs_with
from mmcontrast.sharding import World, value_and_grad
from tests.conftest import GlooPool
from tests.objectives_setup import THREE, Data, draw

N, D, W = 64, 16, 4
TOWER = N * D * 4 // W  # bytes of one modality on one rank

# --------------------------------------------------------------------------------------------- collectives


class CountingWorld(World):
    """Notes every collective and the bytes that each rank gives to it; all of them go through these three methods."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.seen: list[tuple[str, int]] = []

    def gather(self, local: Tensor) -> Tensor:
        self.seen.append(("gather", local.nbytes))
        return super().gather(local)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        self.seen.append(("reduce_scatter", whole.nbytes))
        return super().reduce_scatter(whole)

    def _reduce(self, tensors: Sequence[Tensor], op: Any) -> list[Tensor]:
        if tensors:
            self.seen.append(("reduce", sum(t.nbytes for t in tensors)))
        return super()._reduce(tensors, op)


def _collectives(group: Any, configs: dict[str, Objective.Config], data: Data) -> list[tuple[str, int]]:
    world = CountingWorld(group)
    mine = data.of_rank(world.rank, world.size)
    objectives = {name: config.build() for name, config in configs.items()}
    value_and_grad(objectives, mine.z, mine.present, mine.ids, groups=mine.groups, block=4, world=world)
    return world.seen


@pytest.mark.parametrize(
    ("configs", "towers", "others"),
    [
        # Beside the towers: the table of ids; statistics of rows, column peaks and sums, masked; parameters.
        ({"a": InfoNCE.Config()}, 1, 6),
        # No column statistics, so no peaks and sums of them.
        ({"a": SigLIP.Config()}, 1, 4),
        ({"a": InfoNCE.Config(temperature="per_direction")}, 2, 4),
        ({"a": InfoNCE.Config(pairs=pairs_with("text", "image", "audio"))}, 1, 6),
        ({"a": Symile.Config(modalities=THREE)}, 3, 4),
        ({"a": MultiPositive.Config()}, 2, 3),
        ({"a": Alignment.Config()}, 0, 2),
        # A modality travels once however many objectives look at it.
        ({"a": InfoNCE.Config(), "b": SigLIP.Config(), "c": InfoNCE.Config()}, 1, 2 + 2 * 4 + 2),
    ],
    ids=["CLIP", "SigLIP", "per direction", "two pairs", "Symile", "MultiPositive", "Alignment", "three terms"],
)
def test_only_candidates_travel(gloo: GlooPool, configs: dict[str, Objective.Config], towers: int, others: int) -> None:
    """One tower in and one gradient out of each rank: 2 (W - 1) towers, where gathering both sides takes twice that."""
    data = draw(N, D, dtype=torch.float32)
    for seen in gloo(W, _collectives, configs, data):
        large = [(kind, size) for kind, size in seen if size >= TOWER and kind != "reduce"]
        assert large == [("gather", TOWER)] * towers + [("reduce_scatter", W * TOWER)] * towers
        small = [(kind, size) for kind, size in seen if (kind, size) not in large]
        assert len(small) <= others, small
        # The table has a word of eight bytes for id, group and each modality; the rest are numbers for rows or columns.
        assert max(size for _, size in small) <= max(5 * 8 * N // W, 3 * 4 * N)


# --------------------------------------------------------------------------------------------------- memory


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations made and that live at one time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:  # pyright: ignore[reportUnknownVariableType]
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _peak(objective: Objective, data: Data, **options: Any) -> int:
    with Peak() as peak:
        value_and_grad({"a": objective}, data.z, data.present, data.ids, **options)
    return peak.peak


def test_the_tracker_sees_what_lives() -> None:
    n = 512
    a = torch.randn(n, 4)
    with Peak() as peak:
        first = a @ a.T
        total = first.sum()
        del first
        total = total + (a @ a.T).view(-1).sum()
    del total
    assert n * n * 4 <= peak.peak < 1.1 * n * n * 4  # one at a time, and views are no copies
    leaf = a.clone().requires_grad_()
    with Peak() as peak:
        nn.functional.cross_entropy(leaf @ leaf.T, torch.arange(n)).backward()
    assert peak.peak >= 2 * n * n * 4  # what autograd keeps counts too


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_memory_is_that_of_a_block(missing: float) -> None:
    """CLIP at N = 2048 and block 128: two tiles of [block, N] and a few copies of the embeddings, no matrix of N²."""
    n, d, block, size = 2048, 32, 128, 4
    data = draw(n, d, dtype=torch.float32, missing=missing)
    objective = InfoNCE.Config().build()
    bound = 2 * block * n * size + 12 * n * d * size
    assert bound < n * n * size / 3
    assert block * n * size * (1 - missing) ** 2 < _peak(objective, data, block=block) < bound
    assert _peak(objective, data, block=None) > n * n * size * (1 - missing) ** 2 * 0.9
    kept = _peak(objective, data, block=block, keep_bytes=n * n * size // 2)
    assert bound < kept + bound / 2 and kept < bound + n * n * size // 2


@pytest.mark.parametrize("block", [16, None])
def test_all_tuples_are_streamed(block: int | None) -> None:
    """Symile of all tuples holds some tiles at a time, not one of [N, N] for each of the N² others."""
    n, d, size = 64, 8, 4
    data = draw(n, d, dtype=torch.float32)
    objective = Symile.Config(modalities=THREE, negatives="all").build()
    tile = (block or n) * n * size
    assert _peak(objective, data, block=block) < 8 * tile + 40 * n * d * size < n * n * n * size / 4
