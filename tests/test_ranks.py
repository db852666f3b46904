"""Ranks: equal to a slow count in float64, whatever the block, the order and the ties; within their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from mmcontrast.eval.ranks import DEPTH, Ranks, rank, rank_both_ways


def slow(x: Tensor, y: Tensor, x_labels: Tensor, y_labels: Tensor) -> tuple[list[int], list[float]]:
    """Best rank and average precision at 10, candidate by candidate."""
    scores = (x.double() @ y.double().T).tolist()
    best: list[int] = []
    precision: list[float] = []
    for i, of_query in enumerate(scores):
        right = sorted((s for s, b in zip(of_query, y_labels, strict=True) if b == x_labels[i]), reverse=True)
        wrong = [s for s, b in zip(of_query, y_labels, strict=True) if b != x_labels[i]]
        before = [sum(w >= r - 1e-13 for w in wrong) for r in right]
        best.append(before[0] if before else len(wrong))
        terms = [(k + 1) / (k + 1 + b) for k, b in enumerate(before) if k + b < DEPTH]
        precision.append(sum(terms) / min(DEPTH, max(1, len(right))))
    return best, precision


def units(n: int, d: int, seed: int) -> Tensor:
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def whole_numbers(n: int, d: int, seed: int) -> Tensor:
    """Small ones: sums are exact, so that many scores tie."""
    return torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def some_labels(n: int, kinds: int, seed: int) -> Tensor:
    return torch.randint(0, kinds, (n,), generator=torch.Generator().manual_seed(seed))


def same(found: Ranks, want: tuple[list[int], list[float]]) -> None:
    assert found.best.tolist() == want[0]
    assert found.average_precision.tolist() == pytest.approx(want[1], abs=1e-12)


@pytest.mark.parametrize("kinds", [400, 20, 2])  # hardly any right candidate, several, more than are looked at
@pytest.mark.parametrize("make", [units, whole_numbers])
def test_ranks_equal_counting_whatever_the_block(make: Callable[[int, int, int], Tensor], kinds: int) -> None:
    n, m = 70, 230
    x, y = make(n, 5, 0), make(m, 5, 1)
    y[100:150] = x[:50]  # some are found
    y[5:40] = y[0]  # equal candidates: exact ties in float32 are decided as in float64
    a, b = some_labels(n, kinds, 2), some_labels(m, kinds, 3)
    b[100:150] = a[:50]
    want = slow(x, y, a, b), slow(y, x, b, a)
    assert 0 < sum(r == 0 for r in want[0][0]) < n or kinds == 2, "nothing is told apart"
    for block in (1, 7, 64, 69, 1000):
        found = rank_both_ways(x, y, a, b, block=block)
        same(found[0], want[0])
        same(found[1], want[1])
        same(rank(x, y, a, b, block=block), want[0])
    assert found[0].positives.tolist() == [int((b == label).sum()) for label in a]
    assert found[0].candidates == m and found[1].candidates == n


def test_what_float32_cannot_tell_apart_is_told_in_float64() -> None:
    """Candidates that differ by less than float32 sums resolve: most ranks of a float32 product are wrong."""
    n, d = 40, 64
    generator = torch.Generator().manual_seed(0)
    x = units(n, d, 1)
    y = (x[:1] + 1e-7 * torch.randn(n, d, generator=generator)).float()
    y = torch.where(torch.rand(n, d, generator=generator) < 0.5, y, x[:1])
    labels = torch.arange(n)
    want = slow(x, y, labels, labels)
    naive = [int((row > row[i]).sum()) for i, row in enumerate(x @ y.T)]
    assert sum(a != b for a, b in zip(naive, want[0], strict=True)) > n // 4, "float32 would do"
    for block in (3, 64):
        same(rank(x, y, labels, labels, block=block), want)
    shuffled = torch.randperm(n, generator=generator)
    assert torch.equal(rank(x, y[shuffled], labels, labels[shuffled]).best, torch.tensor(want[0]))


def test_ranks_do_not_depend_on_the_precision_of_products() -> None:
    x, y, labels = units(60, 32, 0), units(60, 32, 1), torch.arange(60)
    want = rank(x, y, labels, labels)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(rank(x, y, labels, labels).best, want.best)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_finds_nothing_and_hides_all(bad: float) -> None:
    x, y = units(6, 4, 0), units(5, 4, 0)
    a, b = torch.tensor([0, 1, 2, 3, 9, 1]), torch.tensor([0, 1, 2, 1, 4])
    x[1, 2] = y[2, 0] = bad
    found, back = rank_both_ways(x, y, a, b)
    # x1 is broken, y2 too: x2 loses its only right candidate; y2 stands before every other right one.
    assert found.best[[1, 2, 3, 4]].tolist() == [3, 4, 5, 5]
    kept = [0, 1, 3, 4]
    want = slow(x[[0, 5]], y[kept], a[[0, 5]], b[kept])[0]
    assert found.best[[0, 5]].tolist() == [w + 1 for w in want]
    assert back.best[2] == 5 and back.best[4] == 6 and found.positives.tolist() == [1, 2, 1, 0, 0, 2]
    assert found.average_precision[[1, 2, 3, 4]].tolist() == [0] * 4
    nothing = rank(torch.full((3, 4), bad), y, a[:3], b)
    assert nothing.best.tolist() == [4, 3, 4] and nothing.average_precision.sum() == 0


def test_a_block_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="block is 0"):
        rank(units(2, 2, 0), units(2, 2, 1), torch.arange(2), torch.arange(2), block=0)


BLOCK, CANDIDATES = 256, 20_000


def _ranked(rows: int) -> harness.Work:
    x, y, labels = units(2048, 64, 0)[:rows], units(CANDIDATES, 64, 1), torch.arange(CANDIDATES)

    def work() -> None:
        rank_both_ways(x, y, labels[:rows], labels, block=min(BLOCK, rows))

    return work


def test_memory_is_bounded_by_the_block() -> None:
    """All scores would take 164 MB."""
    measured = harness.peak(_ranked, 2048, threads=2)
    assert 1 < measured.peak_mb < 32
