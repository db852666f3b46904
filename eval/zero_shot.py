"""Zero-shot classification: name the class of a sample by the nearest prompt.

Letters: n samples, C classes, P prompts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, suggest
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.classified import Classified, softmax
from mmcontrast.eval.counting import BLOCK
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.labels import class_flags, class_numbers, labels_of, names_in, several
from mmcontrast.eval.ranks import rank
from mmcontrast.eval.result import Result
from mmcontrast.eval.task import EmbeddedTask, groups_of
from mmcontrast.eval.together import in_parts

_PROMPTS = 2048  # that a rank takes at once
_AT_ONCE = 256  # of those, that are encoded at once: they are short


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
        """Metadata field with the class, its name or its place in `classes`, from 0; or with a list of classes."""
        classes: tuple[str, ...] = ()
        """Names of all classes; without any, those that the data name or, at last, those that samples have."""
        templates: tuple[str, ...] = ()
        """Prompts, each with {c} for the class name; without any, those of the data, or the bare name."""
        prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts, instead of the templates."""
        names: dict[str, str] = field(default_factory=dict[str, str])
        """Class, as the labels have it -> what prompts call it, such as in another language; by default the same."""
        negative_templates: tuple[str, ...] = ()
        """Prompts with {c} for absence, as CheXzero's "no {c}" (Tiu et al. 2022, doi:10.1038/s41551-022-00936-9)."""
        negative_prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts for its absence, instead of the negative templates."""
        drop_empty: bool = False
        """Leave out samples whose list of classes is empty; otherwise they have none of the classes."""
        scale: float | None = None
        """Logit scale at which a softmax makes probabilities; the command takes the model's. None: no `ece`."""
        block: int = BLOCK
        """Samples that a core scores at once: 8 kB for each of them at most; changes no rank."""

    config: Config

    def __init__(self, config: Config) -> None:
        for template in (*config.templates, *config.negative_templates):
            if "{c}" not in template:
                raise ConfigError(f"the template {template!r} lacks {{c}}, the place of the class name")
        for name, prompts in (*config.prompts.items(), *config.negative_prompts.items()):
            if not prompts:
                raise ConfigError(f"the class {name!r} has an empty list of prompts; give it one, or leave it out")
            if config.classes and name not in config.classes:
                raise ConfigError(f"prompts are given for {name!r}, which is no class{suggest(name, config.classes)}")
        self.config = config

    def modalities(self) -> Sequence[str]:
        """What is classified; prompts are encoded by `score`."""
        return [self.config.modality]

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Over the n samples with a label; `Classified` tells what the numbers mean, of one class each or of lists.

        A sample's score of a class is its cosine with the class's prompts, less that with its negative prompts if there
        are some; a softmax over both, as CheXzero has it, orders the samples of a class in the same way.

        Raises:
            ConfigError: no sample has the modality or carries a label, a label is no class, or some classes alone have
                negative prompts.
        """
        c = self.config
        items, labels = labels_of(data, c.modality, c.label, drop_empty=c.drop_empty)
        classes = list(c.classes or data.source.classes) or names_in(labels)
        prompts = prompts_of(classes, c.prompts, c.templates or data.source.templates, c.names)
        heads = class_embeddings(model, c.prompt_modality, prompts)
        negative = self._negative_prompts(classes)
        if negative:
            heads = heads - class_embeddings(model, c.prompt_modality, negative)
        z, rows = data.z[c.modality][items], data.rows[c.modality][items]
        classified = Classified(
            task="zeroshot_classification",
            names=data.names_of(rows),
            positions=data.positions[rows].tolist(),
            classes=classes,
            scores=lambda part: (z[part].double() @ heads.double().T).numpy(),
            groups=groups_of(data.meta, rows.tolist(), c.bootstrap_by),
            probabilities=None if c.scale is None else softmax(c.scale),
            warnings=collisions(classes, prompts),
        )
        if several(labels):
            return classified.of_several(class_flags(labels, classes))
        truth = class_numbers(labels, classes)
        found = rank(z, heads, torch.from_numpy(truth), torch.arange(len(classes)), block=c.block)
        return classified.of_one(truth, found.best.numpy())

    def _negative_prompts(self, classes: Sequence[str]) -> list[Sequence[str]]:
        c = self.config
        found = [
            c.negative_prompts.get(name) or _filled(c.negative_templates, c.names.get(name, name)) for name in classes
        ]
        without = [name for name, texts in zip(classes, found, strict=True) if not texts]
        if without and len(without) < len(classes):
            raise ConfigError(
                f"the class {without[0]!r} has no negative prompts, but others have: their scores cannot be compared; "
                "give it some, or negative templates for all"
            )
        return [] if without else found


def prompts_of(
    classes: Sequence[str],
    prompts: Mapping[str, Sequence[str]],
    templates: Sequence[str],
    names: Mapping[str, str],
) -> list[Sequence[str]]:
    """Each class's own prompts, or the templates with its name; without templates the bare name.

    Raises:
        ConfigError: `names` has what is no class.
    """
    if unknown := [name for name in names if name not in classes]:
        raise ConfigError(f"names has {unknown[0]!r}, which is no class{suggest(unknown[0], classes)[:400]}")
    return [prompts.get(c) or _filled(templates or ("{c}",), names.get(c, c)) for c in classes]


def _filled(templates: Sequence[str], name: str) -> Sequence[str]:
    return [template.replace("{c}", name) for template in templates]


def class_embeddings(model: MultiEncoder, modality: str, prompts: Sequence[Sequence[str]]) -> Tensor:
    """[C, D] unit norm: the mean of each class's prompts [C][P]; a prompt of several classes is encoded once."""
    places: dict[str, int] = {}
    for text in (text for texts in prompts for text in texts):
        places.setdefault(text, len(places))
    # By length, so that few are padded; in pieces, which ranks share.
    texts = sorted(places, key=len)
    pieces = [texts[i : i + _PROMPTS] for i in range(0, len(texts), _PROMPTS)]
    sorted_z = torch.cat(in_parts(partial(model.encode, modality, batch_size=_AT_ONCE), pieces))
    z = torch.empty_like(sorted_z)
    z[[places[text] for text in texts]] = sorted_z
    means = torch.stack([z[[places[text] for text in texts]].mean(0) for texts in prompts])
    return torch.nn.functional.normalize(means, dim=-1)


def collisions(classes: Sequence[str], prompts: Sequence[Sequence[str]]) -> list[str]:
    """Warnings where classes cannot be told apart, since their prompts are the same."""
    by_prompts: dict[tuple[str, ...], list[str]] = {}
    for name, texts in zip(classes, prompts, strict=True):
        by_prompts.setdefault(tuple(" ".join(text.lower().split()) for text in texts), []).append(name)
    return [
        f"{len(names)} classes have the same prompts ({', '.join(map(repr, names[:3]))}): nothing tells them apart"
        for names in by_prompts.values()
        if len(names) > 1
    ]
