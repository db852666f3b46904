"""Contrastive objectives, one file per paper family; none of them knows how many ranks there are."""

from mmcontrast.objectives.base import Block, Objective, Totals, plain_loss
from mmcontrast.objectives.gap import Alignment, CrossUniformity, Uniformity
from mmcontrast.objectives.infonce import DCL, InfoNCE
from mmcontrast.objectives.pairs import all_pairs, pairs_with
from mmcontrast.objectives.siglip import SigLIP
from mmcontrast.objectives.symile import Symile
from mmcontrast.objectives.targets import CWCL, MultiPositive

__all__ = [
    "CWCL",
    "DCL",
    "Alignment",
    "Block",
    "CrossUniformity",
    "InfoNCE",
    "MultiPositive",
    "Objective",
    "SigLIP",
    "Symile",
    "Totals",
    "Uniformity",
    "all_pairs",
    "pairs_with",
    "plain_loss",
]
