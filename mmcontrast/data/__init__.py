"""Shards -> batches: a deterministic stream that any number of ranks and workers reads in the same order."""

from mmcontrast.data.compose import Compose
from mmcontrast.data.stream import Stream
from mmcontrast.data.symile_m3 import SymileM3

__all__ = ["Compose", "Stream", "SymileM3"]
