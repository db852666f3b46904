"""Classes and prompts of well-known data sets, as their papers publish them; data are the user's own copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmcontrast.config import ConfigError, suggest

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,
butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile,
cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower,
leopard, lion, lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter,
palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket,
rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper,
table, tank, telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf,
woman, worm"""
_PHOTOS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")


def _cifar(names: str, separator: str | None) -> dict[str, Any]:
    """CLIP's prompts for CIFAR (Radford et al. 2021): "a photo of a {c}." and 17 like it."""
    templates = [f"a {kind}photo of {article} {{c}}." for article in ("a", "the") for kind in _PHOTOS]
    templates += [f"a photo of {article} {size} {{c}}." for article in ("a", "the") for size in ("small", "big")]
    classes = [" ".join(name.split()) for name in names.split(separator)]
    return {"classes": classes, "templates": templates, "tasks": ["zero_shot"]}


def _imagenet() -> dict[str, Any]:
    """The 1,000 names and 80 prompts of CLIP, which open_clip carries; folders are WordNet ids in their order."""
    import open_clip

    names: Any = open_clip.IMAGENET_CLASSNAMES
    templates: Any = open_clip.OPENAI_IMAGENET_TEMPLATES
    zero_shot = {"label": "folder_number"}
    return {
        "classes": [str(name) for name in names],
        "templates": [str(template("{c}")) for template in templates],
        "tasks": {"zero_shot": zero_shot},
    }


def _captions() -> dict[str, Any]:
    """Karpathy's test split with all captions, as `mmcontrast prep flickr30k` and `prep coco` write it."""
    return {"texts": ["json:captions"], "tasks": ["retrieval"]}


def _ptbxl(field: str) -> dict[str, Any]:
    """One of PTB-XL's sets of classes, lists as `mmcontrast prep ptbxl` writes them: fold 10 is the test split.

    Recordings without any class of the set are left out, as in its benchmark (Strodthoff et al. 2020,
    arXiv:2004.13701); classes are called as the recordings' statements are.
    """
    return {
        "label": field,
        "drop_empty": True,
        "templates": ["{c}"],
        "bootstrap_by": "patient",
        "tasks": ["zero_shot"],
    }


PUBLISHED: Mapping[str, Callable[[], dict[str, Any]]] = {
    "imagenet": _imagenet,
    "cifar10": lambda: _cifar(_CIFAR10, None),
    "cifar100": lambda: _cifar(_CIFAR100, ","),
    "esc50": lambda: {"layout": "esc50", "templates": ["This is a sound of {c}."], "tasks": ["zero_shot"]},
    "clotho": lambda: {"layout": "clotho", "tasks": ["retrieval"]},
    "audiocaps": lambda: {"layout": "audiocaps", "tasks": ["retrieval"]},
    "flickr30k": _captions,
    "coco": _captions,
    "ptbxl_super": lambda: _ptbxl("super"),
    "ptbxl_sub": lambda: _ptbxl("sub"),
    "ptbxl_form": lambda: _ptbxl("form"),
    "ptbxl_rhythm": lambda: _ptbxl("rhythm"),
}
"""Name -> the settings of a spec, but for where the data lie."""


def published(name: str) -> dict[str, Any]:
    """The spec of a well-known data set.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"no data set is known as {name!r}{suggest(name, PUBLISHED)}")
    return PUBLISHED[name]()
