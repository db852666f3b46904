"""Multimodal contrastive pretraining: any modalities, one shared space, the same exact gradient everywhere.

Importing this package is cheap: nothing heavy is loaded until a public name is used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcontrast.batch import Batch
    from mmcontrast.checkpoint import load
    from mmcontrast.encoders.multi import MultiEncoder
    from mmcontrast.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["Batch", "MultiEncoder", "Trainer", "load"]

# In a checkout eval/, data_prep/ and recipes/ stand beside this package; in a wheel, inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "data_prep").is_dir():
    __path__.append(str(_root))

_HOME = {
    "Batch": "mmcontrast.batch",
    "MultiEncoder": "mmcontrast.encoders.multi",
    "Trainer": "mmcontrast.trainer",
    "load": "mmcontrast.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmcontrast' has no attribute {name!r}")
