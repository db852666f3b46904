"""All randomness of a run is a pure function of named numbers: seed, epoch, position, step, global row.

So two runs agree, ranks and workers do not matter, and a resumed run needs no saved random state.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def fold_seed(*parts: int | str) -> int:
    """One 63-bit seed of several numbers or words; the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@lru_cache(maxsize=256)
def permutation(length: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of 0..length-1 that belongs to `parts`.

    It sorts raw Philox output, the only stream that numpy promises never to change between releases.
    """
    keys = np.random.Philox(key=fold_seed(*parts)).random_raw(length)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)  # shared by all callers through the cache
    return order
