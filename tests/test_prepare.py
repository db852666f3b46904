"""Preparing a source: each good row is written once on the side of its group, also when the work was cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from mmcontrast.config import ConfigError, RunError
from mmcontrast.data_prep import prepare as prepare_module
from mmcontrast.data_prep.cli import SOURCES
from mmcontrast.data_prep.folder import Folder
from mmcontrast.data_prep.journal import NAME
from mmcontrast.data_prep.prepare import SUMMARY, prepare
from mmcontrast.data_prep.source import Grouped, Item, Row
from mmcontrast.shards import MANIFEST, open_shards, read_manifest
from tests.sources import Letters


def files_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def texts(out: Path, split: str) -> dict[str, str]:
    shards = open_shards([str(out / split)])
    return {shards.name(i)[1]: shards.read(i, "txt").decode() for i in range(len(shards))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted preparation in one process writes."""
    out = tmp_path_factory.mktemp("whole")
    prepare(Letters(val=0.2, test=0.2), out, max_samples=4)
    return out


# -------------------------------------------------------------------------------------------- splits


def test_the_split_is_a_pure_function_near_the_asked_shares() -> None:
    groups = [f"group {i}" for i in range(20_000)]
    source = Grouped(val=0.05, test=0.1)
    sides = [source.split_of(g) for g in groups]
    assert [source.split_of(g) for g in reversed(groups)] == sides[::-1]
    share = {side: n / len(groups) for side, n in Counter(sides).items()}
    assert abs(share["val"] - 0.05) < 0.007 and abs(share["test"] - 0.1) < 0.01
    # A larger validation share takes from training alone: what was tested on stays so.
    wider = [Grouped(val=0.2, test=0.1).split_of(g) for g in groups]
    assert all((a == "test") == (b == "test") for a, b in zip(sides, wider, strict=True)) and wider != sides
    # The same on every machine and in every version.
    for side, known in KNOWN.items():
        assert [source.split_of(g) for g in known] == [side] * 2
    assert {Grouped(val=0.0, test=0.0).split_of(g) for g in groups} == {"train"}


KNOWN = {"train": ["a cat", "Käse 猫"], "val": ["group 9", "group 39"], "test": ["group 5", "group 8"]}


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (2.0, 0.0), (float("nan"), 0.1)])
def test_shares_must_leave_something_to_train_on(tmp_path: Path, val: float, test: float) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        prepare(Letters(val=val, test=test), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- what is written


def test_every_row_is_written_once_on_the_side_of_its_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Letters(val=0.2, test=0.2, count=400)
    summary = prepare(source, tmp_path, max_samples=50)
    bad = {i for i in range(400) if i % 7 == 6} | {10, 11}
    found = {split: texts(tmp_path, split) for split in source.splits}
    assert summary.samples == {split: len(samples) for split, samples in found.items()}
    assert min(summary.samples.values()) > 20
    numbers = {int(key): split for split in ("train", "val", "test") for key in found[split]}
    assert numbers.keys() == set(range(400)) - bad - {9}
    assert all(split == source.split_of(f"g{number // 4}") for number, split in numbers.items())
    trained = [n for n, split in numbers.items() if split == "train" and n % 3 == 0]
    assert found["extra"] == {f"{n:04d}-{k}": f"text {n} {k}" for n in trained for k in range(2)}
    manifest = read_manifest(tmp_path / "extra")
    assert manifest is not None and manifest["about"] == {"licence": "CC0", "of": "extra"}
    assert len(manifest["shards"]) == -(-len(found["extra"]) // 50)

    assert {row.where for row in summary.refused} == {f"row {i}" for i in bad}
    reasons = {row.where: row.reason for row in summary.refused}
    assert reasons["row 10"] == "cannot be read: No such file or directory" and reasons["row 11"] == "text is not UTF-8"
    kinds = Counter("broken" if i % 2 else "of no use" for i in bad - {10, 11})
    assert {**kinds, reasons["row 10"]: 1, reasons["row 11"]: 1} == summary.reasons
    said = capsys.readouterr().err
    assert said.count("refused row") == 10 and f"and {len(bad) - 10} more" in said
    assert f"{kinds['broken']} × broken" in said and f"refused {len(bad)}" in said
    kept = json.loads((tmp_path / SUMMARY).read_text())
    assert len(kept["refused"]) == len(bad) and kept["settings"]["count"] == 400 and kept["reasons"] == summary.reasons


def test_processes_change_no_byte(whole: Path, tmp_path: Path) -> None:
    prepare(Letters(val=0.2, test=0.2), tmp_path, workers=2, max_samples=4)
    found = files_of(tmp_path)
    assert found == files_of(whole) and len([name for name in found if name.endswith(".tar")]) > 12


def test_an_empty_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = prepare(Letters(val=0.001, test=0.0, count=4), tmp_path)
    assert summary.samples == {"train": 4, "val": 0, "extra": 4} and not (tmp_path / "test").exists()
    assert "val is empty" in capsys.readouterr().err


def test_an_older_test_split_never_stays_beside_new_training_shards(tmp_path: Path) -> None:
    prepare(Letters(val=0.2, test=0.2), tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare(Letters(val=0.2, test=0.0), tmp_path)
    assert files_of(tmp_path) == before
    prepare(Letters(val=0.2, test=0.0), tmp_path, overwrite=True)
    assert not list((tmp_path / "test").iterdir()) and len(texts(tmp_path, "val")) > 0

    assert list((tmp_path / "extra").iterdir())
    for i in range(2):
        (tmp_path / "in" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a" / f"{i}.png")
    prepare(Folder(folder=tmp_path / "in", val=0.0, test=0.0), tmp_path, overwrite=True)
    assert not list((tmp_path / "extra").iterdir())  # a split that only the older source knew


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    class Bad(Letters):
        def rows(self) -> list[Row]:
            return [Row(6, "row 6", ""), Row(13, "row 13", "")]

    with pytest.raises(ConfigError, match=r"2 refused; the first: row 6: of no use"):
        prepare(Bad(), tmp_path)
    assert not list(tmp_path.rglob(MANIFEST)) and not (tmp_path / NAME).exists()
    assert prepare(Letters(count=3), tmp_path).samples["train"] == 3  # and the way is free


@pytest.mark.parametrize("samples", [0, -1])
def test_shards_hold_something(tmp_path: Path, samples: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 sample"):
        prepare(Letters(), tmp_path, max_samples=samples)


# -------------------------------------------------------------------------------------------- going on


class Stopped(Exception):
    pass


def cut_off(out: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare up to a row."""

    def rows(self: Letters) -> Iterator[Row]:
        for row in Letters.rows(self):
            if row.number == after:
                raise Stopped
            yield row

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(prepare_module, "_PIECE", 1)
        patch.setattr(Cut, "rows", rows)
        prepare(Cut(val=0.2, test=0.2), out, max_samples=4)


class Cut(Letters):
    pass


@pytest.mark.parametrize("rows", [0, 1, 9, 12, 30, 45, 59])
def test_what_was_cut_off_goes_on_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    cut_off(tmp_path, rows, monkeypatch)
    finished = {p.relative_to(tmp_path): p.stat().st_mtime_ns for p in tmp_path.rglob("*.tar")}
    assert (len(finished) > 3) == (rows >= 30)
    assert not list(tmp_path.rglob(MANIFEST))
    encoded: list[int] = []

    def encode(self: Letters, row: Row) -> Sequence[Item]:
        encoded.append(row.number)
        return Letters.encode(self, row)

    monkeypatch.setattr(Cut, "encode", encode)
    prepare(Cut(val=0.2, test=0.2), tmp_path, max_samples=4)
    a, b = files_of(tmp_path), files_of(whole)
    assert json.loads(a.pop(SUMMARY))["refused"] == json.loads(b.pop(SUMMARY))["refused"]
    assert a == b
    # What was finished was neither written nor encoded again.
    assert {p: (tmp_path / p).stat().st_mtime_ns for p in finished} == finished
    assert len(encoded) < 60 - rows // 2 if rows >= 30 else len(encoded) <= 60


def test_it_goes_on_after_being_killed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    (files / "stop").write_text("40")
    code = (
        "import sys; from pathlib import Path; from tests.sources import Letters\n"
        "from mmcontrast.data_prep.prepare import prepare\n"
        f"prepare(Letters(val=0.2, test=0.2, files=Path({str(files)!r})), Path({str(out)!r}), max_samples=4)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ConfigError, match="of other settings.*--overwrite"):
        prepare(Letters(val=0.2, test=0.1, files=files), out, max_samples=4)
    with open(out / NAME, "a") as file:
        file.write('["row 39", ["tr')  # a line that the disk got half of
    prepare(Letters(val=0.2, test=0.2, files=files), out, max_samples=4)
    assert "goes on behind" in capsys.readouterr().err
    a, b = files_of(out), files_of(whole)
    del a[SUMMARY], b[SUMMARY]
    assert a == b


def test_a_worker_that_is_killed_stops_it_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "stop").write_text("30")
    source = Letters(val=0.2, test=0.2, files=tmp_path)
    with pytest.raises(RunError, match="lower --workers"):
        prepare(source, tmp_path / "out", workers=2, max_samples=4)
    assert sum(prepare(source, tmp_path / "out", workers=2, max_samples=4).samples.values()) > 50


def test_a_source_that_changed_meanwhile_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(tmp_path, 40, monkeypatch)

    def others(self: Letters) -> Sequence[Row]:
        return Letters(changed=3).rows()

    monkeypatch.setattr(Cut, "rows", others)
    with pytest.raises(RunError, match="has row 3x where it had row 3 before.*--overwrite"):
        prepare(Cut(val=0.2, test=0.2), tmp_path, max_samples=4)
    monkeypatch.setattr(Cut, "rows", Letters.rows)
    (shard, *_) = sorted((tmp_path / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ConfigError, match="was finished and has changed.*--overwrite"):
        prepare(Cut(val=0.2, test=0.2), tmp_path, max_samples=4)
    prepare(Cut(val=0.2, test=0.2), tmp_path, max_samples=4, overwrite=True)
    assert (tmp_path / SUMMARY).exists() and not (tmp_path / NAME).exists()


# -------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", SOURCES)
def test_the_command_knows_each_source_by_its_own_words(name: str) -> None:
    import importlib

    kind, sentence = SOURCES[name]
    found = getattr(importlib.import_module(f"mmcontrast.data_prep.{name}"), kind)
    assert (found.__doc__ or "").strip().splitlines()[0] == sentence
