"""Filters: what passes is what a plain loop over the rows lets pass; what is wrong is named; answers are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmcontrast.cli import main
from mmcontrast.config import ConfigError
from mmcontrast.eval.index import Index, add, build_index, delete
from mmcontrast.eval.index.facets import facets
from mmcontrast.eval.index.filters import Filter, Joined, Not, Tree
from mmcontrast.eval.index.filters import Test as Compared
from mmcontrast.eval.index.rows import table_of
from mmcontrast.eval.index.segment import Effort, Part, Segment, entry_of, write_parts
from mmcontrast.eval.index.structure import write_structure
from mmcontrast.shard_writer import Sample
from tests import tiny

N = 120
META: list[dict[str, Any]] = [
    {
        "label": ("dog", "cat", "it's", "")[i % 4],
        "rate": (8000, 16000, 2**53 + 1, 2**53)[i % 3 + (i % 5 == 0)],
        "share": [0.1 * i, float("nan"), -3.0][i % 3],
        "good": i % 2 == 0,
        "a name": "x" if i % 7 else "y",
        "empty": None,
    }
    for i in range(N)
]
for _i in range(0, N, 11):
    META[_i] = {}


def _unit(x: NDArray[Any]) -> NDArray[np.float32]:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


VECTORS = _unit(np.random.default_rng(0).standard_normal((N, 16)))
TYPES = {"label": "string", "rate": "int64", "share": "double", "good": "bool", "a name": "string", "empty": "null"}


def _slowly(tree: Tree, row: dict[str, Any]) -> bool | None:
    """As SQL says it, with None for what is unknown."""
    if isinstance(tree, Not):
        inner = _slowly(tree.part, row)
        return None if inner is None else not inner
    if isinstance(tree, Joined):
        parts = [_slowly(part, row) for part in tree.parts]
        decides = tree.word == "or"
        return decides if decides in parts else None if None in parts else not decides
    value = row.get(tree.column)
    if tree.sign == "null":
        return value is None
    if value is None:
        return None
    if tree.sign == "in":
        return any(value == other for other in tree.values)
    compared: dict[str, Callable[[Any, Any], bool]] = {
        "=": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
    }
    return compared[tree.sign](value, tree.values[0])


def _rows() -> Any:
    numbers = [*range(N)]
    columns = {"key": [*map(str, numbers)], "shard": ["s"] * N, "source": [0] * N, "position": numbers}
    return table_of(columns | {"text": [None] * N}, META)


TABLE = _rows()


def _passing(said: str) -> list[int]:
    asked = Filter(said)
    asked.check(TYPES)
    return np.flatnonzero(asked.mask(lambda name: TABLE.column(name))).tolist()


@pytest.mark.parametrize(
    "said",
    [
        "label = 'dog'",
        "label == \"dog\" OR label <> 'cat'",
        "label != 'dog'",
        "not label = 'dog'",
        "label in ('dog', 'it''s') and rate >= 16000",
        "label not in ('dog') or good = true",
        "label is null",
        "label is not null and not (good = false or rate < 9000)",
        "rate = 9007199254740993",
        "rate <= 9007199254740992",
        "rate > 8000.5",
        "not rate > 8000.5",
        "rate >= 8000.5 and rate < 16000.5",
        "rate <= 15999.5",
        "rate = 8000.0",
        "rate != 8000.5",
        "rate = 8000.5",
        "rate < 1e300",
        "rate > -99999999999999999999",
        "rate >= 99999999999999999999 or rate != 1e30",
        "share < 99999999999999999999",
        "share >= 1 and share < 4",
        "not share > 0",
        "good in (true, false)",
        "\"a name\" = 'y' or 'a name' is null",
        "label < 'd'",
        "empty = 3",
        "empty is not null",
        "not not (label = 'cat')",
    ],
)
def test_what_passes_is_what_a_loop_lets_pass(said: str) -> None:
    tree = Filter(said).tree
    want = [i for i, row in enumerate(META) if _slowly(tree, row) is True]
    assert _passing(said) == want
    assert len(want) < N, "everything passes: nothing is compared"


def _test(name: str, sign: str, *values: Any) -> Tree:
    return Compared(name, sign, values)


def _in(values: list[int]) -> Tree:
    return Compared("rate", "in", tuple(values))


def _joined(word: str, parts: list[Tree]) -> Tree:
    return Joined(word, tuple(parts))


def _inner(inner: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    joined = st.builds(_joined, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3))
    return st.one_of(st.builds(Not, inner), joined)


TESTS = st.one_of(
    st.builds(
        _test,
        st.just("label"),
        st.sampled_from(["=", "!=", "<", ">="]),
        st.sampled_from(["dog", "cat", "it's", ""]),
    ),
    st.builds(
        _test,
        st.just("rate"),
        st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
        st.sampled_from([8000, 16000, 2**53, 2**53 + 1, 8000.5, -1e30]),
    ),
    st.builds(_test, st.just("good"), st.just("="), st.booleans()),
    st.builds(_in, st.lists(st.sampled_from([8000, 16000]), min_size=1)),
    st.builds(_test, st.sampled_from(["label", "rate", "share", "good"]), st.just("null")),
)
TREES = st.recursive(TESTS, _inner, max_leaves=8)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _said(tree: Tree) -> str:
    if isinstance(tree, Not):
        return f"not ({_said(tree.part)})"
    if isinstance(tree, Joined):
        return "(" + f" {tree.word} ".join(map(_said, tree.parts)) + ")"
    if tree.sign == "null":
        return f"{tree.column} is null"
    values = [_written(value) for value in tree.values]
    return f"{tree.column} in ({', '.join(values)})" if tree.sign == "in" else f"{tree.column} {tree.sign} {values[0]}"


@given(TREES)
@settings(max_examples=150, deadline=None)
def test_any_filter_passes_what_a_loop_lets_pass(tree: Tree) -> None:
    assert _passing(_said(tree)) == [i for i, row in enumerate(META) if _slowly(tree, row) is True]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "the filter is empty; write one such as"),
        ("label", "ends where it needs =, !=, <, <=, >, >=, in, or is"),
        ("label = dog", "has 'dog' at character 9, where it needs a number, true, false, or a text in quotes"),
        ("label = 'dog", "has a quote that is not closed, at character 9"),
        ("label = 'dog' and", "ends where it needs a column"),
        ("(label = 'dog'", r"ends where it needs '\)'"),
        ("label = 'dog' rate > 3", "has 'rate' at character 15, where it needs and, or, or the end"),
        ("label = null", "compares with null; ask for COLUMN is null instead"),
        ("label in 'dog'", r"where it needs '\('"),
        ("label not = 'dog'", "where it needs in"),
        ("rate > 16k", "has '16k', which no filter has, at character 8"),
        ("rate < 1e999", "has the number 1e999, which is too large"),
        ("__import__('os').system('x')", "which no filter has, at character 17"),
        ("label = 'dog'; drop", "has '; drop', which no filter has, at character 14"),
        (
            "lable = 'dog'",
            r"the column 'lable'; did you mean 'label'\?; columns: label \(text\), rate \(whole number\)",
        ),
        ("label = 3", "compares 'label', which is text, by = with 3, which is a number; put the text in quotes"),
        ("rate >= '16000'", "'rate', which is whole number, by >= with '16000', which is text; give a number without"),
        ("good > true", "'good', which is true or false, by > with true, .*; ask for = true or = false"),
        ("rate = true", "'rate', which is whole number, by = with true, which is true or false; give a number"),
        ("(" * 60 + "good = true" + ")" * 60, "more than 50 brackets or nots within each other"),
        ("label = '" + "x" * 5000 + "'", "the filter has 5010 characters; at most 4000"),
    ],
)
def test_what_is_wrong_is_named(said: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        _passing(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Flat", "IVF8,Flat", "IVF8,SQ8", "HNSW8", "OPQ8,IVF4,PQ8x4fs"])
def test_answers_are_the_best_of_those_that_pass(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where FAISS's selector does it, which takes over when more rows pass than these."""
    write_parts(tmp_path, [Part(VECTORS, TABLE)], 16)
    if kind != "Flat":
        write_structure(tmp_path, kind)
    segment = Segment(tmp_path, entry_of(tmp_path, N, kind=kind, effort=None), 16)
    queries = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    for said in ("good = true", "label = 'dog' and good = true", "rate = 1"):
        asked = Filter(said)
        mask = asked.mask(lambda name: TABLE.column(name))
        passing = [i for i, row in enumerate(META) if _slowly(asked.tree, row) is True]
        for exact_below in (20_000, 0):
            monkeypatch.setattr("mmcontrast.eval.index.segment.EXACT_BELOW", exact_below)
            scores, found = segment.search(queries, 7, mask, Effort(120, 60))
            for query, numbers, got in zip(queries, found.tolist(), scores.tolist(), strict=True):
                products = {i: float(query.astype(np.float64) @ VECTORS[i]) for i in passing}
                want = sorted(passing, key=lambda i: -products[i])[:7]
                assert numbers == want + [-1] * (7 - len(want))
                assert got[: len(want)] == pytest.approx([products[i] for i in want], abs=1e-5)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two segments whose metadata differ in their types, with something deleted."""
    folder = tmp_path_factory.mktemp("filters")
    samples = tiny.samples(30)
    labels = [*tiny.COLOURS]
    first = [
        Sample(s.key, {**s.members, "json": {"label": labels[i % 6], "size": i}}) for i, s in enumerate(samples[:20])
    ]
    more = [
        Sample(f"1{s.key}", {**s.members, "json": {"size": 0.5 + i, "new": f"n{i % 2}"}})
        for i, s in enumerate(samples[20:])
    ]
    run = tiny.write_run(folder / "run")
    build_index(run, [tiny.write_shards(folder / "a", first)], folder / "index")
    add(folder / "index", [tiny.write_shards(folder / "b", more)])
    delete(folder / "index", ["000003"])
    return folder / "index"


def test_columns_of_several_segments_are_one(index: Path) -> None:
    opened = Index(index)
    assert opened.columns["size"] == "double" and opened.columns["new"] == "string"
    (hits,) = opened.search("text", ["red"], top=50, where="size <= 4")
    assert sorted(h.metadata["size"] for h in hits) == [0, 0.5, 1, 1.5, 2, 2.5, 3.5, 4], "3 was deleted"
    (hits,) = opened.search("text", ["red"], top=50, where="new is not null or label = 'blue'")
    assert sum("new" in h.metadata for h in hits) == 10 and {h.metadata.get("label") for h in hits} == {None, "blue"}
    assert all(a.score >= b.score for a, b in zip(hits, hits[1:], strict=False))
    assert opened.search("text", ["red"], where="size > 1000") == [[]]
    everything = [h for h in opened.search("text", ["red"], top=50)[0] if h.metadata["size"] <= 4]
    assert opened.search("text", ["red"], top=50, where="size <= 4")[0] == everything


def test_what_columns_hold_is_told(index: Path) -> None:
    found = {facet.name: facet for facet in facets(Index(index))}
    assert found.keys() == {"label", "size", "new"}
    assert dict(found["label"].values)["red"] == 4 and found["label"].lacking == 10
    assert (found["size"].low, found["size"].high, found["size"].kind) == (0.0, 19.0, "number")
    assert found["new"].values == [("n0", 5), ("n1", 5)] and found["new"].lacking == 19


def test_the_command_filters(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["index", "search", str(index), "red", "--where", "label = 'green'", "--json", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert "[4 of 29 where label = 'green']" in said
    (answer,) = json.loads((tmp_path / "found.json").read_text())
    assert answer["passing"] == 4 == len(answer["hits"]) and {h["metadata"]["label"] for h in answer["hits"]} == {
        "green"
    }
    with pytest.raises(SystemExit) as ended:
        main(["index", "search", str(index), "red", "--where", "size = 'x'"])
    assert ended.value.code != 0 and "'size', which is number" in capsys.readouterr().err
