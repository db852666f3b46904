"""What several commands do with their words: `--trust`, and JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def take_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--trust MODULE` (any number) from the recipe's own flags."""
    trust: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--trust":
            trust.append(next(waiting, ""))
        elif argument.startswith("--trust="):
            trust.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    return trust, rest


def write_json(path: Path | None, value: Any) -> None:
    """Write a file of JSON, if one was asked for."""
    if path is not None:
        write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in a folder that may not be there yet; what UTF-8 cannot hold is written as an escape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8", "backslashreplace")
