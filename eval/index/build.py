"""Shards and a model -> an index: embedded, stored, given a structure, measured.

What makes an index of vectors that are there already (`write_base`) is shared by building, merging and compacting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Reader
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.index.choice import choose
from mmcontrast.eval.index.embeddings import write_embeddings
from mmcontrast.eval.index.identity import identity_of, libraries, open_model
from mmcontrast.eval.index.intake import Encoding, Intake
from mmcontrast.eval.index.quality import Questions, ask, measure, tune
from mmcontrast.eval.index.segment import FLAT, Part, Segment, entry_of, write_parts
from mmcontrast.eval.index.store import MANIFEST, QUERIES, Update, read_manifest
from mmcontrast.eval.index.structure import write_structure
from mmcontrast.eval.index.vectors import Floats, open_vectors, write_vectors
from mmcontrast.shards import FORMATS, BadSample, open_shards

_QUERIES = 1000
_EXACT_WORK = 2e12  # multiplications and additions that the exact answers may take
SKIPPED_KEPT = 1000
"""Skipped samples that a manifest names."""


@dataclass(frozen=True)
class Asked:
    """What is wanted of the structure; see `choice.choose`. The manifest keeps it for when the index is compacted."""

    kind: str | None = None
    memory: int | None = None
    recall: float = 0.95
    searches: int | None = None


@dataclass(frozen=True)
class Queries:
    """Held-out queries that an index is measured with.

    Attributes:
        z: [q, D] float32 unit norm.
        origin: where they come from, in words.
    """

    z: Floats
    origin: str


def build_index(
    model_path: str | Path,
    shards: Sequence[str],
    out: Path,
    *,
    modality: str = "image",
    asked: Asked | None = None,
    queries: str | None = None,
    query_modality: str = "text",
    overwrite: bool = False,
    embeddings: Path | None = None,
    encoding: Encoding | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Embed one modality of some shards and index it; returns the manifest.

    A build that was ended goes on where it was when it is called again. All processes that torchrun starts embed, and
    the first of them writes the index; the folder must be on a disk that all of them see.

    Recall is measured against exact search with queries that are in no index: those given, or the shards' own texts;
    where there are none, with vectors of the index, each left out of its own answers.

    Args:
        model_path: run folder or one of its step-N folders, or a foreign model; see `eval.models.load_asked`.
        shards: folders, globs, ranges, files or addresses; or a folder of embeddings as clip-retrieval writes it, made
            by this model.
        out: the index folder.
        modality: what is indexed; several joined by + are pooled into one vector per sample.
        asked: what is wanted of the structure.
        queries: a text file with a query on each line, or shards.
        query_modality: what the queries are.
        overwrite: replace an index that is there; until the new one is whole, the old one answers.
        embeddings: also write clip-retrieval's folder of embeddings there.
        encoding: how samples are embedded.
        progress: show bars on standard error.

    Raises:
        ConfigError: `out` exists, no such model or modality, or shards that cannot be read.
    """
    asked = asked or Asked()
    if (out / MANIFEST).exists() and not overwrite:
        raise ConfigError(f"{out} exists; choose another folder, or replace it with --overwrite")
    encoding = encoding or Encoding()
    origin = open_model(model_path, trust=encoding.trust)
    identity = identity_of(origin, modality)
    intake = Intake(shards, origin, modality, encoding)
    choose(1, identity["dim"], **_wanted(asked))  # a setting that makes no sense is said before hours of work
    held_out = None if queries is None else given_queries(origin.model, queries, query_modality)
    if intake.ranks.rank:
        intake.helps(out, identity)
        return read_manifest(out)
    with Update(out, create=True) as update:
        parts, skipped = intake.take(out, identity, progress=progress)
        if embeddings is not None:
            write_embeddings(embeddings, modality, parts, identity["dim"])
        if held_out is None and modality != query_modality:
            held_out = own_texts(origin.model, parts)
        about = identity | {
            "model": origin.place,
            "joint": origin.joint,
            "sources": [intake.entry],
            "skipped": [list(s) for s in skipped[:SKIPPED_KEPT]],
            "skipped_count": len(skipped),
        }
        manifest = write_base(update, parts, about, asked, held_out, progress=progress)
        intake.clean(out)
    return manifest


def write_base(
    update: Update,
    parts: Sequence[Part],
    about: dict[str, Any],
    asked: Asked,
    queries: Queries | None,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Write all vectors as one segment, choose and tune its structure, measure it, and make it the index."""
    folder, dim = update.segment(), int(about["dim"])
    n = write_parts(folder, parts, dim)
    choice = choose(n, dim, **_wanted(asked))
    if choice.factory != FLAT:
        write_structure(folder, choice.factory, progress=progress)
    entry = entry_of(folder, n, kind=choice.factory)
    segment = Segment(folder, entry, dim)
    questions = _questions(segment, queries)
    tuning = measuring = questions
    if choice.factory != FLAT and len(questions) > 1:  # what chose a setting cannot say what it is worth
        tuning, measuring = (questions.part(slice(half, None, 2)) for half in (0, 1))
    segment.effort, trials = tune(segment, tuning, asked.recall)
    entry = entry_of(folder, n, kind=choice.factory, effort=segment.effort)
    quality = measure(segment, measuring)
    if queries is not None:
        write_vectors(folder / QUERIES, [queries.z], dim)
        entry["files"][QUERIES] = None
    return update.commit(
        about
        | {
            "count": n,
            "deleted": 0,
            "type": choice.factory,
            "why": choice.why,
            "asked": asdict(asked),
            "quality": quality,
            "tried": [asdict(trial) for trial in trials],
            "queries_from": None if queries is None else queries.origin,
            "libraries": libraries(),
            "segments": [entry],
        }
    )


def _questions(segment: Segment, queries: Queries | None) -> Questions:
    """Queries with their exact answers: the given ones, or vectors of the index itself."""
    n, dim = segment.vectors.shape
    most = int(np.clip(_EXACT_WORK / (2 * n * dim), 100, _QUERIES))
    if queries is not None:
        return ask(segment, _spread(queries.z, most), queries.origin)
    if n < 2:
        return ask(segment, np.asarray(segment.vectors), "the only vector of the index")
    own = _spread(np.arange(n), most)
    return ask(segment, segment.vectors[own], "vectors of the index, each left out of its own answers", own)


def _spread(values: Any, most: int) -> Any:
    """At most so many, evenly over all."""
    places = np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(np.int64)
    return np.ascontiguousarray(values[places])


def own_texts(model: MultiEncoder, parts: Sequence[Part]) -> Queries | None:
    """Texts of the samples, as queries of what belongs to them; None where there are none, or no tower for them."""
    towers = [m for m in model.modalities if model.encoder(m).kind == "text"]
    texts = [text for part in parts for text in part.rows.column("text").drop_null().to_pylist()]
    if not towers or not texts:
        return None
    chosen = [texts[i] for i in _spread(np.arange(len(texts)), _QUERIES)]
    return Queries(model.encode(towers[0], chosen).numpy(), "texts of the samples")


def given_queries(model: MultiEncoder, place: str, modality: str) -> Queries:
    """Queries from a file with a text on each line, or of one modality of some shards.

    Raises:
        ConfigError: no such file or shards, no such modality, or nothing in them.
    """
    kind = model.encoder(modality).kind
    if kind == "text" and Path(place).is_file() and not place.endswith(".tar"):
        try:
            values: list[Any] = [line for line in Path(place).read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the queries {place} cannot be read: {error}") from None
        chosen = [values[i] for i in _spread(np.arange(len(values)), _QUERIES)]
    else:
        opened = open_shards([place])
        reader = Reader(opened, {modality: model.encoder(modality).transform(train=False)})
        having = [p for p in range(len(opened)) if set(opened.extensions(p)) & set(FORMATS[kind])]
        try:
            chosen = [reader.raw(having[i], modality) for i in _spread(np.arange(len(having)), _QUERIES)]
        except BadSample as error:
            raise ConfigError(f"a query of {place} cannot be used: {error}") from None
    if not chosen:
        raise ConfigError(f"{place} holds no queries; give a text file with one on each line, or shards")
    return Queries(model.encode(modality, chosen).numpy(), str(place))


def stored_queries(folder: Path, manifest: dict[str, Any]) -> Queries | None:
    """The queries that an index was measured with, if they are in no index."""
    found = [s["folder"] for s in manifest["segments"] if QUERIES in s["files"]]
    if not found:
        return None
    z = np.concatenate([open_vectors(folder / name / QUERIES) for name in found])
    return Queries(z, str(manifest.get("queries_from")))


def _wanted(asked: Asked) -> dict[str, Any]:
    return {"memory": asked.memory, "recall": asked.recall, "searches": asked.searches, "given": asked.kind}
