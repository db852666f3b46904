"""Optimizers: which parameters, with which rate and decay, and the libraries' update rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError, Configurable, suggest
from mmcontrast.encoders.depth import layers
from mmcontrast.encoders.multi import MultiEncoder

Groups = list[dict[str, Any]]
"""Parameter groups of torch's; `lr_scale` is a group's rate relative to the schedule's."""


class Optimizer(Configurable):
    """Base of all optimizers: one rate, factors of it by tower and by depth, and decay of matrices only."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Settings that every optimizer has."""

        lr: float = 5e-4
        """Learning rate at the top of the schedule."""
        weight_decay: float = 0.2
        """On matrices and kernels of the towers; vectors (biases, gains) and objectives have none."""
        lr_scales: dict[str, float] = field(default_factory=dict[str, float])
        """Modality (its tower and projection), head or objective -> its rate, relative to lr."""
        layer_decay: dict[str, float] = field(default_factory=dict[str, float])
        """Modality -> rate of a layer of its tower relative to the layer above; the projection is the top.
        For pretrained towers (BEiT, Bao et al. 2022, arXiv:2106.08254, table 9: 0.65 to 0.85)."""

    def __init__(self, config: Config) -> None:
        if config.lr <= 0:
            raise ConfigError(f"lr is {config.lr}; it must be above 0")
        if config.weight_decay < 0:
            raise ConfigError(f"weight_decay {config.weight_decay} must not be below 0")
        for name, scale in config.lr_scales.items():
            if not 0 < scale < math.inf:
                raise ConfigError(f"lr_scales: {name} is {scale}; it must be above 0 (`freeze` stops a tower)")
        for name, decay in config.layer_decay.items():
            if not 0 < decay <= 1:
                raise ConfigError(f"layer_decay: {name} is {decay}; it must be above 0, and 1 at most")
        self.shared = config

    def groups(self, model: MultiEncoder, objectives: nn.Module) -> Groups:
        """Trained parameters by rate and decay, in a fixed order.

        Raises:
            ConfigError: a name in `lr_scales` or `layer_decay` that nothing has.
        """
        c = self.shared
        parts = {*model.modalities, *model.heads, *(name for name, _ in objectives.named_children())}
        for setting, names, known in (
            ("lr_scales", c.lr_scales, parts),
            ("layer_decay", c.layer_decay, set(model.modalities)),
        ):
            for name in names:
                if name not in known:
                    raise ConfigError(f"{setting}: nothing is called {name!r}{suggest(name, known)}")
        by_depth = {m: _depth_scales(model, m, decay) for m, decay in c.layer_decay.items()}
        found: dict[tuple[float, float], dict[str, Any]] = {}

        def add(parameter: nn.Parameter, part: str, scale: float, decay: float) -> None:
            if parameter.requires_grad:
                key = (c.lr_scales.get(part, 1.0) * scale, decay)
                group = found.setdefault(key, {"params": [], "weight_decay": decay, "lr_scale": key[0]})
                group["params"].append(parameter)

        for name, parameter in model.named_parameters():
            kind, part, rest = name.split(".", 2)  # such as encoders, image, tower.conv1.weight
            scale = by_depth.get(part, {}).get(rest, 1.0) if kind == "encoders" else 1.0
            add(parameter, part, scale, c.weight_decay if parameter.ndim >= 2 else 0.0)
        for name, parameter in objectives.named_parameters():
            add(parameter, name.partition(".")[0], 1.0, 0.0)
        return list(found.values())

    def optimizer(self, model: MultiEncoder, objectives: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over everything that trains.

        Raises:
            ConfigError: nothing trains, or the settings do not fit the model or the optimizer.
        """
        groups = self.groups(model, objectives)
        if not groups:
            raise ConfigError("no parameter trains: every tower is frozen and no objective learns")
        return self.make(groups)

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """The update rule over parameter groups."""
        raise NotImplementedError


def _depth_scales(model: MultiEncoder, modality: str, decay: float) -> dict[str, float]:
    """Parameter of a tower -> decay ** (layers from the projection down to it)."""
    found = layers(model.encoder(modality))
    return {name: decay ** (len(found) - depth) for depth, names in enumerate(found) for name in names}


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with CLIP's settings as defaults."""

    @dataclass(kw_only=True)
    class Config(Optimizer.Config):
        """Settings of the optimizer."""

        betas: tuple[float, float] = (0.9, 0.98)
        """Decay of the running mean and of the running square."""
        eps: float = 1e-6
        """Added to the root of the running square."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check_moments(config.betas, config.eps)
        self.config = config

    def make(self, groups: Groups) -> torch.optim.AdamW:
        """The rule as torch makes it."""
        c = self.config
        return torch.optim.AdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps)


# Of timm's own list: a second backward pass, and random draws and lists of tensors in the state.
_UNFIT = {"adahessian": "needs second derivatives", "kron": "cannot be resumed exactly"}


class Timm(Optimizer):
    """Any optimizer of timm by its name: lion, lamb, adafactorbv, adopt, nadamw, muon, sgdw and more.

    Rates do not carry over from AdamW: Lion wants a third to a tenth of them, with as much more weight decay (Chen et
    al. 2023, arXiv:2302.06675, section 5).
    """

    @dataclass(kw_only=True)
    class Config(Optimizer.Config):
        """Which optimizer, and what differs from timm's defaults."""

        name: str
        """Its name there."""
        betas: tuple[float, float] | None = None
        """Decay of the running moments; None takes the optimizer's own."""
        eps: float | None = None
        """Added to the root of the running square; None takes the optimizer's own."""
        options: dict[str, int | float | bool | str] = field(default_factory=dict[str, int | float | bool | str])
        """Further arguments of the optimizer, such as momentum or caution."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        optim = _timm()
        known = [str(name) for name in optim.list_optimizers()]
        if config.name not in known:
            raise ConfigError(f"timm has no optimizer {config.name!r}{suggest(config.name, known)[:400]}")
        for start, reason in _UNFIT.items():
            if config.name.startswith(start):
                raise ConfigError(f"the optimizer {config.name} {reason}; use another")
        _check_moments(config.betas, config.eps)
        info = optim.get_optimizer_info(config.name)
        for name, given, taken in (
            ("betas", config.betas, info.has_betas),
            ("eps", config.eps, info.has_eps),
        ):
            if given is not None and not taken:  # timm would drop it without a word
                raise ConfigError(f"the optimizer {config.name} has no {name}; leave it at None")
        self.config = config

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """The rule as timm makes it.

        Raises:
            ConfigError: an option that the optimizer does not take, or hardware or a package that it needs.
        """
        c, given = self.config, dict[str, Any](self.config.options)
        given |= {name: v for name, v in (("betas", c.betas), ("eps", c.eps)) if v is not None}
        try:
            return _timm().create_optimizer_v2(groups, c.name, lr=c.lr, weight_decay=c.weight_decay, **given)
        except (TypeError, ValueError, AssertionError, ImportError) as error:
            raise ConfigError(f"timm cannot make the optimizer {c.name} with {given}: {error}") from None


def _timm() -> Any:
    import timm.optim

    return timm.optim


def _check_moments(betas: tuple[float, float] | None, eps: float | None) -> None:
    if betas is not None and not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas are {betas}; both must be in 0..1, without 1")
    if eps is not None and eps <= 0:
        raise ConfigError(f"eps {eps} must be above 0")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The schedule's learning rate, for each group times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def optimizer_numbers(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """What an optimizer keeps beside tensors, as JSON: counters by group, and by parameter `PARAMETER/KEY`."""
    return {
        "groups": [{k: v for k, v in group.items() if isinstance(v, (int, float))} for group in optimizer.param_groups],
        "parameters": {
            f"{names[parameter]}/{key}": value
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if not isinstance(value, Tensor)
        },
    }


def load_optimizer_numbers(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], numbers: Mapping[str, Any]
) -> None:
    """The reverse of `optimizer_numbers`."""
    by_name = {name: parameter for parameter, name in names.items()}
    for group, saved in zip(optimizer.param_groups, numbers["groups"], strict=True):
        group.update(saved)
    for full, value in numbers["parameters"].items():
        name, _, key = full.rpartition("/")
        optimizer.state[by_name[name]][key] = value


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients down to a global 2-norm of at most `limit`; returns the norm before.

    Gradients may be whole or spread over ranks (DTensor); of the latter every rank must ask.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    spread = [p for p in with_grad if hasattr(p.grad, "full_tensor")]
    kinds = [kind for kind in ([p for p in with_grad if not hasattr(p.grad, "full_tensor")], spread) if kind]
    norms = [nn.utils.get_total_norm([cast(Tensor, p.grad) for p in kind]) for kind in kinds]
    full = [cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(full)) if full else torch.zeros(())
    if limit is not None:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, limit, norm)
    return norm
