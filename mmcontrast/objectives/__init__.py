"""Contrastive objectives, one file per paper family; none of them knows how many ranks there are."""

from mmcontrast.objectives.base import Block, Objective, Totals
from mmcontrast.objectives.infonce import InfoNCE

__all__ = ["Block", "InfoNCE", "Objective", "Totals"]
