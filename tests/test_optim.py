"""Optimizers: every parameter once, at the rate that its tower and depth ask for, and resumed bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcontrast.checkpoint import list_checkpoints, load_optimizer, names_of, optimizer_tensors, read_tensors
from mmcontrast.config import ConfigError, from_dict, to_dict
from mmcontrast.encoders import CascadePool, CoCaText, MelConvNet, MelTransformer, MultiEncoder, SignalResNet
from mmcontrast.encoders.depth import layers
from mmcontrast.encoders.image_models import TimmImage
from mmcontrast.objectives import InfoNCE
from mmcontrast.optim import AdamW, Optimizer, Timm, load_optimizer_numbers, optimizer_numbers, set_rate
from mmcontrast.schedules import WSD
from tests.shapes import write_shapes
from tests.test_trainer import assert_equal, fit, settings, weights
from tests.tiny import model_config, text_transformer, vit

# ---------------------------------------------------------------------------------------------------- depth


def resnet() -> tuple[nn.Module, Any]:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet([1, 2, 1, 1], output_dim=8, heads=2, image_size=64, width=8), torch.zeros(1, 3, 64, 64)


def bert() -> tuple[nn.Module, Any]:
    from transformers import BertConfig, BertModel

    settings = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return BertModel(settings, add_pooling_layer=False), torch.zeros(1, 4, dtype=torch.int64)


def timm_tower(name: str) -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model(name, num_classes=0), torch.zeros(1, 3, 160, 160)


def tower(config: Any) -> tuple[nn.Module, Any]:
    built = config.build()
    return built, built.example()


TOWERS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "vit": (lambda: tower(vit(layers=3)), 4),
    "text": (lambda: tower(text_transformer(layers=3)), 4),
    "coca text": (lambda: tower(CoCaText.Config(context_length=8, width=16, layers=2, heads=2)), 3),
    "cascade": (lambda: tower(CascadePool.Config(tower=vit(layers=2), queries=3, heads=2)), 3),
    "mel convnet": (lambda: tower(MelConvNet.Config(sample_rate=8000, seconds=1, mels=16, width=8, layers=3)), 5),
    "mel transformer": (
        lambda: tower(MelTransformer.Config(sample_rate=8000, seconds=1, mels=32, width=12, layers=2, heads=2)),
        3,
    ),
    "signal": (
        lambda: tower(SignalResNet.Config(channels=("I", "II"), rate=50, seconds=2, widths=(8, 8), blocks=(1, 2))),
        5,
    ),
    "open_clip resnet": (resnet, 6),
    "bert": (bert, 4),
    "timm vit": (lambda: timm_tower("test_vit"), 7),
    "timm convnext": (lambda: timm_tower("test_convnext"), 11),
}


@pytest.mark.parametrize("name", TOWERS)
def test_layers_run_in_the_order_that_they_are_said_to_have(name: str) -> None:
    """Each parameter is in one layer, and a layer's first module is called after that of the layer below."""
    make, count = TOWERS[name]
    module, x = make()
    found = layers(module)
    assert sorted(n for names in found for n in names) == sorted(n for n, _ in module.named_parameters())
    assert len(found) == count
    calls: dict[str, int] = {}
    for path, part in module.named_modules():

        def note(*_: Any, path: str = path) -> None:
            calls.setdefault(path, len(calls))

        part.register_forward_pre_hook(note)
    module.train()
    module(x)
    first = [min(calls[o] for n in names if (o := n.rpartition(".")[0]) in calls and o) for names in found]
    assert first == sorted(first) and len(set(first)) == len(first)


def test_what_follows_the_blocks_belongs_to_the_last_and_what_goes_before_to_the_stem() -> None:
    stem, *_, last = layers(vit(layers=2).build())
    assert {"tower.class_embedding", "tower.positional_embedding", "tower.conv1.weight"} <= set(stem)
    assert "tower.ln_post.weight" in last and "tower.transformer.resblocks.1.ln_1.weight" in last
    module, _ = bert()
    stem, *_, last = layers(module)
    assert all(n.startswith("embeddings.") for n in stem) and all(n.startswith("encoder.layer.2.") for n in last)
    module, _ = resnet()
    assert "attnpool.c_proj.weight" in layers(module)[-1]
    assert layers(nn.Linear(2, 2)) == [["weight", "bias"]]


def test_only_the_top_layers_train() -> None:
    built = vit(layers=3, train_top=2).build()
    trained = {n for n, p in built.named_parameters() if p.requires_grad}
    assert trained == {n for names in layers(built)[2:] for n in names}
    assert any(n.startswith("tower.transformer.resblocks.1.") for n in trained) and "tower.ln_post.bias" in trained
    assert not built.frozen and all(p.requires_grad for p in vit(train_top=2).build().parameters())
    closed = vit(train_top=0).build()
    assert closed.frozen and not any(p.requires_grad for p in closed.parameters())
    pooled = CascadePool.Config(tower=vit(layers=2), queries=3, heads=2, train_top=1).build()
    assert pooled.captions.query.requires_grad and not pooled.tower.tower.conv1.weight.requires_grad
    with pytest.raises(ConfigError, match="train_top is 3; ViT has 2 layers"):
        vit(train_top=3).build()
    with pytest.raises(ConfigError, match="train_top is -1"):
        vit(train_top=-1).build()


def test_a_run_moves_only_what_trains(tmp_path: Path, shards: Path) -> None:
    config = settings(tmp_path / "run", shards, steps=2)
    config.model.encoders["image"].train_top = 1
    built = config.build()
    before = {n: t.clone() for n, t in built.model.state_dict().items()}
    built.fit()
    after = weights(tmp_path / "run")
    moved = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert "encoders.image.tower.transformer.resblocks.0.mlp.c_fc.weight" in moved
    assert "encoders.text.tower.token_embedding.weight" in moved
    assert not {n for n in moved if n.startswith(("encoders.image.tower.conv1", "encoders.image.tower.ln_pre"))}


# ---------------------------------------------------------------------------------------------------- groups


def built(**changes: Any) -> tuple[MultiEncoder, nn.ModuleDict]:
    torch.manual_seed(0)
    config = model_config(encoders={"image": vit(layers=2), "text": text_transformer()}, **changes)
    return config.build(), nn.ModuleDict({"clip": InfoNCE.Config().build()})


def rates(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, tuple[float, float]]:
    found = [(names[p], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


def test_every_parameter_has_the_rate_of_its_tower_and_depth() -> None:
    model, objectives = built()
    config = AdamW.Config(lr_scales={"text": 0.1, "clip": 3.0}, layer_decay={"image": 0.5})
    optimizer = config.build().optimizer(model, objectives)
    names = names_of(("model", model), ("objectives", objectives))
    set_rate(optimizer, 0.01)
    found = rates(optimizer, names)
    assert found.keys() == set(names.values())
    image, text = "model.encoders.image.tower.", "model.encoders.text.tower."
    expected = {
        image + "conv1.weight": (0.01 * 0.5**3, 0.2),
        image + "class_embedding": (0.01 * 0.5**3, 0.0),
        image + "transformer.resblocks.0.mlp.c_fc.weight": (0.01 * 0.5**2, 0.2),
        image + "transformer.resblocks.1.ln_1.bias": (0.01 * 0.5, 0.0),
        image + "ln_post.weight": (0.01 * 0.5, 0.0),
        "model.projections.image.weight": (0.01, 0.2),
        text + "token_embedding.weight": (0.001, 0.2),
        text + "transformer.resblocks.0.mlp.c_fc.weight": (0.001, 0.2),
        "model.projections.text.weight": (0.001, 0.2),
        "objectives.clip.log_scale": (0.03, 0.0),
    }
    for name, wanted in expected.items():
        assert found[name] == pytest.approx(wanted), name


def test_a_step_moves_each_parameter_by_its_own_rate() -> None:
    """Plain gradient descent: the change divided by the gradient is the rate."""
    model, objectives = built()
    config = Timm.Config(
        name="sgd",
        weight_decay=0.0,
        options={"momentum": 0.0, "nesterov": False},
        lr_scales={"image": 2.0},
        layer_decay={"image": 0.5},
    )
    optimizer = config.build().optimizer(model, objectives)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in [*model.parameters(), *objectives.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    set_rate(optimizer, 0.25)
    optimizer.step()
    for name, parameter in model.named_parameters():
        wanted = 0.25
        if name.startswith("encoders.image"):
            depth = 0 if "resblocks" not in name else 1 + int(name.split("resblocks.")[1][0])
            depth = 2 if "ln_post" in name else depth
            wanted *= 2 * 0.5 ** (3 - depth)
        elif name.startswith("projections.image"):
            wanted *= 2
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, wanted), msg=name)


def test_frozen_parameters_are_in_no_group() -> None:
    config = model_config(encoders={"image": vit(freeze=("all",)), "text": text_transformer(train_top=1)})
    model, objectives = config.build(), nn.ModuleDict({"clip": InfoNCE.Config().build()})
    names = names_of(("model", model), ("objectives", objectives))
    found = rates(AdamW.Config().build().optimizer(model, objectives), names)
    assert found.keys() == {n for p, n in names.items() if p.requires_grad} < set(names.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdamW.Config(lr=0.0), "lr is 0.0"),
        (AdamW.Config(lr_scales={"image": 0.0}), "lr_scales: image is 0.0"),
        (AdamW.Config(layer_decay={"image": 1.5}), "layer_decay: image is 1.5"),
        (AdamW.Config(lr_scales={"imag": 1.0}), "lr_scales: nothing is called 'imag'; did you mean 'image'"),
        (AdamW.Config(layer_decay={"clip": 0.9}), "layer_decay: nothing is called 'clip'"),
        (Timm.Config(name="lyon"), "no optimizer 'lyon'; did you mean 'lion'"),
        (Timm.Config(name="adahessian"), "second derivatives"),
        (Timm.Config(name="kron"), "cannot be resumed"),
        (Timm.Config(name="lion", eps=1e-8), "lion has no eps"),
        (Timm.Config(name="sgdw", betas=(0.9, 0.9)), "sgdw has no betas"),
        (Timm.Config(name="lion", options={"speed": 3}), "lion with {'speed': 3}"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: Optimizer.Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build().optimizer(*built())


# ---------------------------------------------------------------------------------------------------- timm, resuming


def runnable() -> list[str]:
    import timm.optim

    optim: Any = timm.optim
    needs_cuda = ("bnb", "fused")
    return [n for n in map(str, optim.list_optimizers()) if not n.startswith(("adahessian", "kron", *needs_cuda))]


class Problem:
    """A small regression with matrices, vectors and a scale of one number, as objectives have."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
        self.scale = nn.ParameterDict({"scale": nn.Parameter(torch.tensor([2.0]))})
        self.names = names_of(("net", self.net), ("scale", self.scale))
        groups = [
            {"params": [p for p in self.names if p.ndim > 1], "weight_decay": 0.1, "lr_scale": 1.0},
            {"params": [p for p in self.names if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 0.5},
        ]
        self.optimizer = Timm.Config(name=name).build().make(groups)

    def step(self, number: int) -> None:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        self.optimizer.zero_grad()
        (self.net(x) * self.scale["scale"]).square().mean().backward()
        set_rate(self.optimizer, 1e-2 / (number + 1))
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for p, name in self.names.items()}


def test_every_optimizer_of_timm_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    names = runnable()
    assert len(names) > 30
    for name in names:
        whole, halted = Problem(name), Problem(name)
        start = whole.weights()
        for number in range(6):
            whole.step(number)
        for number in range(3):
            halted.step(number)
        resumed = Problem(name)
        save_file({k: t.clone() for k, t in optimizer_tensors(halted.optimizer, halted.names).items()}, tmp_path / "o")
        numbers = json.loads(json.dumps(optimizer_numbers(halted.optimizer, halted.names)))
        with torch.no_grad():
            for (p, n), value in zip(resumed.names.items(), halted.weights().values(), strict=True):
                assert n in start
                p.copy_(value)
        load_optimizer(resumed.optimizer, resumed.names, load_file(tmp_path / "o"))
        load_optimizer_numbers(resumed.optimizer, resumed.names, numbers)
        for number in range(3, 6):
            resumed.step(number)
        end = whole.weights()
        assert all(torch.equal(t, resumed.weights()[n]) for n, t in end.items()), name
        assert all(not torch.equal(t, end[n]) for n, t in start.items()), f"{name} moved nothing"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


def test_a_resumed_run_repeats_optimizer_schedule_and_weights_of_the_loss(tmp_path: Path, shards: Path) -> None:
    """Lamb counts its steps in its groups: without them the second half would be another one."""
    config = settings(
        tmp_path / "whole",
        shards,
        optimizer=Timm.Config(name="lamb", lr=1e-2, layer_decay={"image": 0.8}, lr_scales={"text": 0.5}),
        schedule=WSD.Config(decay=0.5),
        objectives={"clip": InfoNCE.Config(weight_schedule=((1, 0.2), (7, 1.0)))},
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    fit(config)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    for step, folder in list_checkpoints(half):
        if step > 4:
            shutil.rmtree(folder)
    assert int(read_tensors(half / "step-000004", "optimizer")["0/step"]) == 4
    config.out = half
    fit(config)
    assert_equal(weights(half), weights(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["clip.weight"] for line in lines] == pytest.approx(
        [0.2, 0.2, *(0.2 + 0.8 * i / 6 for i in range(1, 7))]
    )


def test_timm_towers_take_layer_decay() -> None:
    model = model_config(encoders={"image": TimmImage.Config(model="test_vit", image_size=32)}).build()
    optimizer = AdamW.Config(layer_decay={"image": 0.5}).build().optimizer(model, nn.ModuleDict())
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    assert scales == [0.5**k for k in range(7, -1, -1)]
