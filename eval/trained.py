"""Questions that learn from labelled training data first: what a linear probe, or the nearest neighbours, can name.

What is chosen, such as a strength of regularisation, is chosen on a part of the training data that is held out, and
never on what is asked.

Letters: n samples, D dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.classified import Classified
from mmcontrast.eval.curves import Curves
from mmcontrast.eval.embed import embed
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.labels import class_flags, class_numbers, labels_of, names_in, several
from mmcontrast.eval.models import Foreign
from mmcontrast.eval.result import Result
from mmcontrast.eval.statistics import Floats
from mmcontrast.eval.task import EmbeddedTask, groups_of
from mmcontrast.randomness import permutation

_HELD = 5  # one in so many is held out


@dataclass(frozen=True)
class Examples:
    """Labelled samples.

    Attributes:
        x: [n, D] float32, unit norm.
        right: [n] int64, the class of each; or [n, C] bool, which classes each has.
        groups: [n], which samples must stay in one part; None where every sample is alone.
    """

    x: NDArray[np.float32]
    right: NDArray[Any]
    groups: NDArray[np.int64] | None = None

    def part(self, keep: NDArray[np.bool_]) -> Examples:
        """Some of them."""
        return Examples(self.x[keep], self.right[keep], None if self.groups is None else self.groups[keep])


@dataclass(frozen=True)
class Learned:
    """What came of training: x [b, D] -> scores [b, C] -> probabilities, and what a result says of it."""

    scores: Callable[[NDArray[np.float32]], Floats]
    probabilities: Callable[[Floats], Floats]
    facts: dict[str, float | None] = field(default_factory=dict[str, "float | None"])
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Posed:
    """What is asked, and what is learned from.

    Attributes:
        examples: what is learned from.
        x: [n, D] float32, unit norm, of what is asked.
        right: [n] int64 or [n, C] bool, its classes.
        classes: [C] names.
        names, positions, groups: [n] as `Classified` has them.
        warnings: what may mislead.
    """

    examples: Examples
    x: NDArray[np.float32]
    right: NDArray[Any]
    classes: Sequence[str]
    names: Sequence[str]
    positions: Sequence[int]
    groups: NDArray[np.int64] | None
    warnings: Sequence[str]


class TrainedTask(EmbeddedTask):
    """A question whose answer is learned from the training data's labels."""

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is classified, and what is learned from."""

        train: tuple[str, ...] = ()
        """Shards to learn from."""
        modality: str = "image"
        """What is classified."""
        label: str = "label"
        """Metadata field with the class, or with a list of classes."""
        classes: tuple[str, ...] = ()
        """Names of all classes; without any, those that the data name or, at last, those that samples have."""
        drop_empty: bool = False
        """Leave out samples whose list of classes is empty."""
        features: Literal["projected", "tower"] = "projected"
        """Of the shared space, or as the tower pools them, before their projection; both of unit norm."""
        group: str | None = None
        """Metadata field, such as patient, whose equal values stay on one side when the training data are divided."""

    def modalities(self) -> Sequence[str]:
        """What is classified."""
        return [self.config.modality]

    def score(self, model: MultiEncoder, data: Embedded, train: Embedded | None = None) -> Result:
        """Learn from `train`, by default the shards that the settings name, and answer about `data`.

        Raises:
            ConfigError: as `pose`.
        """
        raise NotImplementedError

    def pose(self, model: MultiEncoder, data: Embedded, train: Embedded | None) -> Posed:
        """Labels and features of both sides.

        Raises:
            ConfigError: data without the modality or the label, no training data, or training data that are those that
                are asked about.
        """
        c = self.config
        if train is None:
            if not c.train:
                raise ConfigError("there are no training data to learn from; name them with train")
            train = embed(model, c.train, modalities=self.modalities())
        if train.fingerprint == data.fingerprint:
            raise ConfigError("the training data are those that are asked about; name others with train")
        if c.features == "tower":
            data, train = (embed(tower(model), d.source, modalities=self.modalities()) for d in (data, train))
        (items, asked), (known_items, known) = (
            labels_of(d, c.modality, c.label, drop_empty=c.drop_empty) for d in (data, train)
        )
        classes = list(c.classes or data.source.classes) or names_in([*asked, *known])
        read: Callable[..., NDArray[Any]] = class_flags if several([*asked, *known]) else class_numbers
        field_of_group = c.group or c.bootstrap_by
        rows, known_rows = (d.rows[c.modality][at] for d, at in ((data, items), (train, known_items)))
        groups = groups_of(train.meta, known_rows.tolist(), field_of_group)
        return Posed(
            examples=Examples(train.z[c.modality][known_items].numpy(), read(known, classes), groups),
            x=data.z[c.modality][items].numpy(),
            right=read(asked, classes),
            classes=classes,
            names=data.names_of(rows),
            positions=data.positions[rows].tolist(),
            groups=groups_of(data.meta, rows.tolist(), c.bootstrap_by),
            warnings=_common(data, rows.tolist(), train, known_rows.tolist(), field_of_group),
        )


class Probe(TrainedTask):
    """A classifier that is trained on the labels."""

    task: str
    """What results call it."""
    renamed: Sequence[str] = ()
    """Metrics that CLIP_benchmark has, under names with lp_ before them."""

    def learn(self, train: Examples, classes: int) -> Learned:
        """Train on labelled samples, and choose settings on a part of them."""
        raise NotImplementedError

    def score(self, model: MultiEncoder, data: Embedded, train: Embedded | None = None) -> Result:
        """Learn, and name the classes of the samples of `data`; `Classified` tells what the numbers mean.

        A class without training samples cannot be found; samples of it count as wrong. Chance is a class at random, and
        `majority` the class that most training samples have.

        Raises:
            ConfigError: as `pose`.
        """
        p = self.pose(model, data, train)
        found = self.learn(p.examples, len(p.classes))
        classified = Classified(
            task=self.task,
            names=p.names,
            positions=p.positions,
            classes=p.classes,
            scores=lambda part: found.scores(p.x[part]),
            probabilities=found.probabilities,
            groups=p.groups,
            facts=found.facts,
            counts={"training_samples": len(p.examples.x)},
            warnings=[*found.warnings, *p.warnings],
        )
        if p.right.ndim > 1:
            return classified.of_several(p.right)
        counts = np.bincount(p.examples.right, minlength=len(p.classes))
        return replace(
            classified,
            chance={"majority": float((p.right == counts.argmax()).mean())},
            warnings=[*classified.warnings, *unseen(p)],
            renamed={f"lp_{name}": name for name in self.renamed},
        ).of_one(p.right)


def unseen(posed: Posed) -> list[str]:
    """A warning where samples are of classes that no training sample has."""
    counts = np.bincount(posed.examples.right, minlength=len(posed.classes))
    lost = int((counts[posed.right] == 0).sum())
    return [f"{lost} samples are of classes without training samples: they count as wrong"] if lost else []


def divided(examples: Examples, *names: str) -> tuple[Examples, Examples]:
    """To learn from, and to choose on: one sample in five, or one group; always the same ones.

    Raises:
        ConfigError: there are less than two samples, or groups, to divide.
    """
    numbers = np.arange(len(examples.x)) if examples.groups is None else examples.groups
    units = int(numbers.max()) + 1
    if units < 2:
        raise ConfigError(
            f"the training data are {units} {'sample' if examples.groups is None else 'group'}; to choose settings, a "
            "part is held out: at least 2 are needed"
        )
    held = np.isin(numbers, permutation(units, "held out", *names)[: -(-units // _HELD)])
    return examples.part(~held), examples.part(held)


def worth(scores: Floats, right: NDArray[Any]) -> float:
    """What settings are chosen by: the share of samples whose class scores highest, or of several classes the mAP."""
    if right.ndim == 1:
        of_right = scores[np.arange(len(right)), right]
        return float(((scores >= of_right[:, None]).sum(1) == 1).mean())
    if not right.any():
        return 0.0
    (found,) = Curves(scores, right).statistics()["mean_average_precision"](np.ones((1, len(right))))
    return float(np.nan_to_num(found))


def tower(model: MultiEncoder) -> MultiEncoder:
    """The model without its projections: it embeds what its towers pool, at unit norm.

    Raises:
        ConfigError: a model of another library, which gives projected embeddings alone.
    """
    if isinstance(model, Foreign):
        raise ConfigError("features tower: a model of another library gives its projected embeddings only")
    return _Towers(model)


class _Towers(MultiEncoder):
    def __init__(self, model: MultiEncoder) -> None:
        nn.Module.__init__(self)
        self.config, self.encoders = model.config, model.encoders
        self.projections = nn.ModuleDict({name: nn.Identity() for name in model.modalities})
        self.heads = nn.ModuleDict()
        self.training = model.training  # or else embedding would leave the shared towers in another mode


def _common(
    data: Embedded, rows: Sequence[int], train: Embedded, rows_known: Sequence[int], name: str | None
) -> list[str]:
    """A warning where one group, such as a patient, is in both data sets."""
    if name is None:
        return []
    seen = {str(train.meta[row].get(name)) for row in rows_known} - {"None"}
    both = [row for row in rows if str(data.meta[row].get(name)) in seen]
    return [f"{len(both)} samples have a {name} that is in the training data too"] if both else []
