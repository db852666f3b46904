"""What the index benchmark searches: vectors in clusters with few dimensions that matter, as encoders give them.

Independent random directions have no neighbours to speak of, so that every approximate index looks useless on them.
Here a vector is the unit-norm sum of what all vectors share (the narrow cone of an encoder's outputs), of one of 200
topics, of one of 20 000 concepts that belong to topics, of a deviation along 64 directions whose scale falls as a power
law, and of a little isotropic noise. Concepts are drawn by Zipf's law, so clusters are large and small. Queries are
drawn anew by the same law and are in no index; those of the other modality have another cone and more deviation, as
texts have that look for pictures.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TOPICS, CONCEPTS, DIRECTIONS = 200, 20_000, 64
_BLOCK = 50_000


class Clusters:
    """Draws vectors [n, D]; the same seed gives the same clusters."""

    def __init__(self, dim: int, *, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)

        def directions(n: int) -> Floats:
            x = draw.standard_normal((n, dim), np.float32)
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        self.dim, self.seed = dim, seed
        self._cones = directions(2)
        self._topics, self._concepts, self._basis = directions(TOPICS), directions(CONCEPTS), directions(DIRECTIONS)
        self._topic_of = draw.integers(0, TOPICS, CONCEPTS)
        self._scales = (np.arange(1, DIRECTIONS + 1) ** -0.5).astype(np.float32)
        share = np.arange(1, CONCEPTS + 1) ** -0.7
        self._share = draw.permutation(share / share.sum())

    def vectors(self, n: int, *, stream: int = 0, other_modality: bool = False) -> Iterator[Floats]:
        """Blocks of n vectors in all; each `stream` is drawn on its own."""
        draw = np.random.default_rng([self.seed, 1 + stream])
        deviation = 0.5 if other_modality else 0.35
        for start in range(0, n, _BLOCK):
            rows = min(_BLOCK, n - start)
            concept = draw.choice(CONCEPTS, rows, p=self._share)
            x = 0.6 * self._cones[int(other_modality)] + 0.6 * self._topics[self._topic_of[concept]]
            x = x + 0.6 * self._concepts[concept]
            x += deviation * ((draw.standard_normal((rows, DIRECTIONS), np.float32) * self._scales) @ self._basis)
            x += 0.2 / np.sqrt(self.dim) * draw.standard_normal((rows, self.dim), np.float32)
            yield (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
