"""A recipe by name, by file, or a run's config.json -> the settings of a run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmcontrast.checkpoint import read_config
from mmcontrast.config import ConfigError, from_dict, suggest
from mmcontrast.trainer import Trainer


def load_recipe(name: str, trust: Collection[str] = ()) -> Trainer.Config:
    """Settings from a shipped recipe's name, a .py file with `recipe()`, or a config.json (or its run folder).

    A .py file is code and is run: it is the user's own. A config.json is data: it can only name this package's
    classes, and those of modules in `trust`.

    Raises:
        ConfigError: no such recipe, or one that makes no Trainer.Config.
    """
    path = Path(name)
    if path.suffix == ".json" or (path / "config.json").is_file():
        config = from_dict(read_config(path.parent if path.suffix == ".json" else path), trust=trust)
    elif path.suffix == ".py":
        config = _call(_module_of_file(path), name)
    else:
        known = sorted(p.stem for p in _folder().glob("*.py") if p.stem != "__init__")
        if name not in known:
            raise ConfigError(f"there is no recipe {name!r}{suggest(name, known)} (or give a .py file or config.json)")
        config = _call(importlib.import_module(f"mmcontrast.recipes.{name}"), name)
    if not isinstance(config, Trainer.Config):
        raise ConfigError(f"{name} makes a {type(config).__name__}, not a Trainer.Config")
    return config


def _folder() -> Path:
    import mmcontrast.recipes as recipes

    return Path(recipes.__path__[0])


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"there is no recipe file {str(path)!r}")
    # Known under its own name, and found again by loader workers and by `--trust NAME`.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _call(module: Any, name: str) -> Any:
    if not callable(getattr(module, "recipe", None)):
        raise ConfigError(f"{name} has no function recipe() that returns a Trainer.Config")
    return module.recipe()
