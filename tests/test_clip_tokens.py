"""Fast tokens are open_clip's tokens, whatever the text."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.encoders import clip_tokens
from mmcontrast.encoders.clip_tokens import ClipTokens, encode_by
from mmcontrast.encoders.text import TokenTransform

open_clip = pytest.importorskip("open_clip.tokenizer")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def ours() -> ClipTokens:
    return ClipTokens(open_clip.SimpleTokenizer())


plain = st.text(alphabet=string.printable, max_size=80)
marked = st.lists(
    st.sampled_from(
        ["&amp;", "&lt;b&gt;", "<end_of_text>", "<START_OF_TEXT>", "Ã©tÃ©", "ﬁ", "\x1b[31m", "\x00", "don't"]
    )
    | st.text(max_size=12),
    max_size=6,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(text=plain | marked)
def test_tokens_are_the_tokenizers(theirs: Any, ours: ClipTokens, text: str) -> None:
    assert ours(text) == theirs.encode(text)


@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 200])
@pytest.mark.parametrize("length", [77, 3])
def test_a_transform_cuts_and_pads_as_the_tokenizer(words: int, length: int) -> None:
    tokenizer = open_clip.SimpleTokenizer(context_length=length)
    text = " ".join(["green"] * words)
    assert torch.equal(TokenTransform(tokenizer)(text), tokenizer(text)[0])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_clip.SimpleTokenizer()
    encode = ClipTokens(tokenizer)
    kept = len(tokenizer.cache)
    monkeypatch.setattr(clip_tokens, "_KNOWN", 16)
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        letters = torch.randint(26, [6], generator=draw).tolist()
        encode("".join(string.ascii_lowercase[i] for i in letters))
    assert len(tokenizer.cache) == kept and len(vars(encode)["_known"]) <= 16
    assert encode("<end_of_text>") == [tokenizer.eot_token_id]


def test_other_tokenizers_are_left_alone() -> None:
    assert encode_by(object()) is None
    assert encode_by(open_clip.SimpleTokenizer(clean="canonicalize")) is None
    assert encode_by(open_clip.SimpleTokenizer(reduction_mask="simple")) is None
    assert encode_by(open_clip.SimpleTokenizer()) is not None
