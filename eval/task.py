"""What every question to a model has in common: in the training loop and from the command it is the same code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError, Configurable
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.embed import embed, remembering
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.result import Result
from mmcontrast.eval.together import sharing
from mmcontrast.sharding import World


class Task(Configurable):
    """A question: given a model, a `Result`."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every question has."""

        data: tuple[str, ...]
        """Shards to ask about."""
        bootstrap_by: str | None = None
        """Metadata field such as patient: intervals are over its values instead of over single samples."""

    config: Any
    last: Result | None = None
    """What was answered last."""

    def answer(self, model: MultiEncoder) -> Result:
        """Ask the model.

        Raises:
            ConfigError: data that cannot be read, or that cannot answer the question.
        """
        raise NotImplementedError

    def run(self, model: MultiEncoder) -> dict[str, float | None]:
        """The numbers of `answer`, by name."""
        self.last = self.answer(model)
        return self.last.flat()

    def run_together(self, model: MultiEncoder, ranks: World, known: dict[Any, Any]) -> dict[str, float | None]:
        """`run` on all of these ranks, each of which does a part of the work; the same on every one.

        Questions with the same `known` embed the same data once.
        """
        with sharing(ranks), remembering(known):
            return self.run(model)

    def details(self) -> dict[str, Any]:
        """What `run` answered last, as plain values, for a report that is drawn later; empty before."""
        return {} if self.last is None else self.last.to_json()


class EmbeddedTask(Task):
    """A question about the embeddings of one set of samples, which several questions can share."""

    def modalities(self) -> Sequence[str]:
        """What must be embedded."""
        raise NotImplementedError

    def score(self, model: MultiEncoder, data: Embedded) -> Result:
        """The result on samples that are embedded.

        Raises:
            ConfigError: data that cannot answer the question.
        """
        raise NotImplementedError

    def answer(self, model: MultiEncoder) -> Result:
        """Embed the data and score it."""
        data = embed(model, self.config.data, modalities=self.modalities())
        return self.located(self.score(model, data), data)

    def located(self, result: Result, data: Embedded) -> Result:
        """The same, with what finds its samples again to show them."""
        about = {
            "names": list(self.config.data),
            "fingerprint": data.fingerprint,
            "modalities": list(self.modalities()),
            "kinds": dict(data.kinds),
        }
        return replace(result, details={**result.details, "data": about})


def fields_of(meta: Sequence[Mapping[str, Any]]) -> str:
    """Names of the metadata fields, for messages."""
    return ", ".join(sorted({name for m in meta[:100] for name in m})) or "none"


def groups_of(meta: Sequence[Mapping[str, Any]], rows: Sequence[int], by: str | None) -> NDArray[np.int64] | None:
    """[len(rows)], 0..G-1: which rows share their value of a metadata field; a row without it is alone.

    Raises:
        ConfigError: no row has the field.
    """
    if by is None:
        return None
    values = [meta[row].get(by) for row in rows]
    if all(value is None for value in values):
        raise ConfigError(f"no sample has {by!r} in its metadata to resample by; fields: {fields_of(meta)}")
    numbers: dict[str, int] = {}
    named = (f"at {row}" if value is None else f"= {value}" for row, value in zip(rows, values, strict=True))
    return np.array([numbers.setdefault(name, len(numbers)) for name in named])
