"""Stamps and prompts: the packages' layouts in small, and the packages' own tools where files are fetched."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Reader
from mmcontrast.data_prep import prompts, stamps
from mmcontrast.data_prep.debian import package_files
from mmcontrast.data_prep.prepare import prepare
from mmcontrast.data_prep.prompts import Prompts
from mmcontrast.data_prep.source import Grouped
from mmcontrast.data_prep.stamps import Stamps
from mmcontrast.decode import image
from mmcontrast.encoders.base import Transform
from mmcontrast.shards import ShardSet, open_shards, read_manifest

SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='40' height='20'><rect width='20' height='20' fill='{}'/></svg>"
CAPTIONS = {
    "animals/cat": "A cat.\nde.utf8=Eine Katze.\nes.utf8=Un gato.\nfr.utf8=Un chat.\nit.utf8=Un gatto.\nru.utf8=Кот.\n",
    "animals/cat2": "A cat.\nes.utf8=Un gato.\nca@valencia.utf8=Un gat.\n",
    "food/apple": "An apple.\nfr.utf8=L'orange amère.\nit.utf8=Un’arancia!\nes.utf8=\nnonsense\n",
    "town/sign": "Drawn.\nru.utf8=Знак\n",
    "town/blank": "Blank.\n",
    "town/broken": "Broken.\n",
    "town/nothing": "Nothing to see.\n",
    "town/latin": "Latin.\n",
    "town/silent": "\nde.utf8=Nur deutsch.\n",
    "town/noisy": "Noisy.\n",
}


def wav(seconds: float = 0.2, *, amplitude: float = 0.3) -> bytes:
    file = io.BytesIO()
    samples = amplitude * np.sin(np.arange(round(seconds * 8000)) / 5)
    soundfile.write(file, samples, 8000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def rgba(width: int, height: int) -> Image.Image:
    """A red left half; the right half is transparent black."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[:, : width // 2] = (200, 0, 0, 255)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Both packages, unpacked."""
    root = tmp_path / "root"
    write_stamps(root / stamps.FOLDER)
    write_prompts(root)
    return root


def write_stamps(folder: Path) -> None:
    for name, captions in CAPTIONS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(captions, "utf-8")
        if name not in ("town/sign", "town/blank", "town/nothing"):
            rgba(400, 200).save(path.with_suffix(".png"))
    (folder / "town/sign.svg").write_text(SVG.format("blue"))
    (folder / "town/blank.svg").write_text(SVG.format("white"))
    (folder / "town/broken.png").write_bytes(b"no picture")
    (folder / "town/latin.txt").write_bytes("Ol\xe9".encode("latin-1"))
    (folder / "animals/cat.wav").write_bytes(wav())
    (folder / "animals/cat_desc_es.ogg").write_bytes(b"speech, not the sound of a cat")
    (folder / "town/noisy.ogg").write_bytes(b"no sound")
    (folder / "animals/cat_mirror.png").write_bytes(b"a picture without a caption of its own")


def write_prompts(root: Path) -> None:
    speakers = {"en": "en_US_f_Ann", "es": "es_MX_f_Ann"}
    texts = {
        "en": "; English\n\nhello: Hello: there.\ndigits/1: one\nbeep: [a tone]\nquiet: (nothing)\nempty:\n",
        "es": "\ufeff; español\nhello: Hola.\ndigits/1: uno\n",
    }
    for language, speaker in speakers.items():
        folder = root / prompts.SOUNDS / speaker
        for prompt in ("hello", "digits/1", "beep", "hush", "broken", *(f"more/{i}" for i in range(40))):
            path = folder / f"{prompt}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(wav(0.1 + 0.01 * len(prompt)))
        (folder / "hush.wav").write_bytes(wav(amplitude=1e-3))
        (folder / "broken.wav").write_bytes(b"RIFF")
        texts_path = root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
        texts_path.parent.mkdir(parents=True)
        texts_path.write_bytes(gzip.compress(texts[language].encode()))


class Plain(Transform):
    """Decoded values as they are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, value: Any) -> Any:
        return value

    def collate(self, values: Any) -> Any:
        return values


def everything(out: Path) -> list[tuple[str, ShardSet, int]]:
    """(split, shards, position) of every sample of all splits that are not empty."""
    found: list[tuple[str, ShardSet, int]] = []
    for split in ("train", "val", "test"):
        manifest = read_manifest(out / split)
        if manifest is not None and manifest["samples"]:
            shards = open_shards([str(out / split)])
            found += [(split, shards, position) for position in range(len(shards))]
    return found


def meta(shards: ShardSet, position: int) -> Any:
    return Reader(shards, {}).meta(position)


# -------------------------------------------------------------------------------------------- stamps


def test_stamps_become_pictures_with_captions_names_and_sounds(root: Path, tmp_path: Path) -> None:
    summary = prepare(Stamps(root=root, val=0.0, test=0.0), tmp_path / "out")
    found = {meta(s, p)["file"]: (s, p) for _, s, p in everything(tmp_path / "out")}
    assert found.keys() == {f"{name}.txt" for name in ("animals/cat", "animals/cat2", "food/apple", "town/sign")}
    shards, cat = found["animals/cat.txt"]
    picture = image(shards.read(cat, "png"))
    assert picture.shape == (3, 80, 160)  # 400 x 200, at most 160
    assert picture[:, 40, 20].tolist() == [200, 0, 0] and picture[:, 40, 140].tolist() == [255, 255, 255]
    assert shards.read(cat, "txt").decode() == "A cat." and shards.read(cat, "wav") == wav()
    facts = meta(shards, cat)
    assert facts["label"] == "cat" and facts["group"] == "animals"
    assert facts["names"] == {"en": "cat", "es": "gato", "fr": "chat", "it": "gatto", "ru": "кот"}
    assert facts["captions"]["de"] == "Eine Katze." and len(facts["captions"]) == 6
    apple = meta(*found["food/apple.txt"])
    assert apple["names"] == {"en": "apple", "fr": "orange amère", "it": "arancia"}
    assert meta(*found["animals/cat2.txt"])["captions"]["ca@valencia"] == "Un gat."
    drawn = image(found["town/sign.txt"][0].read(found["town/sign.txt"][1], "png"))
    assert drawn.shape == (3, 80, 160) and drawn[:, 40, 40].tolist() == [0, 0, 255]
    assert drawn[:, 40, 120].tolist() == [255, 255, 255]
    reasons = {r.where: r.reason for r in summary.refused}
    assert reasons.keys() == {f"town/{n}.txt" for n in ("blank", "broken", "nothing", "latin", "silent", "noisy")}
    assert "blank" in reasons["town/blank.txt"] and "cannot be decoded" in reasons["town/broken.txt"]
    assert reasons["town/nothing.txt"] == "no picture" and "UTF-8" in reasons["town/latin.txt"]
    assert reasons["town/silent.txt"] == "no English caption" and "audio" in reasons["town/noisy.txt"]
    manifest = read_manifest(tmp_path / "out" / "train")
    assert manifest is not None and "GPL-2" in manifest["about"]["licence"]


@pytest.mark.parametrize(
    ("caption", "language", "want"),
    [
        ("A cat.", "en", "cat"),
        ("The United States", "en", "united states"),
        ("A", "en", "a"),
        ("L'École", "fr", "école"),
        ("Un’aquila", "it", "aquila"),
        ("«Un» gatto!", "it", "gatto"),
        ("Las flores.", "es", "flores"),
        ("Кот", "ru", "кот"),
    ],
)
def test_names_are_captions_without_article(caption: str, language: str, want: str) -> None:
    assert stamps.name(caption, language) == want


def test_stamps_of_one_caption_stay_together(root: Path, tmp_path: Path) -> None:
    folder = root / stamps.FOLDER / "people"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Person {i // 2}.\n")
        rgba(20, 20).save(folder / f"{i}.png")
    prepare(Stamps(root=root, val=0.2, test=0.3), tmp_path / "out")
    sides: dict[str, set[str]] = {}
    for split, shards, position in everything(tmp_path / "out"):
        sides.setdefault(shards.read(position, "txt").decode(), set()).add(split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert set.union(*sides.values()) == {"train", "val", "test"}


# -------------------------------------------------------------------------------------------- prompts


def test_prompts_become_recordings_with_texts(root: Path, tmp_path: Path) -> None:
    summary = prepare(Prompts(languages=("en", "es"), root=root, val=0.2, test=0.3), tmp_path / "out")
    found = {
        (facts["language"], facts["prompt"]): (split, shards, position, facts)
        for split, shards, position in everything(tmp_path / "out")
        for facts in [meta(shards, position)]
    }
    assert len(found) == 2 * 42 and sum(summary.samples.values()) == 84
    for (language, prompt), (split, shards, position, facts) in found.items():
        assert split == found["en", prompt][0] == Grouped(val=0.2, test=0.3).split_of(prompt)
        assert shards.read(position, "wav") == wav(0.1 + 0.01 * len(prompt))
        assert facts["speaker"] == {"en": "en_US_f_Ann", "es": "es_MX_f_Ann"}[language]
        assert facts["seconds"] == pytest.approx(0.1 + 0.01 * len(prompt), abs=2e-3)
    assert {split for split, *_ in found.values()} == {"train", "val", "test"}
    texts = {
        key: shards.read(p, "txt").decode()
        for key, (_, shards, p, _) in found.items()
        if key[1] != "x"
        if "txt" in shards.extensions(p)
    }
    assert texts == {
        ("en", "hello"): "Hello: there.",
        ("en", "digits/1"): "one",
        ("es", "hello"): "Hola.",
        ("es", "digits/1"): "uno",
    }
    reasons = {r.where: r.reason for r in summary.refused}
    # What the English text says is a tone is one in Spanish, too, though no Spanish text says so.
    assert reasons.keys() == {f"{lang}/{p}" for lang in ("en", "es") for p in ("beep", "hush", "broken")}
    assert reasons["es/beep"].startswith("not speech") and reasons["es/hush"] == "silent"
    assert reasons["en/broken"].startswith("audio is not")


def test_a_language_that_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two letters"):
        prepare(Prompts(languages=("english",), root=root), tmp_path / "out")
    with pytest.raises(ConfigError, match="apt-get install .*asterisk-core-sounds-ru-wav asterisk-core-sounds-ru`"):
        prepare(Prompts(languages=("ru",), root=root), tmp_path / "out")
    (root / "usr/share/doc/asterisk-core-sounds-ru").mkdir()
    (root / "usr/share/doc/asterisk-core-sounds-ru/core-sounds-ru.txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="core-sounds-ru.txt.gz cannot be read"):
        prepare(Prompts(languages=("ru",), root=root), tmp_path / "out")
    (root / "usr/share/doc/asterisk-core-sounds-ru/core-sounds-ru.txt.gz").write_bytes(gzip.compress(b"a: b"))
    with pytest.raises(ConfigError, match=r"has no \.wav files.*asterisk-core-sounds-ru-wav.*--languages"):
        prepare(Prompts(languages=("ru",), root=root), tmp_path / "out")


# -------------------------------------------------------------------------------------------- packages


def test_what_is_missing_comes_with_the_commands_that_bring_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prep", "stamps", str(tmp_path / "out"), "--root", str(tmp_path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    for part in (
        "usr/share/tuxpaint/stamps is not there",
        "apt-get install tuxpaint-stamps-default",
        "dpkg-deb -x",
        "--root",
        "--fetch",
    ):
        assert part in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Stand-ins for apt-get and dpkg-deb on the PATH, and a cache of its own; returns the log of their calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def make(*, fails: bool = False) -> Path:
        log = tmp_path / "calls"
        download = "echo 'E: Unable to locate package' >&2; exit 100" if fails else "touch one_1_all.deb two_1_all.deb"
        unpack = f'mkdir -p "$3/usr/share/$(basename $2 _1_all.deb)"; echo unpacked >> {log}'
        for name, body in (("apt-get", f"echo apt-get $@ >> {log}; {download}"), ("dpkg-deb", unpack)):
            tool = tmp_path / "bin" / name
            tool.write_text(f"#!/bin/sh\n{body}\n")
            tool.chmod(0o755)
        return log

    return make


def test_packages_are_fetched_once_into_the_cache(tmp_path: Path, tools: Callable[..., Path]) -> None:
    log = tools()
    folders = ["usr/share/one", "usr/share/two"]
    for _ in range(2):
        found = package_files("things", ["one", "two"], folders, root=Path("/nowhere"), fetch=True)
        assert found == tmp_path / "cache" / "mmcontrast" / "debian" / "things"
        assert all((found / folder).is_dir() for folder in folders)
    assert log.read_text().splitlines() == ["apt-get download one two", "unpacked", "unpacked"]
    assert os.listdir(tmp_path / "cache" / "mmcontrast" / "debian") == ["things"]  # and nothing half done beside it


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, tools: Callable[..., Path]) -> None:
    tools(fails=True)
    with pytest.raises(ConfigError, match="apt-get download one` failed: E: Unable to locate.*apt-get update"):
        package_files("things", ["one"], ["usr/share/one"], root=Path("/"), fetch=True)
    assert os.listdir(tmp_path / "cache" / "mmcontrast" / "debian") == []


def test_without_the_tools_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="--fetch needs apt-get.*one.*packages.debian.org.*--root"):
        package_files("things", ["one"], ["usr/share/one"], root=Path("/"), fetch=True)
