"""Heads: terms of the loss that look at the tokens of one sample at a time, and what they can write."""

from mmcontrast.heads.base import Head
from mmcontrast.heads.captioning import Captioning

__all__ = ["Captioning", "Head"]
