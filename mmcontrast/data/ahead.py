"""Remote shards are brought before their samples are read, so that a step waits for none but the first."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from mmcontrast.config import ConfigError
from mmcontrast.data.source import Source
from mmcontrast.shard_cache import BYTES_VARIABLE, Cache
from mmcontrast.shards import ShardSet


class Ahead:
    """Brings the shards of the windows that are read, and of those that come next, in a thread.

    What it cannot bring it leaves to the reader, who tells the user. Where the cache has no room for two windows of all
    lanes that this machine reads, the next ones are not brought: they would drive out what is being read.
    """

    def __init__(self, sources: Sequence[Source], *, lanes: int, reader: int = 0, readers: int = 1) -> None:
        """Start the thread.

        Args:
            sources: of the stream; those on this machine need nothing.
            lanes: that all ranks of this machine read.
            reader: which of the processes that read the same lanes this is; they divide the shards.
            readers: how many there are.
        """
        self._sources, self._share = sources, slice(reader, None, readers)
        self._further = all(2 * need <= cache.limit for cache, need in _needs(sources, lanes).values())
        self._asked: dict[tuple[int, int], int] = {}
        self._wanted: SimpleQueue[tuple[ShardSet, int] | None] = SimpleQueue()
        self._closed = threading.Event()
        # A daemon: a transfer that hangs must not keep a process alive. What has arrived of it stays for the next one.
        threading.Thread(target=self._bring, name="shards ahead", daemon=True).start()

    def notice(self, places: Iterable[tuple[int, int, int]]) -> None:
        """Ask for what belongs to these (source, lane, turn), and comes after; returns at once."""
        for (number, lane), turn in {(number, lane): turn for number, lane, turn in places}.items():
            source = self._sources[number]
            end = source.order.window_end(turn)
            if source.shards.cache is None or self._asked.get((number, lane)) == end:
                continue
            self._asked[number, lane] = end
            wanted = source.order.window_shards(lane, turn)
            if self._further:
                wanted += source.order.window_shards(lane, end)
            for shard in wanted[self._share]:
                self._wanted.put((source.shards, shard))

    def close(self) -> None:
        """Bring nothing more."""
        self._closed.set()
        self._wanted.put(None)

    def _bring(self) -> None:
        while (found := self._wanted.get()) is not None and not self._closed.is_set():
            shard = found[0].shards[found[1]]
            with suppress(ConfigError):
                shard.load()
                os.close(shard.open())


def check_room(sources: Sequence[Source], lanes: int) -> None:
    """Refuse windows that the cache cannot hold: each sample would bring its shard anew.

    Raises:
        ConfigError: naming both sizes.
    """
    for cache, need in _needs(sources, lanes).values():
        if need > cache.limit:
            raise ConfigError(
                f"the shuffle draws from {need / 1e9:.3g} GB of remote shards at once, the cache {cache.folder} holds "
                f"{cache.limit / 1e9:.3g} GB; raise {BYTES_VARIABLE}, or lower data.window"
            )


def _needs(sources: Sequence[Source], lanes: int) -> dict[str, tuple[Cache, int]]:
    """Cache folder -> the cache, and the bytes of the shards that the windows of all sources touch, on average."""
    found: dict[str, tuple[Cache, int]] = {}
    for source in sources:
        if (cache := source.shards.cache) is not None:
            total, order = sum(shard.bytes for shard in source.shards.shards), source.order
            share = min(1.0, order.window / order.lane_length) / order.lanes
            # A window begins and ends within a shard.
            need = min(total, int(lanes * (total * share + total / len(source.shards.shards))))
            found[str(cache.folder)] = (cache, need + found.get(str(cache.folder), (cache, 0))[1])
    return found
