"""Tux Paint stamps -> shards: photographs and drawings with captions in up to 77 languages, some with their sound.

The Debian package `tuxpaint-stamps-default` (GPL-2; single pictures vary) brings them. Captions are divided, not
pictures: stamps of one English caption stay in one split.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.debian import package_files
from mmcontrast.data_prep.split import Item, Refused, Summary, write_splits
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


def prepare(
    out: Path,
    *,
    root: Path = Path("/"),
    fetch: bool = False,
    val: float = 0.05,
    test: float = 0.2,
    overwrite: bool = False,
) -> Summary:
    """Write OUT/train, OUT/val and OUT/test.

    A sample is a picture (`png`, on white, at most 160 pixels wide and high), its English caption (`txt`), the sound
    of what it shows where there is one (`ogg` or `wav`), and metadata: `label`, the name in English; `names`, by
    language, for the languages of `ARTICLES`; `captions`, by locale; `group`, one of 16 kinds of things; `file`.

    Args:
        out: where the shards are written.
        root: / if the package is installed, or where it was unpacked.
        fetch: download and unpack the package into the user's cache.
        val: share of the captions for validation.
        test: share of the captions for testing.
        overwrite: replace shards that are there.

    Raises:
        ConfigError: the package or what draws SVG is not there, or shards are there already.
    """
    folder = package_files("stamps", [PACKAGE], [FOLDER], root=root, fetch=fetch) / FOLDER
    captions = sorted(folder.rglob("*.txt"))
    if any(path.with_suffix(".svg").is_file() for path in captions):
        _renderer()  # now, and not after half of the pictures
    about = {"source": "Tux Paint stamps", "licence": "GPL-2; single pictures vary", "package": PACKAGE}
    items = (_item(folder, path, number) for number, path in enumerate(captions))
    return write_splits(items, out, val=val, test=test, overwrite=overwrite, about=about, total=len(captions))


def _item(folder: Path, path: Path, number: int) -> Item | Refused:
    where = path.relative_to(folder).as_posix()
    try:
        captions = read_captions(path.read_text("utf-8-sig"))
        if not captions.get("en"):
            return Refused(where, "no English caption")
        picture = _picture(path)
        if picture is None:
            return Refused(where, "no picture")
        members: dict[str, Any] = {"png": picture, "txt": captions["en"]}
        for extension in ("ogg", "wav"):
            if (sound := path.with_suffix(f".{extension}")).is_file() and len(members) < 3:
                members[extension] = sound.read_bytes()
                audio(members[extension])
    except UnicodeDecodeError:
        return Refused(where, "captions are not UTF-8")
    except (OSError, BadSample) as error:
        return Refused(where, getattr(error, "strerror", None) or str(error))
    names = {language: name(captions[language], language) for language in ARTICLES if captions.get(language)}
    meta = {
        "label": names["en"],
        "names": names,
        "captions": captions,
        "group": where.partition("/")[0],
        "file": where,
    }
    return Item(Sample(f"{number:06d}", members | {"json": meta}), captions["en"].lower())


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


def _picture(path: Path) -> bytes | None:
    """PNG on white with sides of at most `_SIDE`, which is what most of them have; a few are ten times larger."""
    from PIL import Image

    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    if not png.is_file() and not svg.is_file():
        return None
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
