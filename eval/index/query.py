"""What is sought: pieces of one or several modalities, stored samples among them, brought together to one vector.

Two scores are known. A weighted sum of unit vectors, of unit length itself, is what pairwise models are asked with: its
inner product with a candidate is a cosine. Symile is trained on the product of all modalities (Saporta et al. 2024,
arXiv:2411.01053, sec. 3), so a candidate c scores <q, c> with q the elementwise product of all others; q is not
normalised, as in the paper, since that changes no order. Letters: D dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mmcontrast.config import ConfigError
from mmcontrast.eval.index.vectors import Floats

Joint = Literal["auto", "sum", "product"]
_ZERO = 1e-6


@dataclass(frozen=True)
class Piece:
    """A piece of a query: a value of a modality of the model, the key of a stored sample, or a vector.

    Attributes:
        modality: of the value or the vector; None for a stored sample, which is of the index's.
        value: as `MultiEncoder.encode` takes it.
        key: of a stored sample.
        z: [D] unit norm, instead of a value.
        weight: below 0, away from it.
    """

    modality: str | None = None
    value: Any = None
    key: str | None = None
    z: Floats | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """What is sought together.

    Attributes:
        pieces: at least one.
        joint: "sum", "product", or "auto": the product where Symile trained the model and the pieces allow it.
        where: answers must pass this filter; see `filters`.
        label: what a person calls it.
    """

    pieces: Sequence[Piece]
    joint: Joint = "auto"
    where: str | None = None
    label: str = field(default="", compare=False)


def bring_together(
    pieces: Sequence[tuple[str, Floats, float]], joint: Joint, *, trained: str, target: str, modalities: Collection[str]
) -> tuple[Floats, Literal["sum", "product"]]:
    """One vector [D] of several pieces, and whether it is their "sum" or their "product".

    In a product, pieces of one modality are added by weight and brought to unit length before.

    Args:
        pieces: (modality, unit vector [D], weight) each.
        joint: what is asked for.
        trained: how the model was trained: "sum" or "product".
        target: modality of the index.
        modalities: of the model.

    Raises:
        ConfigError: pieces that cancel each other, or of which no product can be made.
    """
    if not pieces:
        raise ConfigError("the query is empty; give it a text, a file or a stored sample")
    of: dict[str, list[tuple[str, Floats, float]]] = {}
    for piece in pieces:
        of.setdefault(piece[0], []).append(piece)
    problem = _no_product(of, target, modalities)
    if joint == "sum" or (joint == "auto" and (trained != "product" or problem is not None)):
        return _unit(pieces), "sum"
    if problem is not None:
        raise ConfigError(f"the pieces of the query cannot be multiplied: {problem}")
    return np.multiply.reduce([_unit(some) for some in of.values()]), "product"


def _no_product(of: dict[str, list[tuple[str, Floats, float]]], target: str, modalities: Collection[str]) -> str | None:
    """Why the product of these modalities is not what the model was trained on."""
    wanted = [m for m in modalities if m != target]
    lacking = [m for m in wanted if m not in of]
    if target not in modalities:
        return f"the index is of the pool {target}; ask for the sum"
    if target in of:
        return f"{target} is what is scored, so it cannot be among them; ask for the sum"
    if lacking:
        return f"it takes all of {' and '.join(wanted)}, and there is no {' and no '.join(lacking)}"
    for modality, some in of.items():
        if not any(weight > 0 for _, _, weight in some):
            return f"of {modality} there is only what to keep away from; ask for the sum"
    return None


def _unit(pieces: Sequence[tuple[str, Floats, float]]) -> Floats:
    if len(pieces) == 1 and pieces[0][2] > 0:
        return pieces[0][1]  # to the last bit
    total = np.add.reduce([np.float32(weight) * z for _, z, weight in pieces])
    norm = float(np.linalg.norm(total))
    if not norm > _ZERO:
        raise ConfigError("the parts of the query cancel each other; change a weight, or leave one out")
    return total / np.float32(norm)
