"""One question in several languages: one result for each, equal to asking with that language's prompts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.encoders import MultiEncoder
from mmcontrast.eval.spec import Spec, read_spec
from mmcontrast.eval.zero_shot import ZeroShot
from tests import tiny

NAMES = sorted(tiny.COLOURS)
GERMAN = {"black": "schwarz", "blue": "blau", "green": "grün", "red": "rot", "white": "weiß", "yellow": "gelb"}
FRENCH = ["noir", "bleu", "vert", "rouge", "blanc", "jaune"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MultiEncoder]:
    """A folder with a run and shards."""
    folder = tmp_path_factory.mktemp("languages")
    run = tiny.write_run(folder / "run")
    for split, seed in (("train", 0), ("test", 50)):
        tiny.write_shards(folder / "data" / split, tiny.samples(48, seed=seed))
    (folder / "french.txt").write_text("\n".join(FRENCH) + "\n")
    return folder, load(run)


def _spec(folder: Path, languages: Any, **said: Any) -> Path:
    path = folder / "spec.json.yaml"
    path.write_text(json.dumps({"name": "colours", "data": "data", "classes": NAMES, "languages": languages, **said}))
    return path


def test_one_result_per_language(asked: tuple[Path, MultiEncoder], capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = asked
    languages = {
        "en": {},
        "de": {"classes": GERMAN, "templates": ["ein Bild, {c}", "{c}"], "prompts": {"red": "tiefrot"}},
        "fr": {"classes": "french.txt"},
    }
    said = {"templates": ["a {c} thing"], "tasks": ["zero_shot", "retrieval", "few_shot"]}
    out, file = folder / "out", folder / "found.json"
    main(["eval", str(folder / "run"), str(_spec(folder, languages, **said)), "--json", str(file), "--out", str(out)])
    found = json.loads(file.read_text())
    kinds = [(f["task"], f["language"]) for f in found]
    assert kinds == [
        ("zeroshot_retrieval", None),
        *((t, lang) for lang in languages for t in ("zeroshot_classification", "few_shot")),
    ]
    assert len(list(out.glob("*.json"))) == 7, "the languages' files have one name"
    assert "zeroshot_classification  [de]" in capsys.readouterr().out
    prompts = {
        "en": {n: (f"a {n} thing",) for n in NAMES},
        "de": {n: (f"ein Bild, {w}", w) if n != "red" else ("tiefrot",) for n, w in GERMAN.items()},
        "fr": {n: (f"a {w} thing",) for n, w in zip(NAMES, FRENCH, strict=True)},
    }
    scores: set[float] = set()
    for f in found[1::2]:
        config = ZeroShot.Config(
            data=(str(folder / "data" / "test"),), classes=tuple(NAMES), prompts=prompts[f["language"]]
        )
        want = config.build().run(model)
        assert {name: f["metrics"][name] for name in want} == want
        scores.add(want["mean_per_class_recall"] or 0)
    assert len(scores) > 1, "the languages' prompts change nothing"
    for zero, few in zip(found[1::2], found[2::2], strict=True):
        assert few["metrics"]["zero_shot_acc1"] == zero["metrics"]["acc1"]


def test_classes_that_one_language_does_not_tell_apart_are_named(asked: tuple[Path, MultiEncoder]) -> None:
    folder, _ = asked
    spec = _spec(folder, {"x": {"classes": {"red": "same", "blue": "Same "}}, "y": {}}, tasks=["zero_shot"])
    main(["eval", str(folder / "run"), str(spec), "--json", str(folder / "found.json")])
    first, second = json.loads((folder / "found.json").read_text())
    assert first["warnings"] == ["2 classes have the same prompts ('blue', 'red'): nothing tells them apart"]
    assert not second["warnings"]


def test_classes_that_only_samples_name(asked: tuple[Path, MultiEncoder]) -> None:
    """Labels are known when the samples are read."""
    folder, model = asked
    languages = {"de": {"classes": GERMAN}, "some": {"classes": {"red": "rot"}}}
    spec = _spec(folder, languages, classes=[], tasks=["zero_shot"])
    main(["eval", str(folder / "run"), str(spec), "--json", str(folder / "found.json")])
    for f, names in zip(json.loads((folder / "found.json").read_text()), (GERMAN, {"red": "rot"}), strict=True):
        prompts = {n: (names.get(n, n),) for n in NAMES}
        want = ZeroShot.Config(data=(str(folder / "data" / "test"),), prompts=prompts).build().run(model)
        assert {name: f["metrics"][name] for name in want} == want


def test_languages_that_cannot_be_asked(asked: tuple[Path, MultiEncoder], capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = asked
    for languages, said in (
        ({"de": {"classes": ["rot"]}}, "languages.de lists 1 classes of 6 that the spec or the data list"),
        ({"de": {"class": []}}, "languages.de has 'class'; did you mean 'classes'"),
        ({"de": 3}, "languages"),
    ):
        with pytest.raises(ConfigError, match=said):
            spec: Spec = read_spec(str(_spec(folder, languages))).build()
            spec.questions(model, spec.open(), language="de")
    wrong = _spec(folder, {"de": {"classes": {"rd": "rot"}}}, tasks=["zero_shot"])
    with pytest.raises(SystemExit):
        main(["eval", str(folder / "run"), str(wrong)])
    assert "names has 'rd', which is no class; did you mean 'red'" in capsys.readouterr().err
