"""What is asked of a model while it trains, and how ranks answer it together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mmcontrast.config import ConfigError
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.sharding import World


class Evaluator(Protocol):
    """A question.

    If it also has `details()`, plain values of its last answer, they are kept in `RUN/evaluation.json` for the report.
    """

    def run(self, model: MultiEncoder) -> Mapping[str, float | None]:
        """Name -> value."""
        ...


@runtime_checkable
class SharedEvaluator(Evaluator, Protocol):
    """One that all ranks can answer together; others are asked on rank 0, for which the rest wait."""

    def run_together(self, model: MultiEncoder, ranks: World, known: dict[Any, Any]) -> Mapping[str, float | None]:
        """Name -> value, the same on every rank; an error, too, comes to all of them.

        Args:
            model: which is asked.
            ranks: all of them.
            known: what questions to the same weights keep for each other, such as embeddings; empty at the first one.
        """
        ...


def ask(
    evaluators: Mapping[str, Evaluator], models: Mapping[str, MultiEncoder], world: World
) -> dict[str, float | None]:
    """MODEL/EVALUATOR/NAME -> value, of all evaluators on rank 0, of shared ones on every rank.

    Raises:
        ConfigError: a question cannot be answered; on every rank.
    """
    found: dict[str, float | None] = {}
    problem: ConfigError | None = None
    try:
        for kind, model in models.items():
            known: dict[Any, Any] = {}
            for name, evaluator in evaluators.items():
                if isinstance(evaluator, SharedEvaluator):
                    values = evaluator.run_together(model, world, known)
                elif world.rank == 0:
                    values = evaluator.run(model)
                else:
                    continue
                found |= {f"{kind}/{name}/{key}": value for key, value in values.items()}
    except ConfigError as error:
        problem = error
    # One that went on alone would wait for the others in vain.
    problem = world.gather_objects(problem)[0]
    if problem is not None:
        raise problem
    return found
