"""An index that knows which model made it: build, change, search. Nothing heavy is imported until a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcontrast.eval.index.build import build_index
    from mmcontrast.eval.index.change import add, compact, delete, merge
    from mmcontrast.eval.index.query import Piece, Query
    from mmcontrast.eval.index.search import Index
    from mmcontrast.eval.index.stored import Hit, Stored

__all__ = ["Hit", "Index", "Piece", "Query", "Stored", "add", "build_index", "compact", "delete", "merge"]

_HOME = {
    "Hit": "stored",
    "Index": "search",
    "Piece": "query",
    "Query": "query",
    "Stored": "stored",
    "add": "change",
    "build_index": "build",
    "compact": "change",
    "delete": "change",
    "merge": "change",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mmcontrast.eval.index.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mmcontrast.eval.index' has no attribute {name!r}")
