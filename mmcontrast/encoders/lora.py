"""Low-rank adaptation of a tower (LoRA, Hu et al. 2021, arXiv:2106.09685), by peft.

Of a layer's weight W only W + alpha / rank · B A trains, where A and B have `rank` rows and columns. Letters: B rows,
L and S tokens of queries and keys, C width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcontrast.config import ConfigError, Configurable


class Lora(Configurable):
    """Puts adapters beside the layers of a module; all else but what is `fresh` stops training."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """Which layers, and how many numbers."""

        rank: int = 0
        """Rank of the change; 0 adapts nothing, and the tower trains as a whole."""
        alpha: float = 16.0
        """The change is scaled by alpha / rank."""
        dropout: float = 0.0
        """Share of an adapter's inputs that training leaves out."""
        targets: tuple[str, ...] = ()
        """Last names of the layers that are adapted, such as q_proj and v_proj; by default all linear layers and
        convolutions of single places. Attention of torch's kind has q_proj, k_proj, v_proj and out_proj."""

    def __init__(self, config: Config) -> None:
        if config.rank < 0 or config.alpha <= 0 or not 0 <= config.dropout < 1:
            raise ConfigError(
                f"lora: rank {config.rank} must not be below 0, alpha {config.alpha} above 0, dropout "
                f"{config.dropout} in 0..1 (without 1)"
            )
        self.config = config

    def adapt(self, module: nn.Module, fresh: Sequence[str] = ()) -> None:
        """Add the adapters.

        Args:
            module: the tower; layers of it that do not train get none.
            fresh: prefixes of its parameters' names that were not trained before, and go on as they are.

        Raises:
            ConfigError: no layer that can be adapted has such a name, or peft is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ConfigError("LoRA is peft's: pip install 'mmcontrast[lora]'") from None
        from transformers.pytorch_utils import Conv1D

        own = {n for n, p in module.named_parameters() if p.requires_grad and n.startswith(tuple(fresh))}
        _split_attention(module, fresh)
        known = {n: layer for n, layer in module.named_modules() if _can_be(layer, Conv1D) and _trains(n, layer, fresh)}
        chosen = [n for n in known if not self.config.targets or n.rpartition(".")[2] in self.config.targets]
        if missing := set(self.config.targets) - {n.rpartition(".")[2] for n in chosen}:
            names = sorted({n.rpartition(".")[2] for n in known})
            raise ConfigError(f"lora: no layer is called {min(missing)!r}; there are {', '.join(names) or 'none'}")
        if not chosen:
            raise ConfigError(f"lora: {type(module).__name__} has no layer that could be adapted and trains")
        settings = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.config.dropout,
            target_modules="|".join(map(re.escape, chosen)),
            fan_in_fan_out=any(isinstance(known[n], Conv1D) for n in chosen),
        )
        inject_adapter_in_model(settings, module)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in own or ".lora_" in name)


def check_adapters(module: nn.Module, inputs: Any) -> None:
    """Run a tower forward and backward once.

    Raises:
        ConfigError: an adapter gets no gradient, since the tower reads the layer's weight without calling the layer.
    """
    with torch.enable_grad():
        module(inputs)[0].sum().backward()
    idle = [n for n, p in module.named_parameters() if ".lora_B." in n and p.grad is None]
    module.zero_grad(set_to_none=True)
    if idle:
        raise ConfigError(
            f"lora: {idle[0].partition('.lora_B.')[0]} and {len(idle) - 1} more are never called as layers, so they "
            "cannot be adapted; name others with `targets`"
        )


def _can_be(layer: nn.Module, conv1d: type[nn.Module]) -> bool:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return set(layer.kernel_size) == {1} and layer.groups == 1
    return isinstance(layer, (nn.Linear, conv1d))


def _trains(name: str, layer: nn.Module, fresh: Sequence[str]) -> bool:
    weight: Any = layer.weight
    return weight.requires_grad and not f"{name}.".startswith(tuple(fresh))


def _split_attention(module: nn.Module, fresh: Sequence[str]) -> None:
    """Put `SplitAttention` in the places of torch's attention, whose weights are no layers."""
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.MultiheadAttention) or f"{name}.".startswith(tuple(fresh)):
            continue
        same_width = layer.kdim == layer.vdim == layer.embed_dim
        if same_width and layer.batch_first and layer.bias_k is None and not layer.add_zero_attn:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, SplitAttention(layer))


class SplitAttention(nn.Module):
    """torch's `MultiheadAttention`, batch first, whose four projections are layers.

    peft's own adapter of it writes W + BA over W and takes BA off again in every forward: the rounding would add up in
    the frozen weights, and two passes of the gradient cache would differ.
    """

    # What torch's TransformerEncoderLayer asks before it goes around the layers to a fused kernel.
    batch_first, in_proj_bias, _qkv_same_embed_dim = True, None, True

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = whole.num_heads, whole.dropout
        self.q_proj, self.k_proj, self.v_proj = (_third(whole, k) for k in range(3))
        self.out_proj = nn.Linear(whole.embed_dim, whole.embed_dim, device="meta")
        self.out_proj.weight, self.out_proj.bias = whole.out_proj.weight, whole.out_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """[B, L, C], [B, S, C], [B, S, C] -> [B, L, C]; masks as torch has them: True or -inf is not looked at."""
        assert not need_weights, "the weights of the attention are not kept"
        q, k, v = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.ndim == 3:  # [B * heads, L, S]
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(found.transpose(1, 2).flatten(2)), None


def _third(whole: nn.MultiheadAttention, number: int) -> nn.Linear:
    layer = nn.Linear(whole.embed_dim, whole.embed_dim, device="meta")
    for name in ("weight", "bias"):
        tensor: Tensor | None = getattr(whole, f"in_proj_{name}")
        part = None if tensor is None else nn.Parameter(tensor.detach().chunk(3)[number].clone(), tensor.requires_grad)
        setattr(layer, name, part)
    return layer


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
