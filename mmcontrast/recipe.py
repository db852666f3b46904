"""A recipe by name, by file, or a run's config.json -> the settings of a run."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import read_config
from mmcontrast.config import ConfigError, from_dict, import_file, suggest
from mmcontrast.trainer import Trainer


def load_recipe(name: str, trust: Collection[str] = ()) -> Trainer.Config:
    """Settings from a shipped recipe's name, a .py file with `recipe()`, or a run's config.json or folder.

    A .py file is code and is run: it is the user's own. A config.json is data: it can only name this
    package's classes, and those of modules in `trust`.

    Raises:
        ConfigError: no such recipe, or one that makes no Trainer.Config.
    """
    path = Path(name)
    known = sorted(p.stem for p in _folder().glob("*.py") if p.stem != "__init__")
    if path.suffix == ".py" and path.resolve().parent == _folder():
        name = path.stem  # known as mmcontrast.recipes.NAME wherever it is named
    if path.name == "config.json" or (path / "config.json").is_file():
        config = from_dict(read_config(path.parent if path.name == "config.json" else path), trust=trust)
    elif name in known:
        config = _call(importlib.import_module(f"mmcontrast.recipes.{name}"), name)
    elif path.suffix == ".py":
        config = _call(import_file(path), name)
    else:
        raise ConfigError(f"there is no recipe {name!r}{suggest(name, known)}; or give a .py file or a config.json")
    if not isinstance(config, Trainer.Config):
        raise ConfigError(f"{name} makes a {type(config).__name__}, not a Trainer.Config")
    return config


def _folder() -> Path:
    import mmcontrast.recipes as recipes

    return Path(recipes.__path__[0]).resolve()


def _call(module: Any, name: str) -> Any:
    if not callable(getattr(module, "recipe", None)):
        raise ConfigError(f"{name} has no function recipe() that returns a Trainer.Config")
    return module.recipe()
