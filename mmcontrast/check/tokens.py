"""How many tokens a text has before its tower cuts it, counted by the tower's own tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mmcontrast.encoders.coca import CoCaTransform
from mmcontrast.encoders.text import HFTransform, TokenTransform
from mmcontrast.encoders.words import WordTransform


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of a text, start and end included.

    Attributes:
        transform: of the text tower.
        limit: tokens that the tower reads.
    """

    transform: Any
    limit: int

    def __call__(self, value: str) -> int:
        """Tokens of the whole text."""
        match self.transform:
            case WordTransform():
                return len(re.findall(r"\w+", value.lower()))
            case HFTransform():
                return len(self.transform.ids(value))
            case CoCaTransform():
                tokenizer = self.transform.tokenizer
                ends = (tokenizer.sot_token_id, tokenizer.eot_token_id)
                return 2 + sum(i not in ends for i in tokenizer.encode(value))
            case _:
                tokenizer = self.transform.tokenizer
                if hasattr(tokenizer, "encode"):
                    return 2 + len(tokenizer.encode(value))
                return len(tokenizer.tokenizer(tokenizer.clean_fn(value), verbose=False)["input_ids"])


def token_counter(transform: Any) -> TokenCounter | None:
    """A counter for the transforms of this package's text towers; None for others, whose limit is not known."""
    match transform:
        case WordTransform():
            return TokenCounter(transform, transform.max_words)
        case HFTransform():
            return TokenCounter(transform, transform.max_length)
        case CoCaTransform():
            return TokenCounter(transform, transform.context_length)
        case TokenTransform() if not getattr(transform.tokenizer, "tokenizer_mode", ""):
            return TokenCounter(transform, int(transform.tokenizer.context_length))
        case _:
            return None
