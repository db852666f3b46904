"""What an index is worth: recall against exact search, latency and memory, and the settings that were tried.

Recall@k is the share of the k nearest that are found; an answer that scores as high as the k-th nearest counts as one
of them, since which of equal ones comes first says nothing. Letters: n vectors, D dimensions, q queries, k answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmcontrast.eval.index.segment import FLAT, Effort, Segment, has_true_scores
from mmcontrast.eval.index.store import STRUCTURE
from mmcontrast.eval.index.vectors import Floats, Ints, nearest, read_blocks, scores_of

RANKS = (1, 10, 100)
_EQUAL = 1e-6  # float32 sums in another order
_TUNED_AT = 10
_TIMED = 200
_SECONDS = 10.0  # that queries are timed one by one, where each reads every vector
_PROBES = [1 << i for i in range(17)]


@dataclass(frozen=True)
class Trial:
    """A setting that was tried, on the queries that choose.

    Attributes:
        type: of the structure, as FAISS writes it.
        probe: see `Effort`.
        rerank: see `Effort`.
        recall_at_10: against exact search.
        queries_per_second: all queries at once, on all threads.
    """

    type: str
    probe: int
    rerank: int
    recall_at_10: float
    queries_per_second: float


@dataclass(frozen=True)
class Questions:
    """Queries with what an exact search answers.

    Attributes:
        z: [q, D] float32.
        own: [q] rows that the queries are, left out of the answers; None where the queries are in no index.
        origin: where they come from, in words.
        scores: [q, K] exact scores, best first.
    """

    z: Floats
    own: Ints | None
    origin: str
    scores: Floats

    def __len__(self) -> int:
        return len(self.z)

    def part(self, places: slice) -> Questions:
        """Some of them."""
        own = None if self.own is None else self.own[places]
        return replace(self, z=np.ascontiguousarray(self.z[places]), own=own, scores=self.scores[places])

    def recall(self, found: Ints, vectors: Floats, k: int) -> float:
        """Share of the k nearest among the first k of what was found, [q, k + 1] or more; mean over queries."""
        found = _without(found, self.own)[:, :k]
        k = min(k, self.scores.shape[1])
        scores = scores_of(self.z, vectors, found)
        return float((scores >= self.scores[:, k - 1 : k] - _EQUAL).sum(1).clip(max=k).mean() / k)


def ask(segment: Segment, z: Floats, origin: str, own: Ints | None = None) -> Questions:
    """Find the exact answers of queries, reading every vector once."""
    k = min(max(RANKS), len(segment) - (own is not None))
    blocks = read_blocks(segment.folder / "vectors.npy")
    scores, found = nearest(z, k + (own is not None), blocks)
    if own is not None:
        kept = _without(found, own)
        scores = scores_of(z, segment.vectors, kept)
    return Questions(z, own, origin, scores)


def _without(found: Ints, own: Ints | None) -> Ints:
    """[q, k - 1]: what was found but the query itself, or but the last where it is not among them."""
    if own is None:
        return found
    other = found != own[:, None]
    other[other.all(1), -1] = False
    return np.stack([row[keep][: found.shape[1] - 1] for row, keep in zip(found, other, strict=True)])


def tune(segment: Segment, questions: Questions, recall: float) -> tuple[Effort, list[Trial]]:
    """The fastest setting with the recall@10 that is asked for, or the best there is; and all that were tried."""
    if segment.type == FLAT:
        return Effort(), [_try(segment, questions, Effort())]
    import faiss

    inner = segment.structure
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    exact = has_true_scores(segment.structure)
    lists = inner.nlist if isinstance(inner, faiss.IndexIVF) else None
    largest = lists or (1024 if isinstance(inner, faiss.IndexHNSW) else 1)
    trials: list[Trial] = []
    for rerank in (1,) if exact else (1, 2, 4, 10, 30, 100):
        before = -1.0
        for probe in dict.fromkeys(min(p, largest) for p in _PROBES):
            trials.append(_try(segment, questions, Effort(probe, rerank)))
            reached = trials[-1].recall_at_10
            # Wider than this finds the same: what is missing is lost in the codes.
            if reached >= recall or (not exact and probe >= 16 and reached - before < 0.002):
                break
            before = reached
        fastest = max((t.queries_per_second for t in trials if t.recall_at_10 >= recall), default=0.0)
        if fastest > 2 * trials[-1].queries_per_second:
            break  # ranking still more is slower still
    good = [t for t in trials if t.recall_at_10 >= recall]
    best = max(good, key=lambda t: t.queries_per_second) if good else max(trials, key=lambda t: t.recall_at_10)
    return Effort(best.probe, best.rerank), trials


def _try(segment: Segment, questions: Questions, effort: Effort) -> Trial:
    k = min(_TUNED_AT + (questions.own is not None), len(segment))
    start = time.perf_counter()
    _, found = segment.search(questions.z, k, effort=effort)
    seconds = time.perf_counter() - start
    recall = questions.recall(found, segment.vectors, _TUNED_AT)
    return Trial(segment.type, effort.probe, effort.rerank, recall, len(questions) / seconds)


def measure(segment: Segment, questions: Questions) -> dict[str, Any]:
    """Recall, latency of single queries and of many at once, and memory, as the manifest keeps them."""
    recalls: dict[str, float] = {}
    exact, own = segment.type == FLAT, questions.own is not None
    found: Ints | None = None
    # Each by a search for as many, unless it is exact: one for 100 finds the nearest more surely.
    for r in RANKS:
        if found is None or not exact:
            _, found = segment.search(questions.z, min((max(RANKS) if exact else r) + own, len(segment)))
        recalls[f"recall_at_{r}"] = questions.recall(found, segment.vectors, r)
    k = min(_TUNED_AT, len(segment))
    start = time.perf_counter()
    segment.search(questions.z, k)
    rate = len(questions) / (time.perf_counter() - start)
    taken: list[float] = []
    while len(taken) < min(_TIMED, len(questions)) and sum(taken) < 1000 * _SECONDS:
        start = time.perf_counter()
        segment.search(questions.z[len(taken) : len(taken) + 1], k)
        taken.append(1000 * (time.perf_counter() - start))
    structure = segment.folder / STRUCTURE
    return recalls | {
        "queries": len(questions),
        "queries_from": questions.origin,
        "latency_ms_p50": float(np.percentile(taken, 50)),
        "latency_ms_p99": float(np.percentile(taken, 99)),
        "latency_queries": len(taken),
        "queries_per_second": rate,
        "memory_mb": structure.stat().st_size / 1e6 if segment.type != FLAT else 0.0,
        "vectors_mb": segment.vectors.nbytes / 1e6,
        "count": len(segment),
    }


def as_table(tried: Sequence[Mapping[str, Any]], chosen: Mapping[str, int]) -> str:
    """The settings in columns, that which was taken marked."""
    lines = [f"  {'type':24s} {'probe':>6s} {'rerank':>6s} {'recall@10':>9s} {'queries/s':>10s}"]
    for trial in tried:
        mark = " <- taken" if (trial["probe"], trial["rerank"]) == (chosen["probe"], chosen["rerank"]) else ""
        lines.append(
            f"  {trial['type']:24s} {trial['probe']:6d} {trial['rerank']:6d} {trial['recall_at_10']:9.3f} "
            f"{trial['queries_per_second']:10.0f}{mark}"
        )
    return "\n".join(lines)
