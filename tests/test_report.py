"""A run's report: what was written is what is shown, whatever became of the run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from mmcontrast.cli import main
from mmcontrast.config import ConfigError, to_dict
from mmcontrast.page import Html, page
from mmcontrast.report.history import BUCKETS, Curve, read_history
from mmcontrast.report.page import run_page
from mmcontrast.report.settings import settings
from tests.browser import chromium as open_chromium
from tests.browser import needs_chromium, open_page
from tests.shapes import recipe, write_shapes
from tests.test_page import HOSTILE, Reader

STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command, with its report."""
    folder = tmp_path_factory.mktemp("report")
    write_shapes(folder / "train")
    words = ["--out", f"{folder}/run", "--data.shards", f"{folder}/train", "--steps", str(STEPS)]
    main(["train", str(Path(__file__).with_name("shapes.py")), *words, "--log-every", "2", "--health.every", "4"])
    return folder / "run"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_chromium() as driver:
        yield driver


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def charts(page: str) -> dict[str, dict[str, Any]]:
    """Title -> what the chart tells."""
    body = ElementTree.fromstring(page[page.index("<body>") : page.index("<script>")] + "</body>")
    return {
        str(figure.findtext("figcaption/b")): json.loads(svg.attrib["data-chart"])
        for figure in body.iter("figure")
        if (svg := figure.find("svg[@data-chart]")) is not None
    }


def test_a_run_leaves_its_report(run: Path) -> None:
    page = (run / "report.html").read_text()
    lines = [line for line in metrics(run) if "loss" in line]
    drawn = charts(page)
    (loss,) = drawn["Loss"]["lines"]
    assert loss["x"] == [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    assert loss["y"] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    (warmth,) = drawn["Temperature"]["lines"]
    assert warmth["y"] == pytest.approx([1 / line["clip.logit_scale"] for line in lines], rel=1e-4)
    towers = {line["name"]: line["y"] for line in drawn["Gradient norm by tower"]["lines"]}
    measured = [line for line in metrics(run) if "gradient/image" in line]
    assert towers["image"] == pytest.approx([line["gradient/image"] for line in measured], rel=1e-4)
    assert {"Alignment", "Uniformity", "Distance of the centroids", "Effective rank", "Waiting for data", "Memory",
            "Learning rate", "Samples per second", "Gradient norm"} <= drawn.keys()  # fmt: skip
    said = "".join(Reader(page[: page.index("<script>")] + "</body></html>").text)
    assert f"All {STEPS} steps are done" in said and "guessing: " in said
    assert f"torch {metadata.version('torch')}," in said and "Python 3" in said and "Checkpoints" in said


def test_every_number_of_a_run_has_its_place(run: Path) -> None:
    """In a chart, a table, or as a dotted line: none is silently lost."""
    page = (run / "report.html").read_text()
    names = {name for line in metrics(run) for name in line} - {"step", "epoch"}
    titles = charts(page)
    count = sum(len(chart["lines"]) for chart in titles.values())
    tabled = {n for n in names if n.startswith(("data/", "batch/", "chance/", "geometry/rank_limit/"))}
    assert count == len(names - tabled - {"clip.loss"}), "the only term is the loss"
    for name in (n for n in names if n.startswith("batch/")):
        assert name.removeprefix("batch/") in page


def test_curves_are_those_of_all_values_in_bounded_memory() -> None:
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, 10**6), 30_000))
    values = [rng.gauss(0, 1) for _ in steps]
    curve = Curve()
    for step, value in zip(steps, values, strict=True):
        curve.add(step, value)
    buckets = curve.buckets
    assert BUCKETS / 2 < len(buckets) <= BUCKETS and curve.count == len(steps)
    by_bucket: dict[int, list[tuple[int, float]]] = {}
    for step, value in zip(steps, values, strict=True):
        by_bucket.setdefault(step // curve.width, []).append((step, value))
    for bucket, (_, pairs) in zip(buckets, sorted(by_bucket.items()), strict=True):
        among = [value for _, value in pairs]
        assert (bucket.low, bucket.high) == (min(among), max(among))
        assert bucket.mean == pytest.approx(np.mean(among)) and bucket.step == pytest.approx(
            np.mean([step for step, _ in pairs])
        )
    assert (curve.first, curve.last) == (values[0], values[-1])


def test_what_cannot_be_read_is_left_out_and_said(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / "config.json").write_text((run / "config.json").read_text())
    good = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": -1}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (3 << 20) + b"\n",
    ]
    lost = b'{"step": 9, "loss": null, "odd": "word", "flag": true, "wide": 1e999}\n'
    (folder / "metrics.jsonl").write_bytes(b"".join([*bad, *good, lost, b'{"step": 10, "lo']))
    (folder / "health.jsonl").write_text(
        json.dumps({"step": 4, "rule": "limit/clip.logit_scale", "notice": f"hot {HOSTILE}"}) + "\n{}\n"
    )
    found = read_history(folder)
    assert found.damaged == {"metrics.jsonl": len(bad), "health.jsonl": 1} and found.cut
    assert found.lines == len(good) + 1 and found.curves["loss"].count == len([g for g in good if b'"loss"' in g])
    assert found.not_finite == {"loss": [9], "wide": [9]} and "odd" not in found.curves and "flag" not in found.curves
    page = run_page([folder])
    text = "".join(Reader(page[: page.index("<script>")] + "</body></html>").text)
    assert "metrics.jsonl: 6 lines that cannot be read" in text and "the last line is not whole" in text
    assert "loss was not finite at step 9" in text and f"hot {HOSTILE}" in text
    flagged = ElementTree.fromstring(page[page.index("<body>") : page.index("<script>")] + "</body>")
    on = {
        str(figure.findtext("figcaption/b"))
        for figure in flagged.iter("figure")
        if any(c.attrib.get("class") == "flag" for c in figure.iter("circle"))
    }
    assert on == {"Loss", "Temperature"}, "what health said stands where it belongs"


def test_a_run_that_diverges_leaves_its_report(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train")
    words = ["--out", f"{tmp_path}/run", "--data.shards", f"{tmp_path}/train", "--optimizer.lr", "1e30"]
    with pytest.raises(SystemExit):
        main(["train", str(Path(__file__).with_name("shapes.py")), *words])
    (line,) = [json.loads(text) for text in (tmp_path / "run/not_finite.jsonl").read_text().splitlines()]
    page = (tmp_path / "run/report.html").read_text()
    assert f"step {line['step']}: " in page and "loss nan" in page
    assert f"image of {line['ranks'][0]['not_finite']['image'][0]}" in page


def test_runs_beside_each_other(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    lines = [{**line, **({"loss": line["loss"] + 1} if "loss" in line else {})} for line in metrics(run)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((run / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "steps": 99}))
    main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")])
    page = (tmp_path / "both.html").read_text()
    ours, theirs = charts(page)["Loss"]["lines"]
    assert (ours["name"], theirs["name"]) == ("run", "other") and ours["colour"] != theirs["colour"]
    assert np.allclose(np.array(theirs["y"]) - ours["y"], 1, atol=1e-3)
    assert "<td><b>12</b></td><td><b>99</b></td>" in page.replace('class="number"', ""), "settings that differ"
    with pytest.raises(ConfigError, match="named twice"):
        run_page([run, run])
    with pytest.raises(ConfigError, match="1 to 8"):
        run_page([run] * 9)
    with pytest.raises(ConfigError, match="no metrics.jsonl"):
        run_page([tmp_path])


def test_settings_are_those_that_differ() -> None:
    config = recipe()
    listed, why = settings(to_dict(config))
    found = {s.name: (s.value, s.default) for s in listed}
    assert why is None and found["model"] == ("MultiEncoder", None) and found["steps"][1] is None
    assert found["global_batch"] == (str(config.global_batch), None)
    assert "seed" not in found and "model.encoders.image.mlp_ratio" not in found
    config.seed = 7
    assert [s for s in settings(to_dict(config))[0] if s not in listed] == [("seed", "7", "0")]
    foreign = {"class": "elsewhere:Trainer", "steps": 3, "parts": {"class": "elsewhere:Part", "wide": [1, 2]}}
    assert settings(foreign) == ([
        ("class", "Trainer", None), ("steps", "3", None), ("parts", "Part", None), ("parts.wide", "1, 2", None),
    ], settings(foreign)[1])  # fmt: skip
    assert "elsewhere" in str(settings(foreign)[1])


@needs_chromium
def test_the_page_in_a_browser(run: Path, chromium: Any) -> None:
    page = run / "report.html"
    open_page(chromium, page, width=400)
    open_page(chromium, page)
    svg = chromium.find_element("css selector", "svg[data-chart]")
    box = svg.rect
    assert box["width"] > 250 and box["height"] > 120
    colour = "return getComputedStyle(document.querySelector('svg .line')).stroke"
    light = chromium.execute_script(colour)
    webdriver_keys = {"right": "\ue014", "escape": "\ue00c"}
    svg.send_keys(webdriver_keys["right"])
    tip = chromium.find_element("css selector", "figure.chart .tip")
    first = next(line for line in metrics(run) if "loss" in line)
    assert tip.is_displayed() and f"step {first['step']}" in tip.text
    assert f"{first['loss']:.4g}" in tip.text
    svg.send_keys(webdriver_keys["escape"])
    assert not tip.is_displayed()
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert chromium.execute_script(colour) != light
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_chromium
def test_hostile_words_run_nothing_and_the_page_is_read_without_scripts(
    run: Path, tmp_path: Path, chromium: Any
) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")[:60]
    folder.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["objectives"] = {HOSTILE: HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": 1.0, f"{HOSTILE}{i}": i, f"gradient/{HOSTILE}": i, f"data/{HOSTILE}/seen": 3,
              f"eval/{HOSTILE}/acc1": 0.5, f"eval/{HOSTILE}/acc1_low": 0.4, f"eval/{HOSTILE}/acc1_high": 0.6}
             for i in range(1, 4)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    odd = {"step": 1, "loss": HOSTILE, "ranks": [{"not_finite": {HOSTILE: [HOSTILE]}}, 3]}
    others = [{"step": 2, "ranks": 5}, {"step": 3, "ranks": [{"not_finite": 7}, {"not_finite": {"a": 1}}]}]
    (folder / "not_finite.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (odd, *others)))
    (folder / "starts.jsonl").write_text(
        json.dumps({"step": 0, "time": HOSTILE, "versions": {HOSTILE: HOSTILE}}) + "\n"
    )
    page = tmp_path / "page.html"
    page.write_text(run_page([folder]))
    for script in (False, True):
        open_page(chromium, page, width=400, script=script)
        assert not chromium.find_elements("css selector", "img")
        assert len(chromium.find_elements("css selector", "svg[data-chart]")) >= 5
        assert "alert" in chromium.find_element("css selector", "body").text
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@needs_chromium
def test_only_the_script_that_a_page_was_made_with_runs(tmp_path: Path, chromium: Any) -> None:
    path = tmp_path / "page.html"
    foreign = Html("<script>document.title = 'foreign'</script><p onclick='document.title = \"clicked\"'>text</p>")
    path.write_text(page("ours", foreign, script="document.body.dataset.ran = 1"))
    chromium.get(path.as_uri())
    chromium.find_element("css selector", "p").click()
    assert chromium.title == "ours" and chromium.execute_script("return document.body.dataset.ran") == "1"
    assert len(chromium.get_log("browser")) == 2, "both were refused"
