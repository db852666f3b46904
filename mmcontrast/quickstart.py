"""The main job on real data that the install brings, as a sequence of ordinary commands that a person can repeat."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError

QUERIES = ("an animal with wings", "a person at work", "clothes")
_MARK = "quickstart.json"


def run(out: Path, json_file: Path | None, command: Callable[[Sequence[str]], None]) -> dict[str, Any]:
    """Prepare, train, evaluate, index and search under `out`; returns the scores.

    Args:
        out: made anew: what an earlier quickstart left there is removed.
        json_file: also write the scores here.
        command: runs one command line, such as `mmcontrast.cli.main`.

    Raises:
        ConfigError: `out` holds something that no quickstart wrote.
    """
    started = time.perf_counter()
    _make_room(out)
    data, model, index = f"{out}/data", f"{out}/run", f"{out}/index"
    lines = [
        ["prep", "emoji", data],
        ["train", "emoji", "--out", model, "--data.shards", f"{data}/train", "--evaluators.val.data", f"{data}/val"],
        ["eval", model, f"{data}/test", f"{data}/style", "--json", f"{out}/eval.json", "--report", f"{out}/eval.html"],
        ["index", "build", model, f"{data}/test", index, "--json", f"{out}/index.json"],
        ["index", "search", index, *QUERIES, "--html", f"{out}/search.html", "--json", f"{out}/search.json"],
    ]
    seconds: dict[str, float] = {}
    for line in lines:
        print(f"\n$ mmcontrast {shlex.join(line)}", flush=True)
        begun = time.perf_counter()
        command(line)
        seconds[" ".join(line[:2])] = round(time.perf_counter() - begun, 1)

    results = {(r["dataset"], r["task"]): r["metrics"] for r in json.loads((out / "eval.json").read_text())}
    test, style = f"{data}/test", f"{data}/style"
    scores: dict[str, Any] = {
        "zero_shot": results[test, "zeroshot_classification"],
        "retrieval": results[test, "zeroshot_retrieval"],
        "unseen_style": results[style, "zeroshot_classification"] | results[style, "zeroshot_retrieval"],
        "index": json.loads((out / "index.json").read_text())["quality"],
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_of": seconds,
    }
    text = json.dumps(scores, indent=2, allow_nan=False) + "\n"
    (out / _MARK).write_text(text)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text)
    _tell(scores, out)
    return scores


def _make_room(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise ConfigError(f"{out} holds something else; name a new folder with --out")
    for name in ("data", "run", "index"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).write_text("{}\n")  # from here on, the folder is ours to make anew


def _tell(scores: dict[str, Any], out: Path) -> None:
    zero_shot, retrieval, style = scores["zero_shot"], scores["retrieval"], scores["unseen_style"]
    print(f"\nPictures of concepts that were never trained on ({zero_shot['samples']:.0f}):")
    print(
        f"  named right among {zero_shot['classes']:.0f} names: {zero_shot['acc1']:.3f} "
        f"[{zero_shot['acc1_low']:.3f}, {zero_shot['acc1_high']:.3f}], chance {zero_shot['chance']:.3f}"
    )
    print(
        f"  found by their name within 10: {retrieval['text_to_image_recall@10']:.3f} "
        f"[{retrieval['text_to_image_recall@10_low']:.3f}, {retrieval['text_to_image_recall@10_high']:.3f}], "
        f"chance {retrieval['chance@10']:.3f}"
    )
    print(f"Line drawings, a style that was never trained on ({style['samples']:.0f}):")
    print(
        f"  named right among {style['classes']:.0f} names: {style['acc1']:.3f} "
        f"[{style['acc1_low']:.3f}, {style['acc1_high']:.3f}], chance {style['chance']:.4f}"
    )
    pages = ", ".join(str(out / name) for name in ("run/report.html", "eval.html", "search.html"))
    print(f"Look at {pages}; scores in {out / _MARK}; {scores['seconds']:.0f} seconds.")
    sys.stdout.flush()
