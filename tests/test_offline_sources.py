"""Sources that need no download: a smartwatch's recordings, simulated electrocardiograms, spoken names."""

from __future__ import annotations

import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import find_peaks
from scipy.stats import spearmanr
from seglearn.datasets import load_watch  # pyright: ignore[reportUnknownVariableType]

from mmcontrast.config import ConfigError
from mmcontrast.data_prep import emoji, spoken
from mmcontrast.data_prep.ecg import DESCRIPTIONS, SimulatedECG
from mmcontrast.data_prep.ecg_simulator import CLASSES, LEADS, record
from mmcontrast.data_prep.emoji import OpenMoji
from mmcontrast.data_prep.espeak import speaker
from mmcontrast.data_prep.prepare import prepare
from mmcontrast.data_prep.source import Row, signal_member
from mmcontrast.data_prep.spoken import Spoken
from mmcontrast.data_prep.watch import Watch
from mmcontrast.shards import BadSample
from mmcontrast.signals import Signal, signal
from tests.prepared import Written, about, written


def signal_of(sample: Written) -> Signal:
    return signal(sample.members["npy"], lambda: sample.meta)


# -------------------------------------------------------------------------------------------- signals as members


@pytest.mark.parametrize("kind", ["float64", "float32", "int64", "int16"])
def test_a_signal_comes_back_as_it_was(kind: str) -> None:
    values = (np.random.default_rng(0).normal(size=(20, 3)) * 100).astype(kind)
    (data,) = signal_member(values).values()
    found = signal(data, lambda: {"rate": 10, "scale": 0.5})
    assert found.frames == 20 and np.allclose(found.read().numpy(), values.T * 0.5, rtol=1e-6)


def test_what_no_reader_would_take_is_refused() -> None:
    with pytest.raises(BadSample, match="not finite"):
        signal_member(np.array([[1.0], [np.nan]]))
    with pytest.raises(BadSample, match="16 bits"):
        signal_member(np.array([[40_000]]))
    with pytest.raises(BadSample, match="empty"):
        signal_member(np.zeros((0, 3)))


# -------------------------------------------------------------------------------------------- watch


def test_the_watch_s_recordings_are_divided_by_people(tmp_path: Path) -> None:
    summary = prepare(Watch(), tmp_path)
    data: Any = load_watch()
    samples = {sample.meta["recording"]: sample for sample in written(tmp_path)}
    assert summary.samples == {"train": 98, "val": 14, "test": 28} and len(samples) == 140
    for number, (values, y, subject, side) in enumerate(
        zip(data["X"], data["y"], data["subject"], data["side"], strict=True)
    ):
        sample = samples[number]
        found = signal_of(sample)
        assert np.array_equal(found.read().numpy(), values.T.astype(np.float32))
        assert found.rate == 50 and list(found.channels) == data["X_labels"] == ["ax", "ay", "az", "wx", "wy", "wz"]
        assert sample.split == ("test" if subject in (9, 10) else "val" if subject == 8 else "train")
        assert sample.meta["subject"] == subject and sample.meta["side"] == ("right" if side else "left")
        initial = {"PEN": "pe", "ABD": "ab", "FEL": "fo", "IR": "in", "ER": "ex", "TRAP": "lo", "ROW": "be"}
        assert sample.text == sample.meta["label"] and sample.text[:2] == initial[data["y_labels"][y]]
    # What lies still is pulled down by 1 g, which tells the unit.
    still = np.median([np.linalg.norm(signal_of(s).read().numpy()[:3], axis=0).mean() for s in samples.values()])
    assert 0.9 < still < 1.3 and samples[0].meta["units"] == ["g"] * 3 + ["rad/s"] * 3
    assert about(tmp_path)["licence"] == "BSD-3-Clause"


def test_windows_follow_each_other(tmp_path: Path) -> None:
    prepare(Watch(window=5.0), tmp_path)
    data: Any = load_watch()
    for number in (0, 77, 139):
        parts = [s for s in written(tmp_path) if s.meta["recording"] == number]
        assert [s.key for s in parts] == [f"{number:03d}-{k:02d}" for k in range(len(parts))]
        joined = np.concatenate([signal_of(s).read().numpy() for s in parts], axis=1)
        whole = data["X"][number].T.astype(np.float32)
        assert whole.shape[1] - 250 < joined.shape[1] == 250 * len(parts) and len(parts) >= 3
        assert np.array_equal(joined, whole[:, : joined.shape[1]])


@pytest.mark.parametrize("people", [(11,), (1, 1), tuple(range(1, 11))])
def test_people_must_be_known_and_some_left(tmp_path: Path, people: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="name some of 1 to 10"):
        prepare(Watch(val_people=(), test_people=people), tmp_path)


# -------------------------------------------------------------------------------------------- simulated ECG


def test_recordings_of_a_patient_stay_together_and_classes_are_equal(tmp_path: Path) -> None:
    prepare(SimulatedECG(patients=120, rate=100), tmp_path)
    samples = written(tmp_path)
    assert Counter(s.meta["label"] for s in samples) == dict.fromkeys(DESCRIPTIONS.values(), 20)
    sides: dict[int, set[str]] = {}
    for sample in samples:
        sides.setdefault(sample.meta["patient"], set()).add(sample.split)
        found = signal_of(sample)
        assert (found.rate, found.frames, tuple(found.channels)) == (100, 1000, LEADS)
    assert all(len(splits) == 1 for splits in sides.values())
    assert set.union(*sides.values()) == {"train", "val", "test"}
    for sample in samples:
        code, text = sample.meta["scp"], sample.text.lower()
        assert DESCRIPTIONS[code].lower() in text
        assert not [d for c, d in DESCRIPTIONS.items() if c != code and d.lower() in text]
    two = [s for s in samples if s.meta["patient"] == 5]
    assert len(two) == 2 and two[0].members["npy"] != two[1].members["npy"]
    assert about(tmp_path)["source"] == "simulated ECG"
    with pytest.raises(ConfigError, match="each of which needs one"):
        prepare(SimulatedECG(patients=3), tmp_path / "none")


def test_a_recording_is_a_pure_function_of_its_row() -> None:
    source = SimulatedECG(patients=24, rate=100)
    rows = list(source.rows())
    first = [source.encode(row) for row in rows]
    assert [source.encode(row) for row in reversed(rows)] == first[::-1]
    assert SimulatedECG(patients=24, rate=100, seed=1).encode(rows[0]) != first[0]


def leads(code: str, patient: int, seconds: float = 30.0) -> tuple[dict[str, NDArray[np.float64]], float]:
    values, beats = record(code, patient, 0, rate=500, seconds=seconds, seed=3)
    return dict(zip(LEADS, values.T, strict=True)), beats


def test_leads_agree_with_each_other() -> None:
    for code in CLASSES:
        lead, _ = leads(code, 1)
        assert np.allclose(lead["II"], lead["I"] + lead["III"])
        assert np.allclose(lead["aVR"] + lead["aVL"] + lead["aVF"], 0)
        assert np.allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2)
        assert all(0.1 < np.ptp(lead[name]) < 8 for name in LEADS)


def r_waves(lead: dict[str, NDArray[np.float64]]) -> NDArray[np.int64]:
    """Where beats are: peaks of the size of all leads together, without what is quicker than 20 ms."""
    smooth = [np.convolve(x - np.median(x), np.ones(10) / 10, "same") for x in lead.values()]
    size = np.sqrt(np.sum(np.square(smooth), axis=0))
    return find_peaks(size, height=0.6 * np.quantile(size, 0.995), distance=150)[0]


def test_rhythms_are_what_their_names_say() -> None:
    rates: dict[str, list[float]] = {code: [] for code in CLASSES}
    spread: dict[str, list[float]] = {code: [] for code in CLASSES}
    for code in ("NORM", "SBRAD", "STACH", "AFIB", "3AVB"):
        for patient in range(6):
            lead, beats = leads(code, patient)
            gaps = np.diff(r_waves(lead)) / 500
            assert abs(60 / gaps.mean() - beats) < 0.06 * beats
            rates[code].append(60 / float(gaps.mean()))
            spread[code].append(float(gaps.std() / gaps.mean()))
    assert all(57 < rate < 100 for rate in rates["NORM"])
    assert max(rates["SBRAD"]) < 56 and min(rates["STACH"]) > 100 and max(rates["3AVB"]) < 50
    assert min(spread["AFIB"]) > 2 * max(spread["NORM"]) and max(spread["3AVB"]) < 0.06


def average(code: str, patient: int, name: str) -> NDArray[np.float64]:
    """The mean beat of a lead, from 0.4 s before to 0.5 s behind the middle of QRS."""
    lead, _ = leads(code, patient)
    places = [p for p in r_waves(lead) if 200 <= p < len(lead[name]) - 250]
    return np.mean([lead[name][p - 200 : p + 250] - np.median(lead[name][p - 200 : p + 250]) for p in places], axis=0)


def test_shapes_are_what_their_names_say() -> None:
    for patient in range(4):
        norm, left, right, hypertrophy = (
            {name: average(code, patient, name) for name in ("II", "V1", "V5", "V6")}
            for code in ("NORM", "CLBBB", "CRBBB", "LVH")
        )

        def width(beat: NDArray[np.float64]) -> int:
            """Samples of QRS where the lead is beyond a third of its peak."""
            part = np.abs(beat[125:275])
            return int((part > part.max() / 3).sum())

        assert width(left["V6"]) > 2 * width(norm["V6"])
        assert left["V1"][150:250].min() < -0.8 and left["V6"][280:400].min() < -0.08  # discordant
        assert right["V1"][200:260].max() > 0.4 > norm["V1"][200:260].max()  # R'
        # The criterion of Sokolow and Lyon: R in V5 and S in V1 add up to 3.5 mV.
        assert hypertrophy["V5"].max() - hypertrophy["V1"].min() > 3.5 > norm["V5"].max() - norm["V1"].min()
        # First degree block: P is more than 0.2 s before R.
        early, usual = average("1AVB", patient, "II")[40:90], average("NORM", patient, "II")[40:90]
        assert early.max() > usual.max() + 0.03


# -------------------------------------------------------------------------------------------- spoken


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spoken")
    some = emoji.emojis()[::25]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken, "emojis", lambda: some)
        summary = prepare(Spoken(val=0.1, test=0.2, languages=("en", "de")), out)
    assert not summary.refused and sum(summary.samples.values()) > 1.8 * len(some)
    return out


def test_names_are_drawn_spoken_and_written(words: Path) -> None:
    samples = written(words)
    english = [s for s in samples if s.meta["language"] == "en"]
    assert {s.text for s in english} == {s.meta["label"] for s in samples}
    german = {s.meta["emoji"]: s for s in samples if s.meta["language"] == "de"}
    assert any("ü" in s.text or "ä" in s.text for s in german.values())
    plain = OpenMoji(val=0.1, test=0.2)
    seconds: list[float] = []
    for sample in english:
        assert Image.open(io.BytesIO(sample.members["png"])).size == (96, 96)
        assert german[sample.meta["emoji"]].members["png"] == sample.members["png"]
        assert german[sample.meta["emoji"]].split == sample.split == plain.split_of(sample.meta["concept"])
        speech, rate = soundfile.read(io.BytesIO(sample.members["flac"]))
        assert rate == 22_050 and abs(len(speech) / rate - sample.meta["seconds"]) < 1e-3
        assert np.abs(speech).max() > 0.05
        seconds.append(len(speech) / rate)
    assert {s.split for s in samples} == {"train", "val", "test"}
    # It is the name that is said: longer names take longer, and everybody says them.
    assert spearmanr(seconds, [len(s.text) for s in english]).correlation > 0.8  # pyright: ignore
    assert len({s.meta["voice"] for s in english}) == 8
    assert {s.meta["voice"].partition("+")[0] for s in german.values()} == {"de"}


def test_speech_depends_on_word_and_voice() -> None:
    say = partial(speaker().say, voice="en-us+f2")
    assert len(say("a cat and a dog and a mouse")) > 2 * len(say("cat"))
    assert not np.array_equal(speaker().say("cat", "en-us+m1")[:5000], say("cat")[:5000])
    with pytest.raises(ConfigError, match="no voice 'xx'"):
        speaker().say("cat", "xx")


def test_languages_that_are_not_spoken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'ja' is no language"):
        prepare(Spoken(languages=("ja",)), tmp_path)
    with pytest.raises(ConfigError, match="at least one language"):
        prepare(Spoken(languages=()), tmp_path)


def test_silence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = emoji.emojis()[0]

    def silence(text: str, voice: str) -> NDArray[np.int16]:
        return np.zeros(1000, np.int16)

    monkeypatch.setattr(speaker(), "say", silence)
    with pytest.raises(BadSample, match="silent"):
        Spoken().encode(Row(0, "grinning face (en)", (known, "en", known.name)))
