"""Queries of several pieces: what they find is what plain loops in float64 find; files of queries; what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmcontrast import load
from mmcontrast.cli import main
from mmcontrast.config import ConfigError, to_dict
from mmcontrast.encoders import MelConvNet, MultiEncoder
from mmcontrast.eval.index import Index, Piece, Query, build_index
from mmcontrast.objectives import Symile
from mmcontrast.shard_writer import Sample
from tests import tiny
from tests.served import RATE, wav


@dataclass(frozen=True)
class World:
    """A model of three modalities that Symile trained, as far as its run says, and an index of its pictures."""

    run: Path
    index: Path
    samples: list[Sample]
    sounds: list[str]

    def z(self, modality: str, value: Any) -> list[float]:
        return load(self.run).encode(modality, [value])[0].tolist()

    def ranked(self, query: list[float], *, without: str | None = None) -> list[tuple[str, float]]:
        model = load(self.run)
        scores = {
            s.key: sum(a * b for a, b in zip(query, model.encode("image", [s.members["png"]])[0].tolist(), strict=True))
            for s in self.samples
            if s.key != without
        }
        return sorted(scores.items(), key=lambda item: -item[1])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("queries")
    encoders: dict[str, Any] = {
        "image": tiny.vit(),
        "text": tiny.text_transformer(),
        "audio": MelConvNet.Config(sample_rate=RATE, seconds=0.5, width=16, layers=1),
    }
    run = tiny.write_run(folder / "run", MultiEncoder.Config(encoders=encoders, dim=8))
    config = json.loads((run / "config.json").read_text())
    objective = Symile.Config(modalities=("image", "text", "audio"))
    (run / "config.json").write_text(json.dumps(config | {"objectives": {"s": to_dict(objective)}}))
    samples = tiny.samples(24)
    build_index(run, [tiny.write_shards(folder / "shards", samples)], folder / "index")
    sounds = []
    for number, tone in enumerate((300.0, 1500.0)):
        (folder / f"{number}.wav").write_bytes(wav(tone=tone))
        sounds.append(str(folder / f"{number}.wav"))
    return World(run, folder / "index", samples, sounds)


def _unit(*weighted: tuple[float, list[float]]) -> list[float]:
    total = [sum(w * z[d] for w, z in weighted) for d in range(8)]
    norm = sum(x * x for x in total) ** 0.5
    return [x / norm for x in total]


def _same(hits: list[Any], want: list[tuple[str, float]]) -> None:
    assert [h.key for h in hits] == [key for key, _ in want[: len(hits)]]
    assert [h.score for h in hits] == pytest.approx([score for _, score in want[: len(hits)]], abs=1e-5)


def test_pieces_are_added_by_weight(world: World) -> None:
    a, b, sound = world.z("text", "a red square"), world.z("text", "a blue bar"), world.z("audio", world.sounds[0])
    pieces = [
        Piece("text", "a red square"),
        Piece("audio", world.sounds[0], weight=0.5),
        Piece("text", "a blue bar", weight=-1),
    ]
    opened = Index(world.index)
    (answer,) = opened.ask([Query(pieces, "sum")], top=24)
    assert answer.joint == "sum" and len(answer.hits) == 24 == answer.passing
    want = world.ranked(_unit((1, a), (0.5, sound), (-1, b)))
    _same(answer.hits, want)
    alone = opened.search("text", ["a red square"], top=24)[0]
    assert [h.key for h in alone] != [key for key, _ in want], "the other pieces change nothing"


def test_a_symile_model_is_asked_by_the_product_of_the_others(world: World) -> None:
    text, sound = world.z("text", "a red square"), world.z("audio", world.sounds[1])
    pieces = [Piece("text", "a red square"), Piece("audio", world.sounds[1])]
    opened = Index(world.index)
    auto, product, total = opened.ask([Query(pieces), Query(pieces, "product"), Query(pieces, "sum")], top=24)
    assert (auto.joint, product.joint, total.joint) == ("product", "product", "sum")
    _same(auto.hits, world.ranked([a * b for a, b in zip(text, sound, strict=True)]))
    assert auto == product and [h.key for h in auto.hits] != [h.key for h in total.hits]
    # Pieces of one modality are one before they are multiplied.
    away = Piece("text", "a blue bar", weight=-0.5)
    (answer,) = opened.ask([Query([*pieces, away])], top=24)
    changed = _unit((1, text), (-0.5, world.z("text", "a blue bar")))
    _same(answer.hits, world.ranked([a * b for a, b in zip(changed, sound, strict=True)]))
    # With one of two known modalities alone there is no product.
    (answer,) = opened.ask([Query([Piece("text", "a red square")])], top=24)
    assert answer.joint == "sum"
    _same(answer.hits, world.ranked(text))


def test_a_stored_sample_finds_its_neighbours_and_not_itself(world: World) -> None:
    opened = Index(world.index)
    want = world.ranked(world.z("image", world.samples[5].members["png"]), without="000005")
    hits = opened.like("000005", top=24)
    assert len(hits) == 23
    _same(hits, want)
    _same(opened.like("000005", top=3, where="label != 'red'"), [w for w in want if int(w[0]) % 6 != 0])
    (answer,) = opened.ask([Query([Piece(key="000005"), Piece("text", "a red bar", weight=-1)])], top=24)
    z = _unit((1, world.z("image", world.samples[5].members["png"])), (-1, world.z("text", "a red bar")))
    _same(answer.hits, world.ranked(z, without="000005"))


def test_what_cannot_be_brought_together_is_said(world: World) -> None:
    opened = Index(world.index)
    text, sound = Piece("text", "red"), Piece("audio", world.sounds[0])
    for query, message in (
        (Query([text, Piece("text", "red", weight=-1)]), "the parts of the query cancel each other"),
        (Query([text], "product"), "cannot be multiplied: it takes all of text and audio, and there is no audio"),
        (Query([text, sound, Piece(key="000001")], "product"), "image is what is scored, so it cannot be among them"),
        (
            Query([text, Piece("audio", world.sounds[0], weight=-1)], "product"),
            "of audio there is only what to keep away",
        ),
        (Query([Piece(key="00001")]), r"the key '00001' is not in .*index; did you mean '000\d\d\d'\?"),
        (Query([Piece("video", "x")]), "the model has no modality 'video'"),
        (Query([Piece("audio", "gone.wav")]), "a query cannot be used: gone.wav"),
        (Query([]), "the query is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened.ask([query])
    with pytest.raises(ConfigError, match="query 2: the parts of the query cancel"):
        opened.ask([Query([text]), Query([text, Piece("text", "red", weight=-1)])])


def _found(world: World, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    main(["index", "search", str(world.index), *arguments, "--json", str(tmp_path / "found.json")])
    return json.loads((tmp_path / "found.json").read_text())


def _keys(answer: dict[str, Any]) -> list[str]:
    return [hit["key"] for hit in answer["hits"]]


def test_the_command_takes_all_kinds_of_pieces(world: World, tmp_path: Path) -> None:
    arguments = [
        "a red square",
        "green",
        "--not",
        "a blue bar",
        "--with",
        f"0.5*audio={world.sounds[0]}",
        "--joint",
        "sum",
    ]
    first, second = _found(world, tmp_path, *arguments, "--top", "9")
    a, b, sound = world.z("text", "a red square"), world.z("text", "a blue bar"), world.z("audio", world.sounds[0])
    assert _keys(first) == [key for key, _ in world.ranked(_unit((1, a), (0.5, sound), (-1, b)))[:9]]
    assert first["query"] == f"a red square + 0.5*audio={world.sounds[0]} - a blue bar" and first["joint"] == "sum"
    assert _keys(second) != _keys(first) and second["query"].startswith("green")
    (answer,) = _found(world, tmp_path, "--with", "text=a red square", f"audio={world.sounds[0]}")
    assert answer["joint"] == "product" and answer["query"].startswith("text=a red square + audio=")
    like, other = _found(world, tmp_path, "--like", "000005", "000007", "--top", "3")
    assert _keys(like) == [h.key for h in Index(world.index).like("000005", top=3)] and other["query"] == "like 000007"


def test_queries_come_from_files(world: World, tmp_path: Path) -> None:
    opened = Index(world.index)
    (tmp_path / "some.txt").write_text("red\n\na blue bar\n")
    answers = _found(world, tmp_path, "--file", str(tmp_path / "some.txt"), "--where", "label = 'red'")
    assert [a["query"] for a in answers] == ["red", "a blue bar"]
    assert _keys(answers[1]) == [h.key for h in opened.search("text", ["a blue bar"], where="label = 'red'")[0]]

    lines: list[dict[str, Any]] = [
        {"text": "red", "not": ["blue", "green"], "weights": {"text": 2}},
        {"like": "000003", "where": "shape = 'bar'"},
        {"text": ["red", "blue"], "audio": world.sounds[0]},
    ]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = _found(world, tmp_path, "--file", str(tmp_path / "some.jsonl"), "--top", "24")
    z = {word: world.z("text", word) for word in ("red", "blue", "green")}
    assert _keys(answers[0]) == [k for k, _ in world.ranked(_unit((2, z["red"]), (-1, z["blue"]), (-1, z["green"])))]
    assert _keys(answers[1]) == [h.key for h in opened.like("000003", top=24, where="shape = 'bar'")]
    assert answers[2]["joint"] == "product"

    vectors = np.array([z["red"], z["blue"]], np.float16)
    np.save(tmp_path / "some.npy", vectors)
    answers = _found(world, tmp_path, "--file", str(tmp_path / "some.npy"))
    assert _keys(answers[1]) == [h.key for h in opened.search("text", ["blue"])[0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "a.jsonl:1 is no JSON"),
        ("a.jsonl", "\n[]", "a.jsonl:2 is no object; write one such as"),
        ("a.jsonl", '{"txt": "x"}', r"a.jsonl:1 has the field 'txt'; did you mean 'text'\?"),
        ("a.jsonl", '{"text": 3}', "has \\[3\\] for 'text'; give a text, the name of a file, or a list"),
        ("a.jsonl", '{"text": "x", "weights": {"text": "y"}}', "give an object of numbers by modality"),
        ("a.jsonl", '{"where": "label = \'red\'"}', "asks for nothing; give it one of image, text, audio, like or not"),
        ("a.jsonl", '{"text": "x", "where": 3}', "has a `where` that is no text"),
        ("a.txt", "\n \n", "a.txt holds no queries"),
        ("a.npy", "x", "a.npy is no .npy of vectors"),
        ("gone.txt", None, "gone.txt cannot be read"),
        ("gone.npy", None, "gone.npy are not there"),
    ],
)
def test_a_file_that_holds_no_queries_is_refused(
    world: World, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    from mmcontrast.eval.index.asked import read_queries

    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_queries(tmp_path / name, "text", ["image", "text", "audio"])


def test_a_piece_that_is_none_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "wide.npy", np.ones((2, 9), np.float32))
    for arguments, message in (
        (["--with", "audio"], "'audio' is no piece of a query; write MODALITY=VALUE"),
        (["--with", "1.2.3*audio=x"], "'1.2.3*audio=x' is no piece of a query"),
        ([], "search needs at least one query"),
        (["--file", str(tmp_path / "wide.npy")], "9-dimensional"),
    ):
        with pytest.raises(SystemExit):
            main(["index", "search", str(world.index), *arguments])
        assert message in capsys.readouterr().err
