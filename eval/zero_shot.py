"""Zero-shot classification: name the class of a sample by the nearest prompt.

Letters: n samples, C classes, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import Embedded, embed, fields_of
from mmcontrast.eval.statistics import bootstrap


class ZeroShot(Configurable):
    """Zero-shot classification with templates (CLIP, Radford et al. 2021, arXiv:2103.00020, sec. 3.1)."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """What is classified, against which names."""

        data: tuple[str, ...]
        """Shards whose samples carry a label."""
        modality: str = "image"
        """What is classified."""
        prompt_modality: str = "text"
        """What the class names are encoded as."""
        label: str = "label"
        """Metadata field with the class name."""
        templates: tuple[str, ...] = ("{c}",)
        """Prompts, each with {c} for the class name; a class is the mean of their embeddings."""

    def __init__(self, config: Config) -> None:
        for template in config.templates:
            if "{c}" not in template:
                raise ConfigError(f"the template {template!r} lacks {{c}}, the place of the class name")
        if not config.templates:
            raise ConfigError("zero-shot classification needs at least one template, such as '{c}'")
        self.config = config

    def run(self, model: MultiEncoder) -> dict[str, float | None]:
        """Embed and classify; the metrics of `score`."""
        return self.score(model, embed(model, self.config.data, modalities=[self.config.modality]))

    def score(self, model: MultiEncoder, data: Embedded) -> dict[str, float | None]:
        """acc1, acc5 (null below five classes) and mean_per_class_recall, chance, counts and a 95 % interval.

        A class name that ties with the right one counts as wrong, so equal embeddings do not score.

        Raises:
            ConfigError: no sample has the modality, or none carries a label.
        """
        c = self.config
        if c.modality not in data.rows:
            raise ConfigError(f"no sample has the modality {c.modality!r}: there is nothing to classify")
        names = [data.meta[int(row)].get(c.label) for row in data.rows[c.modality]]
        labelled = [i for i, name in enumerate(names) if name is not None]
        if not labelled:
            raise ConfigError(f"no sample has the label {c.label!r} in its metadata; fields: {fields_of(data.meta)}")
        classes = sorted({str(names[i]) for i in labelled})
        number = {name: k for k, name in enumerate(classes)}
        truth = torch.tensor([number[str(names[i])] for i in labelled])
        scores = data.z[c.modality][labelled] @ class_embeddings(model, c.prompt_modality, classes, c.templates).T
        right = scores.gather(1, truth[:, None])
        # How many other classes are not less near; so written, a score that is not a number never wins.
        rank = (~(scores < right)).sum(1) - 1
        hit1, hit5 = (rank < 1).double(), (rank < 5).double()
        per_class = torch.stack([hit1[truth == k].mean() for k in range(len(classes))])
        low, high = bootstrap(hit1)
        return {
            "acc1": float(hit1.mean()),
            "acc1_low": low,
            "acc1_high": high,
            "acc5": float(hit5.mean()) if len(classes) >= 5 else None,
            "mean_per_class_recall": float(per_class.mean()),
            "chance": 1 / len(classes),
            "classes": float(len(classes)),
            "samples": float(len(labelled)),
        }


def class_embeddings(model: MultiEncoder, modality: str, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[C, D] unit norm: the mean over templates of each class's prompts."""
    prompts = [template.replace("{c}", name) for name in classes for template in templates]
    z = model.encode(modality, prompts).view(len(classes), len(templates), -1).mean(1)
    return torch.nn.functional.normalize(z, dim=-1)
