"""Zero-shot classification: name the class of a sample by the nearest prompt.

Letters: n samples, C classes, P prompts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, suggest
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.classified import Classified
from mmcontrast.eval.embed import Embedded
from mmcontrast.eval.labels import class_numbers, labels_of, names_in
from mmcontrast.eval.ranks import rank
from mmcontrast.eval.result import Result
from mmcontrast.eval.task import EmbeddedTask, groups_of


class ZeroShot(EmbeddedTask):
    """Zero-shot classification with templates (CLIP, Radford et al. 2021, arXiv:2103.00020, sec. 3.1)."""

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is classified, against which names."""

        modality: str = "image"
        """What is classified."""
        prompt_modality: str = "text"
        """What the class names are encoded as."""
        label: str = "label"
        """Metadata field with the class: its name, or its place in `classes`, from 0."""
        classes: tuple[str, ...] = ()
        """Names of all classes; without any, those that the data name or, at last, those that samples have."""
        templates: tuple[str, ...] = ()
        """Prompts, each with {c} for the class name; without any, those of the data, or the bare name."""
        prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts, instead of the templates."""
        block: int = 4096
        """Samples that are scored at once: memory is 4 bytes for each of them and each class."""

    config: Config

    def __init__(self, config: Config) -> None:
        for template in config.templates:
            if "{c}" not in template:
                raise ConfigError(f"the template {template!r} lacks {{c}}, the place of the class name")
        for name, prompts in config.prompts.items():
            if not prompts:
                raise ConfigError(f"the class {name!r} has an empty list of prompts; give it one, or leave it out")
            if config.classes and name not in config.classes:
                raise ConfigError(f"prompts are given for {name!r}, which is no class{suggest(name, config.classes)}")
        self.config = config

    def modalities(self) -> Sequence[str]:
        """What is classified; prompts are encoded by `score`."""
        return [self.config.modality]

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Over the n samples with a label, see below.

        - acc1, acc5 (undefined below five classes): the right class is the nearest, or among the five nearest.
        - mean_per_class_recall: acc1 of each class that has samples, averaged.

        A class that ties with the right one stands before it, so equal embeddings do not score.

        Raises:
            ConfigError: no sample has the modality or carries a label, or a label is no class.
        """
        c = self.config
        items, labels = labels_of(data, c.modality, c.label)
        classes = list(c.classes or data.source.classes) or names_in(labels)
        truth = class_numbers(labels, classes)
        prompts = [c.prompts.get(name) or self._prompts(name, data.source.templates) for name in classes]
        prototypes = class_embeddings(model, c.prompt_modality, prompts)
        z, rows = data.z[c.modality][items], data.rows[c.modality][items]
        found = rank(z, prototypes, torch.from_numpy(truth), torch.arange(len(classes)), block=c.block)
        heads = prototypes.double().T
        return Classified(
            task="zeroshot_classification",
            names=data.names_of(rows),
            positions=data.positions[rows].tolist(),
            classes=classes,
            scores=lambda part: (z[part].double() @ heads).numpy(),
            groups=groups_of(data.meta, rows.tolist(), c.bootstrap_by),
            warnings=collisions(classes, prompts),
        ).of_one(truth, found.best.numpy())

    def _prompts(self, name: str, templates: Sequence[str]) -> Sequence[str]:
        return [template.replace("{c}", name) for template in self.config.templates or templates or ("{c}",)]


def class_embeddings(model: MultiEncoder, modality: str, prompts: Sequence[Sequence[str]]) -> Tensor:
    """[C, D] unit norm: the mean of each class's prompts [C][P]; a prompt of several classes is encoded once."""
    places: dict[str, int] = {}
    for text in (text for texts in prompts for text in texts):
        places.setdefault(text, len(places))
    z = model.encode(modality, list(places))
    means = torch.stack([z[[places[text] for text in texts]].mean(0) for texts in prompts])
    return torch.nn.functional.normalize(means, dim=-1)


def collisions(classes: Sequence[str], prompts: Sequence[Sequence[str]]) -> list[str]:
    """Warnings where classes cannot be told apart, since their prompts are the same."""
    by_prompts: dict[tuple[str, ...], list[str]] = {}
    for name, texts in zip(classes, prompts, strict=True):
        by_prompts.setdefault(tuple(" ".join(text.lower().split()) for text in texts), []).append(name)
    return [
        f"{len(names)} classes have the same prompts ({', '.join(map(repr, names[:3]))}): none of them can be found"
        for names in by_prompts.values()
        if len(names) > 1
    ]
