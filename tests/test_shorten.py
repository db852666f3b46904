"""Texts without their padding, and sorted by length: the same embeddings, where the tower cannot see the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from open_clip import transformer
from torch import Tensor, nn

from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.encoders.text import TextTransformer, TokenTower
from mmcontrast.eval.models import load_asked
from mmcontrast.eval.zero_shot import class_embeddings
from tests import clip_benchmark_data as made
from tests import tiny

Tower: Any = transformer.TextTransformer
TEXTS = ["a", "a red bar, or a blue one", "two", "a photo of something long " * 3, "", "blue"]


def spread(model: nn.Module) -> None:
    """Weights at which texts and paddings that differ come out far apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.normal_(std=1)


def tokens(count: int, length: int, eos: int) -> Tensor:
    """Texts of several lengths, ends and padding behind them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, eos, (count, length), generator=generator)
    for i, row in enumerate(x):
        row[2 + i] = eos
        row[3 + i :] = 0
    return x


@pytest.mark.parametrize(
    "settings",
    [{}, {"pool_type": "eos", "eos_id": 99}, {"output_tokens": True}, {"proj_bias": True}, {"output_dim": None}],
)
def test_a_causal_tower_does_not_see_its_padding(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tower = Tower(context_length=20, vocab_size=100, width=32, heads=2, layers=2, **{"output_dim": 8, **settings})
    spread(tower)
    read, x = TokenTower(tower.eval()), tokens(5, 20, 99)
    short = read.shorten(x)
    assert short.shape == (5, 7) and (short[-1] == 99).any()
    with torch.no_grad():
        want, found = tower(x), read(short)
        if "output_tokens" in settings:
            want, of_tokens = want
            assert found[1] is not None
            torch.testing.assert_close(found[1], of_tokens[:, :7])
        torch.testing.assert_close(found[0], want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(read(x)[0], want, rtol=0, atol=0)
        assert not torch.allclose(read(short[:, :4])[0], want, atol=1e-2), "a cut would not be seen"
    assert tower.attn_mask.shape == (20, 20)


@pytest.mark.parametrize(
    "settings", [{"pool_type": "last"}, {"no_causal_mask": True, "use_pad_mask": True}, {"embed_cls": True}]
)
def test_towers_that_see_their_padding_keep_it(settings: dict[str, Any]) -> None:
    tower = Tower(context_length=20, vocab_size=100, width=32, heads=2, layers=1, output_dim=8, **settings).eval()
    read, x = TokenTower(tower), tokens(5, 20, 99)
    assert read.shorten(x) is x
    with torch.no_grad():
        found, want = read(x)[0], tower(x)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_texts_are_embedded_by_length_and_come_back_in_order() -> None:
    torch.manual_seed(0)
    model: MultiEncoder = tiny.model_config().build()
    spread(model)
    seen: list[int] = []
    tower = model.encoder("text")
    assert isinstance(tower, TextTransformer)
    tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    found = model.encode("text", TEXTS, batch_size=2)
    assert seen == sorted(seen) and len(seen) == 3 and seen[0] < seen[-1] <= int(tower.tokenizer.context_length or 0)
    alone = torch.cat([model.encode("text", [text]) for text in TEXTS])
    torch.testing.assert_close(found, alone)
    full = model({"text": torch.stack([tower.transform(train=False)(text) for text in TEXTS])}, towers=["text"])[
        "text"
    ].detach()
    torch.testing.assert_close(found, full)
    assert (found[0] - found[1]).abs().max() > 0.01, "all texts look alike"


def test_the_head_of_an_open_clip_model_is_that_of_its_own_encoder(tmp_path: Any) -> None:
    import open_clip

    given = made.open_clip_weights(tmp_path)
    architecture, weights = given.split(",")
    peer: Any = open_clip.create_model(architecture, pretrained=weights).eval()
    tokenizer = open_clip.get_tokenizer(architecture)
    prompts = [[f"a {kind} of a {name}" for kind in ("photo", "very large drawing")] for name in ("cat", "sea lion")]
    found = class_embeddings(load_asked(given).model, "text", prompts)
    with torch.no_grad():
        z = [nn.functional.normalize(peer.encode_text(tokenizer(texts)), dim=1).mean(0) for texts in prompts]
    torch.testing.assert_close(found, nn.functional.normalize(torch.stack(z), dim=1))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
