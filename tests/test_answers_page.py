"""The page of an evaluation: what it shows is what was found, drawn anew; nothing of the data runs or leaves it."""

from __future__ import annotations

import base64
import io
import json
import random
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.decode import audio, picture
from mmcontrast.eval.answers_page import draw, shown_again
from mmcontrast.eval.confusion import MOST, confusion, together
from mmcontrast.eval.joint import Joint
from mmcontrast.eval.media import Media
from mmcontrast.eval.ranks import rank
from mmcontrast.eval.result import chance_of
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.shown import gallery, plane
from mmcontrast.eval.sources import Files
from mmcontrast.report.page import run_page
from mmcontrast.shard_writer import Sample
from tests import served, tiny
from tests.browser import chromium as open_chromium
from tests.browser import needs_chromium, open_page
from tests.embedded import embedded
from tests.served import HOSTILE
from tests.test_page import Reader


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four modalities, beside shards with hostile words."""
    folder = tmp_path_factory.mktemp("answers")
    samples = [Sample(s.key, dict(s.members)) for s in served.content()]
    for i, sample in enumerate(samples):
        if i not in (2, 3, 5, 6):  # these keep their own
            cast(dict[str, Any], sample.members)["json"] = {"label": (HOSTILE, "red", "blue")[i % 3]}
    tiny.write_shards(folder / "shards", samples)
    return served.write_run(folder / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    path = run.parent / "page.html"
    shards = str(run.parent / "shards")
    main(["eval", str(run), shards, "--tasks", "zero_shot", "retrieval", "--report", str(path)])
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium() as driver:
        yield driver


def test_a_gallery_shows_the_first_answers_and_the_right_one() -> None:
    g = torch.Generator().manual_seed(0)
    zx, zy = (torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=1) for n in (40, 70))
    x_labels, y_labels = torch.arange(40), torch.randint(0, 40, (70,), generator=g)
    ranks = rank(zx, zy, x_labels, y_labels)
    x, y = (torch.stack([torch.arange(n), torch.full((n,), part)], 1) for n, part in ((40, 0), (70, 1)))
    found = gallery(zx, zy, x_labels, y_labels, ranks, x, y)
    assert sum(n for *_, n in found["ranks"]) == 40
    one = next(n for a, b, n in found["ranks"] if (a, b) == (1, 1))
    assert one == int((ranks.best == 0).sum()) and found["ranks"][-1][1] == 70
    assert len(found["random"]) == len(found["worst"]) == 8
    assert [q["rank"] for q in found["worst"]] == sorted((ranks.best + 1).tolist(), reverse=True)[:8]
    for q in (*found["random"], *found["worst"]):
        i = q["item"][0]
        scores = [(float(zx[i].double() @ zy[j].double()), j) for j in range(70)]
        first = sorted(scores, reverse=True)[:5]
        assert [a["item"] for a in q["first"]] == [[j, 1] for _, j in first]
        assert [a["right"] for a in q["first"]] == [int(y_labels[j]) == i for _, j in first]
        right = [s for s in scores if int(y_labels[s[1]]) == i]
        assert (q["answer"] is None) == (not right)
        if right:
            assert q["answer"]["item"] == [max(right)[1], 1] and q["answer"]["score"] == pytest.approx(
                max(right)[0], abs=1e-4
            )


def test_the_plane_is_that_of_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    data = embedded({"a": rng.normal(size=(50, 7)) + 1, "b": rng.normal(size=(50, 7))}, [{}] * 50)
    found = plane(data, "a", "b")
    assert found is not None and len(found["at"]) == 50
    both = torch.cat([data.z["a"], data.z["b"]]).double().numpy()
    centred = both - both.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    assert found["shares"] == pytest.approx((singular[:2] ** 2 / (singular**2).sum()).tolist(), abs=1e-4)
    for side, m in enumerate(("a", "b")):
        rows = [pair[side][0] for pair in found["items"]]
        want = (data.z[m].double().numpy()[rows] - both.mean(0)) @ axes[:2].T
        assert np.allclose(np.abs([at[side] for at in found["at"]]), np.abs(want), atol=1e-3), "but for the signs"
    assert plane(embedded({"a": np.ones((2, 3)), "b": np.ones((2, 3))}, [{}] * 2), "a", "b") is None


def test_of_several_captions_the_gallery_names_which() -> None:
    data = embedded({"image": np.eye(3), "text": np.eye(3)}, [{}] * 3)
    rows, z = torch.tensor([0, 0, 1, 2]), data.z["text"]
    data = replace(data, rows={**data.rows, "text": rows}, z={**data.z, "text": z[[2, 0, 1, 2]]})
    task = Retrieval(Retrieval.Config(data=(), equal_texts=False))
    details = task.score(cast(Any, None), data).details
    forth = details["galleries"][0]
    (first,) = [q for q in forth["random"] if q["item"] == [0, 0]]
    assert first["answer"] == {"item": [0, 1], "score": 1.0, "right": True} and first["rank"] == 1


def test_what_is_found_with_several_modalities_has_its_gallery() -> None:
    rng = np.random.default_rng(1)
    data = embedded({m: rng.normal(size=(9, 5)) for m in ("image", "audio", "text")}, [{}] * 9)
    task: Joint = Joint.Config(data=(), candidate="image", known=("audio", "text"), score="sum").build()
    (found,) = task.score(cast(Any, None), data).details["galleries"]
    assert found["from"] == ["audio", "text"] and found["to"] == "image"
    together = (data.z["audio"] + data.z["text"]).double() @ data.z["image"].double().T
    for q in found["random"]:
        i = q["item"][0]
        assert q["answer"]["item"] == [i, 0] and q["rank"] == int((together[i] > together[i, i]).sum()) + 1
        assert q["first"][0]["item"] == [int(together[i].argmax()), 0]


def test_confused_classes_stand_beside_each_other() -> None:
    table = np.diag([9] * 6)
    for a, b in ((0, 3), (1, 5), (2, 4)):
        table[a, b] = table[b, a] = 5
    order = together(table)
    assert sorted(order) == list(range(6))
    places = {c: i for i, c in enumerate(order)}
    assert all(abs(places[a] - places[b]) == 1 for a, b in ((0, 3), (1, 5), (2, 4)))
    assert together(np.diag([3, 1, 2])) == [0, 1, 2]


def test_of_many_classes_the_most_confused_are_drawn() -> None:
    rng = random.Random(0)
    truth = [rng.randrange(200) for _ in range(3000)]
    named = [t if rng.random() < 0.8 else (t + 1) % 10 if t < 10 else rng.randrange(200) for t in truth]
    triples = sorted({(t, p) for t, p in zip(truth, named, strict=True)})
    counts = [(a, b, sum((t, p) == (a, b) for t, p in zip(truth, named, strict=True))) for a, b in triples]
    found = confusion([f"class {c}" for c in range(200)], counts)
    largest = sorted((n for a, b, n in counts if a != b), reverse=True)
    assert [p.samples for p in found.pairs] == largest[:12]
    top = found.pairs[0]
    assert top.of == truth.count(int(top.right.removeprefix("class ")))
    assert f"The {MOST} most confused of 200 classes" in found.drawn and top.right in found.drawn
    for r in found.recalls:
        c = int(r.name.removeprefix("class "))
        own = [p == c for t, p in zip(truth, named, strict=True) if t == c]
        assert (r.samples, r.recall) == (len(own), pytest.approx(np.mean(own)))


@pytest.mark.parametrize(
    ("metric", "level"),
    [("acc1", 0.1), ("mean_per_class_recall", 0.1), ("acc5", 0.2), ("acc3", None), ("a_to_b_recall@5", 0.3),
     ("b_to_a_recall@5", 0.2), ("a_to_b_recall@1%", None), ("blend_acc1@4shot", 0.1),
     ("macro_auroc", 0.5), ("median_rank", None)],
)  # fmt: skip
def test_chance_is_that_of_the_metric(metric: str, level: float | None) -> None:
    known = {"chance": 0.1, "chance@5": 0.2, "a_to_b_chance@5": 0.3, "macro_auroc_chance": 0.5}
    assert chance_of(metric, known) == level


def test_media_are_drawn_anew_in_bounded_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 300, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    values = {"image": [picture(file.getvalue())], "audio": [audio(served.wav(9.0))], "text": ["x" * 1000]}

    class Source(Files):
        def __len__(self) -> int:
            return 1000

        def name(self, position: int) -> tuple[str, str]:
            return "shard", f"<{position}>"

        def values(self, position: int, modality: str, kind: str) -> Any:
            return values[kind]

    media = Media(Source(Path(), []), {"image": "image", "audio": "audio", "text": "text"})
    shown = Reader(str(media.draw("image", [0, 0]))).named("img")[0]
    data = base64.b64decode(str(shown["src"]).removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(data)) as drawn:
        assert max(drawn.size) == 176 and drawn.format == "WEBP" and shown["alt"] == "<0>"
    players = [Reader(str(media.draw("audio", [i, 0]))).named("audio") for i in range(200)]
    first = base64.b64decode(str(players[0][0]["src"]).removeprefix("data:audio/wav;base64,"))
    with wave.open(io.BytesIO(first)) as heard:
        assert heard.getnframes() == 3 * heard.getframerate() and heard.getframerate() == served.RATE
    count = sum(bool(p) for p in players)
    total = sum(len(str(p[0]["src"])) for p in players if p)
    assert 50 < count < 200 and total < 9 << 20 and not players[-1], "no player any more, but a waveform"
    assert len(Reader(str(media.draw("text", [0, 0]))).text[0]) == 221
    assert "<5000>" not in str(media.draw("image", [5000, 0])) and "sample 5000" in str(media.draw("image", [5000, 0]))


def test_the_page_says_what_was_found(page: Path) -> None:
    text = page.read_text()
    read = Reader(text[: text.index("<script>")] + "</body></html>")
    said = "".join(read.text)
    for heading in ("zero-shot classification", "retrieval", "Hardest mistakes", "text by image", "image by text",
                    "Worst ranks", "Confusion", "image and text in one plane"):  # fmt: skip
        assert heading in said
    assert HOSTILE in said and "cannot be shown" not in said and "cannot be drawn" not in said
    sources = {str(a["src"]).partition(",")[0] for a in read.named("img")}
    assert sources == {"data:image/webp;base64"}, "no byte of the data is handed on"


def test_sounds_and_signals_have_their_place(run: Path, tmp_path: Path) -> None:
    for pair, what in ((("audio", "text"), "audio"), (("ecg", "text"), "path")):
        path = tmp_path / f"{pair[0]}.html"
        words = ["--tasks", "retrieval", "--pair", *pair, "--report", str(path)]
        main(["eval", str(run), str(run.parent / "shards"), *words])
        text = path.read_text()
        found = Reader(text[: text.index("<script>")] + "</body></html>").named(what)
        assert [a for a in found if what == "audio" or a.get("class") == "trace"]


def test_two_models_are_compared(run: Path, tmp_path: Path) -> None:
    other = tiny.write_run(tmp_path / "other", seed=3)
    path = tmp_path / "page.html"
    words = ["--against", str(other), "--tasks", "retrieval", "--report", str(path)]
    main(["eval", str(run), str(run.parent / "shards"), *words])
    assert f"Compared with {other}" in path.read_text() and path.read_text().count("not told apart") > 5


def test_shots_are_a_curve_and_failed_sets_are_shown(run: Path) -> None:
    metrics = {"acc1@1shot": [0.4, 0.3, 0.5], "acc1@16shot": [0.8, 0.7, 0.9], "acc1@4shot": [0.6, 0.5, 0.7],
               "zero_shot_acc1": [0.55, 0.5, 0.6]}  # fmt: skip
    few = draw(shown_again("x", {"task": "few_shot", "metrics": metrics, "chance": {"chance": 0.1}, "counts": {}}))
    told = next(a["data-chart"] for a in Reader(few).named("svg") if "data-chart" in a)
    (line,) = json.loads(str(told))["lines"]
    assert line["x"] == [1, 4, 16] and line["y"] == [0.4, 0.6, 0.8] and line["high"] == [0.5, 0.7, 0.9]
    assert "prompts alone" in few and few.count('class="chance"') == 4
    names = [str(run.parent / "shards")]
    data = Retrieval.Config(data=tuple(names)).build().answer(cast(Any, load(run))).details["data"]
    failed = {"task": "compositional", "metrics": {}, "counts": {}, "details": {
        "data": data, "failed": [{"item": "x", "positions": [0, 1]}]}}  # fmt: skip
    sets = Reader(draw(shown_again("x", failed)))
    assert len(sets.named("img")) == 2 and HOSTILE in sets.text


@pytest.fixture
def kept(run: Path, tmp_path: Path) -> Path:
    """A run folder as training leaves it after an evaluation."""
    task = Retrieval.Config(data=(str(run.parent / "shards"),)).build()
    task.run(load(run))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    content = {"step": 1, "averaged": False, "answers": {HOSTILE: task.details()}}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    return tmp_path


def test_the_last_evaluation_stands_in_the_runs_report(run: Path, kept: Path) -> None:
    page = run_page([kept])
    assert "text by image" in page and page.count("<img") > 30 and "cannot be" not in page
    content = json.loads((kept / "evaluation.json").read_text())
    content["answers"][HOSTILE]["details"]["data"]["fingerprint"] = "other"
    (kept / "evaluation.json").write_text(json.dumps(content))
    page = run_page([kept])
    assert "holds others than those that were asked about" in page and "<img" not in page
    assert "text by image" in page, "what does not need the samples is shown"
    content["answers"][HOSTILE]["details"]["data"]["names"] = [str(kept / "gone")]
    (kept / "evaluation.json").write_text(json.dumps(content))
    assert "The samples cannot be shown" in run_page([kept])
    content["answers"][HOSTILE]["details"]["data"]["names"] = ["http://127.0.0.1:9/{00..99}.tar"]
    (kept / "evaluation.json").write_text(json.dumps(content))
    assert "a report asks no network for http://127.0.0.1:9" in run_page([kept])


def test_a_changed_file_costs_a_part_and_not_the_page(kept: Path) -> None:
    """Any value replaced by any other: no error gets out, and nothing but our own markup in."""
    result = json.loads((kept / "evaluation.json").read_text())["answers"][HOSTILE]
    result["details"].update(
        classes=["a", HOSTILE], confusion=[[0, 0, 2], [0, 1, 1]], reliability=[
            {"low": 0.0, "high": 0.5, "count": 3, "confidence": 0.3, "accuracy": 0.2}],
        mistakes=[{"position": 0, "label": "a", "predicted": "b", "score": 0.4, "right_score": 0.1, "rank": 2}],
        per_class=[{"class": "a", "samples": 2, "auroc": 0.5, "average_precision": 0.1, "max_f1": 0.2}],
    )  # fmt: skip
    rng = random.Random(0)
    junk = (None, -1, 10**30, float("nan"), "x", HOSTILE, [], {}, [[]], True, 0)

    def spoil(value: Any, chance: float) -> Any:
        if rng.random() < chance:
            return rng.choice(junk)
        if isinstance(value, dict):
            return {k: spoil(v, chance) for k, v in cast(dict[str, Any], value).items()}
        return [spoil(v, chance) for v in cast(list[Any], value)] if isinstance(value, list) else value

    result["details"]["data"]["names"] = []  # without the samples: quick
    whole = draw(shown_again("x", result))
    assert "cannot be drawn" not in whole and "Reliability" in whole
    for round_ in range(60):
        chance = (0.3, 0.03, 0.003)[round_ % 3]
        read = Reader(draw(shown_again(HOSTILE, {name: spoil(value, chance) for name, value in result.items()})))
        assert not read.named("script") and not [a for _, a in read.elements if any(n.startswith("on") for n in a)]


@needs_chromium
def test_the_page_in_a_browser(page: Path, chromium: Any) -> None:
    for width in (400, 1280):
        open_page(chromium, page, width=width)
        assert not chromium.find_elements("css selector", "img[src=x]")
        loaded = "return [...document.images].every((i) => i.complete && i.naturalWidth > 0)"
        assert chromium.execute_script(loaded) and len(chromium.find_elements("css selector", "svg[role=img]")) >= 2
    cloud = chromium.find_element("css selector", ".plane svg[data-chart]")
    cloud.send_keys("\ue014")
    tip = chromium.find_element("css selector", ".plane .tip")
    assert tip.is_displayed() and tip.text
