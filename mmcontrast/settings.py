"""Parts of a run that do not go together, found before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from mmcontrast.cached import batch_coupled_layers
from mmcontrast.config import ConfigError, suggest
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.objectives.base import Objective

if TYPE_CHECKING:
    from mmcontrast.trainer import Trainer


def check_config(config: Trainer.Config) -> None:
    """What the settings show alone.

    Raises:
        ConfigError: a value out of its limits, an objective that cannot have its name or that is not there at all, or
            a tracker that is not installed.
    """
    for name in ("steps", "global_batch", "micro_batch", "log_every"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1")
    for name in ("block", "eval_every"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least 1, or None")
    for name in ("keep_bytes", "keep_graph_bytes", "keep_graphs"):
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be 0 or more")
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise ConfigError(f"clip_norm is {config.clip_norm}; it must be above 0, or None")
    if not 0 <= config.seed < 2**63:
        raise ConfigError(f"seed is {config.seed}; it must be in 0..2^63 - 1")
    for name in config.objectives:
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ConfigError(f"the objective name {name!r} must be an identifier such as clip, and no word of torch's")
    if config.trackers:
        from accelerate.tracking import get_available_trackers

        known = {tracker.value for tracker in get_available_trackers()}
        for tracker in config.trackers:
            if tracker not in known:
                raise ConfigError(f"the tracker {tracker!r} is not installed or not known{suggest(tracker, known)}")
    if not config.objectives:
        raise ConfigError("the recipe has no objectives: there is nothing to train on")


def check_model(model: MultiEncoder, terms: Mapping[str, Objective]) -> None:
    """Whether the model, in training mode, and the terms of the loss are made for each other.

    Raises:
        ConfigError: a layer that mixes samples, a modality that is not there or that nothing reads, or two terms of
            one name.
    """
    coupled = batch_coupled_layers(model)
    if coupled:
        raise ConfigError(f"the layer {coupled[0]} mixes samples, which micro-batches change; replace or freeze it")
    for name, term in terms.items():
        for modality in term.modalities:
            if modality not in model.modalities:
                known = ", ".join(model.modalities)
                raise ConfigError(f"objective {name!r} reads the modality {modality!r}; the model has {known}")
    for modality in model.modalities:
        if not any(modality in reader.modalities for reader in [*terms.values(), *model.terms.values()]):
            raise ConfigError(f"no objective reads the modality {modality!r}; leave its tower out, or name it in one")
    for name in model.terms.keys() & terms.keys():
        raise ConfigError(f"a head and an objective are both called {name!r}; rename one, for their values' sake")


def micro_batches(model: MultiEncoder, micro_batch: int, by_tower: Mapping[str, int]) -> dict[str, int]:
    """Modality -> rows that a rank encodes at once.

    Raises:
        ConfigError: a tower is named that is not there, or one head would read two sizes.
    """
    for name, size in by_tower.items():
        if name not in model.modalities:
            raise ConfigError(f"tower_micro_batch names {name!r}{suggest(name, model.modalities)}")
        if size < 1:
            raise ConfigError(f"tower_micro_batch is {size} for {name!r}; it must be at least 1")
    found = {m: by_tower.get(m, micro_batch) for m in model.modalities}
    for name, head in model.terms.items():
        sizes = {m: found[m] for m in head.modalities}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"the head {name!r} reads towers of different micro-batches, {sizes}; give them one")
    return found
