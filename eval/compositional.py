"""Compositional understanding: which caption belongs to which picture, where all of them have the same words.

Letters: S sets, M samples of a set, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, cast

import numpy as np
import torch

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.classified import SHOWN
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Items, Result
from mmcontrast.eval.statistics import mean
from mmcontrast.eval.task import EmbeddedTask, fields_of, groups_of

_LARGEST = 6  # samples of a set for which chance is added up over all orders


class Compositional(EmbeddedTask):
    """Winoground's scores (Thrush et al. 2022, arXiv:2204.03162, 3.2), for any two modalities and any size of sets.

    Samples with the same value of `set` are each other's hard negatives; a sample may also bring wrong texts of its
    own in its metadata, as SugarCrepe's do (Hsieh et al. 2023, arXiv:2306.14610).
    """

    @dataclass(kw_only=True)
    class Config(EmbeddedTask.Config):
        """What is compared with what."""

        pair: tuple[str, str] = ("image", "text")
        """The two modalities."""
        set: str = "set"
        """Metadata field: samples with equal values are a set."""
        negatives: str | None = None
        """Metadata field with wrong texts of the sample itself, one or a list, of the pair's second modality."""

    config: Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def modalities(self) -> Sequence[str]:
        """Both of the pair."""
        return self.config.pair

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """Over sets, for a pair (x, y), see below.

        - y_score: for every x of the set, its own y scores higher than all others of the set and its wrong texts.
        - x_score: for every y of the set, its own x scores higher than all others.
        - group_score: both.

        A tie is wrong, so equal embeddings do not score. Chance is that of scores in random order. Where no set has two
        samples only y_score is defined. Details: `failed`, sets that fail at the group score, at most 100.

        Raises:
            ConfigError: no sample has both modalities, or none is in a set of two or has wrong texts.
        """
        c = self.config
        x, y = c.pair
        rows = data.having(x, y).tolist()
        if not rows:
            raise ConfigError(f"no sample has both {x} and {y}: there is nothing to compare")
        sets: dict[str, list[int]] = {}
        for row in rows:
            value = data.meta[row].get(c.set)
            sets.setdefault(f"at {row}" if value is None else f"= {value}", []).append(row)
        wrong = {row: _texts(data.meta[row].get(c.negatives)) if c.negatives else [] for row in rows}
        asked = [members for members in sets.values() if len(members) > 1 or wrong[members[0]]]
        if not asked:
            raise ConfigError(
                f"no two samples have the same {c.set!r}, and none has wrong texts: name the metadata field of sets "
                f"with set, or of wrong texts with negatives; fields: {fields_of(data.meta)}"
            )
        first = {m: np.unique(data.rows[m].numpy(), return_index=True) for m in c.pair}
        place = {m: dict(zip(found.tolist(), at.tolist(), strict=True)) for m, (found, at) in first.items()}
        texts = list(dict.fromkeys(text for row in rows for text in wrong[row]))
        places = {text: k for k, text in enumerate(texts)}
        of_wrong = model.encode(y, texts).double() if texts else torch.zeros(0, 1)
        right: dict[str, list[float]] = {f"{y}_score": [], f"{x}_score": [], "group_score": []}
        chance: dict[str, list[float]] = {name: [] for name in right}
        for members in asked:
            zx, zy = (data.z[m][[place[m][row] for row in members]].double() for m in c.pair)
            scores = zx @ zy.T
            own = scores.diagonal()
            others = scores.masked_fill(torch.eye(len(members), dtype=torch.bool), -torch.inf)
            best_wrong = [
                float((of_wrong[[places[text] for text in wrong[row]]] @ z).max()) if wrong[row] else -math.inf
                for row, z in zip(members, zx, strict=True)
            ]
            y_right = bool((own > others.amax(1).maximum(torch.tensor(best_wrong, dtype=torch.float64))).all())
            x_right = bool((own > others.amax(0)).all())
            sizes = [len(wrong[row]) for row in members]
            for name, hit, by_chance in (
                (f"{y}_score", y_right, math.prod(1 / (len(members) + q) for q in sizes)),
                (f"{x}_score", x_right, len(members) ** -len(members)),
                ("group_score", x_right and y_right, _chance_of_both(sizes)),
            ):
                right[name].append(float(hit))
                chance[name].append(by_chance)
        several = any(len(members) > 1 for members in asked)
        names = list(right) if several else [f"{y}_score"]
        firsts = torch.tensor([members[0] for members in asked])
        items = Items(
            data.names_of(firsts),
            {name: mean(right[name]) for name in names},
            groups_of(data.meta, firsts.tolist(), c.bootstrap_by),
        )
        failed = [members for members, hit in zip(asked, right["group_score"], strict=True) if not hit]
        ours = {"image_acc": "image_score", "text_acc": "text_score", "acc": "group_score"}
        return Result(
            "image_caption_selection" if set(c.pair) == {"image", "text"} else "compositional",
            [items],
            chance={f"{name}_chance": float(np.mean(chance[name])) for name in names},
            counts={
                "sets": len(asked),
                "samples": sum(map(len, asked)),
                "wrong_texts": sum(len(wrong[r]) for r in rows),
            },
            undefined=[name for name in right if name not in names],
            renamed=ours if set(c.pair) == {"image", "text"} else {},
            details={
                "failed": [
                    {"item": data.names_of(torch.tensor(members[:1]))[0], "positions": data.positions[members].tolist()}
                    for members in failed[:SHOWN]
                ]
            },
        )


def _texts(value: Any) -> list[str]:
    values: list[Any] = list(cast(Sequence[Any], value)) if isinstance(value, (list, tuple)) else [value]
    return [str(v) for v in values if v is not None and str(v).strip()]


def _chance_of_both(wrong: Sequence[int]) -> float:
    """That all M own scores are the largest of their row, wrong texts included, and of their column.

    In the order of the own scores, smallest first, each must be larger than what is left of its row and column; over
    independent uniform scores that is a product of fractions for each order. (M - 1)! / (2M - 1)! without wrong texts.
    """
    m = len(wrong)
    if len(set(wrong)) == 1:
        return math.prod(1 / (2 * m + wrong[0] - k) for k in range(1, m + 1))
    if m > _LARGEST:
        raise ConfigError(
            f"a set of {m} samples has other numbers of wrong texts for each; chance is known for {_LARGEST} at most"
        )
    total = 0.0
    for order in permutations(wrong):
        below = np.cumsum([2 * (m - k) + 1 + q for k, q in enumerate(order, 1)])
        total += float(np.prod(1 / below))
    return total
