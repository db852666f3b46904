"""`mmcontrast index`: build, change, search. The command imports it at its start, so nothing heavy is imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmcontrast.arguments import write_json
from mmcontrast.config import ConfigError

Positional = tyro.conf.Positional
Json = Annotated[Path | None, tyro.conf.arg(name="json")]


def build(
    model: Positional[Path],
    shards: Positional[str],
    out: Positional[Path],
    modality: str = "image",
    kind: Annotated[str | None, tyro.conf.arg(name="type")] = None,
    memory: str | None = None,
    recall: float = 0.95,
    searches: int | None = None,
    queries: str | None = None,
    query_modality: str = "text",
    overwrite: bool = False,
    processes: int | None = None,
    workers: int = 0,
    batch_size: int = 128,
    json_file: Json = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Embed shards with a trained model and index them. A build that was ended goes on where it was.

    Args:
        model: run folder, or one of its step-N folders.
        shards: folder, glob or range.
        out: the index folder.
        modality: what to index; image+text pools a sample's picture and text into one vector.
        kind: structure in FAISS's language, such as HNSW32 or IVF4096,SQ8; by default it is chosen, and the choice
            explained.
        memory: that the structure may take, such as 800MB or 2GB; by default half of this machine's.
        recall: recall@10 that is asked for, on the queries.
        searches: that will come before the index is built anew; few of them make an exact search worth its time.
        queries: a text file with a query on each line, or shards; by default the texts of the samples.
        query_modality: what the queries are.
        overwrite: replace an index that is there.
        processes: that encode, each with a model of its own; by default one per GPU.
        workers: processes that read and decode, for each that encodes.
        batch_size: samples encoded at once.
        json_file: also write the manifest here.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.eval.index.build import Asked, build_index

    found = build_index(
        model,
        [shards],
        out,
        modality=modality,
        asked=Asked(kind, _bytes(memory), recall, searches),
        queries=queries,
        query_modality=query_modality,
        overwrite=overwrite,
        trust=trust,
        processes=processes,
        workers=workers,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
    _say(out, found)
    write_json(json_file, found)


def add(
    index: Positional[Path],
    shards: Positional[str],
    replace: bool = False,
    model: Path | None = None,
    processes: int | None = None,
    workers: int = 0,
    batch_size: int = 128,
    json_file: Json = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Embed the samples of some shards into an index; whoever searches it goes on meanwhile.

    Args:
        index: the index folder.
        shards: folder, glob or range.
        replace: samples take the place of those of the same key.
        model: where the model lies now, if it moved.
        processes: that encode, each with a model of its own; by default one per GPU.
        workers: processes that read and decode, for each that encodes.
        batch_size: samples encoded at once.
        json_file: also write the manifest here.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.eval.index.change import add as change

    found = change(
        index,
        [shards],
        model=model,
        replace=replace,
        trust=trust,
        processes=processes,
        workers=workers,
        batch_size=batch_size,
        progress=sys.stderr.isatty(),
    )
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


def compact(
    index: Positional[Path],
    kind: Annotated[str | None, tyro.conf.arg(name="type")] = None,
    memory: str | None = None,
    recall: float | None = None,
    searches: int | None = None,
    json_file: Json = None,
) -> None:
    """Drop what was deleted, and choose and measure the structure anew; without settings as the index was built.

    Args:
        index: the index folder.
        kind: structure in FAISS's language; auto chooses.
        memory: that the structure may take, such as 800MB or 2GB.
        recall: recall@10 that is asked for.
        searches: that will come before the index is built anew.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import compact as change

    found = change(index, asked=_asked(kind, memory, recall, searches), progress=sys.stderr.isatty())
    _say(index, found)
    write_json(json_file, found)


def merge(
    indices: Positional[tuple[Path, ...]],
    out: Path,
    kind: Annotated[str | None, tyro.conf.arg(name="type")] = None,
    memory: str | None = None,
    recall: float | None = None,
    searches: int | None = None,
    json_file: Json = None,
) -> None:
    """Make one index of several of the same model: mmcontrast index merge A B --out C.

    Args:
        indices: index folders; they stay as they are.
        out: the new one.
        kind: structure in FAISS's language; auto chooses.
        memory: that the structure may take, such as 800MB or 2GB.
        recall: recall@10 that is asked for.
        searches: that will come before the index is built anew.
        json_file: also write the manifest here.
    """
    from mmcontrast.eval.index.change import merge as change

    asked = _asked(kind, memory, recall, searches)
    found = change(indices, out, asked=asked, progress=sys.stderr.isatty())
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


def search(
    index: Positional[Path],
    queries: Positional[tuple[str, ...]],
    modality: str = "text",
    top: int = 5,
    model: Path | None = None,
    html: Path | None = None,
    json_file: Json = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Search an index with texts or pictures.

    Args:
        index: what `index build` wrote.
        queries: texts; or files, if the modality is not text.
        modality: what the queries are.
        top: answers per query.
        model: where the model lies now, if it moved.
        html: also write a page with the pictures.
        json_file: also write the answers here.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.eval.index.search import Index
    from mmcontrast.eval.report import search_page

    if not queries:
        raise ConfigError("search needs at least one query: mmcontrast index search INDEX QUERY…")
    opened = Index(index, model=model, trust=trust)
    answers = opened.search(modality, queries, top=top)
    for query, hits in zip(queries, answers, strict=True):
        print(query)
        for place, hit in enumerate(hits, 1):
            print(f"  {place}. {hit.score:.3f}  {hit.key}  {hit.text or ''}")
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(search_page(opened, queries, answers), "utf-8")
        print(f"wrote {html}", file=sys.stderr)
    write_json(
        json_file,
        [{"query": q, "hits": [asdict(h) for h in hits]} for q, hits in zip(queries, answers, strict=True)],
    )


def serve(
    indices: Positional[tuple[Path, ...]],
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: tuple[str, ...] = (),
    model: tuple[Path, ...] = (),
    trust: tuple[str, ...] = (),
) -> None:
    """Search indices on a page of one's own: with words, pictures, sounds and signals; and by a JSON API.

    Args:
        indices: what `index build` wrote; two of them can be looked at side by side.
        host: address to listen at. The default answers this machine alone; there is no password.
        port: to listen at; 0 takes a free one.
        allow_host: further names by which the server is reached, as behind a proxy.
        model: where the models lie now, if they moved: one for each index, or one for all.
        trust: modules or .py files whose classes the runs' configs may name.
    """
    try:
        from mmcontrast.eval.serve.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise ConfigError("the page is served by FastAPI: pip install 'mmcontrast[serve]'") from None

    run(indices, host=host, port=port, names=allow_host, models=model, trust=trust)


INDEX: dict[str, Callable[..., None]] = {
    "build": build,
    "add": add,
    "delete": delete,
    "merge": merge,
    "compact": compact,
    "search": search,
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
        f"latency {q['latency_ms_p50']:.2f} ms (median), {q['latency_ms_p99']:.2f} ms (99 %), "
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


def _asked(kind: str | None, memory: str | None, recall: float | None, searches: int | None) -> Any:
    """What is wanted of a structure; None where nothing is said, and what was asked before counts."""
    from mmcontrast.eval.index.build import Asked

    if kind is None and memory is None and recall is None and searches is None:
        return None
    return Asked(kind, _bytes(memory), 0.95 if recall is None else recall, searches)


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
