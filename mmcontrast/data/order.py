"""The order of training samples: a pure function of (seed, position), endless and without memory of the past.

An epoch lines up the shards in a random order and cuts the line into `lanes` equal parts; each lane is read
from front to back and shuffled within windows. A global batch takes the same number of samples from every
lane, so ranks that own lanes read different shards, in sequence, and no rank, worker or restart changes what
a step sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.randomness import permutation


class Order:
    """`order.sample(step, slot)` is the sample that stands in a slot of a step's global batch.

    An epoch is `per_epoch` = lanes * (N // lanes) samples: fewer than `lanes` are left out, others in each
    epoch. A step may span two epochs. A sample travels less than `window` places from its shard's turn, so
    the shuffle holds 8 bytes per sample of a window and lane.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, global_batch: int, window: int = 16384, lanes: int = 1
    ) -> None:
        """Order over shards with `counts` samples each.

        Raises:
            ConfigError: no samples, fewer samples than lanes, or a global batch that lanes do not divide.
        """
        total = sum(counts)
        if global_batch < 1:
            raise ConfigError(f"the global batch is {global_batch}; it must be at least 1")
        if lanes < 1 or global_batch % lanes:
            raise ConfigError(f"lanes ({lanes}) must divide the global batch ({global_batch})")
        if total < lanes:
            raise ConfigError(f"the shards hold {total} samples, fewer than the {lanes} lanes that read them")
        if window < 1:
            raise ConfigError(f"the shuffle window is {window}; it must be at least 1")
        self.seed, self.window, self.lanes = seed, window, lanes
        self.lane_length = total // lanes
        self.lane_batch = global_batch // lanes
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        self._line_epoch, self._line = -1, self._counts  # the line of the epoch that was asked for last

    @property
    def per_epoch(self) -> int:
        """Samples in an epoch."""
        return self.lanes * self.lane_length

    def place(self, step: int, slot: int) -> tuple[int, int]:
        """(lane, turn) of a slot: the turn counts the lane's samples since the run began."""
        return slot // self.lane_batch, step * self.lane_batch + slot % self.lane_batch

    def at(self, lane: int, turn: int) -> int:
        """The sample at a lane's turn."""
        epoch, first, length = self._window_of(turn)
        place = turn % self.lane_length
        shuffled = first + int(permutation(length, self.seed, epoch, lane, first)[place - first])
        return self._on_line(epoch, lane * self.lane_length + shuffled)

    def window_end(self, turn: int) -> int:
        """The turn at which the window after this one's begins."""
        epoch, first, length = self._window_of(turn)
        return epoch * self.lane_length + first + length

    def window_shards(self, lane: int, turn: int) -> list[int]:
        """The shards of which a lane's window has samples, in the order of the line."""
        epoch, first, length = self._window_of(turn)
        shards, line = self._lined_up(epoch)
        first += lane * self.lane_length
        # Shards without samples end where they begin, and are in no window.
        turns = range(*np.searchsorted(line, [first, first + length - 1], side="right") + [0, 1])
        return [int(shards[t]) for t in turns if self._counts[shards[t]]]

    def _window_of(self, turn: int) -> tuple[int, int, int]:
        """A turn's epoch, and first place and length of its window in the lane."""
        epoch, place = divmod(turn, self.lane_length)
        first = place - place % self.window
        return epoch, first, min(self.window, self.lane_length - first)

    def sample(self, step: int, slot: int) -> int:
        """The sample in a slot of a step's global batch."""
        return self.at(*self.place(step, slot))

    def _on_line(self, epoch: int, position: int) -> int:
        """The sample at a position of the epoch's line of shards."""
        shards, line = self._lined_up(epoch)
        turn = int(np.searchsorted(line, position, side="right"))
        shard = shards[turn]
        return int(self._firsts[shard] + position - (line[turn] - self._counts[shard]))

    def _lined_up(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in an epoch's order, and where on the line each ends."""
        shards = permutation(len(self._counts), self.seed, epoch, "shards")
        if self._line_epoch != epoch:
            self._line_epoch, self._line = epoch, np.cumsum(self._counts[shards])
        return shards, self._line
