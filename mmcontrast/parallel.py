"""How the weights lie on the ranks: whole on each of them (one process, DDP), or a part on each (FSDP2).

What the trainer asks is the same of both: a model to call, contexts that say whether a backward sends gradients to
the other ranks, and whole tensors for checkpoints. Gradients come out averaged over ranks in both.

FSDP2 is torch's own `fully_shard` (Accelerate leaves its FSDP plugin out on a CPU, without a word). A block of a tower
is gathered as one, then what else the tower has. Towers, projections and heads are roots of their own, so that each
can be called by itself. Parameters are DTensors, split along their first dimension.

Letters: W ranks, P bytes of a model's parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmcontrast.config import ConfigError
from mmcontrast.encoders.depth import blocks
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.optim import Groups, Optimizer


class Layout(Protocol):
    """Where the weights of a model are, and how its gradients come together."""

    @property
    def model(self) -> nn.Module:
        """What is called to encode."""
        ...

    def accumulating(self) -> AbstractContextManager[None]:
        """Forward and backward that only add up gradients on this rank."""
        ...

    def reducing(self) -> AbstractContextManager[None]:
        """The last backward of a step, which averages over ranks what all of them have added up."""
        ...

    def whole_model(self, model: MultiEncoder) -> MultiEncoder:
        """A model, which lies as `self.model` does, to be asked questions by each rank alone; every rank calls this."""
        ...


class Whole:
    """All weights on every rank: one process, or DDP."""

    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        """Wrap the model if there are several ranks; DDP refuses one of which nothing trains."""
        trains = any(p.requires_grad for p in model.parameters())
        self.accelerator = accelerator
        self.model: nn.Module = accelerator.prepare_model(model, evaluation_mode=not trains)

    def accumulating(self) -> AbstractContextManager[None]:
        """DDP's `no_sync`."""
        return self._unless_alone(self.accelerator.no_sync)

    def reducing(self) -> AbstractContextManager[None]:
        """DDP reduces in this backward."""
        return self._unless_alone(self.accelerator.trigger_sync_in_backward)

    def whole_model(self, model: MultiEncoder) -> MultiEncoder:
        """The model itself."""
        return model

    def _unless_alone(self, context: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.accelerator.num_processes == 1 else context(self.model)


class Sharded:
    """A part of each parameter on every rank: FSDP2.

    Weights are gathered once per step and stay whole until its last backward, or, with `reshard`, are gathered for
    each block of each micro-batch anew. What the micro-batches add up is whole on every rank, in float32, and goes
    through one reduce-scatter at the end of the step.
    """

    def __init__(self, accelerator: Any, model: MultiEncoder, *, reshard: bool = False) -> None:
        """Shard the model in place; parameters are others afterwards, of the same names.

        A tower that is frozen as a whole stays whole: it has neither gradients nor a moving average to share.

        Raises:
            ConfigError: a parameter that is a scalar.
        """
        self.accelerator, self.model, self.reshard = accelerator, model, reshard
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._assets = TemporaryDirectory(prefix="mmcontrast-assets-")
        model.save_assets(Path(self._assets.name))
        self.roots = self.share(model)
        self._synced(True)

    def share(self, model: MultiEncoder) -> list[FSDPModule]:
        """Shard another model of the same kind, such as a moving average, in the same way."""
        half = self.accelerator.mixed_precision == "bf16"
        return shard(model, self.mesh, dtype=torch.bfloat16 if half else None, reshard=self.reshard)

    def whole_model(self, model: MultiEncoder) -> MultiEncoder:
        """A whole copy on every rank, which takes the memory of all weights there."""
        copy: MultiEncoder = model.config.build(restore=Path(self._assets.name))
        copy.load_state_dict(whole(model.state_dict()))
        return copy.to(self.accelerator.device).eval()

    def accumulating(self) -> AbstractContextManager[None]:
        """No reduce-scatter, and the weights stay gathered if they may."""
        return self._setting(False)

    def reducing(self) -> AbstractContextManager[None]:
        """One reduce-scatter per block of what all backwards have added up."""
        return self._setting(True)

    @contextmanager
    def _setting(self, on: bool) -> Generator[None]:
        before = self._on
        self._synced(on)
        try:
            yield
        finally:
            self._synced(before)

    def _synced(self, on: bool) -> None:
        self._on = on
        for root in self.roots:
            root.set_requires_gradient_sync(on)
            root.set_is_last_backward(on)
            root.set_reshard_after_backward(on or self.reshard)


def shard(
    model: MultiEncoder, mesh: DeviceMesh, *, dtype: torch.dtype | None = None, reshard: bool = False
) -> list[FSDPModule]:
    """Apply `fully_shard` to the blocks and then to the rest of each tower, projection and head; returns these roots.

    With `dtype` the blocks, which hold nearly all weights, are gathered and run in it; their gradients are reduced in
    the parameters' own type. What is around them (patches, spectra, the last norm) stays as it is, for autocast.

    Raises:
        ConfigError: a parameter that is a scalar.
    """
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ConfigError(f"parallel fsdp cannot shard the scalar {name}: give it the shape [1], or use ddp")
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    of_blocks = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32)
    roots: list[FSDPModule] = []
    for part in [*model.encoders.values(), *model.projections.values(), *model.heads.values()]:
        if getattr(part, "frozen", False) or not any(True for _ in part.parameters()):
            continue
        for block in blocks(part):
            fully_shard(block, mp_policy=of_blocks, **options)
        root = fully_shard(part, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **options)
        # It warns that whoever changes this output in place loses the gradient; nobody does.
        warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(root).__name__}\) returned a view")
        roots.append(root)
    return roots


# ------------------------------------------------------------------------------------------ parts and wholes


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The whole of every tensor that is spread over ranks, in host memory; others as they are. Every rank must ask.

    Args:
        tensors: by name, in the same order on every rank.
        keep: whether this rank wants them; without, it gives its parts and gets nothing.
    """
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            t = t.full_tensor()
            t = t.cpu() if keep else t
        if keep:
            found[name] = t
    return found


def part_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor -> this rank's part of it, if a parameter of its shape is spread over ranks; no communication."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.to_local().device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, into parameters that may be spread over ranks."""
    own = cast(dict[str, Tensor], module.state_dict())
    module.load_state_dict({name: part_like(t, own[name]) if name in own else t for name, t in tensors.items()})


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of each lies in this rank's memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


# ------------------------------------------------------------------------------------------------ optimizers


def check_optimizer(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Three steps on a small matrix and a vector that are spread over the ranks, and the same on whole ones.

    Beside them lies a number that every rank has, like the temperature of an objective. Some rules look
    at a parameter as a whole (norms of it, factored moments) in ways that DTensors do not have.

    Raises:
        ConfigError: the results differ, or a state that cannot be saved and spread again.
    """
    name = getattr(getattr(optimizer, "config", None), "name", type(optimizer).__name__)
    problem = _spread_fault(optimizer, mesh)
    if problem is not None:
        raise ConfigError(
            f"the optimizer {name} does not work on parts of parameters ({problem}): use parallel ddp, or a rule that "
            "goes number by number, such as adamw or lion"
        )


def _spread_fault(optimizer: Optimizer, mesh: DeviceMesh) -> str | None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2 * mesh.size() + 1, 128), (mesh.size() + 1,), (1,))
    drawn = [[0.01 * torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]

    def put(t: Tensor, spread: bool) -> Tensor:
        t = t.to(mesh.device_type)
        return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) if spread and t.numel() > 1 else t

    def after(spread: bool) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(put(t.clone(), spread)) for t in drawn[0]]
        groups: Groups = [{"params": parameters, "weight_decay": 0.1, "lr_scale": 1.0}]
        rule = optimizer.make(groups)
        for gradients in drawn[1:]:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = put(gradient.clone(), spread)
            rule.step()
        return parameters, rule

    want, _ = after(False)
    try:
        got, rule = after(True)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        return " ".join((str(error) or type(error).__name__).split())[:160]
    for a, b in zip(whole({str(k): p.detach() for k, p in enumerate(got)}).values(), want, strict=True):
        if not torch.allclose(a, b.detach().cpu(), rtol=1e-4, atol=1e-7):
            return "it comes to other weights"
    for parameter, state in rule.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                return f"its {key} has another shape than the parameter"
    return None
