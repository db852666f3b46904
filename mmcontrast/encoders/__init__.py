"""Encoders, one file per modality, and the model that brings them into one space."""

from mmcontrast.encoders.base import Encoder
from mmcontrast.encoders.image import OpenClipImage, TimmImage, ViT
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.encoders.text import HFText, OpenClipText, TextTransformer

__all__ = [
    "Encoder",
    "HFText",
    "MultiEncoder",
    "OpenClipImage",
    "OpenClipText",
    "TextTransformer",
    "TimmImage",
    "ViT",
]
