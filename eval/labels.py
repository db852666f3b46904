"""Which classes samples have: one each, or lists of any number of them.

Letters: n samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, suggest
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.task import fields_of


def labels_of(data: Embedded, modality: str, label: str, *, drop_empty: bool = False) -> tuple[list[int], list[Any]]:
    """Places in z[modality] of what carries a label, and the labels: names, numbers, or lists of them.

    Args:
        data: samples with metadata.
        modality: of what is classified.
        label: metadata field.
        drop_empty: leave out what has an empty list of labels, too.

    Raises:
        ConfigError: no sample has the modality, or none the label.
    """
    if modality not in data.rows:
        raise ConfigError(f"no sample has the modality {modality!r}: there is nothing to classify")
    values = [data.meta[row].get(label) for row in data.rows[modality].tolist()]
    items = [i for i, value in enumerate(values) if value is not None and not (drop_empty and value in ([], ()))]
    if not items:
        raise ConfigError(f"no sample has the label {label!r} in its metadata; fields: {fields_of(data.meta)}")
    return items, [values[i] for i in items]


def several(labels: Sequence[Any]) -> bool:
    """Whether labels are lists of classes."""
    return any(isinstance(value, (list, tuple)) for value in labels)


def names_in(labels: Sequence[Any]) -> list[str]:
    """Names of the classes that the labels have, sorted."""
    return sorted({str(name) for value in labels for name in _listed(value)})


def class_numbers(labels: Sequence[Any], classes: Sequence[str]) -> NDArray[np.int64]:
    """[n]: each label's place in `classes`; a number that is no class's name is a place itself.

    Raises:
        ConfigError: a label is no class.
    """
    places: Mapping[str, int] = {name: place for place, name in reversed(list(enumerate(classes)))}
    found: list[int] = []
    for label in labels:
        if isinstance(label, int) and not isinstance(label, bool) and str(label) not in places:
            if not 0 <= label < len(classes):
                raise ConfigError(f"a sample has the label {label}; there are {len(classes)} classes, from 0")
            found.append(label)
        elif str(label) in places:
            found.append(places[str(label)])
        else:
            raise ConfigError(
                f"a sample has the label {label!r}, which is no class{suggest(str(label), classes)[:400]}"
            )
    return np.array(found, dtype=np.int64)


def class_flags(labels: Sequence[Any], classes: Sequence[str]) -> NDArray[np.bool_]:
    """[n, C]: which classes each list of labels has; a label alone is a list of one.

    Raises:
        ConfigError: a label is no class.
    """
    found = np.zeros((len(labels), len(classes)), dtype=bool)
    for row, value in zip(found, labels, strict=True):
        row[class_numbers(_listed(value), classes)] = True
    return found


def _listed(value: Any) -> Sequence[Any]:
    return cast(Sequence[Any], value) if isinstance(value, (list, tuple)) else [value]
