"""Answers for people: results as a table or CLIP_benchmark's JSON, search results as a page with pictures."""

from __future__ import annotations

import base64
import sys
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import find_checkpoint, load_checkpoint
from mmcontrast.config import ConfigError
from mmcontrast.eval.embed import embed, has
from mmcontrast.eval.geometry import Geometry
from mmcontrast.eval.index import Hit, Index
from mmcontrast.eval.retrieval import Retrieval, clip_benchmark_names
from mmcontrast.eval.zero_shot import ZeroShot
from mmcontrast.shards import open_shards

_TASKS = {"zero_shot": "zeroshot_classification", "retrieval": "zeroshot_retrieval", "geometry": "geometry"}


def answer(
    model_path: Path,
    datasets: Sequence[str],
    *,
    tasks: Sequence[str],
    label: str = "label",
    templates: Sequence[str] = ("{c}",),
    pair: tuple[str, str] = ("image", "text"),
    group: str | None = None,
    trust: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Every task on every data set, each embedded once; objects with CLIP_benchmark's keys.

    A task that a data set cannot answer (no labels, say) is left out if the other one can; if none can, that
    is an error.

    Raises:
        ConfigError: a model or shards that cannot be read, or a data set that answers no task.
    """
    checkpoint = find_checkpoint(model_path)
    model = load_checkpoint(checkpoint, trust=trust)
    results: list[dict[str, Any]] = []
    for dataset in datasets:
        needed = pair[:1] if set(tasks) == {"zero_shot"} else pair
        zero_shot = ZeroShot.Config(
            data=(dataset,),
            modality=pair[0],
            prompt_modality=pair[1],
            label=label,
            templates=tuple(templates),
        )
        retrieval = Retrieval.Config(data=(dataset,), pair=pair, group=group)
        # Without those that no sample has: pictures with labels alone can still be classified.
        opened = open_shards([dataset])
        data = embed(model, opened, modalities=[m for m in needed if has(opened, model, m)] or needed)
        problems: list[str] = []
        for task in tasks:
            try:
                if task == "zero_shot":
                    metrics = ZeroShot(zero_shot).score(model, data)
                elif task == "geometry":
                    metrics = Geometry(Geometry.Config(data=(dataset,), pair=pair)).score(data)
                else:
                    metrics = clip_benchmark_names(Retrieval(retrieval).score(data), retrieval.k)
            except ConfigError as error:
                problems.append(f"{dataset}: {task} left out: {error}")
                continue
            results.append(
                {
                    "dataset": dataset,
                    "model": str(model_path),
                    "pretrained": checkpoint.name,
                    "task": _TASKS[task],
                    "metrics": metrics,
                    "language": None,
                    "skipped": [list(s) for s in data.skipped],
                }
            )
        if len(problems) == len(tasks):
            raise ConfigError("; ".join(problems))
        for problem in problems:
            print(problem, file=sys.stderr)
    return results


def as_table(results: Sequence[dict[str, Any]]) -> str:
    """Results in columns, one metric a line."""
    lines: list[str] = []
    for result in results:
        lines.append(f"{result['dataset']}  {result['task']}")
        for name, value in result["metrics"].items():
            if not name.endswith(("_low", "_high")) and not name.startswith(("image_retrieval", "text_retrieval")):
                low, high = (result["metrics"].get(f"{name}_{end}") for end in ("low", "high"))
                interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
                lines.append(f"  {name:32s} {_number(value)}{interval}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 2 and value == int(value) else f"{value:.3f}"


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.facts { color: GrayText; font-size: .9rem; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; padding: 0; }
.hits li { list-style: none; border: 1px solid #8884; border-radius: .5rem; padding: .6rem; }
.hits img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: .3rem; }
.none { display: grid; place-items: center; aspect-ratio: 1; color: GrayText; }
.score { font-variant-numeric: tabular-nums; color: GrayText; font-size: .85rem; }
.bar { height: .3rem; border-radius: .2rem; background: #3b7dd8; margin: .3rem 0; }
"""


def search_page(index: Index, queries: Sequence[str], answers: Sequence[Sequence[Hit]]) -> str:
    """One self-contained HTML page: each query with its answers as pictures, scores and texts."""
    m = index.manifest
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>mmcontrast: {len(queries)} queries</title><style>{_STYLE}</style>",
        f"<h1>{len(queries)} queries, {m['count']} candidates</h1>",
        f"<p class='facts'>Model {escape(str(m['model_hash']))} · {escape(str(m['modality']))} · {m['dim']} "
        f"dimensions · {escape(str(m['type']))} index · recall@10 against exact search "
        f"{m['quality']['recall_at_10']:.3f}</p>",
    ]
    for query, hits in zip(queries, answers, strict=True):
        parts.append(f"<section><h2>“{escape(query)}”</h2><ol class='hits'>")
        parts += [_card(index, hit, place) for place, hit in enumerate(hits, 1)]
        parts.append("</ol></section>")
    return "\n".join([*parts, "</html>\n"])


def _card(index: Index, hit: Hit, place: int) -> str:
    data = index.picture(hit)
    text = escape(hit.text or hit.key)
    if data is None:
        picture = "<div class='none'>no picture</div>"
    else:
        kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
        picture = f"<img alt='{text}' src='data:image/{kind};base64,{base64.b64encode(data).decode()}'>"
    width = max(0.0, min(1.0, hit.score)) * 100
    return (
        f"<li>{picture}<div class='bar' style='width:{width:.0f}%'></div>"
        f"<div>{text}</div><div class='score'>{place}. cosine {hit.score:.3f}</div></li>"
    )
