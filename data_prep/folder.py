"""A folder of pictures and captions -> shards.

A picture's caption is the text file beside it (`dog.jpg`, `dog.txt`); without one, the name of its folder
(`golden_retriever/0001.jpg` -> "golden retriever"). The folder's name also becomes its label.
"""

from __future__ import annotations

from pathlib import Path

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.split import Item, Refused, Summary, write_splits
from mmcontrast.decode import image
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample


def prepare(folder: Path, out: Path, *, val: float, test: float, overwrite: bool = False) -> Summary:
    """Write the shards; pictures with equal captions of their own stay in one split, classes are divided.

    Raises:
        ConfigError: no such folder, no pictures, or none with a caption.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = [p for p in files if p.suffix.lower()[1:] in FORMATS["image"]]
    if not pictures:
        raise ConfigError(f"{folder} has no pictures; looked for {', '.join(FORMATS['image'])} in it and below")
    about = {"source": "folder", "path": folder.name}
    items = (_item(folder, path, number) for number, path in enumerate(pictures))
    return write_splits(items, out, val=val, test=test, overwrite=overwrite, about=about, total=len(pictures))


def _item(folder: Path, path: Path, number: int) -> Item | Refused:
    where = str(path.relative_to(folder)).encode("utf-8", "backslashreplace").decode()
    try:
        caption, label = _caption(folder, path)
        if not caption:
            return Refused(where, "no caption: no text file beside it, and not in a named folder")
        data = path.read_bytes()
        image(data)
    except UnicodeDecodeError:
        return Refused(where, f"{path.with_suffix('.txt').name} is not UTF-8")
    except OSError as error:
        return Refused(where, f"cannot be read: {error.strerror}")
    except BadSample as error:
        return Refused(where, str(error))
    meta = {"file": where} | ({"label": label} if label else {})
    extension = path.suffix.lower()[1:]
    # A class whose name stands in for captions must not move to one split as a whole.
    group = where if caption == label else caption
    return Item(Sample(f"{number:08d}", {extension: data, "txt": caption, "json": meta}), group)


def _caption(folder: Path, path: Path) -> tuple[str, str]:
    label = "" if path.parent == folder else path.parent.name.replace("_", " ").strip()
    label = label.encode("utf-8", "backslashreplace").decode()
    beside = path.with_suffix(".txt")
    if beside.is_file():
        text = " ".join(beside.read_text("utf-8-sig").split())
        if text:
            return text, label
    return label, label
