"""Encoders, one file per modality, and the model that brings them into one space."""

from mmcontrast.encoders.audio import MelConvNet, MelTransformer
from mmcontrast.encoders.base import Encoder
from mmcontrast.encoders.coca import CascadePool, CoCaText
from mmcontrast.encoders.hf_audio import HFAudio
from mmcontrast.encoders.image import ConvNet, ViT
from mmcontrast.encoders.image_models import OpenClipImage, TimmImage
from mmcontrast.encoders.lora import Lora
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.encoders.text import HFText, OpenClipText, TextTransformer
from mmcontrast.encoders.timeseries import SignalResNet, SignalTransformer
from mmcontrast.encoders.warp import Warp
from mmcontrast.encoders.words import BagOfWords

__all__ = [
    "CascadePool",
    "CoCaText",
    "ConvNet",
    "BagOfWords",
    "Encoder",
    "HFAudio",
    "HFText",
    "Lora",
    "MelConvNet",
    "MelTransformer",
    "MultiEncoder",
    "OpenClipImage",
    "OpenClipText",
    "SignalResNet",
    "SignalTransformer",
    "TextTransformer",
    "TimmImage",
    "ViT",
    "Warp",
]
