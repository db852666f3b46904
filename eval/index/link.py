"""Record linkage: for each sample of one index the nearest of another, and whether they are the same thing.

A record's vector may be pooled of its picture and its text (`index build --modality image+text`), as CLIPPINGS does it
(Arora et al. 2023, arXiv:2304.03464): the nearest exemplar is looked for by one inner product, and a threshold on the
score decides. The threshold is chosen on labelled pairs, half of them, and what it is worth is said of the other half,
since what chose a threshold cannot say that. Letters: n records, p labelled records.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.stored import Stored
from mmcontrast.eval.index.vectors import Floats, Ints

_SPACE = ("model_hash", "dim", "metric", "normalisation")
_BLOCK = 4096


@dataclass(frozen=True)
class Point:
    """What a threshold is worth.

    Attributes:
        threshold: the least score of a link.
        precision: share of the links that are right; 1 where there are none.
        recall: share of the records that have a counterpart which are linked to it.
        links: above the threshold.
    """

    threshold: float
    precision: float
    recall: float
    links: int

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@dataclass(frozen=True)
class Calibration:
    """A threshold, chosen on labelled pairs.

    Attributes:
        threshold: that was chosen.
        by: how.
        chosen_on: records that chose it.
        held_out: what it is worth on the other records; None where there are too few to part them.
        held_out_on: how many.
        curve: of all labelled records, from the strictest threshold on.
    """

    threshold: float
    by: str
    chosen_on: int
    held_out: Point | None
    held_out_on: int
    curve: list[Point]

    def to_json(self) -> dict[str, Any]:
        """As a file of JSON says it."""
        return asdict(self)


Labels = Mapping[str, frozenset[str]]
"""Key of a record of the first index -> keys of its counterparts in the second; none if it has none."""


class Linked:
    """The nearest record of another index for each of one."""

    def __init__(self, left: Stored, right: Stored, *, where: str | None = None, progress: bool = False) -> None:
        """Search for all of them.

        Args:
            left: whose records are linked.
            right: where their counterparts are looked for.
            where: counterparts must pass this filter; see `filters`.
            progress: show a bar on standard error.

        Raises:
            ConfigError: they are of different models, or no filter.
        """
        for name in _SPACE:
            if left.manifest[name] != right.manifest[name]:
                raise ConfigError(
                    f"{left.folder} was made with {name} {left.manifest[name]}, {right.folder} with "
                    f"{right.manifest[name]}: their spaces differ; build one of them with the other's model"
                )
        from tqdm import tqdm

        self.left, self.right = left, right
        self.rows: Ints = left.rows()
        self.scores: Floats = np.zeros(len(self.rows), np.float32)
        self.nearest: Ints = np.zeros(len(self.rows), np.int64)
        with tqdm(total=len(self.rows), desc="link", unit="record", unit_scale=True, disable=not progress) as bar:
            for start in range(0, len(self.rows), _BLOCK):
                some = slice(start, start + _BLOCK)
                vectors = left.vectors(self.rows[some])
                scores, found = right.nearest(vectors, 1, where)
                self.scores[some], self.nearest[some] = scores[:, 0], found[:, 0]
                bar.update(len(vectors))

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[str]:
        """[n] of the records."""
        return self.left.keys(self.rows)

    def records(self, threshold: float) -> Iterator[dict[str, Any]]:
        """`a`, `b`, `score` and `link` of each record; `b` is None where nothing passes the filter."""
        found = self.nearest >= 0
        theirs = iter(self.right.keys(self.nearest[found]))
        for key, score, there in zip(self.keys(), self.scores.tolist(), found.tolist(), strict=True):
            yield {
                "a": key,
                "b": next(theirs) if there else None,
                "score": round(score, 6) if there else None,
                "link": there and score >= threshold,
            }

    def calibrate(self, labels: Labels, *, precision: float | None = None) -> Calibration:
        """The threshold with the best F1, or with the most recall at a precision that is asked for.

        Raises:
            ConfigError: a precision that makes no sense or is not reached, or labels of no record here.
        """
        if precision is not None and not 0 < precision <= 1:
            raise ConfigError(f"precision is {precision}; ask for a share of right links above 0, up to 1")
        places = {key: place for place, key in enumerate(self.keys())}
        missing = [key for key in labels if key not in places]
        if missing:
            raise ConfigError(f"{len(missing)} of the labelled records are not in {self.left.folder}: {missing[0]!r}")
        if len(labels) < 2:
            raise ConfigError(f"{len(labels)} records are labelled; a threshold takes at least 2, and better hundreds")
        chosen = np.array([places[key] for key in labels])
        wanted = list(labels.values())
        there = self.nearest[chosen] >= 0
        theirs = iter(self.right.keys(self.nearest[chosen][there]))
        named = [next(theirs) if t else None for t in there.tolist()]
        right = np.array([name in keys for name, keys in zip(named, wanted, strict=True)])
        has = np.array([bool(keys) for keys in wanted])
        scores = np.where(there, self.scores[chosen], -np.inf)
        # Drawn, so that a sorted file does not put one kind of records into one half.
        order = np.random.default_rng(0).permutation(len(scores))
        choosing, other = (order[::2], order[1::2]) if len(order) >= 20 else (order, order[:0])
        curve = points(scores[choosing], right[choosing], has[choosing])
        best = _best(curve, precision)
        held_out = worth(best.threshold, scores[other], right[other], has[other]) if len(other) else None
        return Calibration(
            best.threshold,
            "the best F1" if precision is None else f"the most recall at precision {precision:g}",
            len(choosing),
            held_out,
            len(other),
            points(scores, right, has),
        )


def points(scores: Floats, right: Any, has: Any) -> list[Point]:
    """What each threshold is worth at which a decision changes, from the strictest on. [p] each, as for `worth`."""
    order = np.argsort(-scores, kind="stable")[: np.count_nonzero(np.isfinite(scores))]
    scores, good = scores[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True)) if len(scores) else order
    counterparts = int(np.count_nonzero(has))
    return [
        Point(
            float(scores[i]), int(good[i]) / (i + 1), int(good[i]) / counterparts if counterparts else 1.0, int(i) + 1
        )
        for i in last
    ]


def worth(threshold: float, scores: Floats, right: Any, has: Any) -> Point:
    """What a threshold is worth. [p] scores, whether the nearest is the counterpart, and whether there is one."""
    linked = scores >= threshold
    links, good = int(np.count_nonzero(linked)), int(np.count_nonzero(linked & right))
    counterparts = int(np.count_nonzero(has))
    return Point(threshold, good / links if links else 1.0, good / counterparts if counterparts else 1.0, links)


def _best(curve: Sequence[Point], precision: float | None) -> Point:
    if not curve:
        raise ConfigError("no labelled record has anything near it: no threshold can be chosen")
    if precision is None:
        return max(curve, key=lambda point: point.f1)
    good = [point for point in curve if point.precision >= precision]
    if not good:
        most = max(point.precision for point in curve)
        raise ConfigError(
            f"no threshold reaches precision {precision:g} on the labelled pairs; the best has {most:.3f}"
        )
    return max(good, key=lambda point: point.recall)


def read_labels(path: Path) -> dict[str, frozenset[str]]:
    """Labelled pairs: a CSV with the columns a and b, or JSON lines with these fields; an empty b: no counterpart.

    A record may come several times, with several counterparts.

    Raises:
        ConfigError: no such file, or other columns.
    """
    found: dict[str, set[str]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix in (".jsonl", ".ndjson"):
                rows: list[Any] = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        raise ConfigError(f"the labelled pairs {path} cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        pair = cast(Mapping[str, Any], row) if isinstance(row, Mapping) else {}
        a, b = pair.get("a"), pair.get("b")
        if not isinstance(a, str) or not a or not (b is None or isinstance(b, str)) or "b" not in pair:
            raise ConfigError(f"pair {number} of {path} has no keys `a` and `b` (an empty `b`: no counterpart)")
        found.setdefault(a, set()).update([b] if b else [])
    if not found:
        raise ConfigError(f"{path} holds no pairs; give the columns a and b")
    return {a: frozenset(keys) for a, keys in found.items()}
