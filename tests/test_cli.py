"""The command as a person meets it: on their own pictures, and with wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmcontrast.cli import main
from tests.shapes import COLORS, SHAPES, picture, write_shapes

RECIPE = str(Path(__file__).with_name("shapes.py"))


def test_four_commands_on_a_folder_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "my pictures"
    for color in COLORS:
        for shape in SHAPES:
            (pictures / shape).mkdir(parents=True, exist_ok=True)
            (pictures / shape / f"{color}.png").write_bytes(picture(color, shape))
            (pictures / shape / f"{color}.txt").write_text(f"a {color} {shape}\n")
    (pictures / "broken.jpg").write_bytes(b"not a picture")
    data, run, index = str(tmp_path / "data"), str(tmp_path / "run"), str(tmp_path / "index")

    main(["prep", "folder", str(pictures), data, "--val", "0", "--test", "0.2"])
    assert "refused broken.jpg: no caption" in capsys.readouterr().err
    counts = [json.loads((Path(data) / s / "manifest.json").read_text())["samples"] for s in ("train", "test")]
    assert sum(counts) == 24 and counts[1] >= 2
    main(
        [
            "train",
            RECIPE,
            "--out",
            run,
            "--data.shards",
            f"{data}/train",
            "--steps",
            "30",
            "--global-batch",
            "16",
        ]
    )
    main(["eval", run, f"{data}/train", "--json", str(tmp_path / "eval.json")])
    results = json.loads((tmp_path / "eval.json").read_text())
    assert [r["task"] for r in results] == ["zeroshot_classification", "zeroshot_retrieval"]
    assert results[0]["metrics"]["classes"] == 4 and results[0]["metrics"]["acc5"] is None
    assert results[1]["metrics"]["image_to_text_recall@10"] > results[1]["metrics"]["chance@10"]
    main(["index", "build", run, f"{data}/train", index])
    capsys.readouterr()
    page, found = tmp_path / "page.html", tmp_path / "found.json"
    main(
        [
            "index",
            "search",
            index,
            "a red circle",
            "a bar",
            "--top",
            "3",
            "--html",
            str(page),
            "--json",
            str(found),
        ]
    )
    assert capsys.readouterr().out.splitlines()[0] == "a red circle"
    answers = json.loads(found.read_text())
    assert [len(a["hits"]) for a in answers] == [3, 3]
    assert all(h["score"] >= answers[0]["hits"][-1]["score"] for h in answers[0]["hits"])
    assert page.read_text().count("data:image/webp;base64,") == 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "emojy"], "there is no recipe 'emojy'; did you mean 'emoji'?"),
        (["train", "--steps", "5", "emoji"], "the recipe comes first"),
        (["train", "nowhere.py"], "nowhere.py'"),
        (["train", RECIPE, "--data.shards", "nowhere"], "no shards match 'nowhere'"),
        (["train", RECIPE, "--data.shards", "pipe:rm -rf x"], "would run a command"),
        (["train", RECIPE, "--data.shards", "SHARDS", "--steps", "0"], "steps is 0; it must be at least 1"),
        (
            ["train", RECIPE, "--data.shards", "SHARDS", "--data.lanes", "3"],
            "lanes (3) must divide the global batch (8)",
        ),
        (["check", "grads", "emojy"], "there is no recipe 'emojy'; did you mean 'emoji'?"),
        (["check", "grads", RECIPE, "--data.shards", "nowhere"], "no shards match 'nowhere'"),
        (["check", "grads", RECIPE, "--rows", "9"], "rows is 9; 8 micro-batches are made of them"),
        (["eval", "nowhere", "SHARDS"], "there is no run folder 'nowhere'"),
        (["eval", "SHARDS", "SHARDS"], "holds no whole checkpoint"),
        (["eval", "nowhere"], "there is no run folder"),
        (["prep", "folder", "nowhere", "out"], "there is no folder 'nowhere'"),
        (["prep", "table", "nowhere.csv", "out"], "there is no table 'nowhere.csv'"),
        (["prep", "index", "SHARDS"], "exists; write it again with --overwrite"),
        (["index", "build", "nowhere", "SHARDS", "out"], "there is no run folder 'nowhere'"),
        (["index", "search", "SHARDS", "a dog"], "is not the manifest of an index"),
        (["index", "serve", "SHARDS"], "is not the manifest of an index"),
        (["index", "serve"], "serve needs at least one index"),
        (["index", "serve", "SHARDS", "--port", "70000"], "port is 70000; it must be from 0"),
        (["quickstart", "--out", "SHARDS"], "holds something else; name a new folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str],
    says: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(shards) if w == "SHARDS" else w for w in words])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    said = [line for line in lines if not line.startswith("check grads: ")]  # what it is about to do
    assert said[-1].startswith("mmcontrast: error: ") and says in said[-1]
    assert len(said) == 1 and not list(tmp_path.iterdir())


def test_a_mistyped_flag_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", RECIPE, "--model.encoders.image.widht", "8"])
    assert ended.value.code == 2
    assert "Perhaps you meant" in (said := capsys.readouterr().err) and "--model.encoders.image.width" in said


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["prep"],
        ["prep", "folder"],
        ["train"],
        ["check"],
        ["check", "grads"],
        ["eval"],
        ["index"],
        ["index", "build"],
        ["index", "serve"],
    ],
)
def test_help_of_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    assert f"usage: mmcontrast {' '.join(words[:1])}".strip() in capsys.readouterr().out


def test_version_and_module_entry() -> None:
    done = subprocess.run([sys.executable, "-m", "mmcontrast", "--version"], capture_output=True, text=True, check=True)
    from mmcontrast import __version__

    assert done.stdout.strip() == __version__
