"""Pictures in folders of their classes -> shards: ImageNet, its variants, and whatever is laid out like them.

    FOLDER/train/n01440764/n01440764_10026.JPEG     likewise val or validation, and test

Names of the classes are read from a file beside them, in any of the forms in which they are given out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import Item, Row, Source, folder_there, numbered, picture_member
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS

FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""Split -> names of its folder."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """Pictures in SPLIT/CLASS folders, such as ImageNet, with the names of the classes.

    A sample is a picture (`jpg` or as it was), the name of its class (`txt`), and metadata: `label`, the name; `class`,
    the folder; `names`, language -> name, where there are translations; `file`.
    """

    folder: Path
    """Where train/, val/ and test/ are, those that you have."""
    names: str | None = None
    """What the classes are called: a file with lines "n01440764 tench, Tinca tinca" (LOC_synset_mapping.txt,
    words.txt), one name per line in the order of the folders (classnames.txt), or JSON (imagenet_class_index.json, or
    folder -> name); or "imagenet", CLIP's names of the thousand classes. By default the folders' names, _ as space."""
    translations: Path | None = None
    """JSON file: name in English -> {"synset_id": folder, language: name, …}, as Symile-M3 has it."""

    @property
    def splits(self) -> Sequence[str]:
        """Those that have a folder."""
        found = list(self._folders())
        if not found:
            raise ConfigError(
                f"{self.folder} has none of train, val, test with a folder per class; "
                "`mmcontrast prep folder` divides pictures that are not divided"
            )
        return found

    def _folders(self) -> dict[str, Path]:
        there = {split: [self.folder / name for name in names] for split, names in FOLDERS.items()}
        return {split: path for split, paths in there.items() for path in paths if path.is_dir()}

    def about(self, split: str) -> Mapping[str, Any]:
        """The folder's name."""
        return {"source": "imagefolder", "path": self.folder.resolve().name}

    def rows(self) -> Sequence[Row]:
        """One per picture, sorted by split and path."""
        folder_there(self.folder)
        classes = sorted({path.name for root in self._folders().values() for path in root.iterdir() if path.is_dir()})
        if not classes:
            raise ConfigError(f"{self.folder} has no folder per class in {', '.join(self._folders())}")
        names = class_names(self.names, classes)
        translated = {} if self.translations is None else read_translations(self.translations)
        found: list[tuple[str, tuple[str, Path, dict[str, Any]]]] = []
        for split, root in self._folders().items():
            for path in sorted(root.glob("*/**/*")):
                if path.suffix.lower()[1:] in FORMATS["image"]:
                    where, kind = path.relative_to(self.folder).as_posix(), path.relative_to(root).parts[0]
                    more = {"names": translated[kind]} if kind in translated else {}
                    found.append((where, (split, path, {"label": names[kind], "class": kind, "file": where, **more})))
        if not found:
            raise ConfigError(f"{self.folder} has no pictures; looked for {', '.join(FORMATS['image'])}")
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """A picture with the name of its class."""
        split, path, meta = row.data
        return [Item(split, Sample(f"{row.number:08d}", {**picture_member(path), "txt": meta["label"], "json": meta}))]


def class_names(source: str | None, classes: Sequence[str]) -> dict[str, str]:
    """Folder -> what its class is called.

    Args:
        source: as `ImageFolder.names`.
        classes: the folders, sorted.

    Raises:
        ConfigError: it cannot be read, leaves a class without name, or gives two the same.
    """
    if source is None:
        names = {kind: kind.replace("_", " ").strip() for kind in classes}
    elif source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        names = _in_order(list(IMAGENET_CLASSNAMES), classes, "ImageNet")
    else:
        try:
            text = Path(source).read_text("utf-8-sig")
            names = _from_json(json.loads(text)) if source.endswith(".json") else _from_lines(text, classes, source)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{source} cannot be read as names of classes: {error}") from None
    if missing := [kind for kind in classes if not names.get(kind)]:
        raise ConfigError(f"{source} has no name for {len(missing)} of {len(classes)} classes, such as {missing[0]!r}")
    counts = Counter(names[kind] for kind in classes)
    if twice := [kind for kind in classes if counts[names[kind]] > 1]:
        # As labels they would be one class.
        raise ConfigError(
            f"{source or 'the folders'} call both {twice[0]} and others {names[twice[0]]!r}; give them distinct names"
            + (" (--names imagenet has such for ImageNet)" if source != "imagenet" else "")
        )
    return {kind: names[kind] for kind in classes}


def read_translations(path: Path) -> dict[str, dict[str, str]]:
    """Folder -> language -> name.

    Raises:
        ConfigError: the file is something else.
    """
    try:
        value: Any = json.loads(path.read_bytes())
        return {
            str(entry["synset_id"]): {
                language: name
                for language, name in cast(dict[str, Any], entry).items()
                if isinstance(name, str) and language != "synset_id"
            }
            for entry in value.values()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(
            f'{path} cannot be read as translations, name -> {{"synset_id": …, "en": …}} ({type(error).__name__})'
        ) from None


def _from_json(value: Any) -> dict[str, str]:
    """From {"0": ["n01440764", "tench"]} or {"n01440764": "tench"}."""
    if not isinstance(value, dict):
        raise ValueError("not an object")
    found: dict[str, str] = {}
    for key, entry in cast(dict[str, Any], value).items():
        pair: list[Any] = cast(list[Any], entry) if isinstance(entry, list) else [key, entry]
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{key!r} is neither a name nor [folder, name]")
        found[pair[0]] = pair[1].replace("_", " ").strip()
    return found


def _from_lines(text: str, classes: Sequence[str], source: str) -> dict[str, str]:
    """From lines with a folder and its synonyms, the first of which is taken, or from names in the folders' order."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    pairs = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1:] for line in lines}
    if any(kind in pairs for kind in classes) and all(pairs.get(kind) for kind in classes):
        return {kind: pairs[kind][0].split(",")[0].strip() for kind in classes}
    return _in_order(lines, classes, source)


def _in_order(names: Sequence[str], classes: Sequence[str], source: str) -> dict[str, str]:
    if len(names) != len(classes):
        raise ConfigError(f"{source} has {len(names)} names for {len(classes)} folders")
    return dict(zip(classes, names, strict=True))
