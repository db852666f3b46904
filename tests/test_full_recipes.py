"""Recipes at full scale: the settings as they are, on towers and data that are small."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import pytest
import soundfile
import torch

from mmcontrast.cli import main
from mmcontrast.config import from_dict, to_dict
from mmcontrast.data import Stream, SymileM3
from mmcontrast.data_prep.source import signal_member
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.joint import Joint
from mmcontrast.recipe import load_recipe
from mmcontrast.recipes.ecg_text import LEADS
from mmcontrast.shard_writer import Sample
from mmcontrast.trainer import Trainer
from tests import hf_models, tiny
from tests.towers import Origins, make_origins


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    return make_origins(tmp_path_factory.mktemp("origins"))


def _sounds() -> Iterator[Sample]:
    for number in range(16):
        file = io.BytesIO()
        wave = np.sin(np.arange(32_000) * (0.05 + 0.01 * number))
        soundfile.write(file, wave, 16_000, format="FLAC")
        yield Sample(f"{number:03d}", {"flac": file.getvalue(), "txt": f"a tone, the {number}th", "json": {}})


def _heartbeats() -> Iterator[Sample]:
    draw = np.random.default_rng(0)
    for number in range(16):
        meta = {"patient": number // 2, "rate": 500, "channels": list(LEADS), "units": "mV", "scale": 0.001}
        signal = signal_member(draw.integers(-900, 900, (5000, 12)))
        yield Sample(f"{number:03d}", {**signal, "txt": f"sinus rhythm, {60 + number}", "json": meta})


def clip(config: Trainer.Config, origins: Origins) -> list[Sample]:
    wanted = open_clip.get_model_config("ViT-B-16")
    assert wanted is not None and wanted["embed_dim"] == config.model.dim, "no projection is there to mend it"
    towers = cast(dict[str, Any], config.model.encoders)
    assert {t.architecture for t in towers.values()} == {"ViT-B-16"}
    for tower in towers.values():
        tower.architecture = "tiny-clip"
    config.model.dim = 12
    return tiny.samples(16)


def clap(config: Trainer.Config, origins: Origins) -> list[Sample]:
    towers = cast(dict[str, Any], config.model.encoders)
    towers["audio"].model, towers["audio"].seconds = hf_models.clap(origins.folder / "clap"), 2.0
    towers["text"].model = origins.bert
    return list(_sounds())


def ptbxl(config: Trainer.Config, origins: Origins) -> list[Sample]:
    towers = cast(dict[str, Any], config.model.encoders)
    towers["ecg"].width, towers["ecg"].layers = 32, 1
    towers["text"].model, towers["text"].train_top = origins.bert, 1
    return list(_heartbeats())


@pytest.mark.parametrize(("name", "shrink"), [("clip_vit_b16", clip), ("clap_audiocaps", clap), ("ptbxl_text", ptbxl)])
def test_a_full_recipe_trains_when_it_is_made_small(
    origins: Origins, tmp_path: Path, name: str, shrink: Callable[[Trainer.Config, Origins], list[Sample]]
) -> None:
    config = load_recipe(name)
    assert to_dict(from_dict(to_dict(config))) == to_dict(config)
    shards = tiny.write_shards(tmp_path / "data", shrink(config, origins))
    assert isinstance(config.data, Stream.Config)
    data = replace(config.data, shards=(shards,), lanes=1, workers=0)
    small = replace(config, data=data, out=tmp_path / "run", evaluators={}, global_batch=8, micro_batch=4, steps=2)
    small.precision = "fp32"  # Accelerate takes one precision per process, and other tests share this one
    small.build().fit()
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss is not None] and all(np.isfinite(x) for x in losses if x is not None)


def test_coca_has_the_papers_size() -> None:
    config = load_recipe("coca_vit_b16")
    with torch.device("meta"):
        model: MultiEncoder = config.model.build()
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(383e6, rel=0.12)  # of the paper, whose words and patches are others


LANGUAGES = ("en", "es", "fr", "it", "ru")
WORDS = {
    "n01": ("cat", "gato", "chat", "gatto", "кот"),
    "n02": ("dog", "perro", "chien", "cane", "собака"),
    "n03": ("house", "casa-de", "maison", "casa-di", "дом"),
    "n04": ("tree", "árbol", "arbre", "albero", "дерево"),
    "n05": ("moon", "luna-es", "lune", "luna-it", "луна"),
    "n06": ("book", "libro-es", "livre", "libro-it", "книга"),
}


def _pictures_and_voices(folder: Path) -> None:
    """ImageNet's layout with Symile-M3's translations, and Common Voice's, as they are given out."""
    translations: dict[str, Any] = {}
    for number, (kind, names) in enumerate(WORDS.items()):
        translations[names[0]] = {"synset_id": kind, **dict(zip(LANGUAGES, names, strict=True))}
        for split in ("train", "val"):
            path = folder / "imagenet" / split / kind / f"{kind}_{split}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(tiny.png("red", size=40, seed=number))
    (folder / "translations.json").write_text(json.dumps(translations), "utf-8")
    for number, language in enumerate(LANGUAGES):
        clips = folder / "voices" / language / "clips"
        clips.mkdir(parents=True)
        for table in ("train", "dev", "test"):
            soundfile.write(clips / f"{table}.mp3", np.sin(np.arange(32_000) * 0.01 * (number + 1)), 32_000)
            (clips.parent / f"{table}.tsv").write_text(
                f"client_id\tpath\tsentence\tlocale\n{table}\t{table}.mp3\tHello\t{language}\n"
            )


def test_symile_m3_is_composed_of_pictures_and_voices(origins: Origins, tmp_path: Path) -> None:
    """Two corpora in their own layouts, prepared by the commands of the recipe, become its tuples and train it."""
    _pictures_and_voices(tmp_path)
    folders = [str(tmp_path / name) for name in ("imagenet", "pictures", "voices", "spoken")]
    main(["prep", "imagefolder", *folders[:2], "--translations", str(tmp_path / "translations.json")])
    main(["prep", "common_voice", *folders[2:]])
    config = load_recipe("symile_m3")
    towers = cast(dict[str, Any], config.model.encoders)
    towers["image"].architecture, towers["image"].weights = "tiny-clip", origins.clip
    towers["audio"].model, towers["audio"].seconds = hf_models.whisper(origins.folder / "whisper"), 1.0
    towers["text"].model = origins.bert
    config.model.dim = 16
    assert isinstance(config.data, Stream.Config) and isinstance(config.data.compose, SymileM3.Config)
    compose = replace(config.data.compose, speech=(f"{folders[3]}/train",))
    data = replace(config.data, shards=(f"{folders[1]}/train",), compose=compose, lanes=1, workers=0)
    evaluator = cast(Joint.Config, config.evaluators["val"])
    asked = replace(evaluator, data=(f"{folders[1]}/val",), compose=replace(compose, speech=(f"{folders[3]}/val",)))
    small = replace(config, data=data, evaluators={"val": asked}, out=tmp_path / "run")
    small.global_batch, small.micro_batch, small.steps, small.precision = 6, 3, 2, "fp32"
    trainer: Trainer = small.build()
    batch = next(iter(trainer.stream.batches(0, 1)))
    assert {m: len(rows) for m, rows in batch.rows.items()} == {"image": 6, "audio": 6, "text": 6}
    trainer.fit()
    trained = {n.partition(".")[0] for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"projections"}
    found = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["eval/val/pairwise_bound"] == 1 / 5 and found["eval/val/chance@1"] == pytest.approx(1 / 6)
