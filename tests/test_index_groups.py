"""Near-duplicates and record linkage: groups, nearest exemplars and thresholds are those that plain loops find."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, add, build_index, delete
from mmcontrast.eval.index import duplicates as module
from mmcontrast.eval.index.duplicates import find_duplicates
from mmcontrast.eval.index.link import Linked, points, read_labels, worth
from mmcontrast.eval.index.pages import duplicates_page, links_page
from mmcontrast.eval.index.stored import Stored
from mmcontrast.shard_writer import Sample
from tests import served, tiny


def _samples(count: int, *, start: int = 0) -> list[Sample]:
    """Pictures of which every fifth comes again with one pixel's noise, and every tenth to the bit."""
    found: list[Sample] = []
    for i in range(count):
        seed = 10_000 + i // 10 if i % 10 in (0, 9) else start + i
        colour = [*tiny.COLOURS][i // 10 % 6] if i % 10 in (0, 9) else [*tiny.COLOURS][i % 6]
        picture = tiny.png(colour, "square" if i % 10 in (0, 9) else tiny.SHAPES[i % 3], seed=seed)
        found.append(Sample(f"{start + i:06d}", {"png": picture, "txt": f"a {colour} <b>", "json": {"part": i % 2}}))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indices of one run; the first of two segments, with something deleted."""
    folder = tmp_path_factory.mktemp("groups")
    run = tiny.write_run(folder / "run")
    first, second = _samples(40), _samples(30, start=1000)
    build_index(run, [tiny.write_shards(folder / "a", first)], folder / "left", modality="image+text")
    add(folder / "left", [tiny.write_shards(folder / "b", second)])
    delete(folder / "left", ["000009"])
    build_index(
        run, [tiny.write_shards(folder / "c", _samples(50, start=5000))], folder / "right", modality="image+text"
    )
    return folder


def _slow_groups(
    index: Stored, threshold: float, allowed: set[str] | None = None
) -> dict[frozenset[str], dict[str, float]]:
    """By comparing every pair in float64, and walking from one to the next."""
    rows = index.rows().tolist()
    keys, vectors = index.keys(index.rows()), [index.vector(row).astype(np.float64) for row in rows]
    chosen = [i for i, key in enumerate(keys) if allowed is None or key in allowed]
    close = {i: {j: float(vectors[i] @ vectors[j]) for j in chosen if i != j} for i in chosen}
    close = {i: {j: s for j, s in others.items() if s >= threshold} for i, others in close.items()}
    seen: set[int] = set()
    found: dict[frozenset[str], dict[str, float]] = {}
    for i in chosen:
        group, waiting = set[int](), [i]
        while waiting:
            if (j := waiting.pop()) not in group | seen:
                group.add(j)
                waiting += close[j]
        seen |= group
        if len(group) > 1:
            found[frozenset(keys[j] for j in group)] = {keys[j]: max(close[j].values()) for j in group}
    return found


def _groups(found: module.Duplicates) -> dict[frozenset[str], dict[str, float]]:
    return {frozenset(m.key for m in g.members): {m.key: m.score for m in g.members} for g in found.groups}


@pytest.mark.parametrize("threshold", [0.9999, 0.999, 0.99])
@pytest.mark.parametrize("rows", [4096, 7])
def test_groups_are_what_all_pairs_connect(
    folder: Path, threshold: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(module, "_HELD", 5)
    index = Stored(folder / "left")
    want = _slow_groups(index, threshold)
    assert 1 < len(want) < 60 and any(len(group) > 2 for group in want), "the threshold groups all or nothing"
    for neighbours in (None, 68):
        found = find_duplicates(index, threshold, neighbours=neighbours)
        got = _groups(found)
        assert got.keys() == want.keys()
        for group, scores in want.items():
            assert got[group] == pytest.approx(scores, abs=1e-5)
        assert found.redundant == sum(len(g) - 1 for g in want) and found.looked_at == 69
        assert [len(g.members) for g in found.groups] == sorted((len(g) for g in want), reverse=True)
        assert found.truncated == 0


def test_a_filter_limits_what_is_compared(folder: Path) -> None:
    index = Stored(folder / "left")
    allowed = {
        k for k, r in zip(index.keys(index.rows()), index.rows(), strict=True) if index.facts(int(r))["part"] == 0
    }
    found = find_duplicates(index, 0.999, where="part = 0")
    assert _groups(found).keys() == _slow_groups(index, 0.999, allowed).keys() != _slow_groups(index, 0.999).keys()


def test_few_neighbours_say_what_they_may_miss(folder: Path) -> None:
    index = Stored(folder / "left")
    found = find_duplicates(index, 0.99, neighbours=1)
    assert found.neighbours == 1 and found.truncated > 0
    whole = _groups(find_duplicates(index, 0.99))
    assert all(any(part <= group for group in whole) for part in _groups(found))
    for settings, message in (
        ({"threshold": 1.5}, "threshold is 1.5; a cosine is from -1 to 1"),
        ({"neighbours": -1}, "neighbours is -1; look at 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_duplicates(index, **settings)  # pyright: ignore[reportArgumentType]


def test_the_command_writes_groups_and_their_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "index",
            "duplicates",
            str(folder / "left"),
            "--threshold",
            "0.999",
            "--json",
            str(tmp_path / "g.json"),
            "--html",
            str(tmp_path / "g.html"),
        ]
    )
    want = _slow_groups(Stored(folder / "left"), 0.999)
    told = json.loads((tmp_path / "g.json").read_text())
    assert {frozenset(m["key"] for m in group) for group in told["groups"]} == want.keys()
    assert f"{len(want)} groups among 69 samples (all pairs looked at)" in capsys.readouterr().out
    page = (tmp_path / "g.html").read_text()
    assert page.count("<img") == sum(min(len(g), 12) for g in want) and "a white <b>" not in page
    assert "&lt;b&gt;" in page and "script" not in page.lower().replace("default-src", "")
    assert "may have more" in duplicates_page(
        Stored(folder / "left"), find_duplicates(Stored(folder / "left"), 0.99, neighbours=1)
    )


def test_sounds_and_signals_of_a_group_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"rate": 8, "channels": ["I", "II"]}
    found = [Sample(f"sound{i}", {"wav": served.wav(3.0), "txt": "a tone"}) for i in range(3)]
    found += [Sample(f"beat{i}", {"npy": served.npy(served.series(i)), "json": facts, "txt": "heart"}) for i in (0, 1)]
    found += [Sample(f"torn{i}", {"wav": served.wav()[:30], "txt": "lost"}) for i in (0, 1)]
    found += [Sample(f"none{i}", {"txt": "words alone"}) for i in (0, 1)]
    run = tiny.write_run(tmp_path / "run")
    build_index(run, [tiny.write_shards(tmp_path / "shards", found)], tmp_path / "index", modality="text")
    index = Stored(tmp_path / "index")
    groups = find_duplicates(index, 0.99999)
    assert len(groups.groups) == 4
    page = duplicates_page(index, groups)
    assert page.count("<audio") == 3 and page.count('class="traces"') == 2 and page.count("cannot be shown") == 2
    monkeypatch.setattr("mmcontrast.eval.media._SOUNDS", 150_000)  # a player of 3 s at 8 kHz takes 64,000 bytes
    page = duplicates_page(index, groups)
    assert page.count("<audio") == 2 and page.count('aria-label="waveform"') == 3
    linked = links_page(Linked(index, index), 0.5, None)
    assert linked.count("<audio") == 2 and linked.count('class="traces"') == 4


# ------------------------------------------------------------------------------------------------- linking


def test_each_record_gets_its_nearest(folder: Path) -> None:
    left, right = Stored(folder / "left"), Stored(folder / "right")
    linked = Linked(left, right)
    rows = right.rows()
    names, vectors = right.keys(rows), [right.vector(int(r)).astype(np.float64) for r in rows]
    seen = 0
    for record, row in zip(linked.records(0.9995), left.rows(), strict=True):
        scores = [float(left.vector(int(row)).astype(np.float64) @ v) for v in vectors]
        best = max(scores)
        assert record["score"] == pytest.approx(best, abs=2e-6) and record["link"] == (record["score"] >= 0.9995)
        assert scores[names.index(record["b"])] == pytest.approx(best, abs=1e-6)  # of equal ones, either
        seen += record["link"]
    assert 0 < seen < 69
    some = [*Linked(left, right, where="part = 1").records(0)]
    assert all(int(r["b"]) % 2 == 1 for r in some)
    assert {(r["b"], r["link"]) for r in Linked(left, right, where="part = 7").records(-1)} == {(None, False)}


def test_thresholds_are_worth_what_a_loop_counts() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, 200) / 30.0
    has = rng.random(200) < 0.7
    right = has & (rng.random(200) < scores)
    scores[5] = -np.inf
    right[5] = False
    scores = scores.astype(np.float32)
    found = points(scores, right, has)
    assert [p.threshold for p in found] == sorted({float(np.float32(s)) for s in scores if s >= 0}, reverse=True)
    for point in found:
        links = [i for i in range(200) if np.float32(scores[i]) >= point.threshold]
        good = sum(bool(right[i]) for i in links)
        assert point.links == len(links)
        assert point.precision == pytest.approx(good / len(links))
        assert point.recall == pytest.approx(good / sum(map(bool, has)))
        assert worth(point.threshold, scores, right, has) == point
    assert worth(2.0, scores, right, has).precision == 1.0


def _labels(folder: Path) -> dict[str, frozenset[str]]:
    """A record's counterpart is what is nearest, for those nearer than a bound and a few others wrongly."""
    found: dict[str, frozenset[str]] = {}
    for number, record in enumerate(Linked(Stored(folder / "left"), Stored(folder / "right")).records(0)):
        right = record["score"] > 0.9995
        found[record["a"]] = frozenset([record["b"]] if right != (number % 17 == 0) else [])
    return found


def test_the_threshold_is_the_best_there_is(folder: Path) -> None:
    linked, labels = Linked(Stored(folder / "left"), Stored(folder / "right")), _labels(folder)
    found = linked.calibrate(labels)
    assert found.chosen_on == 35 and found.held_out_on == 34 and found.held_out is not None
    order = np.random.default_rng(0).permutation(69)
    for some, point in ((order[::2], None), (order[1::2], found.held_out)):
        records = [*linked.records(found.threshold)]
        links = [records[i] for i in some if records[i]["link"]]
        good = sum(r["b"] in labels[r["a"]] for r in links)
        precision, recall = good / len(links), good / sum(bool(labels[records[i]["a"]]) for i in some)
        if point is not None:
            assert (point.precision, point.recall) == pytest.approx((precision, recall))
        else:  # no other threshold has a better F1 on those that chose it
            best = 2 * precision * recall / (precision + recall)
            for score in {float(linked.scores[i]) for i in some}:
                other = [i for i in some if linked.scores[i] >= score]
                right = sum(records[i]["b"] in labels[records[i]["a"]] for i in other)
                p, r = right / len(other), right / sum(bool(labels[records[i]["a"]]) for i in some)
                assert (2 * p * r / (p + r) if right else 0) <= best + 1e-12
    strict = linked.calibrate(labels, precision=0.9)
    assert strict.by == "the most recall at precision 0.9"
    few = linked.calibrate(dict([*labels.items()][:10]))
    assert few.held_out is None and few.chosen_on == 10


def test_the_command_links(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b"])
        writer.writerows([a, next(iter(b), "")] for a, b in _labels(folder).items())
    assert read_labels(tmp_path / "labels.csv") == _labels(folder)
    arguments = ["index", "link", str(folder / "left"), str(folder / "right")]
    main(
        [
            *arguments,
            "--labels",
            str(tmp_path / "labels.csv"),
            "--out",
            str(tmp_path / "links.jsonl"),
            "--json",
            str(tmp_path / "l.json"),
            "--html",
            str(tmp_path / "l.html"),
        ]
    )
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "l.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "links.jsonl").read_text().splitlines()]
    assert len(records) == 69 and sum(r["link"] for r in records) == told["links"]
    assert all(r["link"] == (r["score"] >= told["threshold"] - 1e-6) for r in records)
    assert told["calibration"]["held_out_on"] == 34 and "on 34 others: precision " in said
    assert len(told["calibration"]["curve"]) > 3
    page = (tmp_path / "l.html").read_text()
    assert (
        "Just linked" in page
        and "Just not linked" in page
        and "threshold has precision" in page
        and "data-chart" in page
        and page.count("<img") == 2 * (min(12, told["links"]) + min(12, 69 - told["links"]))
    )
    main([*arguments, "--threshold", "0.9995"])
    assert "of 69 samples of" in capsys.readouterr().out
    linked = Linked(Stored(folder / "left"), Stored(folder / "right"))
    assert "Threshold" not in links_page(linked, 0.9995, None)


def test_what_cannot_be_linked_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny.write_run(tmp_path / "other", seed=3)
    build_index(other, [str(folder / "c")], tmp_path / "index", modality="image+text")
    left = Stored(folder / "left")
    with pytest.raises(ConfigError, match="was made with model_hash .*: their spaces differ"):
        Linked(left, Stored(tmp_path / "index"))
    linked = Linked(left, Stored(folder / "right"))
    for labels, precision, message in (
        ({"x": frozenset("a"), "000001": frozenset("b")}, None, "1 of the labelled records are not in .*left: 'x'"),
        ({"000001": frozenset("b")}, None, "1 records are labelled; a threshold takes at least 2"),
        ({"000001": frozenset("b"), "000002": frozenset("b")}, 0.9, "no threshold reaches precision 0.9"),
        ({"000001": frozenset("b"), "000002": frozenset("b")}, 2.0, "precision is 2.0; ask for a share"),
    ):
        with pytest.raises(ConfigError, match=message):
            linked.calibrate(labels, precision=precision)
    for content, message in (
        ("a,c\n1,2\n", "pair 1 of .* has no keys"),
        ("a,b\n", "holds no pairs"),
        ("a,b\n,x\n", "pair 1"),
    ):
        (tmp_path / "labels.csv").write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_labels(tmp_path / "labels.csv")
    (tmp_path / "labels.jsonl").write_text('{"a": "x", "b": null}\n{"a": "x", "b": "y"}\n')
    assert read_labels(tmp_path / "labels.jsonl") == {"x": frozenset("y")}
    with pytest.raises(SystemExit):
        main(["index", "link", str(folder / "left"), str(folder / "right")])


def test_an_index_answers_these_without_its_model(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "left", tmp_path / "alone")
    manifest: dict[str, Any] = json.loads((tmp_path / "alone" / "manifest.json").read_text())
    (tmp_path / "alone" / "manifest.json").write_text(json.dumps(manifest | {"model": "/gone"}))
    assert (
        find_duplicates(Stored(tmp_path / "alone"), 0.999).groups
        == find_duplicates(Stored(folder / "left"), 0.999).groups
    )
    with pytest.raises(ConfigError, match="needs the model /gone"):
        Index(tmp_path / "alone")
