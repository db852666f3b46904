"""Image towers: attention pooling, dropped patches, other resolutions than the weights', networks of own sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.encoders import ConvNet, Encoder, OpenClipImage, TimmImage
from tests import tiny
from tests.towers import Origins, build, make_origins


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


def pixels(side: int, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def slow_pool(pooler: Any, tokens: Tensor) -> Tensor:
    """The pooler of Zhai et al. for one picture [T, C], head by head: attention of the query, then x + MLP(norm(x))."""
    query = pooler.q(pooler.latent[0, 0])
    keys, values = pooler.kv(tokens).chunk(2, 1)
    found: list[Tensor] = []
    for part in range(pooler.num_heads):
        at = slice(part * pooler.head_dim, (part + 1) * pooler.head_dim)
        scores = torch.stack([(query[at] * key[at]).sum() for key in keys]) / pooler.head_dim**0.5
        weights = scores.exp() / scores.exp().sum()
        found.append(sum((w * v[at] for w, v in zip(weights, values, strict=True)), torch.zeros(pooler.head_dim)))
    x = pooler.proj(torch.cat(found))
    return x + pooler.mlp(pooler.norm(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        tiny.vit(image_size=32, attention_pool=True),
        ConvNet.Config(image_size=32, widths=(8, 8, 8, 128), blocks=(1, 1, 1, 1), attention_pool=True),
        TimmImage.Config(model="test_vit", image_size=32, attention_pool=True),
        TimmImage.Config(model="test_convnext", image_size=32, attention_pool=True),
    ],
)
def test_attention_pools_the_tokens(config: Encoder.Config) -> None:
    net = build(config)
    net.pooler.latent.normal_()
    pooled, tokens = net(pixels(32))
    assert net.pooler.num_heads == max(1, net.dim // 64)
    for row in range(2):
        torch.testing.assert_close(pooled[row], slow_pool(net.pooler, tokens[row]), rtol=1e-4, atol=1e-5)
    assert (pooled - tokens.mean(1)).abs().max() > 0.1, "the mean would pass"


def test_tokens_that_attention_pools_are_normed_where_the_tower_norms_behind_its_pooling() -> None:
    net = build(TimmImage.Config(model="test_convnext", image_size=32, attention_pool=True))
    tokens = net(pixels(32))[1]
    torch.testing.assert_close(tokens.mean(2), torch.zeros(2, tokens.shape[1]), rtol=0, atol=1e-4)
    plain = build(TimmImage.Config(model="test_convnext", image_size=32))(pixels(32))[1]
    assert plain.mean(2).abs().max() > 1e-2, "they would have been normed anyway"


def test_what_the_old_pooling_alone_used_stops_training(origins: Origins) -> None:
    import open_clip

    architecture = {
        "embed_dim": 12,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "patch_size": 16,
            "head_width": 8,
            "pool_type": "avg",
            "final_ln_after_pool": True,
        },
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    import json

    (origins.folder / "architectures" / "tiny-clipa.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(origins.folder / "architectures")
    net = build(OpenClipImage.Config(architecture="tiny-clipa", attention_pool=True)).train()
    net(pixels(32))[0].square().sum().backward()
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {
        "tower.ln_post.weight",
        "tower.ln_post.bias",
    }
    assert all((p.grad is not None) is p.requires_grad for p in net.parameters())


def test_patches_are_dropped_in_training_only(origins: Origins) -> None:
    for config, tokens in (
        (TimmImage.Config(model="test_vit", image_size=64, patch_dropout=0.75), 17),
        (OpenClipImage.Config(architecture="tiny-clip", image_size=64, patch_dropout=0.75), 16),
    ):
        net = build(config)
        x = pixels(64)
        assert net(x)[1].shape[1] == tokens and torch.equal(net(x)[0], net(x)[0])
        a, b = net.train()(x), net(x)
        assert a[1].shape[1] == tokens - 12 and not torch.allclose(a[0], b[0])


@torch.no_grad()
def test_weights_come_to_another_resolution_as_their_library_brings_them(origins: Origins) -> None:
    import open_clip
    import timm

    theirs: Any = timm.create_model("test_vit", num_classes=10)
    theirs.load_state_dict(torch.load(origins.timm["test_vit"]))
    theirs.reset_classifier(0)
    theirs.set_input_size((96, 96))
    ours = build(TimmImage.Config(model="test_vit", weights=origins.timm["test_vit"], image_size=96))
    x = pixels(96)
    torch.testing.assert_close(ours(x)[0], theirs.eval()((x / 255 - 0.5) / 0.5), rtol=1e-3, atol=1e-4)
    assert ours.tower.pos_embed.shape[1] == 37 and not torch.equal(
        ours.tower.pos_embed[:, :5], build(TimmImage.Config(model="test_vit", image_size=96)).tower.pos_embed[:, :5]
    )
    clip: Any = open_clip.create_model("tiny-clip", pretrained=origins.clip, force_image_size=64).eval()
    own = build(OpenClipImage.Config(architecture="tiny-clip", weights=origins.clip, image_size=64))
    assert own.size == 64
    torch.testing.assert_close(own(pixels(64))[0], clip.encode_image(own.normalise(pixels(64))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "prefix"), [("test_vit", 1), ("test_convnext", 0)])
def test_training_sees_smaller_sizes_and_evaluation_does_not(model: str, prefix: int) -> None:
    net = build(TimmImage.Config(model=model, image_size=128, smaller_sizes=(64, 96)))
    stride = 16 if prefix else 32
    sides = {128: prefix + (128 // stride) ** 2, 96: prefix + (96 // stride) ** 2, 64: prefix + (64 // stride) ** 2}
    x = pixels(128)
    assert net(x)[1].shape[1] == sides[128]
    net.train()
    torch.manual_seed(0)
    first = [net(x)[1].shape[1] for _ in range(20)]
    assert set(first) == set(sides.values())
    torch.manual_seed(0)
    assert [net(x)[1].shape[1] for _ in range(20)] == first, "the gradient cache could not repeat the draw"
    small = torch.nn.functional.interpolate(net.normalise(x), (64, 64), mode="bilinear", antialias=True)
    want = net.eval().tower(small)
    net.train().sizes = (64, 64)
    torch.testing.assert_close(net(x)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TimmImage.Config(model="test_convnext", patch_dropout=0.5), "has no patch_drop_rate: leave patch_dropout out"),
        (TimmImage.Config(model="beit_base_patch16_224", smaller_sizes=(96,)), "no dynamic_img_size: leave smaller_s"),
        (TimmImage.Config(model="test_vit", patch_dropout=1.0), "patch_dropout is 1.0; it must be in 0..1"),
        (
            TimmImage.Config(model="test_vit", image_size=64, smaller_sizes=(64,)),
            "64 must be above 0 and below image_s",
        ),
        (TimmImage.Config(model="test_vit", image_size=64, smaller_sizes=(40,)), "test_vit does not take 40 pixels: "),
        (OpenClipImage.Config(architecture="tiny-resnet", patch_dropout=0.5), "tiny-resnet has no patches to drop"),
        (ConvNet.Config(widths=(8, 8, 8, 0)), "must be four numbers of at least 1, one per stage"),
        (ConvNet.Config(image_size=16), "patch_size is 4 and image_size 16; give at least 1, and 8 patches"),
        (ConvNet.Config(drop_path=1.0), "drop_path 1.0 must be in 0..1"),
    ],
)
def test_settings_that_make_no_tower_are_refused(origins: Origins, config: Encoder.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config.build()
    assert "\n" not in str(error.value)


def test_attention_pooling_needs_tokens(origins: Origins, tmp_path: Path) -> None:
    import open_clip

    torch.save(open_clip.create_model("tiny-resnet").state_dict(), tmp_path / "resnet.pt")
    config = OpenClipImage.Config(architecture="tiny-resnet", weights=str(tmp_path / "resnet.pt"), attention_pool=True)
    with pytest.raises(ConfigError, match="attention_pool: OpenClipImage gives no tokens"):
        config.build()
