"""What a classifier takes for what, so that a person can read it: classes that are confused beside each other.

Letters: C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmcontrast.charts import heat
from mmcontrast.page import Html, number

MOST = 30
"""Classes of the drawn table; of more, those that are most confused."""
_PAIRS = 12


class Pair(NamedTuple):
    """Samples of one class that were called another."""

    right: str
    called: str
    samples: int
    of: int


class Recall(NamedTuple):
    """The share of a class's samples that is named right."""

    name: str
    recall: float
    samples: int


@dataclass(frozen=True)
class Confusion:
    """The table as a drawing, the pairs that are most confused, and each class that has samples."""

    drawn: Html
    pairs: Sequence[Pair]
    recalls: Sequence[Recall]


def confusion(classes: Sequence[str], counts: Sequence[tuple[int, int, int]]) -> Confusion:
    """Of (right class, named class, samples) triples.

    Raises:
        IndexError: a class that is not there.
    """
    samples, right = Counter[int](), Counter[int]()
    for a, b, n in counts:
        samples[a] += n
        right[a] += n if a == b else 0
    wrong = sorted(((n, a, b) for a, b, n in counts if a != b), key=lambda e: (-e[0], e[1], e[2]))
    pairs = [Pair(classes[a], classes[b], n, samples[a]) for n, a, b in wrong[:_PAIRS]]
    recalls = [Recall(classes[c], right[c] / n, n) for c, n in sorted(samples.items()) if n]
    chosen = _chosen(len(classes), counts, wrong)
    table = _table(chosen, counts)
    order = together(table)
    named = [classes[chosen[i]] for i in order]
    about = "Rows are right, columns what was answered; confused classes stand beside each other."
    if len(chosen) < len(classes):
        about += f" The {len(chosen)} most confused of {number(len(classes))} classes."
    drawn = heat(table[np.ix_(order, order)].tolist(), named, title="Confusion", about=about) if chosen else Html()
    return Confusion(drawn, pairs, recalls)


def _chosen(classes: int, counts: Sequence[tuple[int, int, int]], wrong: Sequence[tuple[int, int, int]]) -> list[int]:
    """All classes if they are few; otherwise those of the largest confusions."""
    if classes <= MOST:
        return list(range(classes))
    found: dict[int, None] = {}
    for _, a, b in wrong:
        for c in (a, b):
            if len(found) < MOST:
                found.setdefault(c)
    return sorted(found)


def _table(chosen: Sequence[int], counts: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    places = {c: i for i, c in enumerate(chosen)}
    found = np.zeros((len(chosen), len(chosen)), np.int64)
    for a, b, n in counts:
        if a in places and b in places:
            found[places[a], places[b]] += n
    return found


def together(table: NDArray[np.int64]) -> list[int]:
    """An order of [C, C] counts in which classes that are confused stand beside each other.

    Leaves of an average-linkage tree, in the order with the shortest steps (Bar-Joseph et al. 2001).
    """
    n = len(table)
    if n < 3 or not (table - np.diag(np.diag(table))).any():
        return list(range(n))
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    far = 2.0 - np.minimum(shares + shares.T, 2.0)
    np.fill_diagonal(far, 0.0)
    return leaves_list(linkage(squareform(far, checks=False), "average", optimal_ordering=True)).tolist()
