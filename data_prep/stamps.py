"""Tux Paint stamps -> shards: photographs and drawings with captions in up to 77 languages, some with their sound.

The Debian package `tuxpaint-stamps-default` (GPL-2; single pictures vary) brings them. Captions are divided, not
pictures: stamps of one English caption stay in one split.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.debian import package_files
from mmcontrast.data_prep.source import Grouped, Item, Row, numbered
from mmcontrast.decode import audio, image
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import BadSample

PACKAGE = "tuxpaint-stamps-default"
FOLDER = "usr/share/tuxpaint/stamps"
ARTICLES: Mapping[str, tuple[str, ...]] = {
    "en": ("a", "an", "the", "some"),
    "es": ("un", "una", "unos", "unas", "el", "la", "los", "las"),
    "fr": ("un", "une", "des", "du", "de", "le", "la", "les", "l"),
    "it": ("un", "uno", "una", "il", "lo", "la", "l", "i", "gli", "le", "dei", "delle", "degli"),
    "ru": (),
}
"""Language -> words that a name does not begin with."""
_SIDE = 160


@dataclass(frozen=True, kw_only=True)
class Stamps(Grouped):
    """Tux Paint stamps: pictures with captions in many languages, from a Debian package.

    A sample is a picture (`png`, on white, at most 160 pixels wide and high), its English caption (`txt`), the sound
    of what it shows where there is one (`ogg` or `wav`), and metadata: `label`, the name in English; `names`, by
    language, for the languages of `ARTICLES`; `captions`, by locale; `group`, one of 16 kinds of things; `file`.
    """

    root: Path = Path("/")
    """/ if the package is installed, or the folder it was unpacked in."""
    fetch: bool = False
    """Download and unpack the package into the cache folder instead."""
    test: float = 0.2

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {"source": "Tux Paint stamps", "licence": "GPL-2; single pictures vary", "package": PACKAGE}

    def rows(self) -> Sequence[Row]:
        """One per file of captions."""
        folder = package_files("stamps", [PACKAGE], [FOLDER], root=self.root, fetch=self.fetch) / FOLDER
        captions = sorted(folder.rglob("*.txt"))
        if any(path.with_suffix(".svg").is_file() for path in captions):
            _renderer()  # now, and not after half of the pictures
        return numbered((path.relative_to(folder).as_posix(), path) for path in captions)

    def encode(self, row: Row) -> Sequence[Item]:
        """A stamp; one without an English caption or a picture is refused."""
        path: Path = row.data
        captions = read_captions(path.read_text("utf-8-sig"))
        if not captions.get("en"):
            raise BadSample("no English caption")
        members: dict[str, Any] = {"png": _picture(path), "txt": captions["en"]}
        for extension in ("ogg", "wav"):
            if (sound := path.with_suffix(f".{extension}")).is_file() and len(members) < 3:
                members[extension] = sound.read_bytes()
                audio(members[extension])
        names = {language: name(captions[language], language) for language in ARTICLES if captions.get(language)}
        members["json"] = {
            "label": names["en"],
            "names": names,
            "captions": captions,
            "group": row.where.partition("/")[0],
            "file": row.where,
        }
        return [Item(self.split_of(captions["en"].lower()), Sample(f"{row.number:06d}", members))]


def read_captions(text: str) -> dict[str, str]:
    """Locale -> caption: the first line is English, the others are `LOCALE.utf8=caption`."""
    first, *others = text.splitlines() or [""]
    found = {"en": first.strip()}
    for line in others:
        locale, equals, caption = line.partition(".utf8=")
        if equals and caption.strip() and locale.strip() != "en":
            found[locale.strip()] = caption.strip()
    return found


def name(caption: str, language: str) -> str:
    """A caption without its article and full stop, in lower case: `Un gato.` -> `gato`."""
    words = re.sub(r"[.!\"«»]", "", re.sub(r"(?i)\b(l|un)['’]", r"\1 ", caption)).lower().split()
    while len(words) > 1 and words[0] in ARTICLES[language]:
        words = words[1:]
    return " ".join(words)


def _picture(path: Path) -> bytes:
    """PNG on white with sides of at most `_SIDE`, which is what most of them have; a few are ten times larger."""
    from PIL import Image

    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    if not png.is_file() and not svg.is_file():
        raise BadSample("no picture")
    data = png.read_bytes() if png.is_file() else _renderer()(svg)
    picture = Image.fromarray(image(data).permute(1, 2, 0).numpy())
    picture.thumbnail((_SIDE, _SIDE))
    if picture.convert("L").getextrema() == (255, 255):
        raise BadSample("the picture is blank")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _renderer() -> Callable[[Path], bytes]:
    try:
        import resvg_py
    except ImportError:
        raise ConfigError("drawings are rendered by resvg: pip install 'mmcontrast[demo]'") from None

    def render(svg: Path) -> bytes:
        try:
            return bytes(resvg_py.svg_to_bytes(svg_string=svg.read_text("utf-8"), height=_SIDE))
        except ValueError as error:
            raise BadSample(f"the drawing cannot be rendered: {error}") from None

    return render
