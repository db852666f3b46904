"""Models of transformers that are asked: small ones, made here, embed as their own library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcontrast import decode
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.models import load_asked, pil_image
from tests import coca, tiny
from tests.test_layouts import picture, sound, text

TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def _tokenizer(folder: Path) -> Any:
    """CLIP's kind, whose vocabulary is single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(97, 123)] + list("0123456789.,")
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)


def _clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder.mkdir()
    tokenizer = _tokenizer(folder)
    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    vision.pop("vocab_size")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 20, **ends}, vision_config=vision, projection_dim=16
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def _clap(folder: Path) -> Path:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer

    folder.mkdir()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(chr(c) for c in range(97, 123)), "Ġ"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)
    config = ClapConfig(
        text_config={**TEXT, "max_position_embeddings": 40},
        audio_config={
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "spec_size": 64,
            "num_mel_bins": 16,
            "window_size": 4,
            "patch_size": 4,
            "patch_stride": [4, 4],
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    ClapModel(config).save_pretrained(folder)
    extractor = ClapFeatureExtractor(
        feature_size=16, sampling_rate=16000, max_length_s=1, truncation="rand_trunc", padding="repeatpad"
    )
    ClapProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def _features(found: Any) -> Tensor:
    return nn.functional.normalize(found if isinstance(found, Tensor) else found.pooler_output, dim=1)


def test_clip_of_transformers_embeds_as_it_does_there(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    folder = _clip(tmp_path / "clip")
    asked = load_asked(folder)
    assert asked.model.modalities == ["image", "text"] and asked.pretrained == "clip"
    model: Any = AutoModel.from_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder)
    pictures = [tiny.png("red", size=40), tiny.png("blue", "bar", size=60)]
    texts = ["a red square", "b" * 50, "x"]
    with torch.no_grad():
        inputs = processor(
            text=texts, images=[pil_image(p) for p in pictures], return_tensors="pt", padding=True, truncation=True
        )
        want = {
            "image": _features(model.get_image_features(pixel_values=inputs["pixel_values"])),
            "text": _features(
                model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            ),
        }
    for modality, values in (("image", pictures), ("text", texts)):
        torch.testing.assert_close(asked.model.encode(modality, values), want[modality], atol=1e-6, rtol=1e-5)
        assert (want[modality][0] - want[modality][1]).norm() > 1e-3, "they look the same to the model"
    torch.testing.assert_close(asked.model.encode("text", texts[2:]), want["text"][2:], atol=1e-6, rtol=1e-5)


def test_clap_of_transformers_embeds_as_it_does_there(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    folder = _clap(tmp_path / "clap")
    asked = load_asked(folder)
    assert asked.model.modalities == ["audio", "text"]
    sound(tmp_path / "short.wav", 3)
    sound(tmp_path / "long.wav", 9, seconds=2.5)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    found = asked.model.encode("audio", [tmp_path / "short.wav", tmp_path / "long.wav"])
    assert np.random.get_state()[1].tolist() == before, "the global state of numpy was used up"  # type: ignore[index, union-attr]
    torch.testing.assert_close(asked.model.encode("audio", [tmp_path / "long.wav"])[0], found[1])
    from torchaudio.functional import resample

    model: Any = AutoModel.from_pretrained(folder).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    samples = np.frombuffer((tmp_path / "short.wav").read_bytes()[44:], "<i2").astype(np.float32) / 32768
    given = resample(torch.from_numpy(samples), 8000, 16000).numpy()
    with torch.no_grad():
        inputs = processor.feature_extractor(given, sampling_rate=16000, return_tensors="pt")
        want = _features(model.get_audio_features(**inputs))
        words = processor.tokenizer(["a dog barks", "rain"], padding=True, return_tensors="pt")
        want_text = _features(model.get_text_features(**words))
    torch.testing.assert_close(found[:1], want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(asked.model.encode("text", ["a dog barks", "rain"]), want_text, atol=1e-6, rtol=1e-5)
    assert (found[0] - found[1]).norm() > 1e-3


def test_the_command_asks_them(tmp_path: Path) -> None:
    folder = _clip(tmp_path / "clip")
    for colour in ("red", "blue"):
        picture(tmp_path / "pictures" / colour / "0.png", colour)
    main(["eval", str(folder), str(tmp_path / "pictures"), "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"]["samples"] == 2 and found["model"] == str(folder)
    run = tiny.write_run(tmp_path / "run")
    main(["eval", str(folder), str(tmp_path / "pictures"), "--against", str(run), "--json", str(tmp_path / "both")])
    assert [r["model"] for r in json.loads((tmp_path / "both").read_text())] == [str(folder), str(run)]


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = _clip(tmp_path / "clip")
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be loaded with transformers"):
        load_asked(folder)
    text(tmp_path / "odd" / "config.json", json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(ConfigError, match="cannot be loaded with transformers"):
        load_asked(tmp_path / "odd")


def test_models_are_asked_on_the_device_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory: what comes from it cannot be read, and what does not lie on it cannot be mixed in."""
    run, meta = tiny.write_run(tmp_path / "run", coca.model_config()), torch.device("meta")
    clip = _clip(tmp_path / "clip")
    for given in (run, clip):
        model = load_asked(given, device=meta).model
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {meta}
        prepared = model.encoder("image").transform(train=False)
        x = prepared.collate([prepared(decode.picture(tiny.png("red")))])
        assert model.embed("image", x).device == meta
    monkeypatch.setattr("mmcontrast.launch.device_of", lambda: meta)
    tiny.write_shards(tmp_path / "shards", tiny.samples(3))
    red = tmp_path / "red.png"
    red.write_bytes(tiny.png("red"))
    for words in (["eval", str(run), str(tmp_path / "shards"), "--workers", "0"], ["caption", str(run), str(red)]):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            main(words)
