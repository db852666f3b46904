"""How the blocks of a tower are run: recomputed in the backward, compiled, or both. Neither changes a gradient.

Both take the place of a block's `forward`, under whatever hooks it has, so that parameters keep their names and
sharding stays outside: FSDP gathers a block's weights, and what is here runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from mmcontrast.config import ConfigError, suggest
from mmcontrast.encoders.depth import blocks

CompileMode = Literal["default", "max-autotune-no-cudagraphs"]
"""Those of torch.compile that do not reuse the memory of outputs: the gradient cache keeps several at a time."""

_VARIANTS = 64  # with and without gradient, of one row and of any number, of each kind of block


def recompute(towers: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Keep only the inputs of these towers' blocks, and run a block again when its backward comes.

    (Chen et al. 2016, arXiv:1604.06174.) The random numbers are those of the first time.

    The towers' own switches (`set_grad_checkpointing`, `gradient_checkpointing_enable`) do the same, but not all have
    one, and some recompute in ways that hooks of sharding do not bear.

    Args:
        towers: modality -> tower.
        names: modalities; "all" stands for every tower that has blocks.

    Raises:
        ConfigError: no such tower, or one without blocks.
    """
    from torch.utils.checkpoint import checkpoint

    for block in _blocks(towers, names, "checkpoint_activations"):
        _replace(block, lambda forward: partial(checkpoint, forward, use_reentrant=False))


def compile_blocks(towers: Mapping[str, nn.Module], mode: CompileMode = "default") -> None:
    """Let torch.compile make kernels of the blocks: alike ones share them, and an odd size is compiled once for all.

    Random numbers are drawn as without it (`fallback_random`). Inductor's own repeat from forward to forward, but are
    others than those of a forward that was not compiled, such as when too many sizes have come: the second pass of the
    gradient cache could then have other masks than the first.

    Raises:
        ConfigError: no tower has blocks.
    """
    import torch
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    dynamo.recompile_limit = max(_VARIANTS, dynamo.recompile_limit)
    for block in _blocks(towers, ("all",), "compile"):
        _replace(block, lambda forward: torch.compile(forward, mode=mode))


def _blocks(towers: Mapping[str, nn.Module], names: Sequence[str], setting: str) -> list[nn.Module]:
    found = {name: blocks(tower) for name, tower in towers.items()}
    everything = "all" in names
    for name in () if everything else names:
        if name not in towers:
            raise ConfigError(f"{setting} names {name!r}{suggest(name, [*towers, 'all'])}")
        if not found[name]:
            raise ConfigError(
                f"{setting}: {type(towers[name]).__name__} of {name!r} is no stack of blocks; leave it out"
            )
    if names and not any(found.values()):
        raise ConfigError(f"{setting}: no tower is a stack of blocks; leave it out")
    return [block for name, own in found.items() if everything or name in names for block in own]


def _replace(block: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    block.forward = change(block.forward)
