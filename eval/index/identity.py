"""Which space an index is of: what its manifest says of model, preprocessing and arithmetic, and who may be asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from mmcontrast.checkpoint import find_checkpoint, read_config
from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.index.store import different
from mmcontrast.eval.models import Foreign, load_asked

METRIC, NORMALISATION = "inner product", "unit length"
_LIBRARIES = ("mmcontrast", "faiss-cpu", "faiss-gpu", "torch", "torchvision", "torchaudio", "transformers", "pyarrow")


@dataclass(frozen=True)
class Origin:
    """The model of an index.

    Attributes:
        place: by which it is found again from any folder.
        model: in evaluation mode.
        hash: changes when weights, settings or preparation do.
        joint: how several known modalities are brought together: "product" where Symile trained it, else "sum".
    """

    place: str
    model: MultiEncoder
    hash: str
    joint: str


def open_model(given: str | Path, *, trust: Collection[str] = ()) -> Origin:
    """A model by what it is called: a run, or a foreign one as `eval.models.load_asked` takes it.

    Raises:
        ConfigError: there is no such model, or it cannot be loaded.
    """
    asked, path = load_asked(given, trust=trust), Path(given)
    if not isinstance(asked.model, Foreign):
        checkpoint = find_checkpoint(path)
        return Origin(str(checkpoint.resolve()), asked.model, asked.identity, joint_of(checkpoint))
    place = str(path.resolve())
    if not path.is_dir():
        architecture, _, weights = str(given).partition(",")
        place = f"{architecture},{Path(weights).resolve() if Path(weights).is_file() else weights}"
    return Origin(place, asked.model, asked.identity, "sum")


def shown_name(place: str) -> str:
    """A model's name for people: where on the disk it lies is nobody's business."""
    if Path(place).is_absolute():
        return "/".join(Path(place).parts[-2:])
    architecture, _, weights = place.partition(",")
    return f"{architecture},{Path(weights).name}"


def identity_of(origin: Origin, modality: str) -> dict[str, Any]:
    """The fields of `store.IDENTITY`, of an index of a modality, or of a pool such as image+text.

    Raises:
        ConfigError: the model has no such modality.
    """
    names = modality.split("+")
    if len(set(names)) < len(names):
        raise ConfigError(f"the pool {modality!r} names a modality twice; name each once")
    return {
        "model_hash": origin.hash,
        "modality": modality,
        "preprocessing": {m: _settings(origin.model.encoder(m).transform(train=False)) for m in names},
        "dim": origin.model.config.dim,
        "metric": METRIC,
        "normalisation": NORMALISATION,
    }


def _settings(transform: Any) -> dict[str, Any]:
    """What a transform is set to, as far as it is plain numbers and words; the model's hash covers the rest."""
    found: dict[str, Any] = {"transform": type(transform).__name__}
    for name, value in sorted(vars(transform).items()):
        plain = [*cast(Sequence[Any], value)] if isinstance(value, (tuple, list)) else [value]
        if not name.startswith("_") and all(isinstance(v, (str, int, float)) for v in plain):
            found[name] = plain if isinstance(value, (tuple, list)) else value
    return found


def joint_of(checkpoint: Path) -> str:
    """How several known modalities are brought together: `product` where Symile trained the model, else `sum`."""
    objectives = read_config(checkpoint.parent).get("objectives")
    terms = cast(Mapping[str, Any], objectives).values() if isinstance(objectives, Mapping) else ()
    paths = [str(cast(Mapping[str, Any], t).get("class")) for t in terms if isinstance(t, Mapping)]
    return "product" if any(path.rpartition(":")[2] == "Symile" for path in paths) else "sum"


def libraries() -> dict[str, str]:
    """Versions of what made the vectors and searches them."""
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str, who: str) -> None:
    """Refuse another space, by the first field that differs.

    Raises:
        ConfigError: they differ.
    """
    name = different(ours, theirs)
    if name is not None:
        raise ConfigError(
            f"{what} was made with {name} {_short(ours[name])}, {who} has {_short(theirs[name])}: their spaces "
            "differ; give the right --model, or build it again"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
