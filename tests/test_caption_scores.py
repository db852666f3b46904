"""Captions that a model writes: BLEU, ROUGE-L and CIDEr as plain loops count them, and the question to a small CoCa."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.captions import Captions, Scores, words
from mmcontrast.eval.statistics import value
from mmcontrast.shard_writer import Sample
from tests import coca, tiny
from tests.test_page import Reader

WRITTEN = ("a red square on the left", "two bars", "a green green corner", "blue", "the big black bar of the two bars")
CAPTIONS = (
    ("a red square", "there is a red square on the left side"),
    ("two bars", "two long bars side by side"),
    ("a green corner", "green corner of a picture", "a corner"),
    ("nothing of this kind",),
    ("the big black bar", "of the two bars the big one is black"),
)


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    split = text.split()
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def _slow_bleu(written: Sequence[str], captions: Sequence[Sequence[str]], most: int) -> float:
    logarithms = 0.0
    for n in range(1, most + 1):
        right = guessed = 0
        for text, said in zip(written, captions, strict=True):
            for gram, count in _grams(text, n).items():
                right += min(count, max(_grams(s, n)[gram] for s in said))
                guessed += count
        logarithms += math.log(right / guessed) / most
    length = sum(len(text.split()) for text in written)
    closest = sum(
        min((abs(len(s.split()) - len(t.split())), len(s.split())) for s in said)[1]
        for t, said in zip(written, captions, strict=True)
    )
    return math.exp(logarithms) * math.exp(min(0.0, 1 - closest / length))


def _longest(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    return 1 + _longest(a[1:], b[1:]) if a[0] == b[0] else max(_longest(a[1:], b), _longest(a, b[1:]))


def _slow_rouge(text: str, said: Sequence[str]) -> float:
    common = [_longest(text.split(), s.split()) for s in said]
    precision = max(c / len(text.split()) for c in common)
    recall = max(c / len(s.split()) for c, s in zip(common, said, strict=True))
    return 0.0 if not precision or not recall else 2.44 * precision * recall / (recall + 1.44 * precision)


def _slow_cider(i: int, written: Sequence[str], captions: Sequence[Sequence[str]]) -> float:
    """CIDEr-D: clipped, with a penalty for another length, the mean over 1- to 4-grams and captions, times 10."""
    total = 0.0
    for said in captions[i]:
        for n in range(1, 5):

            def weighted(text: str, n: int = n) -> dict[tuple[str, ...], float]:
                found: dict[tuple[str, ...], float] = {}
                for gram, count in _grams(text, n).items():
                    having = sum(any(gram in _grams(s, n) for s in of_sample) for of_sample in captions)
                    found[gram] = count * (math.log(len(captions)) - math.log(max(1, having)))
                return found

            a, b = weighted(written[i]), weighted(said)
            norms = [math.sqrt(sum(v * v for v in part.values())) for part in (a, b)]
            inner = sum(min(v, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, v in a.items())
            if norms[0] and norms[1]:
                # The library counts pairs of words for its lengths.
                delta = sum(_grams(written[i], 2).values()) - sum(_grams(said, 2).values())
                total += inner / norms[0] / norms[1] * math.exp(-(delta**2) / 72)
    return 10 * total / 4 / len(captions[i])


def test_scores_equal_counting() -> None:
    scores = Scores(WRITTEN, CAPTIONS)
    got = {name: value(s, 5) for name, s in scores.statistics().items()}
    want = {
        "bleu1": _slow_bleu(WRITTEN, CAPTIONS, 1),
        "bleu4": _slow_bleu(WRITTEN, CAPTIONS, 4),
        "rouge_l": np.mean([_slow_rouge(t, s) for t, s in zip(WRITTEN, CAPTIONS, strict=True)]),
        "cider": np.mean([_slow_cider(i, WRITTEN, CAPTIONS) for i in range(5)]),
        "exact": 1 / 5,
    }
    assert got == pytest.approx(want, abs=1e-6)
    assert 0.1 < want["bleu4"] < want["bleu1"] < 1 and 0 < want["rouge_l"] < 1 < want["cider"]


def test_weights_are_repetitions() -> None:
    weights = np.array([[1, 2, 0, 3, 1], [2, 0, 0, 0, 1]])
    statistics = Scores(WRITTEN, CAPTIONS).statistics()
    for row, w in enumerate(weights):
        again = [i for i, count in enumerate(w) for _ in range(count)]
        parts = [WRITTEN[i] for i in again], [CAPTIONS[i] for i in again]
        for name, n in (("bleu1", 1), ("bleu4", 4)):
            assert statistics[name](weights.astype(float))[row] == pytest.approx(_slow_bleu(*parts, n), abs=1e-6)


def test_the_corpus_score_is_the_library_s(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    given: Any = {i: [t] for i, t in enumerate(WRITTEN)}
    theirs, _ = Bleu(4).compute_score({i: list(s) for i, s in enumerate(CAPTIONS)}, given, verbose=0)
    ours = Scores(WRITTEN, CAPTIONS).statistics()
    assert [value(ours[name], 5) for name in ("bleu1", "bleu4")] == pytest.approx([theirs[0], theirs[3]], rel=1e-9)
    assert not capsys.readouterr().out


def test_words() -> None:
    assert words("  A cat's (big) Paw, well-known:\n über 3.") == "a cat's big paw well known über 3"
    assert words("?! …") == ""


def test_the_question_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.write_run(tmp_path / "run", coca.model_config())
    samples = tiny.samples(70)
    captions: list[Any] = [[f"a thing {i}", "Red?"] if i % 2 else None for i in range(70)]
    captions[1] = ["…"]  # no words
    content = [
        Sample(s.key, {"png": s.members["png"], "txt": "x", "json": {"captions": c} if c else {}})
        for s, c in zip(samples, captions, strict=True)
    ]
    shards = tiny.write_shards(tmp_path / "shards", content)
    model = load(run)
    written = model.caption([s.members["png"] for s in samples])
    assert len(set(written)) > 1, "the model writes the same of every picture"
    kept = [i for i in range(70) if i % 2 and i != 1]
    want = Scores([words(written[i]) for i in kept], [[words(c) for c in captions[i]] for i in kept])
    spec = tmp_path / "captions.yaml"
    spec.write_text("data: shards\ntexts: ['json:captions']\ntasks: [captions]\n")
    main(["eval", str(run), str(spec), "--json", str(tmp_path / "found.json"), "--report", str(tmp_path / "page.html")])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert found["task"] == "captioning" and found["metrics"]["samples"] == 34 and found["metrics"]["captions"] == 68
    for name, statistic in want.statistics().items():
        assert found["metrics"][name] == pytest.approx(value(statistic, 34), abs=1e-9)
    assert found["metrics"]["Bleu_4"] == found["metrics"]["bleu4"] and "cider_chance" in found["metrics"]
    page = (tmp_path / "page.html").read_text()
    read = Reader(page[: page.index("<script>")] + "</body></html>")
    assert len(read.named("img")) == 12 and "cannot be" not in page
    lowest = kept[int(want.cider.argmin())]
    for text in (written[lowest], *captions[lowest], f"CIDEr {want.cider.min():.2f}"):
        assert text in read.text
    # A model that writes what people wrote reaches the most there is, and another sample's text does not.
    answers = iter([captions[i][0] for i in kept])
    monkeypatch.setattr(type(model), "caption", lambda self, values, **_: [next(answers) for _ in values])  # type: ignore[misc]
    from mmcontrast.eval.embed import embed
    from mmcontrast.eval.layouts import Reading, open_data

    data = embed(model, open_data(shards, Reading(texts=["json:captions"])), modalities=["image"])
    best = Captions.Config(data=()).build().score(model, data)
    assert best.metrics["exact"].value == 1 and best.metrics["bleu1"].value == pytest.approx(1)
    assert best.chance["exact_chance"] == 0 and 0 < best.chance["bleu1_chance"] < 1
    shown = sorted(best.details["captions"], key=lambda d: d["position"])
    assert [(d["position"], d["written"]) for d in shown] == [(i, captions[i][0]) for i in kept]


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    wordless = [Sample(s.key, {"png": s.members["png"]}) for s in tiny.samples(3)]
    shards = tiny.write_shards(tmp_path / "shards", [*wordless, Sample("x", {"txt": "a"})])
    with pytest.raises(ConfigError, match="no sample has a caption"):
        Captions.Config(data=(shards,)).build().run(load(tiny.write_run(tmp_path / "run")))
    said = tiny.write_shards(tmp_path / "said", tiny.samples(3))
    with pytest.raises(ConfigError, match="cannot write captions"):
        Captions.Config(data=(said,)).build().run(load(tmp_path / "run"))
