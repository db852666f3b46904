"""`mmcontrast index`: what is asked of one that is there. As in `cli`, nothing heavy is imported here."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmcontrast.arguments import write_json, write_text
from mmcontrast.config import ConfigError

Positional = tyro.conf.Positional
Json = Annotated[Path | None, tyro.conf.arg(name="json")]


def search(
    index: Positional[Path],
    queries: Positional[tuple[str, ...]] = (),
    modality: str = "text",
    top: int = 5,
    where: str | None = None,
    away: Annotated[tuple[str, ...], tyro.conf.arg(name="not")] = (),
    beside: Annotated[tuple[str, ...], tyro.conf.arg(name="with")] = (),
    like: tuple[str, ...] = (),
    file: Path | None = None,
    joint: Literal["auto", "sum", "product"] = "auto",
    model: str | None = None,
    html: Path | None = None,
    json_file: Json = None,
    trust: tuple[str, ...] = (),
) -> None:
    """Search an index with texts, pictures, sounds, signals and stored samples, alone or together.

    Args:
        index: what `index build` wrote.
        queries: texts; or files, if the modality is not text.
        modality: what the queries are.
        top: answers per query.
        where: only answers that pass, such as "label = 'dog' and rate >= 16000"; also !=, in, not, or, is null.
        away: texts that answers should not be like.
        beside: sought together with each query: MODALITY=VALUE, or WEIGHT*MODALITY=VALUE, such as audio=bark.wav.
        like: keys of stored samples; each is a query of its own.
        file: queries as well: one on each line; .jsonl with objects such as {"text": "a dog", "image": "a.jpg", "not":
            "a cat", "like": "000012", "weights": {"image": 0.5}, "where": "rate > 3"}; or .npy with vectors.
        joint: how pieces are brought together; auto is the product if Symile trained the model and all other
            modalities are given, otherwise the weighted sum.
        model: where the model lies now, if it moved.
        html: also write a page with the pictures.
        json_file: also write the answers here.
        trust: modules or .py files whose classes the run's config may name.
    """
    from mmcontrast.eval.index.asked import queries_of, read_queries
    from mmcontrast.eval.index.pages import search_page
    from mmcontrast.eval.index.search import Index

    opened = Index(index, model=model, trust=trust)
    known = opened.model.modalities
    texts = next((m for m in known if opened.model.encoder(m).kind == "text"), None)
    asked = queries_of(queries, modality, keys=like, beside=beside, away=away, texts=texts, joint=joint, where=where)
    if file is not None:
        asked += read_queries(file, modality, known, texts=texts, joint=joint, where=where)
    if not asked:
        raise ConfigError("search needs at least one query: mmcontrast index search INDEX QUERY…")
    answers = opened.ask(asked, top=top)
    for query, answer in zip(asked, answers, strict=True):
        product = " (product)" if answer.joint == "product" else ""
        passing = "" if query.where is None else f"  [{answer.passing} of {len(opened)} where {query.where}]"
        print(f"{query.label}{product}{passing}")
        for place, hit in enumerate(answer.hits, 1):
            print(f"  {place}. {hit.score:.3f}  {hit.key}  {hit.text or ''}")
    if html is not None:
        write_text(html, search_page(opened, [q.label for q in asked], [a.hits for a in answers]))
        print(f"wrote {html}", file=sys.stderr)
    found = [
        {"query": q.label, "where": q.where, "joint": a.joint, "passing": a.passing, "hits": list(map(asdict, a.hits))}
        for q, a in zip(asked, answers, strict=True)
    ]
    write_json(json_file, found)


def duplicates(
    index: Positional[Path],
    threshold: float = 0.95,
    where: str | None = None,
    neighbours: int | None = None,
    html: Path | None = None,
    json_file: Json = None,
) -> None:
    """Groups of near-duplicates: samples that are connected by pairs whose cosine reaches a threshold.

    Args:
        index: what `index build` wrote; its model is not needed.
        threshold: the least cosine of a pair.
        where: only samples that pass this filter.
        neighbours: nearest ones of each sample that are looked at, through the index; 0 looks at all pairs, which is
            the default up to 200000 samples; above them it is 32.
        html: also write a page with the pictures.
        json_file: also write the groups here.
    """
    from mmcontrast.eval.index.duplicates import as_json, find_duplicates
    from mmcontrast.eval.index.pages import duplicates_page
    from mmcontrast.eval.index.stored import Stored

    opened = Stored(index)
    found = find_duplicates(opened, threshold, where=where, neighbours=neighbours, progress=sys.stderr.isatty())
    how = "all pairs" if found.neighbours is None else f"each one's {found.neighbours} nearest"
    print(
        f"{len(found.groups)} groups among {found.looked_at} samples ({how} looked at), cosine {threshold:g} or more: "
        f"{found.redundant} samples beyond the first of each"
    )
    for group in found.groups[:10]:
        print(f"  {len(group.members)}: {', '.join(member.key for member in group.members[:6])}")
    if len(found.groups) > 10:
        print(f"  and {len(found.groups) - 10} smaller groups")
    if found.truncated:
        print(f"{found.truncated} samples may have more close neighbours: give more --neighbours", file=sys.stderr)
    if html is not None:
        write_text(html, duplicates_page(opened, found))
        print(f"wrote {html}", file=sys.stderr)
    write_json(json_file, as_json(found))


def link(
    left: Positional[Path],
    right: Positional[Path],
    out: Path | None = None,
    labels: Path | None = None,
    precision: float | None = None,
    threshold: float | None = None,
    where: str | None = None,
    html: Path | None = None,
    json_file: Json = None,
) -> None:
    """Record linkage: the nearest sample of another index for each of one, and whether they are the same.

    Indices of --modality image+text compare what pictures and texts say together. The models are not needed.

    Args:
        left: index whose samples are linked.
        right: index where their counterparts are looked for, of the same model.
        out: a file of JSON lines for the links: a, b, score, link.
        labels: pairs that are known: a CSV with the columns a and b, or JSON lines; an empty b says that there is no
            counterpart. They choose the threshold, and half of them say what it is worth.
        precision: that the threshold must reach on the labels; by default it has the best F1.
        threshold: instead of labels.
        where: counterparts must pass this filter.
        html: also write a page with the curve and the links next to the threshold.
        json_file: also write threshold, its worth, and the precision/recall curve here.
    """
    import json

    from mmcontrast.eval.index.link import Linked, read_labels
    from mmcontrast.eval.index.pages import links_page
    from mmcontrast.eval.index.stored import Stored

    if (labels is None) == (threshold is None):
        raise ConfigError("link needs --labels, by which it chooses the threshold, or a --threshold")
    known = None if labels is None else read_labels(labels)
    linked = Linked(Stored(left), Stored(right), where=where, progress=sys.stderr.isatty())
    calibration = None if known is None else linked.calibrate(known, precision=precision)
    if calibration is not None:
        threshold = calibration.threshold
        print(f"threshold {threshold:.4f} by {calibration.by} on {calibration.chosen_on} labelled records")
        if (w := calibration.held_out) is not None:
            on = f"on {calibration.held_out_on} others"
            print(f"{on}: precision {w.precision:.3f}, recall {w.recall:.3f}, F1 {w.f1:.3f}")
        else:
            print("fewer than 20 records are labelled: nothing says what the threshold is worth", file=sys.stderr)
    assert threshold is not None
    records = list(linked.records(threshold))
    accepted = sum(record["link"] for record in records)
    print(f"{accepted} of {len(records)} samples of {left} are linked to {right}")
    if out is not None:
        write_text(out, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    if html is not None:
        write_text(html, links_page(linked, threshold, calibration))
        print(f"wrote {html}", file=sys.stderr)
    chosen = {"threshold": threshold, "records": len(records), "links": accepted}
    write_json(json_file, chosen | {"calibration": None if calibration is None else calibration.to_json()})


def serve(
    indices: Positional[tuple[Path, ...]],
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: tuple[str, ...] = (),
    model: tuple[str, ...] = (),
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
