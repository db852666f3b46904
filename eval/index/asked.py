"""Queries as the command takes them: words, files and keys; one on each line of a file; vectors in a `.npy`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError, suggest
from mmcontrast.eval.index.query import Joint, Piece, Query
from mmcontrast.eval.index.vectors import open_vectors

_WITH = re.compile(r"(?:([-+]?[\d.]+)\*)?([^=*\s]+)=(.+)", re.DOTALL)
_OWN = ("not", "like", "weights", "where")


def queries_of(
    values: Sequence[str],
    modality: str,
    *,
    keys: Sequence[str] = (),
    beside: Sequence[str] = (),
    away: Sequence[str] = (),
    texts: str | None = "text",
    joint: Joint = "auto",
    where: str | None = None,
) -> list[Query]:
    """A query for each value and each key, all of them with what is sought beside them and kept away from.

    Args:
        values: texts, or files if the modality is of another kind.
        modality: of the values.
        keys: of stored samples.
        beside: MODALITY=VALUE, or WEIGHT*MODALITY=VALUE. Where there are no values and keys, a query by itself.
        away: texts.
        texts: the modality of texts; None where the model knows none.
        joint: of each query.
        where: of each query.

    Raises:
        ConfigError: nothing is asked, or a piece that cannot be read.
    """
    shared = [*map(_beside, beside), *(Piece(_texts(texts), text, weight=-1.0) for text in away)]
    label = "".join(f" + {said}" for said in beside) + "".join(f" - {said}" for said in away)
    starts = [(value, Piece(modality, value)) for value in values] + [(f"like {key}", Piece(key=key)) for key in keys]
    found = [Query([piece, *shared], joint, where, said + label) for said, piece in starts]
    return found or ([Query(shared, joint, where, label.removeprefix(" + "))] if shared else [])


def _beside(said: str) -> Piece:
    found = _WITH.fullmatch(said)
    try:
        if found is None:
            raise ValueError
        return Piece(found[2], found[3], weight=1.0 if found[1] is None else float(found[1]))
    except ValueError:
        raise ConfigError(
            f"{said!r} is no piece of a query; write MODALITY=VALUE or WEIGHT*MODALITY=VALUE, such as image=a.jpg"
        ) from None


def _texts(modality: str | None) -> str:
    if modality is None:
        raise ConfigError("the model knows no texts, so none can be kept away from; use -1*MODALITY=FILE")
    return modality


def read_queries(
    path: Path,
    modality: str,
    modalities: Sequence[str],
    *,
    texts: str | None = "text",
    joint: Joint = "auto",
    where: str | None = None,
) -> list[Query]:
    """Queries of a file.

    Text: one on each line. `.jsonl`: an object on each line, of modalities and their values (or lists of them), `like`
    (a stored key), `not` (texts), `weights` (of modalities and `like`) and `where`. `.npy`: vectors [q, D] of the
    model that made the index, which nobody can check but by their dimension.

    Args:
        path: of the file.
        modality: of the lines of a text file.
        modalities: of the model.
        texts: the modality of texts.
        joint: of each query.
        where: of each query that says nothing else.

    Raises:
        ConfigError: a file or a line that cannot be read.
    """
    if path.suffix == ".npy":
        try:
            vectors = open_vectors(path, dtypes=("<f4", "<f2"))
        except FileNotFoundError:
            raise ConfigError(f"the queries {path} are not there") from None
        return [Query([Piece(modality, z=z)], joint, where, f"vector {i}") for i, z in enumerate(vectors)]
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the queries {path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"{path} holds no queries; give one on each line")
    if path.suffix not in (".jsonl", ".ndjson"):
        return [Query([Piece(modality, line)], joint, where, line) for _, line in numbered]
    return [_of_object(f"{path}:{number}", line, modalities, texts, joint, where) for number, line in numbered]


def _of_object(
    place: str, line: str, modalities: Sequence[str], texts: str | None, joint: Joint, where: str | None
) -> Query:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f'{place} is no object; write one such as {{"text": "a dog"}}')
    said = cast(dict[str, Any], found)
    for name in said:
        if name not in modalities and name not in _OWN:
            raise ConfigError(f"{place} has the field {name!r}{suggest(name, [*modalities, *_OWN])}")
    weights = said.get("weights", {})
    if not isinstance(weights, dict) or not all(
        isinstance(w, (int, float)) and not isinstance(w, bool) for w in cast(dict[str, Any], weights).values()
    ):
        raise ConfigError(f"{place} has weights {str(cast(Any, weights))[:60]}; give an object of numbers by modality")
    of = cast(Mapping[str, float], weights)
    pieces = [
        Piece(m, value, weight=float(of.get(m, 1))) for m in modalities if m in said for value in _list(place, m, said)
    ]
    if "like" in said:
        pieces += [Piece(key=key, weight=float(of.get("like", 1))) for key in _list(place, "like", said)]
    if "not" in said:
        pieces += [Piece(_texts(texts), text, weight=-1.0) for text in _list(place, "not", said)]
    own = said.get("where", where)
    if own is not None and not isinstance(own, str):
        raise ConfigError(f"{place} has a `where` that is no text")
    if not pieces:
        raise ConfigError(f"{place} asks for nothing; give it one of {', '.join(modalities)}, like or not")
    return Query(pieces, joint, own, line.strip())


def _list(place: str, name: str, said: Mapping[str, Any]) -> list[str]:
    value = said[name]
    values = cast(list[Any], value if isinstance(value, list) else [value])
    if not all(isinstance(v, str) and v for v in values):
        raise ConfigError(f"{place} has {str(values)[:60]} for {name!r}; give a text, the name of a file, or a list")
    return values
