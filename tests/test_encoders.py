"""Towers: each treats samples alone, trains what it should, and computes what the library it came from computes."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mmcontrast import load
from mmcontrast.batch import map_tensors
from mmcontrast.config import ConfigError
from mmcontrast.encoders import (
    Encoder,
    HFText,
    MultiEncoder,
    OpenClipImage,
    OpenClipText,
    TimmImage,
)
from mmcontrast.shards import BadSample
from tests import tiny
from tests.towers import MINILM, TEXTS, TOWERS, Origins, build, inputs, make_origins, raw


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


@pytest.fixture(params=list(TOWERS))
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------- every tower


def test_a_tower_gives_what_it_says(origins: Origins, tower: str) -> None:
    make, dim = TOWERS[tower]
    encoder = build(make(origins))
    assert encoder.dim == dim
    pooled, tokens = encoder(inputs(encoder))
    assert pooled.shape == (3, dim) and pooled.dtype == torch.float32 and torch.isfinite(pooled).all()
    assert tokens is None or (tokens.ndim == 3 and len(tokens) == 3)
    assert pooled.std(0).max() > 1e-4, "the samples are not told apart"
    example, _ = encoder(encoder.example())
    assert example.shape == (1, dim) and torch.isfinite(example).all()
    assert encoder.kind == ("text" if "Te" in tower else "image") == encoder.transform(train=True).kind


def test_samples_are_independent(origins: Origins, tower: str) -> None:
    encoder = build(TOWERS[tower][0](origins))
    transform = encoder.transform(train=False)
    together, _ = encoder(inputs(encoder))
    alone = [encoder(transform.collate([transform(v)]))[0][0] for v in raw(encoder)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_trains_and_nothing_else(origins: Origins, tower: str) -> None:
    config = TOWERS[tower][0](origins)
    names = [name for name, _ in build(config).named_parameters()]
    some = names[len(names) // 2]
    for freeze in ((), (some,), (some.rpartition(".")[0], names[-1]), ("all",)):
        config.freeze = freeze
        encoder = build(config).train()
        pooled, _ = encoder(inputs(encoder))
        if freeze != ("all",):
            (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        for name, p in encoder.named_parameters():
            frozen = "all" in freeze or any(name.startswith(prefix) for prefix in freeze)
            assert p.requires_grad is not frozen
            assert (p.grad is None) is frozen, f"{name}: {'frozen, yet' if frozen else 'no'} gradient"
            # A key's bias shifts all scores of a softmax alike: its gradient is zero but for rounding.
            assert frozen or (p.grad is not None and p.grad.any()) or name.endswith("key.bias"), name
    config.freeze = (names[0], "no.such.layer")
    with pytest.raises(
        ConfigError, match="freeze: no parameter starts with 'no.such.layer'; there are .*(tower|captions)"
    ):
        build(config)


def test_a_frozen_tower_is_always_in_evaluation_mode(origins: Origins, tower: str) -> None:
    config = TOWERS[tower][0](origins)
    config.freeze = ("all",)
    frozen = build(config)
    frozen.train()
    assert not any(m.training for m in frozen.modules())
    config.freeze = ()
    trained = build(config).train()
    norms = [m for m in trained.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    assert trained.training and not any(m.training for m in norms) and bool(norms) is ("batch norm" in tower)


def test_transforms_travel_to_workers(origins: Origins, tower: str) -> None:
    encoder = build(TOWERS[tower][0](origins))
    here = encoder.transform(train=False)
    there = pickle.loads(pickle.dumps(here))
    for value in raw(encoder):
        a, b = here(value), there(value)
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_run_needs_its_towers_origins_no_more(origins: Origins, tower: str, tmp_path: Path) -> None:
    """What the weights came from may be gone; what the tower computed stays."""
    copy = tmp_path / "origins"
    shutil.copytree(origins.folder, copy)
    moved = Origins(copy, str(copy / "clip.pt"), {n: str(copy / f"{n}.pt") for n in origins.timm}, str(copy / "bert"))
    encoder = TOWERS[tower][0](moved)
    run = tiny.write_run(tmp_path / "run", MultiEncoder.Config(encoders={"m": encoder}, dim=8))
    before = load(run)
    want = before.encode("m", raw(before.encoder("m")))
    shutil.rmtree(copy)
    assert torch.equal(load(run).encode("m", raw(before.encoder("m"))), want)


# ------------------------------------------------------------------------------------------------- pictures


def test_evaluation_takes_the_centre_and_training_a_random_crop() -> None:
    encoder = tiny.vit(crop_scale=(0.3, 0.6)).build()
    wide = torch.zeros(3, 16, 40, dtype=torch.uint8)
    wide[:, :, 12:28] = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    centre = encoder.transform(train=False)
    assert torch.equal(centre(wide), wide[:, :, 12:28]), "a square of the right size must stay as it is"
    assert torch.equal(centre(wide.transpose(1, 2)), wide[:, :, 12:28].transpose(1, 2))
    random = encoder.transform(train=True)
    first, second = random(wide), random(wide)
    assert first.shape == second.shape == (3, 16, 16) and first.dtype == torch.uint8
    assert not torch.equal(first, second)
    assert centre(torch.zeros(3, 1, 5, dtype=torch.uint8)).shape == (3, 16, 16)


def test_augmentation_is_what_was_asked() -> None:
    picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    whole = tiny.vit(crop_scale=(1.0, 1.0))
    grey = tiny.vit(crop_scale=(1.0, 1.0), grayscale=1.0).build().transform(train=True)(picture)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2]) and grey.float().std() > 1
    jitter = tiny.vit(crop_scale=(1.0, 1.0), color_jitter=0.5)
    levels = {float(jitter.build().transform(train=True)(picture).float().mean()) for _ in range(4)}
    assert len(levels) == 4
    assert whole.build().transform(train=True)(picture).shape == (3, 16, 16)
    for scale in ((0.0, 1.0), (0.9, 0.5), (0.5, 1.5)):
        with pytest.raises(ConfigError, match="crop_scale .* must rise within 0..1"):
            tiny.vit(crop_scale=scale).build()


def test_pixels_are_normalised_as_open_clip_does(origins: Origins) -> None:
    import open_clip

    _, _, preprocess = open_clip.create_model_and_transforms("tiny-clip")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    ours = OpenClipImage.Config(architecture="tiny-clip").build()
    got = ours.normalise(ours.transform(train=False)(pixels)[None])
    torch.testing.assert_close(got[0], preprocess(Image.fromarray(pixels)), rtol=1e-5, atol=1e-5)  # pyright: ignore
    other = OpenClipImage.Config(architecture="tiny-clip", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).build()
    assert torch.equal(other.normalise(torch.full((1, 3, 1, 1), 255)).flatten(), torch.full((3,), 2.0))


def test_patches_are_dropped_in_training_only() -> None:
    encoder = tiny.vit(image_size=32, patch_dropout=0.5).build()
    x = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        a, b = (encoder.train()(x)[0] for _ in range(2))
        c, d = (encoder.eval()(x)[0] for _ in range(2))
        kept = encoder.train()(x)[1]
    assert not torch.allclose(a, b) and torch.equal(c, d)
    assert kept is not None and kept.shape[1] == 8  # of 16
    assert encoder.eval()(x)[1].shape[1] == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny.vit(patch_size=7), "patch_size 7 must divide image_size 16"),
        (tiny.vit(heads=3), "heads 3 must divide width 16"),
        (tiny.text_transformer(heads=3), "heads 3 must divide width 16"),
        (tiny.text_transformer(context_length=2), "context_length 2 leaves no room"),
        (TimmImage.Config(model="test_vt"), "timm has no model 'test_vt'; did you mean 'test_vit"),
        (OpenClipImage.Config(architecture="ViT-B32"), "no architecture 'ViT-B32'; did you mean 'ViT-B-32'"),
        (OpenClipText.Config(architecture="ViT-B32"), "no architecture 'ViT-B32'; did you mean 'ViT-B-32'"),
        (OpenClipImage.Config(architecture="hf-hub:a/b"), "no architecture 'hf-hub:a/b'"),
        (OpenClipImage.Config(architecture="ViT-B-32", weights="/no/file.pt"), "no weights file '/no/file.pt'"),
        (OpenClipImage.Config(architecture="ViT-B-32", weights="openai"), "no weights file 'openai'"),
        (TimmImage.Config(model="test_vit", weights="/no/file.pt"), "no weights file '/no/file.pt'"),
        (HFText.Config(model="/no/such/folder"), "there is no folder '/no/such/folder' with a transformers model"),
        (HFText.Config(model="~/no/such/folder"), "there is no folder '/.*no/such/folder' with"),
        (HFText.Config(model="nobody/no-such-model"), "transformers cannot load 'nobody/no-such-model'"),
    ],
)
def test_settings_that_make_no_tower_are_refused(config: Encoder.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        config.build()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_tower_that_needs_the_hub_says_so(origins: Origins) -> None:
    for config in (
        OpenClipImage.Config(architecture="tiny-from-hub"),
        OpenClipText.Config(architecture="tiny-from-hub"),
    ):
        with pytest.raises(ConfigError, match="open_clip cannot make tiny-from-hub: "):
            config.build()


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip_weights_give_open_clips_embeddings(origins: Origins, tmp_path: Path, suffix: str) -> None:
    import open_clip
    from safetensors.torch import save_file

    theirs: Any = open_clip.create_model("tiny-clip", pretrained=origins.clip).eval()
    weights = tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{n}": t for n, t in theirs.state_dict().items()}}, weights)
    else:
        save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, weights)
    encoders: dict[str, Encoder.Config] = {
        "image": OpenClipImage.Config(architecture="tiny-clip", weights=str(weights)),
        "text": OpenClipText.Config(architecture="tiny-clip", weights=str(weights)),
    }
    ours: MultiEncoder = MultiEncoder.Config(encoders=encoders, dim=12, projection="none").build()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        want = theirs.encode_image((pixels / 255 - mean) / std, normalize=True)
        torch.testing.assert_close(ours.embed("image", pixels), want, rtol=1e-4, atol=1e-5)
        want = theirs.encode_text(open_clip.get_tokenizer("tiny-clip")(TEXTS), normalize=True)
        torch.testing.assert_close(ours.encode("text", TEXTS), want, rtol=1e-4, atol=1e-5)
    scratch = MultiEncoder.Config(encoders={"text": OpenClipText.Config(architecture="tiny-clip")}, dim=12).build()
    assert (scratch.encode("text", TEXTS) - want).abs().max() > 0.1, "any weights would pass"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_weights_give_timms_features(origins: Origins, name: str) -> None:
    import timm

    theirs: Any = timm.create_model(name, num_classes=10)
    theirs.load_state_dict(torch.load(origins.timm[name]))
    theirs.reset_classifier(0)
    ours = build(TimmImage.Config(model=name, weights=origins.timm[name], image_size=160))
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    with torch.no_grad():
        want = theirs.eval()((pixels / 255 - 0.5) / 0.5)
        torch.testing.assert_close(ours(pixels)[0], want, rtol=1e-3, atol=1e-4)
        assert (
            build(TimmImage.Config(model="test_vit", image_size=160))(pixels)[0][:, :64] - want[:, :64]
        ).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("test_vit", (1, 101, 64)),
        ("test_convnext", (1, 25, 64)),  # a map, width first
        ("test_mambaout", (1, 25, 64)),  # a map, width last
    ],
)
def test_timm_tokens_are_places_of_the_picture(name: str, shape: tuple[int, int, int]) -> None:
    ours = build(TimmImage.Config(model=name, image_size=160))
    pixels = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    changed = pixels.clone()
    changed[..., :32, :32] = 255 - changed[..., :32, :32]  # the first place of a 5 x 5 map
    with torch.no_grad():
        tokens, after = ours(pixels)[1], ours(changed)[1]
    assert tokens is not None and after is not None and tokens.shape == shape
    if name != "test_vit":  # which looks everywhere
        moved = (tokens - after).abs().amax(2)[0]
        assert moved[0] > 5 * moved[-1], "the order of places is lost"


def test_batch_norm_runs_on_stored_statistics_or_not_at_all(origins: Origins) -> None:
    for config in (
        TimmImage.Config(model="test_resnet", image_size=32),
        OpenClipImage.Config(architecture="tiny-resnet"),
    ):
        with pytest.raises(
            ConfigError, match="has batch norm .* cannot be trained from scratch .* give pretrained weights"
        ):
            config.build()
    encoder = build(TOWERS["TimmImage with batch norm"][0](origins))
    x = inputs(encoder)
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    want = encoder(x)[0]
    assert torch.equal(encoder.train()(x)[0], want) and any("running_mean" in n for n in before)
    assert all(torch.equal(b, before[n]) for n, b in encoder.named_buffers()), "statistics were learned"


def _changed(origins: Origins, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    weights = torch.load(origins.timm["test_vit"])
    torch.save(change(weights), tmp_path / "changed.pt")
    return str(tmp_path / "changed.pt")


def test_tensors_of_other_names_load_in_order(origins: Origins, tmp_path: Path) -> None:
    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"layer{i}.{n.rpartition('.')[2]}": t for i, (n, t) in enumerate(weights.items())}

    path = _changed(origins, tmp_path, rename)
    ours, theirs = (
        build(TimmImage.Config(model="test_vit", image_size=160, weights=w)) for w in (path, origins.timm["test_vit"])
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())


CHANGES: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (
        lambda w: {n: t for n, t in w.items() if "qkv.weight" not in n},
        "has no tensor 'blocks.0.attn.qkv.weight': it holds another model",
    ),
    (lambda w: w | {"norm.weight": torch.ones(3)}, r"'norm.weight' has shape \[3\], not \[64\]"),
    (lambda w: {f"x.{n}": t for n, t in reversed(w.items())}, "has no tensor 'cls_token'"),
    (lambda w: {f"x.{n}": t[..., :1] for n, t in w.items()}, r"'cls_token' has shape \[1, 1, 1\], not"),
    (lambda w: [1, 2], "holds no tensors by name"),
    (lambda w: {"epoch": 3, "state_dict": {"epoch": 3}}, "holds no tensors by name"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_weights_of_another_model_are_refused_by_name(
    origins: Origins, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    path = _changed(origins, tmp_path, change)
    with pytest.raises(ConfigError, match=message) as error:
        TimmImage.Config(model="test_vit", image_size=160, weights=path).build()
    assert path in str(error.value)


@pytest.mark.parametrize("config", [OpenClipImage.Config, OpenClipText.Config])
def test_open_clip_weights_of_another_model_are_refused_by_name(origins: Origins, tmp_path: Path, config: Any) -> None:
    weights = torch.load(origins.clip)
    for change, message in (
        ({n: t for n, t in weights.items() if n != "ln_final.weight"}, r"Missing key.*ln_final.weight"),
        (weights | {"visual.proj": torch.ones(2, 2)}, r"size mismatch for visual.proj"),
        (weights | {"more.bias": torch.ones(2)}, r"Unexpected key.*more.bias"),
    ):
        torch.save(change, tmp_path / "wrong.pt")
        with pytest.raises(ConfigError, match=f"open_clip cannot make tiny-clip with .*wrong.pt: {message}") as error:
            config(architecture="tiny-clip", weights=str(tmp_path / "wrong.pt")).build()
        assert "\n" not in str(error.value)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_weights_file_runs_nothing(origins: Origins, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "bomb.pt"
    torch.save({"weight": _Bomb(mark)}, path)
    for config in (
        TimmImage.Config(model="test_vit", weights=str(path)),
        OpenClipImage.Config(architecture="tiny-clip", weights=str(path)),
        OpenClipText.Config(architecture="tiny-clip", weights=str(path)),
    ):
        with pytest.raises(ConfigError, match="bomb.pt"):
            config.build()
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(ConfigError, match="noise.pt cannot be read as weights"):
        TimmImage.Config(model="test_vit", weights=str(tmp_path / "noise.pt")).build()
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the file was harmless, and nothing was shown"


# ------------------------------------------------------------------------------------------------- texts


def test_hf_text_equals_plain_transformers() -> None:
    from transformers import AutoModel, AutoTokenizer

    ours = build(HFText.Config(model=str(MINILM), max_length=12))
    tokenizer, theirs = AutoTokenizer.from_pretrained(MINILM), AutoModel.from_pretrained(MINILM).eval()
    x = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        tokens = theirs(**x).last_hidden_state
        got, all_tokens = ours(inputs(ours))
    assert x["attention_mask"].sum(1).tolist() == [3, 5, 12], "padding and cutting must both happen"
    want = [t[m.bool()].mean(0) for t, m in zip(tokens, x["attention_mask"], strict=True)]
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(all_tokens, tokens, rtol=1e-4, atol=1e-5)
    assert ours.dim == 384


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_looks_at_the_mask(origins: Origins, pool: Any, side: str) -> None:
    encoder = build(HFText.Config(model=origins.bert, pool=pool))
    lengths = [1, 3, 6, 2]
    mask = torch.zeros(4, 6, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    ids = torch.randint(1000, 2000, (4, 6)) * mask
    with torch.no_grad():
        pooled, tokens = encoder({"input_ids": ids, "attention_mask": mask})
    assert tokens is not None
    for row in range(4):
        real = [tokens[row, i] for i in range(6) if mask[row, i]]
        want = {"mean": sum(real) / len(real), "cls": real[0], "last": real[-1]}[pool]
        torch.testing.assert_close(pooled[row], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_a_tokenizer_that_pads_on_the_left_changes_nothing(origins: Origins, tmp_path: Path, pool: Any) -> None:
    """Absolute positions would otherwise depend on the longest text of the batch."""
    from transformers import AutoTokenizer

    shutil.copytree(origins.bert, tmp_path / "left")
    AutoTokenizer.from_pretrained(origins.bert, padding_side="left").save_pretrained(tmp_path / "left")
    assert AutoTokenizer.from_pretrained(tmp_path / "left").padding_side == "left"
    left, right = (build(HFText.Config(model=m, pool=pool)) for m in (str(tmp_path / "left"), origins.bert))
    with torch.no_grad():
        want = right(inputs(right))[0]
        torch.testing.assert_close(left(inputs(left))[0], want)
        transform = left.transform(train=False)
        alone = torch.cat([left(transform.collate([transform(t)]))[0] for t in TEXTS])
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-5)


def test_text_is_cut_and_padding_is_not_read() -> None:
    encoder = build(tiny.text_transformer(context_length=5))
    transform = encoder.transform(train=False)
    long, cut, other = (transform(t) for t in ("one two three four five", "one two three and more", "one two four"))
    assert long.shape == (5,) and torch.equal(long, cut) and not torch.equal(long, other)
    short = transform("one")[None].clone()
    assert (short == 0).sum() == 2
    want = encoder(short)[0]
    short[short == 0] = 7
    torch.testing.assert_close(encoder(short)[0], want)


# ------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def model() -> MultiEncoder:
    torch.manual_seed(0)
    return tiny.model_config().build()


def _pictures(n: int) -> list[bytes]:
    return [s.members["png"] for s in tiny.samples(n) if isinstance(s.members["png"], bytes)]


def test_an_absent_modality_still_gets_zero_gradients(model: MultiEncoder) -> None:
    x = inputs(model.encoder("image"))
    z = model({"image": x})
    assert z["text"].shape == (0, 8) and z["image"].shape == (3, 8) and list(z) == ["image", "text"]
    (z["image"][:, 0].sum() + z["text"].sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient: DDP would wait for it"
        assert bool(p.grad.any()) is ("image" in name), name
    assert all(t.shape == (0, 8) for t in model({}).values())


def test_a_frozen_tower_keeps_no_graph() -> None:
    config = tiny.model_config(encoders={"image": tiny.vit(freeze=("all",)), "text": tiny.text_transformer()})
    model: MultiEncoder = config.build()
    pooled: list[Tensor] = []
    model.encoder("image").register_forward_hook(lambda _m, _x, out: pooled.append(out[0]))
    z = model({"image": inputs(model.encoder("image"))})
    z["image"][:, 0].sum().backward()
    assert not pooled[0].requires_grad
    assert all((p.grad is None) is ("encoders.image" in n or "text" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("projection", ["linear", "mlp", "none"])
def test_embeddings_are_of_unit_length_in_every_precision(projection: Any) -> None:
    config = tiny.model_config(projection=projection, dim=16 if projection == "none" else 8)
    model: MultiEncoder = config.build().eval()
    prepared = {m: inputs(model.encoder(m)) for m in model.modalities}
    plain = model(prepared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(prepared)
    double = model.double()(prepared)
    for m in prepared:
        assert (plain[m].dtype, half[m].dtype, double[m].dtype) == (torch.float32, torch.float32, torch.float64)
        for z in (plain[m], half[m], double[m]):
            torch.testing.assert_close(z.norm(dim=1), torch.ones(3, dtype=z.dtype), rtol=0, atol=1e-6)
        error = (half[m] - plain[m]).abs().max()
        assert 1e-5 < error < 0.1, "bfloat16 was not used, or is off"
        torch.testing.assert_close(plain[m].double(), double[m], rtol=1e-3, atol=1e-5)


def test_encode_takes_pictures_in_every_form(model: MultiEncoder, tmp_path: Path) -> None:
    data = tiny.png("red")
    (tmp_path / "a.png").write_bytes(data)
    picture = Image.open(tmp_path / "a.png")
    array = np.array(picture)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    forms = [data, str(tmp_path / "a.png"), tmp_path / "a.png", picture, array, tensor]
    z = model.encode("image", forms)
    assert z.shape == (6, 8) and z.dtype == torch.float32 and not z.requires_grad
    torch.testing.assert_close(z, z[:1].expand(6, 8), rtol=1e-5, atol=1e-6)
    assert (model.encode("image", [tiny.png("blue")]) - z[0]).abs().max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_encode_keeps_order_and_mode(model: MultiEncoder, batch_size: int) -> None:
    pictures = _pictures(7)
    want = torch.cat([model.encode("image", [p]) for p in pictures])
    for training in (True, False):
        model.train(training)
        got = model.encode("image", pictures, batch_size=batch_size)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert all(m.training is training for m in model.modules()), "the mode was not given back"
    assert want.std(0).min() > 1e-5
    assert model.encode("text", []).shape == (0, 8)


def test_encode_gives_the_mode_back_after_an_error(model: MultiEncoder) -> None:
    model.train()
    with pytest.raises(BadSample, match="image cannot be decoded"):
        model.encode("image", [b"no picture"])
    with pytest.raises(RuntimeError):
        model.embed("image", torch.zeros(1, 3, 5, 5, dtype=torch.uint8))
    assert model.training


def test_a_probe_can_be_trained_on_embeddings(model: MultiEncoder) -> None:
    probe = nn.Linear(8, 2)
    probe(model.encode("text", TEXTS)).square().sum().backward()
    assert probe.weight.grad is not None and probe.weight.grad.any()


def test_a_sample_that_cannot_be_read_is_named(model: MultiEncoder, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    for value, message in (
        (tmp_path / "notes.png", "notes.png: image cannot be decoded"),
        (str(tmp_path / "gone.png"), "gone.png cannot be read"),
        (np.zeros((4, 4), np.uint8), r"must be uint8 \[H, W, 3\], got uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3)), r"must be uint8 \[H, W, 3\], got float64"),
    ):
        with pytest.raises(BadSample, match=message):
            model.encode("image", [tiny.png("red"), value])


def test_an_unknown_modality_is_named(model: MultiEncoder) -> None:
    for ask in (
        lambda: model.encode("imge", []),
        lambda: model.encoder("imge"),
        lambda: model({"imge": torch.zeros(1)}),
    ):
        with pytest.raises(ConfigError, match="the model has no modality 'imge'; did you mean 'image'"):
            ask()
    for one in ("a text", b"bytes"):
        with pytest.raises(ConfigError, match="encode takes a list of samples, got one"):
            model.encode("text", one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoders": {}}, "the model has no encoders"),
        ({"encoders": {"chest-xray": tiny.vit()}}, "'chest-xray' must be an identifier"),
        ({"encoders": {"type": tiny.vit()}}, "'type' must be an identifier"),
        ({"projection": "none"}, "projection 'none': the image tower ends in 16 dimensions, the space has 8"),
    ],
)
def test_models_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.model_config(**settings).build()


def test_inputs_may_be_mappings(origins: Origins) -> None:
    model: MultiEncoder = MultiEncoder.Config(encoders={"text": HFText.Config(model=origins.bert)}, dim=4).build()
    x = inputs(model.encoder("text"))
    assert set(x) == {"input_ids", "attention_mask"}
    moved = map_tensors(x, lambda t: t[:2])
    torch.testing.assert_close(
        model.eval()({"text": moved})["text"], model.encode("text", TEXTS[:2]), rtol=1e-4, atol=1e-5
    )
