"""Shards -> batches: a deterministic stream that any number of ranks and workers reads in the same order."""

from mmcontrast.data.compose import Captions, Compose
from mmcontrast.data.near_in_time import NearInTime
from mmcontrast.data.source import Source
from mmcontrast.data.stream import Mixture, Stream
from mmcontrast.data.symile_m3 import SymileM3

__all__ = ["Captions", "Compose", "Mixture", "NearInTime", "Source", "Stream", "SymileM3"]
