"""What img2dataset left beside the tars that it wrote, for the manifest that `mmcontrast prep index` makes of them.

    00000.tar, 00000.parquet, 00000_stats.json      the last one comes when a tar is finished

https://github.com/rom1504/img2dataset, 1.47.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


def statistics(folder: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What the manifest says of the download, empty if it was none of img2dataset's; and what a person should know.

    Args:
        folder: of the tars.
        entries: the tars' entries in the manifest.
    """
    counts: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    warnings: list[str] = []
    unfinished: list[str] = []
    for entry in entries:
        name = str(entry["name"])
        path = folder / f"{name.removesuffix('.tar')}_stats.json"
        try:
            found: Any = json.loads(path.read_bytes())
            numbers = {key: int(found[key]) for key in _COUNTS}
            reasons = {str(reason): int(number) for reason, number in found["status_dict"].items()}
        except FileNotFoundError:
            unfinished.append(name)
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.append(f"{path.name} cannot be read ({type(error).__name__})")
            continue
        counts.update(numbers)
        statuses.update(reasons)
        if entry["samples"] != numbers["successes"]:
            warnings.append(f"{name} has {entry['samples']} samples, {path.name} says {numbers['successes']}")
    if not counts:
        return {}, warnings
    if unfinished:
        warnings.append(f"{len(unfinished)} tars were not finished: no _stats.json, such as {unfinished[0]}")
    failed = {reason: number for reason, number in statuses.most_common() if reason != "success"}
    return {"source": "img2dataset", **{key: counts[key] for key in _COUNTS}, "failures": failed}, warnings
