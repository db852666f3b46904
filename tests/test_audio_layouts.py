"""Corpora of sounds, each as a small copy of the real layout that the test writes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.audiocaps import AudioCaps
from mmcontrast.data_prep.clotho import Clotho
from mmcontrast.data_prep.common_voice import CommonVoice
from mmcontrast.data_prep.esc50 import ESC50
from mmcontrast.data_prep.librispeech import LibriSpeech
from mmcontrast.data_prep.prepare import SUMMARY, prepare
from mmcontrast.data_prep.speech_commands import SpeechCommands
from tests.prepared import Written, about, written


def write_sound(path: Path, seconds: float = 0.2, rate: int = 16_000) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(np.arange(round(seconds * rate)) * (0.01 + len(path.name) / 100)) / 2
    soundfile.write(path, tone, rate)
    return path.read_bytes()


def write_lines(path: Path, *lines: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def refused(out: Path) -> dict[str, str]:
    return dict(json.loads((out / SUMMARY).read_text())["refused"])


def by(samples: list[Written], field: str) -> dict[str, Written]:
    return {str(sample.meta[field]): sample for sample in samples}


# -------------------------------------------------------------------------------------------- ESC-50


def test_esc50(tmp_path: Path) -> None:
    folder, lines = tmp_path / "ESC-50-master", ["filename,fold,target,category,esc10,src_file,take"]
    sounds: dict[str, bytes] = {}
    for fold in range(1, 6):
        for number, category in ((0, "dog"), (10, "washing_machine")):
            name = f"{fold}-10{fold}-A-{number}.wav"
            lines.append(f"{name},{fold},{number},{category},{number == 0},10{fold},A")
            sounds[f"10{fold} {category}"] = write_sound(folder / "audio" / name, 5.0, 44_100)
    write_lines(folder / "meta" / "esc50.csv", *lines, "gone.wav,1,0,dog,True,9,A", "x.wav,6,0,dog,True,9,A")
    (folder / "audio" / "x.wav").write_bytes(sounds["101 dog"])
    summary = prepare(ESC50(folder=folder), tmp_path / "out")
    samples = written(tmp_path / "out")
    assert summary.samples == {"train": 6, "val": 2, "test": 2} and len(samples) == 10
    for sample in samples:
        fold = sample.meta["fold"]
        assert sample.split == {1: "test", 2: "val"}.get(fold, "train")
        assert sample.text == sample.meta["label"] in ("dog", "washing machine")
        assert sample.members["wav"] == sounds[f"{sample.meta['recording']} {sample.text.replace(' ', '_')}"]
        assert sample.meta["esc10"] == (sample.text == "dog") and sample.meta["seconds"] == 5.0
    assert refused(tmp_path / "out") == {
        "row 11, gone.wav": "cannot be read: No such file or directory",
        "row 12, x.wav": "its fold is none of 1 to 5",
    }
    assert "CC BY-NC" in about(tmp_path / "out")["licence"]

    everything = ESC50(folder=folder, val_folds=(), test_folds=(1, 2, 3, 4, 5))
    assert prepare(everything, tmp_path / "all").samples == {"test": 10}
    with pytest.raises(ConfigError, match="there is no table"):
        prepare(ESC50(folder=tmp_path), tmp_path / "none")


# -------------------------------------------------------------------------------------------- AudioCaps and Clotho


def test_audiocaps(tmp_path: Path) -> None:
    folder = tmp_path / "audiocaps"
    header = "audiocap_id,youtube_id,start_time,caption"
    write_lines(folder / "train.csv", header, "91139,r1nicOVtvkQ,130,A woman talks", "7,-gone,30,A dead link")
    write_lines(folder / "val.csv", header, *(f"{i},vvvvvvvvvvv,20,val caption {i}" for i in range(5)), "9,broken,0,x")
    write_lines(
        folder / "test.csv",
        header,
        *(f'{10 + i},{"same" if i % 2 else "other"},{i % 2 * 40},"test, caption {i}"' for i in range(10)),
    )
    sounds = {
        "r1nicOVtvkQ": write_sound(folder / "train" / "91139.wav"),
        "vvvvvvvvvvv": write_sound(folder / "val" / "Yvvvvvvvvvvv.flac"),
        "same": write_sound(folder / "test" / "same_40.wav"),
        "other": write_sound(folder / "test" / "other.wav", 0.3),
    }
    write_sound(folder / "train" / "other.wav", 0.4)  # the same video elsewhere: each split looks at its own first
    (folder / "val" / "broken.wav").write_bytes(b"RIFF0000WAVEno")
    summary = prepare(AudioCaps(folder=folder), tmp_path / "out")
    samples = by(written(tmp_path / "out"), "youtube")
    assert summary.samples == {"train": 1, "val": 1, "test": 2}
    assert {name: next(v for k, v in s.members.items() if k != "txt") for name, s in samples.items()} == sounds
    assert samples["r1nicOVtvkQ"].meta["captions"] == ["A woman talks"]
    assert samples["vvvvvvvvvvv"].meta["captions"] == [f"val caption {i}" for i in range(5)]
    assert samples["vvvvvvvvvvv"].text == "val caption 0" and samples["vvvvvvvvvvv"].split == "val"
    assert samples["same"].meta["captions"] == [f"test, caption {i}" for i in (1, 3, 5, 7, 9)]
    assert samples["same"].meta["audiocap_ids"] == ["11", "13", "15", "17", "19"]
    assert samples["same"].meta["start"] == 40.0 and samples["other"].meta["seconds"] == 0.3
    assert refused(tmp_path / "out") == {
        "train.csv, row 2, -gone": "no recording",
        "val.csv, row 6, broken": "audio cannot be decoded (LibsndfileError)",
    }
    with pytest.raises(ConfigError, match="none of train.csv, dataset/train.csv"):
        prepare(AudioCaps(folder=tmp_path), tmp_path / "none")
    with pytest.raises(ConfigError, match="--audio"):
        prepare(AudioCaps(folder=folder, audio=tmp_path / "out"), tmp_path / "none")


@pytest.mark.parametrize("nested", [False, True])
def test_clotho(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "clotho"
    tables = folder / "clotho_csv_files" if nested else folder
    sounds = folder / "clotho_audio_files" if nested else folder
    captions = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    facts = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license"
    licence = "http://creativecommons.org/licenses/by/3.0/"
    for number, part in enumerate(("development", "validation", "evaluation")):
        file = f"Distorted AM {number}.wav"
        write_sound(sounds / part / file, rate=44_100)
        said = ",".join(f"{part} {k}" for k in range(1, 6))
        gone = ("gone.wav,a,b,c,d,e",) if part == "validation" else ()
        write_lines(tables / f"clotho_captions_{part}.csv", captions, f"{file},{said}", *gone)
        line = f'{file},noise;radio,{100 + number},https://freesound.org/x,"[0, 5]",Käse,{licence}'
        encoding = "latin-1" if part == "development" else "utf-8"
        write_lines(tables / f"clotho_metadata_{part}.csv", facts, line, encoding=encoding)
    summary = prepare(Clotho(folder=folder), tmp_path / "out")
    assert summary.samples == {"train": 1, "val": 1, "test": 1}
    for sample, part in zip(written(tmp_path / "out"), ("evaluation", "development", "validation"), strict=True):
        assert sample.text == f"{part} 1" and sample.meta["captions"] == [f"{part} {k}" for k in range(1, 6)]
        assert sample.members["wav"] == (sounds / part / sample.meta["file"]).read_bytes()
        assert sample.meta["keywords"] == ["noise", "radio"] and sample.meta["author"] == "Käse"
        assert sample.meta["licence"] == licence and sample.meta["sound"][:2] == "10"
    assert refused(tmp_path / "out") == {
        "clotho_captions_validation.csv, row 2, gone.wav": "cannot be read: No such file or directory"
    }


# -------------------------------------------------------------------------------------------- speech


def test_speech_commands(tmp_path: Path) -> None:
    folder = tmp_path / "speech_commands_v0.02"
    for word in ("bed", "yes"):
        for speaker in ("0a7c2a8d", "b5d1e505", "ffd2ba2f"):
            write_sound(folder / word / f"{speaker}_nohash_1.wav", 1.0)
    write_sound(folder / "_background_noise_" / "running_tap.wav")
    write_sound(folder / "bed" / "other.wav")
    write_lines(folder / "validation_list.txt", "bed/b5d1e505_nohash_1.wav", "yes/b5d1e505_nohash_1.wav")
    write_lines(
        folder / "testing_list.txt", "yes/ffd2ba2f_nohash_1.wav", "bed/ffd2ba2f_nohash_1.wav", "bed/x_nohash_0.wav"
    )
    assert prepare(SpeechCommands(folder=folder), tmp_path / "out").samples == {"train": 2, "val": 2, "test": 2}
    for sample in written(tmp_path / "out"):
        assert sample.text == sample.meta["label"] in ("bed", "yes") and sample.meta["take"] == 1
        speaker = {"train": "0a7c2a8d", "val": "b5d1e505", "test": "ffd2ba2f"}[sample.split]
        assert sample.meta["speaker"] == speaker
        assert sample.members["wav"] == (folder / sample.text / f"{speaker}_nohash_1.wav").read_bytes()
    assert refused(tmp_path / "out") == {
        "bed/other.wav": "its name is not SPEAKER_nohash_TAKE.wav",
        "bed/x_nohash_0.wav": "cannot be read: No such file or directory",
    }
    (folder / "testing_list.txt").unlink()
    with pytest.raises(ConfigError, match="no testing_list.txt"):
        prepare(SpeechCommands(folder=folder), tmp_path / "none")


def test_librispeech(tmp_path: Path) -> None:
    folder = tmp_path / "LibriSpeech"
    write_lines(
        folder / "SPEAKERS.TXT",
        ";ID  |SEX| SUBSET           |MINUTES| NAME",
        "103  | F | train-clean-100  | 25.14 | Karen Savage",
        "84   | M | dev-clean        | 8.02  | Christie Nowak",
    )
    for subset, speaker in (("train-clean-100", 103), ("train-other-500", 20), ("dev-clean", 84), ("test-other", 367)):
        chapter = folder / subset / f"{speaker}" / "1240"
        names = [f"{speaker}-1240-{number:04d}" for number in range(2)]
        for name in names:
            write_sound(chapter / f"{name}.flac")
        write_lines(
            chapter / f"{speaker}-1240.trans.txt", f"{names[0]} CHAPTER ONE MISSUS", f"{names[1]} THAT'S {speaker}"
        )
    odd = folder / "dev-clean" / "84" / "1240"
    write_sound(odd / "84-1240-0009.flac")
    with open(odd / "84-1240.trans.txt", "a") as file:
        file.write("84-1240-0007 NOBODY SAYS THIS\n84-1240-0000\n")
    assert prepare(LibriSpeech(folder=folder), tmp_path / "out").samples == {"train": 4, "val": 2, "test": 2}
    samples = by(written(tmp_path / "out"), "utterance")
    for name, sample in samples.items():
        speaker = name.partition("-")[0]
        assert sample.text == ("chapter one missus" if name.endswith("0") else f"that's {speaker}")
        assert sample.meta["speaker"] == speaker and sample.meta["chapter"] == "1240"
        path = folder / sample.meta["subset"] / speaker / "1240" / f"{name}.flac"
        assert sample.members["flac"] == path.read_bytes()
        assert sample.meta.get("sex") == {"103": "female", "84": "male"}.get(speaker)
    assert samples["84-1240-0001"].split == "val" and samples["367-1240-0000"].split == "test"
    assert refused(tmp_path / "out") == {
        "dev-clean/84/1240/84-1240.trans.txt, line 3": "cannot be read: No such file or directory",
        "dev-clean/84/1240/84-1240.trans.txt, line 4": "no text",
        "dev-clean/84/1240/84-1240-0009.flac": "no text",
    }
    with pytest.raises(ConfigError, match="no SUBSET/SPEAKER/CHAPTER"):
        prepare(LibriSpeech(folder=folder / "dev-clean"), tmp_path / "none")


def test_common_voice(tmp_path: Path) -> None:
    folder = tmp_path / "cv"
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment"
    for language, said in (("de", "Guten Tag"), ("el", "Καλημέρα")):
        for table in ("train", "dev", "test"):
            name = f"common_voice_{language}_{table}.mp3"
            write_sound(folder / language / "clips" / name, 0.5, 32_000)
            write_lines(
                folder / language / f"{table}.tsv",
                header,
                f"{table}speaker\t{name}\t{said}, {table}\t2\t0\ttwenties\t\t\t\t{language}\t",
                f"{table}speaker\tcommon_voice_gone.mp3\tWeg\t2\t0\t\t\t\t\t{language}\t",
            )
    out = tmp_path / "out"
    assert prepare(CommonVoice(folder=folder), out).samples == {"train": 2, "val": 2, "test": 2}
    for sample in written(out):
        table = {"val": "dev"}.get(sample.split, sample.split)
        language = sample.meta["language"]
        assert sample.text == f"{ {'de': 'Guten Tag', 'el': 'Καλημέρα'}[language] }, {table}"
        assert sample.meta["speaker"] == f"{table}speaker" and sample.meta["age"] == "twenties"
        assert "gender" not in sample.meta
        name = f"common_voice_{language}_{table}.mp3"
        assert sample.members["mp3"] == (folder / language / "clips" / name).read_bytes()
        assert soundfile.info(io.BytesIO(sample.members["mp3"])).samplerate == 32_000
    assert len(refused(out)) == 6
    assert prepare(CommonVoice(folder=folder, languages=("el",)), tmp_path / "el").samples["train"] == 1
    with pytest.raises(ConfigError, match="no language 'fr'; there are de, el"):
        prepare(CommonVoice(folder=folder, languages=("fr",)), tmp_path / "none")
