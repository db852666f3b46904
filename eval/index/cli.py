"""`mmcontrast index`: build, change, show. The command imports it at its start, so nothing heavy is imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcontrast.arguments import write_json
from mmcontrast.config import ConfigError
from mmcontrast.eval.index.cli_ask import duplicates, link, search, serve

Positional = tyro.conf.Positional
Json = Annotated[Path | None, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class Structure:
    """What is wanted of the structure."""

    kind: Annotated[str | None, tyro.conf.arg(name="type")] = None
    """Structure in FAISS's language, such as HNSW32 or IVF4096,SQ8. `auto` chooses, and explains the choice."""
    memory: str | None = None
    """That the structure may take, such as 800MB or 2GB; half of this machine's if nothing else was asked for."""
    recall: float | None = None
    """recall@10 that is asked for, on the queries; 0.95 if nothing else was asked for."""
    searches: int | None = None
    """That will come before the index is built anew; few of them make an exact search worth its time."""


Structured = Annotated[Structure, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Embedding:
    """How samples are embedded."""

    processes: int | None = None
    """That encode, each with a model of its own; by default one per GPU. torchrun starts several, too."""
    workers: int = 0
    """Processes that read and decode, for each that encodes."""
    batch_size: int = 128
    """Samples encoded at once."""
    trust: tuple[str, ...] = ()
    """Modules or .py files whose classes the run's config may name."""


Embedded = Annotated[Embedding, tyro.conf.arg(name="")]


def build(
    model: Positional[str],
    shards: Positional[str],
    out: Positional[Path],
    modality: str = "image",
    queries: str | None = None,
    query_modality: str = "text",
    overwrite: bool = False,
    shards_out: Path | None = None,
    structure: Structured = Structure(),
    embedding: Embedded = Embedding(),
    json_file: Json = None,
) -> None:
    """Embed shards with a trained model and index them. A build that was ended goes on where it was.

    In several processes, of machines that share a disk: torchrun --nproc_per_node N -m mmcontrast index build …

    Args:
        model: run folder, or one of its step-N folders; ARCHITECTURE,WEIGHTS of open_clip; a folder of transformers.
        shards: folder, glob or range; or clip-retrieval's folder of embeddings, made by this model.
        out: the index folder.
        modality: what to index; image+text pools a sample's picture and text into one vector.
        queries: a text file with a query on each line, or shards; by default the texts of the samples.
        query_modality: what the queries are.
        overwrite: replace an index that is there.
        shards_out: also write the embeddings there as clip-retrieval does, npy and Parquet.
        structure: see there.
        embedding: see there.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.build import Asked, build_index
    from mmcontrast.eval.index.intake import Encoding

    found = build_index(
        model,
        [shards],
        out,
        modality=modality,
        asked=_asked(structure) or Asked(),
        queries=queries,
        query_modality=query_modality,
        overwrite=overwrite,
        embeddings=shards_out,
        encoding=Encoding(**vars(embedding)),
        progress=sys.stderr.isatty(),
    )
    if _first():
        _say(out, found)
        write_json(json_file, found)


def add(
    index: Positional[Path],
    shards: Positional[str],
    replace: bool = False,
    model: str | None = None,
    embedding: Embedded = Embedding(),
    json_file: Json = None,
) -> None:
    """Embed the samples of some shards into an index; whoever searches it goes on meanwhile.

    Args:
        index: the index folder.
        shards: as for build.
        replace: samples take the place of those of the same key.
        model: where the model lies now, if it moved.
        embedding: see there.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import add as change
    from mmcontrast.eval.index.intake import Encoding

    found = change(
        index,
        [shards],
        model=model,
        replace=replace,
        encoding=Encoding(**vars(embedding)),
        progress=sys.stderr.isatty(),
    )
    if _first():
        print(_counts(index, found))
        write_json(json_file, found)


def delete(
    index: Positional[Path],
    keys: Positional[tuple[str, ...]] = (),
    file: Path | None = None,
    json_file: Json = None,
) -> None:
    """Delete samples from an index by their keys; whoever searches it goes on meanwhile.

    Args:
        index: the index folder.
        keys: of the samples.
        file: a text file with a key on each line, as well.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import delete as change

    try:
        named = [] if file is None else [line for line in file.read_text("utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keys of {file} cannot be read: {error}") from None
    if not keys and not named:
        raise ConfigError("delete needs at least one key: mmcontrast index delete INDEX KEY…")
    found = change(index, [*keys, *named])
    print(_counts(index, found))
    write_json(json_file, found)


def compact(index: Positional[Path], structure: Structured = Structure(), json_file: Json = None) -> None:
    """Drop what was deleted, and choose and measure the structure anew; without settings as the index was built.

    Args:
        index: the index folder.
        structure: see there.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import compact as change

    found = change(index, asked=_asked(structure), progress=sys.stderr.isatty())
    _say(index, found)
    write_json(json_file, found)


def merge(
    indices: Positional[tuple[Path, ...]], out: Path, structure: Structured = Structure(), json_file: Json = None
) -> None:
    """Make one index of several of the same model: mmcontrast index merge A B --out C.

    Args:
        indices: index folders; they stay as they are.
        out: the new one.
        structure: see there; by default as the first one was built.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import merge as change

    found = change(indices, out, asked=_asked(structure), progress=sys.stderr.isatty())
    _say(out, found)
    write_json(json_file, found)


def show(index: Positional[Path], json_file: Json = None) -> None:
    """What an index says of itself: model, data, structure and why, measured quality, settings tried.

    Args:
        index: the index folder.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.store import read_manifest

    found = read_manifest(index)
    print(f"model      {found['model']} ({found['model_hash']})")
    print(f"modality   {found['modality']}, {found['dim']} dimensions, {found['metric']} at {found['normalisation']}")
    for source in found["sources"]:
        print(f"data       {', '.join(source['shards'])} ({source['data']})")
    print(f"generation {found['generation']}, {len(found['segments'])} segments, {found['deleted']} deleted")
    _say(index, found)
    write_json(json_file, found)


INDEX: dict[str, Callable[..., None]] = {
    "build": build,
    "add": add,
    "delete": delete,
    "merge": merge,
    "compact": compact,
    "search": search,
    "duplicates": duplicates,
    "link": link,
    "serve": serve,
    "show": show,
}


def _say(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Count, structure and why, the settings tried, and what the index is worth."""
    from mmcontrast.eval.index.quality import as_table

    q, asked = manifest["quality"], manifest["asked"]["recall"]
    print(_counts(folder, manifest))
    print(f"{manifest['type']}: {manifest['why']}")
    if len(manifest["tried"]) > 1:
        print(as_table(manifest["tried"], manifest["segments"][0]["effort"]))
    recalls = ", ".join(f"@{r} {q[f'recall_at_{r}']:.3f}" for r in (1, 10, 100))
    print(f"recall against exact search {recalls} on {q['queries']} queries ({q['queries_from']})")
    print(
        f"latency {q['latency_ms_p50']:.2f} ms (median), {q['latency_ms_p99']:.2f} ms (99 %) "
        f"of {q['latency_queries']} single queries, "
        f"{q['queries_per_second']:.0f} queries/s at once; memory {q['memory_mb']:.1f} MB, "
        f"vectors on the disk {q['vectors_mb']:.1f} MB"
    )
    if q["recall_at_10"] < asked:
        print(f"recall@10 is below the {asked:g} asked for: give more --memory or another --type", file=sys.stderr)


def _counts(folder: Path, manifest: Mapping[str, Any]) -> str:
    """How many vectors, and how the rest of the index came to be."""
    changed = manifest["count"] != manifest["quality"]["count"] or manifest["deleted"]
    since = f" (measured with {manifest['quality']['count']}; `index compact` measures anew)" if changed else ""
    skipped = f", {n} samples skipped" if (n := manifest["skipped_count"]) else ""
    return f"{folder}: {manifest['count']} vectors of {manifest['modality']}, {manifest['type']}{skipped}{since}"


def _first() -> bool:
    """Whether this process is alone, or the first of those that torchrun started: one of them speaks."""
    return os.environ.get("RANK", "0") == "0"


def _asked(structure: Structure) -> Any:
    """What is wanted of a structure; None where nothing is said, and what was asked before counts."""
    from mmcontrast.eval.index.build import Asked

    if structure == Structure():
        return None
    s = structure
    return Asked(s.kind, _bytes(s.memory), 0.95 if s.recall is None else s.recall, s.searches)


def _bytes(text: str | None) -> int | None:
    """800MB, 2GB or a number of bytes.

    Raises:
        ConfigError: something else.
    """
    if text is None:
        return None
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    number = text.rstrip("BKMGTbkmgt")
    try:
        return int(float(number) * units[text[len(number) :].upper()])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"memory is {text!r}; give a size such as 800MB or 2GB") from None
