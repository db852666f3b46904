"""How deep a parameter lies: the layers of any tower, from its input up.

Layer 0 is the stem (embeddings, patches, positions); then come the blocks; what follows them, such as a last norm, a
pooler or a projection, belongs to the last block. A timm model knows its own order and is asked (`group_matcher`, which
another module may have as well); otherwise blocks are what stands in a `ModuleList` or `Sequential`, in the order in
which a module names its children.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def layers(module: nn.Module) -> list[list[str]]:
    """Names of the module's parameters by layer, [stem, block, …, block]; each name is in one of them."""
    return [names for names in _layers(module, "") if names]


def _layers(module: nn.Module, prefix: str) -> list[list[str]]:
    """[stem, block, …]; the stem may be empty, and a module without blocks is all stem."""
    if hasattr(module, "group_matcher"):
        from timm.models import group_parameters

        matcher: Any = cast(Any, module).group_matcher(coarse=False)
        groups = cast(dict[int, list[str]], group_parameters(module, matcher))
        return [[prefix + name for name in groups[number]] for number in sorted(groups)]
    own = [name for name, _ in module.named_parameters(recurse=False)]
    stem, blocks = [prefix + name for name in own if "proj" not in name], list[list[str]]()
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        found = _stacked(child, path) if _is_stack(child) else _layers(child, path)
        if len(found) == 1:  # a leaf, before the blocks or after
            (blocks[-1] if blocks else stem).extend(found[0])
        elif not blocks:
            stem, blocks = stem + found[0], found[1:]
        else:  # a second trunk upon the first
            blocks += [found[0] + found[1], *found[2:]]
    (blocks[-1] if blocks else stem).extend(prefix + name for name in own if "proj" in name)
    return [stem, *blocks]


def blocks(module: nn.Module) -> list[nn.Module]:
    """The modules that a tower is a stack of, from its input up: units for sharding and for recomputing.

    Of stacks within stacks (stages) these are the innermost.
    """
    found: list[nn.Module] = []
    for child in module.children():
        inner = blocks(child)
        found += inner or (list(child.children()) if _is_stack(child) else [])
    return found


def _is_stack(module: nn.Module) -> bool:
    """Whether a list holds blocks: modules that have modules in them, unlike those of a perceptron."""
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and any(any(True for _ in m.children()) for m in module)


def _stacked(stack: nn.Module, prefix: str) -> list[list[str]]:
    blocks = [[f"{prefix}{name}.{n}" for n, _ in m.named_parameters()] for name, m in stack.named_children()]
    return [[], *blocks]
