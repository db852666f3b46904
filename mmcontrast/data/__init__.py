"""Shards -> batches: a deterministic stream that any number of ranks and workers reads in the same order."""

from mmcontrast.data.stream import Stream

__all__ = ["Stream"]
