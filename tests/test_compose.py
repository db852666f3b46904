"""Examples of several samples: what they are made of, and that they keep every promise of the stream."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, from_dict, to_dict
from mmcontrast.data import Compose, Stream, SymileM3
from mmcontrast.data.compose import pick
from mmcontrast.data.reader import Reader
from mmcontrast.data.stream import Stream as StreamOfFile
from mmcontrast.decode import Sound
from mmcontrast.encoders.base import Transform
from mmcontrast.shard_writer import Sample, ShardWriter
from mmcontrast.shards import BadSample, open_shards
from tests.tiny import png

LANGUAGES = ("en", "es", "fr")
PROMPTS = 4  # per language
CLASSES = 12


class Number(Transform):
    """A picture or a sound as the number that its samples hold; a text as the bytes of its words."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, value: Any) -> Tensor:
        if isinstance(value, Sound):
            return torch.tensor([round(float(value.read()[0]) * 100), int(torch.randint(1000, ()))])
        if isinstance(value, str):
            return torch.tensor([int(word, 36) for word in value.split()])
        return value.read()[:, :2, :2]

    def collate(self, values: Sequence[Any]) -> Any:
        return torch.stack(list(values))


def transforms() -> dict[str, Any]:
    return {"image": Number("image"), "audio": Number("audio"), "text": Number("text")}


def word(number: int, language: int) -> str:
    """Class 3 in language 1 -> a word that base 36 gives back as 31."""
    return np.base_repr(10 * number + language, 36).lower()


def read_word(value: int) -> tuple[int, int]:
    return divmod(value, 10)


def wav(number: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.full(20, number / 100, np.float32), 8000, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 12 classes, two of the first, and 4 others that are none; 4 recordings in each of 3 languages."""
    folder = tmp_path_factory.mktemp("compose")
    with ShardWriter(folder / "pictures", max_samples=7) as writer:
        for i in range(CLASSES + 1):
            names = {language: word(i % CLASSES, k) for k, language in enumerate(LANGUAGES)}
            writer.write(Sample(f"p{i:02d}", {"png": png("red", seed=i), "json": {"names": names, "place": i}}))
        for i, names in enumerate(({}, None, {"en": "a"}, {"en": "two words", "es": "b", "fr": "c"})):
            meta = {} if names is None else {"names": names}
            writer.write(Sample(f"x{i}", {"png": png("blue", seed=i), "json": meta}))
    write_speech(folder / "speech")
    return folder


def write_speech(out: Path, *, damaged: int | None = None) -> Path:
    with ShardWriter(out, max_samples=5) as writer:
        for i in range(PROMPTS * len(LANGUAGES)):
            content = b"RIFF" if i == damaged else wav(i)
            meta = {"language": LANGUAGES[i % len(LANGUAGES)], "prompt": str(i)}
            writer.write(Sample(f"s{i:02d}", {"wav": content, "json": meta}))
    return out


def config(data: Path, **settings: Any) -> SymileM3.Config:
    defaults: dict[str, Any] = {"speech": (str(data / "speech"),), "languages": LANGUAGES}
    return SymileM3.Config(**(defaults | settings))


def composed(data: Path, **settings: Any) -> SymileM3:
    c = config(data, **settings)
    return c.build(Reader(open_shards([str(data / "pictures")]), transforms(), made=c.made()))


def stream(data: Path, *, seed: int = 7, rank: int = 0, world: int = 1, **options: Any) -> Stream:
    settings: dict[str, Any] = {"compose": config(data), "groups": ("class",), "workers": 0} | options
    built = Stream.Config(shards=(str(data / "pictures"),), **settings)
    return built.build(transforms(), seed=seed, global_batch=8, rank=rank, world=world)


# -------------------------------------------------------------------------------------------- what an example is


def test_only_the_spoken_language_tells_which_word_counts(data: Path) -> None:
    made = composed(data)
    languages, places, others = Counter[int](), Counter[int](), Counter[int]()
    recordings, targets, pictures = Counter[int](), Counter[int](), set[int]()
    for turn in range(900):
        position = made.anchor(turn % len(made))
        example = made.example(position, turn)
        shown = position % CLASSES
        spoken = int(example.inputs["audio"][0])
        language = spoken % len(LANGUAGES)
        words = [read_word(int(value)) for value in example.inputs["text"]]
        assert sorted(k for _, k in words) == [0, 1, 2]
        assert len({number for number, _ in words}) == 3
        assert words.count((shown, language)) == 1
        assert sum(number == shown for number, _ in words) == 1
        assert example.meta["class"] == word(shown, 0) and example.meta["place"] == position
        pictures.add(int(example.inputs["image"].sum()))
        targets[shown] += 1
        assert example.position == position and example.key == f"p{position:02d}"
        languages[language] += 1
        recordings[spoken] += 1
        places[words.index((shown, language))] += 1
        others.update(number for number, _ in words if number != shown)
    assert len(pictures) == CLASSES + 1
    # Uniform: each count within five deviations of its mean.
    for counts, kinds in ((languages, 3), (places, 3), (recordings, 12), (others, CLASSES), (targets, CLASSES)):
        mean = counts.total() / kinds
        assert (
            len(pictures) == CLASSES + 1
            and len(counts) == kinds
            and all(abs(n - mean) < 5 * mean**0.5 for n in counts.values())
        ), counts


def test_an_example_is_a_function_of_anchor_and_seed(data: Path) -> None:
    one, two = composed(data), composed(data)
    texts: set[tuple[int, ...]] = set()
    for seed in range(30):
        torch.manual_seed(seed)  # composition does not ask it
        a, b = one.raw(3, Random(seed)), two.raw(3, Random(seed))
        assert a["text"] == b["text"] and torch.equal(a["audio"].read(), b["audio"].read())
        assert torch.equal(a["image"].read(), b["image"].read())
        texts.add(tuple(a["text"].split()))
    assert len(texts) > 25


def test_pictures_without_such_names_are_no_anchors(data: Path) -> None:
    made = composed(data)
    assert [made.anchor(i) for i in range(len(made))] == list(range(CLASSES))
    assert made.counts() == [7, 5, 0]
    assert len(made.words) == CLASSES and made.facts == {"pairwise_bound": 1 / 3}
    assert made.pictures[made.classes[0]] == [0, CLASSES]


def test_words_that_several_classes_share_are_left_out(tmp_path: Path, data: Path) -> None:
    kinds = [("a1", "a2"), ("b1", "a2"), ("a1", "c2"), ("d1", "d1"), ("e1", "e2"), ("e2", "f2"), ("g1", "g2")]
    with ShardWriter(tmp_path / "pictures") as writer:
        for i, (en, es) in enumerate(kinds):
            writer.write(Sample(f"{i}", {"png": png("red"), "json": {"names": {"en": en, "es": es}}}))
    made = config(data, languages=("en", "es")).build(
        Reader(open_shards([str(tmp_path / "pictures")]), transforms(), made=("audio", "text"))
    )
    assert made.words == [("a1", "a2"), ("e1", "e2"), ("g1", "g2")]
    assert [made.anchor(i) for i in range(len(made))] == [0, 4, 6]


def test_modalities_that_nobody_asks_for_are_not_read(data: Path) -> None:
    shards = open_shards([str(data / "pictures")])
    for asked in (("image",), ("audio", "text"), ("text",)):
        kinds = {m: t for m, t in transforms().items() if m in asked}
        made = config(data).build(Reader(shards, kinds, made=("audio", "text")))
        example = made.example(2, 5)
        whole = composed(data).example(2, 5)
        assert example.inputs.keys() == set(asked)
        assert all(torch.equal(example.inputs[m][:1], whole.inputs[m][:1]) for m in asked)


def test_a_number_is_picked_uniformly_and_the_same_for_ever() -> None:
    draw = Random(1)
    assert [pick(draw, 10) for _ in range(8)] == [1, 8, 7, 2, 4, 4, 6, 7]
    assert {pick(draw, 3) for _ in range(100)} == {0, 1, 2}


# -------------------------------------------------------------------------------------------- the stream's promises


def same(a: Batch, b: Batch) -> bool:
    return (
        a.keys == b.keys
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.groups["class"], b.groups["class"])
        and all(torch.equal(a.inputs[m], b.inputs[m]) for m in ("image", "audio", "text"))
    )


def test_any_number_of_ranks_and_workers_makes_the_same_examples(data: Path) -> None:
    whole = list(stream(data).batches(0, 6))
    assert all(same(a, b) for a, b in zip(whole, stream(data, workers=2).batches(0, 6), strict=True))
    for world in (2, 4):
        parts = [list(stream(data, rank=rank, world=world).batches(0, 6)) for rank in range(world)]
        for step, want in enumerate(whole):
            for modality in ("image", "audio", "text"):
                found = torch.cat([part[step].inputs[modality] for part in parts])
                assert torch.equal(found, want.inputs[modality])
            assert [k for part in parts for k in part[step].keys] == want.keys
    other = list(stream(data, seed=8).batches(0, 6))
    assert not any(same(a, b) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_makes_the_same_examples(data: Path, workers: int) -> None:
    straight = list(stream(data).batches(0, 9))
    resumed = list(stream(data, workers=workers).batches(4, 9))
    assert len(resumed) == 5 and all(same(a, b) for a, b in zip(straight[4:], resumed, strict=True))


def test_an_anchor_comes_once_per_epoch_and_otherwise_composed_each_time(data: Path) -> None:
    made = stream(data)
    assert made.per_epoch == CLASSES
    seen: dict[int, list[tuple[int, ...]]] = {}
    for batch in made.batches(0, CLASSES):  # 8 epochs, all in all
        for place, text in zip(batch.ids.tolist(), batch.inputs["text"], strict=True):
            seen.setdefault(place, []).append(tuple(text.tolist()))
    assert {place: len(texts) for place, texts in seen.items()} == dict.fromkeys(range(CLASSES), 8)
    assert sum(len(set(texts)) for texts in seen.values()) > 7 * CLASSES


def test_equal_classes_are_equal_groups(data: Path) -> None:
    groups: dict[int, int] = {}
    for batch in stream(data).batches(0, 8):
        groups |= dict(zip(batch.ids.tolist(), batch.groups["class"].tolist(), strict=True))
    assert len(groups) == CLASSES == len(set(groups.values()))


def test_a_damaged_recording_is_named_and_the_example_replaced(tmp_path: Path, data: Path) -> None:
    (tmp_path / "pictures").symlink_to(data / "pictures")
    write_speech(tmp_path / "speech", damaged=6)
    skipped: list[tuple[str, str, str]] = []
    for good, bad in zip(stream(data).batches(0, 20), stream(tmp_path).batches(0, 20), strict=True):
        hurt = (good.inputs["audio"][:, 0] == 6).tolist()
        assert len(bad) == 8 and not bool((bad.inputs["audio"][:, 0] == 6).any())
        assert len(bad.skipped) >= sum(hurt)
        for row in range(8):
            if not hurt[row]:
                assert torch.equal(good.inputs["text"][row], bad.inputs["text"][row])
                assert good.keys[row] == bad.keys[row]
        skipped += bad.skipped
    assert skipped and {reason for *_, reason in skipped} == {"00001.tar/s06: audio is not WAV, FLAC, Ogg or MP3"}


def test_the_state_and_the_config_know_the_recordings(tmp_path: Path, data: Path) -> None:
    (tmp_path / "pictures").symlink_to(data / "pictures")
    write_speech(tmp_path / "speech", damaged=0)
    want, other = stream(data).state(), stream(tmp_path).state()
    assert json.loads(json.dumps(want)) == want and [n for n in want if want[n] != other[n]] == ["speech"]
    settings = stream(data).config
    assert from_dict(json.loads(json.dumps(to_dict(settings)))) == settings


# -------------------------------------------------------------------------------------------- the default, and others


def test_by_default_an_example_is_the_sample(data: Path) -> None:
    reader = Reader(open_shards([str(data / "pictures")]), {"image": Number("image")})
    plain: Compose = Compose.Config().build(reader)
    assert len(plain) == len(reader.shards) == 17 and plain.counts() == [7, 7, 3] and plain.state() == {}
    for position in range(17):
        a, b = plain.example(position, 5), reader.example(position)
        assert torch.equal(a.inputs["image"], b.inputs["image"]) and (a.key, a.meta) == (b.key, b.meta)
    assert plain.example(2, 5, meta=False).meta == {}


class Twin(Compose):
    """A composition of one's own: the picture, and as text the number of a drawn sample."""

    def raw(self, position: int, draw: Random) -> Mapping[str, Any]:
        return {"image": self.reader.raw(position, "image"), "text": word(pick(draw, 17), 0)}

    class Config(Compose.Config):
        def made(self) -> tuple[str, ...]:
            return ("text",)


def test_a_composition_of_ones_own_needs_one_method(data: Path) -> None:
    kinds = {m: t for m, t in transforms().items() if m != "audio"}
    built = StreamOfFile.Config(shards=(str(data / "pictures"),), compose=Twin.Config(), workers=0)
    made = built.build(kinds, seed=1, global_batch=17)
    drawn = next(made.batches(0, 1)).inputs["text"][:, 0].tolist()
    assert len(set(drawn)) > 5 and all(read_word(v)[0] < 17 for v in drawn)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"languages": ("en",)}, "at least two, each once"),
        ({"languages": ("en", "en")}, "at least two, each once"),
        ({"languages": ("en", "de")}, "0 classes .* en, de"),
        ({"names": "nomes"}, "0 classes .*'nomes'"),
        ({"language": "tongue"}, "has the tongue en, es, fr"),
        ({"image": "picture"}, "'image'; known|'image'; did you mean"),
        ({"speech": ("nowhere",)}, "nowhere"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: Path, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        config(data, **settings).build(
            Reader(open_shards([str(data / "pictures")]), transforms(), made=("audio", "text"))
        )


def test_what_is_made_need_not_be_in_the_shards(data: Path) -> None:
    shards = open_shards([str(data / "pictures")])
    with pytest.raises(ConfigError, match="no sample has the modality 'audio'"):
        Reader(shards, transforms())
    with pytest.raises(BadSample, match="has none of"):
        Reader(shards, {"audio": Number("audio")}, made=("audio",)).example(0)
