"""The house: imports point one way, and importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What each part may import, beside the standard library and other packages.
LOW = {"config", "batch", "shards", "decode", "signals", "randomness", "tar"}
MAY = {
    "config": set[str](),
    "randomness": set[str](),
    "tar": {"config"},
    "batch": {"config"},
    "remote": {"config"},
    "shard_cache": {"config", "remote"},
    "manifest": {"config", "tar", "remote"},
    "shards": {"config", "tar", "remote", "shard_cache", "manifest"},
    "shard_writer": {"config", "tar", "manifest", "shards"},
    "decode": {"config", "shards"},
    "signals": {"shards"},
    "schedules": {"config"},
    "heads": {"config", "batch", "randomness", "schedules", "heads"},
    "encoders": LOW | {"encoders", "heads"},
    "objectives": {"config", "batch", "randomness", "schedules", "objectives"},
    "tiles": {"objectives"},
    "evaluate": {"batch", "objectives", "tiles"},
    "sharding": {"config", "batch", "objectives", "evaluate"},
    "cached": {"config", "batch", "randomness", "objectives", "sharding", "heads"},
    "data": LOW | {"shard_cache", "data"},
    "optim": {"config", "encoders"},
    "ema": {"config", "encoders"},
    "geometry": set[str](),
    "health": {"config", "batch", "geometry", "objectives", "health"},
    "progress": {"batch", "health"},
    "checkpoint": {"config", "batch", "shards", "encoders"},
    "interrupts": {"config"},
    "not_finite": {"batch"},
    "launch": {"config"},
    "lock": {"config"},
    "run_folder": {"config", "checkpoint", "sharding", "lock"},
    "run_state": {"checkpoint", "ema", "encoders", "optim", "parallel"},
    "questions": {"config", "encoders", "sharding"},
    "execution": {"config", "encoders"},
    "parallel": {"config", "encoders", "optim"},
    "settings": {"config", "cached", "encoders", "objectives", "trainer"},  # the trainer's settings, as a type
    "trainer": LOW
    | {"encoders", "objectives", "sharding", "cached", "data", "optim", "health", "checkpoint"}
    | {"interrupts", "not_finite", "run_folder", "run_state", "questions", "settings"}
    | {"schedules", "ema", "progress", "parallel", "execution", "launch"},
    "plan": {
        "config",
        "batch",
        "cached",
        "manifest",
        "encoders",
        "execution",
        "trainer",
        "recipe",
        "arguments",
        "plan",
    },
    "recipe": {"config", "checkpoint", "trainer"},
    "arguments": set[str](),
    "tables": {"config"},
    "processes": {"config"},
    "page": set[str](),
    "charts": {"page", "charts"},
    "check": LOW
    | {"encoders", "objectives", "sharding", "cached", "checkpoint", "trainer", "data", "recipe"}
    | {"parallel", "arguments", "page", "charts", "processes", "check"},
    "report": {"config", "checkpoint", "not_finite", "page", "charts", "eval", "report"},
    "eval": LOW
    | {"sharding", "check", "heads", "launch"}
    | {"encoders", "objectives", "data", "checkpoint", "manifest", "arguments", "tables", "page", "charts", "geometry"}
    | {"remote", "eval"},
    "data_prep": LOW | {"shard_writer", "manifest", "remote", "shard_cache", "processes", "tables", "data_prep"},
    "quickstart": {"config"},
}


def parts() -> dict[str, list[Path]]:
    """Part of the house -> its files; recipes, the command and the package itself may import anything."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "mmcontrast").rglob("*.py")):
        name = path.relative_to(ROOT / "mmcontrast").parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__", "cli"):
            found.setdefault(name, []).append(path)
    for name in ("eval", "data_prep"):
        found[name] = sorted((ROOT / name).rglob("*.py"))
    return found


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_imports_point_one_way() -> None:
    found = parts()
    assert found.keys() == MAY.keys()
    for part, paths in found.items():
        for path in paths:
            for name in imported(path):
                package, _, rest = name.partition(".")
                if package == "mmcontrast" and rest:
                    target = rest.partition(".")[0]
                    if not (part == "recipe" and target == "recipes"):  # to list what is shipped, by name
                        assert target in MAY[part], f"{path.relative_to(ROOT)} may not import mmcontrast.{target}"


def test_only_two_files_import_torch_distributed() -> None:
    """`sharding` for samples and losses, `parallel` for weights."""
    users = {
        path.name
        for paths in parts().values()
        for path in paths
        if any(name.startswith("torch.distributed") for name in imported(path))
    }
    assert users == {"sharding.py", "parallel.py"}


def test_the_command_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, mmcontrast, mmcontrast.cli\n"
        "print([m for m in ('torch','numpy','transformers','open_clip','accelerate','faiss') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
