"""LoRA in every tower: what is computed is W + alpha / rank · B A, and nothing else trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.encoders import CascadePool, Encoder, Lora, MultiEncoder, TimmImage
from mmcontrast.encoders.lora import SplitAttention
from mmcontrast.objectives import InfoNCE
from mmcontrast.trainer import Trainer
from tests import tiny
from tests.towers import EVERY, Origins, build, inputs, make_origins, raw

ADAPTED = [name for name in EVERY if name != "BagOfWords"]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


@pytest.fixture(params=ADAPTED)
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(origins: Origins, tower: str, **settings: Any) -> tuple[Any, Any]:
    """The tower as it is, and with adapters that were moved from zero."""
    config = EVERY[tower](origins)
    plain = build(config)
    config.lora = Lora.Config(rank=2, alpha=3.0, **settings)
    encoder = build(config)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if ".lora_B." in name:
                p.normal_(0, 0.3)
        for name, p in [*plain.named_parameters(), *encoder.named_parameters()]:
            if name.endswith(".gamma"):
                p.fill_(1)  # ConvNeXt's blocks start with next to no effect
    return plain, encoder


def folded(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of an adapted tower as those of a plain one, number by number."""
    made: dict[str, Tensor] = {}
    for name in wanted:
        stem, _, last = name.rpartition(".")
        if name not in found and last in ("in_proj_weight", "in_proj_bias"):
            parts = [f"{stem}.{part}_proj.{last.removeprefix('in_proj_')}" for part in "qkv"]
            made[name] = torch.cat([_folded(found, part, scale) for part in parts])
        else:
            made[name] = _folded(found, name, scale)
    return made


def _folded(found: Mapping[str, Tensor], name: str, scale: float) -> Tensor:
    stem, _, last = name.rpartition(".")
    base = found.get(f"{stem}.base_layer.{last}")
    if base is None:
        return found[name]
    if last != "weight":
        return base
    a, b = (found[f"{stem}.lora_{which}.default.weight"].flatten(1) for which in "AB")
    change = torch.zeros(len(b), a.shape[1])
    for row in range(len(b)):
        for rank in range(len(a)):
            change[row] += scale * b[row, rank] * a[rank]
    lying = ".h." in name  # GPT-2's weights are transposed
    return base + (change.T if lying else change.reshape(base.shape))


@torch.no_grad()
def test_an_adapted_tower_is_one_with_changed_weights(origins: Origins, tower: str) -> None:
    plain, encoder = adapted(origins, tower)
    x = inputs(encoder)
    before = plain(x)[0]
    want_state = folded(encoder.state_dict(), plain.state_dict(), 3.0 / 2)
    changed = [n for n, t in plain.state_dict().items() if not torch.equal(t, want_state[n])]
    plain.load_state_dict(want_state)
    torch.testing.assert_close(encoder(x)[0], plain(x)[0], rtol=1e-3, atol=1e-4)
    assert (encoder(x)[0] - before).abs().max() > 1e-3 and len(changed) >= 2
    # Gradients are off: torch's fused kernels would otherwise go around the adapters.
    with torch.enable_grad():
        torch.testing.assert_close(encoder(x)[0].detach(), plain(x)[0].detach(), rtol=1e-3, atol=1e-4)


def test_only_adapters_train_and_they_start_as_nothing(origins: Origins, tower: str) -> None:
    config = EVERY[tower](origins)
    plain = build(config)
    config.lora = Lora.Config(rank=2)
    encoder = build(config)
    with torch.no_grad():
        x = inputs(encoder)
        torch.testing.assert_close(encoder(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    own = tuple(encoder.fresh)
    assert all(".lora_" in n or (own and n.startswith(own)) for n in trained) and any(".lora_A." in n for n in trained)
    assert sum(p.numel() for n, p in encoder.named_parameters() if ".lora_" in n) > 0
    encoder.train()
    pooled = encoder(x)[0]
    (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name, p in encoder.named_parameters():
        assert (p.grad is not None) is (name in trained), name


@torch.no_grad()
def test_samples_are_independent(origins: Origins, tower: str) -> None:
    _, encoder = adapted(origins, tower)
    transform = encoder.transform(train=False)
    together = encoder(inputs(encoder))[0]
    alone = [encoder(transform.collate([transform(v)]))[0][0] for v in raw(encoder)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-3, atol=1e-4)


def test_a_run_holds_its_adapters(origins: Origins, tower: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = EVERY[tower](origins)
    config.lora = Lora.Config(rank=2)
    run = tiny.write_run(tmp_path / "run", MultiEncoder.Config(encoders={"m": config}, dim=8))
    stored = load_file(run / "step-000001" / "model.safetensors")
    assert any(".lora_A." in n for n in stored) and any("base_layer" in n for n in stored)
    model = load(run)
    want = {n: t for n, t in model.state_dict().items() if ".lora_A." in n}
    assert want and all(torch.equal(t, stored[n]) for n, t in want.items())


def test_forwards_leave_the_frozen_weights_as_they_are(origins: Origins, tower: str) -> None:
    """peft's own adapter of attention adds its change and takes it off again, and what is rounded stays."""
    _, encoder = adapted(origins, tower)
    encoder.train()
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    names = {id(p) for p in encoder.parameters()}
    for _ in range(3):
        encoder(inputs(encoder))[0].sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in encoder.state_dict().items())
    assert {id(p) for p in encoder.parameters()} == names


# ------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_is_torchs(bias: bool) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True)
    for p in whole.parameters():
        p.normal_(0, 0.5)
    split = SplitAttention(whole)
    query, key, value = (torch.randn(4, n, 12) for n in (5, 7, 7))
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[1, 5:] = padding[3, 1:] = True
    several = torch.randn(4 * 3, 5, 7)
    masks: list[dict[str, Any]] = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.ones(5, 7).triu(3).bool()},
        {"attn_mask": several},
        {"attn_mask": several, "key_padding_mask": torch.zeros(4, 7).masked_fill(padding, -torch.inf)},
    ]
    found: list[Tensor] = []
    for mask in masks:
        want = whole(query, key, value, need_weights=False, **mask)[0]
        found.append(split(query, key, value, **mask)[0])
        torch.testing.assert_close(found[-1], want, rtol=1e-4, atol=1e-5)
    assert all((found[0] - other).abs().max() > 1e-3 for other in found[1:]), "the masks were not looked at"
    double = split.double()(*(t.double() for t in (query, key, value)), key_padding_mask=padding)[0]
    torch.testing.assert_close(double.float(), found[1], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- settings


def test_layers_are_chosen_by_their_last_names() -> None:
    net: Encoder = tiny.vit(layers=2, lora=Lora.Config(rank=1, targets=("q_proj", "v_proj"))).build()
    names = {n.partition(".lora_A")[0].rpartition(".")[2] for n, _ in net.named_parameters() if ".lora_A." in n}
    assert names == {"q_proj", "v_proj"}


def test_frozen_layers_get_no_adapter() -> None:
    frozen: Encoder = tiny.vit(layers=2, freeze=("tower.transformer.resblocks.0",), lora=Lora.Config(rank=1)).build()
    names = [n for n, _ in frozen.named_parameters() if ".lora_A." in n]
    assert names and not any("resblocks.0." in n for n in names)


def test_what_is_new_in_a_tower_trains_as_a_whole() -> None:
    for inside in (True, False):
        lora = Lora.Config(rank=1)
        config = CascadePool.Config(tower=tiny.vit(**({"lora": lora} if inside else {})), queries=2, heads=2)
        config.lora = Lora.Config() if inside else lora
        net: Encoder = config.build()
        trained = {n for n, p in net.named_parameters() if p.requires_grad}
        assert {"captions.query", "contrast.query", "captions.attn.in_proj_weight"} <= trained
        assert all(".lora_" in n for n in trained if n.startswith("tower."))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": Lora.Config(rank=-1)}, "rank -1 must not be below 0"),
        ({"lora": Lora.Config(rank=1, alpha=0.0)}, "alpha 0.0 above 0"),
        ({"lora": Lora.Config(rank=1, dropout=1.0)}, "dropout 1.0 in 0..1"),
        ({"lora": Lora.Config(rank=1), "freeze": ("all",)}, "lora freezes a tower itself"),
        ({"lora": Lora.Config(rank=1, targets=("query",))}, "no layer is called 'query'; there are .*q_proj"),
        ({"lora": Lora.Config(rank=1), "freeze": ("tower",)}, "no layer that could be adapted"),
    ],
)
def test_settings_that_adapt_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.vit(**settings).build()


def test_a_tower_without_layers_to_adapt_says_so(origins: Origins) -> None:
    config = EVERY["BagOfWords"](origins)
    config.lora = Lora.Config(rank=1)
    with pytest.raises(ConfigError, match="BagOfWords has no layer that could be adapted"):
        config.build()


def test_a_layer_that_is_never_called_is_refused() -> None:
    """BEiT reads the weight of its queries, keys and values: an adapter beside it would do nothing."""
    config = TimmImage.Config(model="beit_base_patch16_224", image_size=224)
    config.lora = Lora.Config(rank=1)
    with torch.device("meta"), pytest.raises(ConfigError, match=r"blocks.0.attn.qkv and 11 more are never called"):
        config.build()
    config.lora.targets = ("fc1", "fc2")
    with torch.device("meta"):
        config.build()


def test_adapters_are_trained_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    data = tiny.write_shards(tmp_path / "data", tiny.samples(12))

    def run(out: str, *, stop: bool = False) -> dict[str, Tensor]:
        model = tiny.model_config(
            encoders={
                "image": tiny.vit(lora=Lora.Config(rank=2, dropout=0.1)),
                "text": tiny.text_transformer(lora=Lora.Config(rank=2)),
            }
        )
        config = Trainer.Config(
            model=model,
            data=Stream.Config(shards=(data,), workers=0),
            objectives={"clip": InfoNCE.Config()},
            steps=4,
            global_batch=6,
            micro_batch=3,
            out=tmp_path / out,
        )
        config.checkpoint.every = 2
        trainer: Trainer = config.build()
        if stop:
            original = trainer.step

            def interrupted(step: int, batch: Any) -> Any:
                if step == 2:
                    raise KeyboardInterrupt
                return original(step, batch)

            trainer.step = interrupted
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()
        else:
            trainer.fit()
        return trainer.model.state_dict()

    whole = run("whole")
    run("parts", stop=True)
    parts = run("parts")
    assert all(torch.equal(t, parts[n]) for n, t in whole.items())
    assert all(t.any() for n, t in whole.items() if ".lora_B." in n)
