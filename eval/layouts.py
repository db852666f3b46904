"""Data as others lay them out, recognised and read as they are: no code, no conversion.

    ROOT/test/nshards.txt, 0.tar …      CLIP_benchmark's webdataset layout, with classnames.txt and so on in ROOT
    ROOT/*.tar, or a glob, a range      shards
    ROOT/meta/esc50.csv, audio/         ESC-50 (UrbanSound8K and others of its form by a spec)
    ROOT/clotho_captions_*.csv          Clotho, five captions per sound
    ROOT/*.csv with youtube_id          AudioCaps, a caption per line, several lines per sound
    ROOT/CLASS/*.jpg                    a folder per class (ImageFolder), of pictures or sounds
    ROOT/examples.jsonl, images/        Winoground, two pictures and two captions of the same words in each line
    TABLE.csv, .tsv, .jsonl, .parquet   a line per sample, or per caption of one

Where several of ROOT/test, ROOT/val and ROOT/train are there, `split` says which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError, suggest
from mmcontrast.eval.sources import Files, Record, Shards, Source
from mmcontrast.manifest import MANIFEST
from mmcontrast.shards import FORMATS, open_shards
from mmcontrast.tables import TABLES, read_table

SPLITS = ("test", "val", "train")
_KIND_OF: Mapping[str, str] = {
    extension: kind for kind, extensions in FORMATS.items() if kind in ("image", "audio") for extension in extensions
}
_FILE_COLUMNS = ("filepath", "file_path", "file_name", "filename", "file", "path", "image", "audio")
_TEXT_COLUMNS = ("caption", "captions", "text", "title", "sentence", "description", "raw_text")
_LABEL_COLUMNS = ("label", "class", "category", "classname")


@dataclass(frozen=True)
class Reading:
    """How data are to be read; what is not said is recognised.

    Attributes:
        split: the part of a data set that has several.
        files: column of a table with files.
        texts: columns of a table with captions; of shards, members or metadata fields as `json:FIELD`.
        label: column of a table with the class.
        key: column of a table whose equal values are one sample; by default the file.
        where: column or metadata field -> the values to keep, such as fold -> 5.
        folder: where the files of a table lie; by default beside it.
    """

    split: str = "test"
    files: str | None = None
    texts: Sequence[str] = ()
    label: str | None = None
    key: str | None = None
    where: Mapping[str, Sequence[str]] = field(default_factory=dict[str, "Sequence[str]"])
    folder: Path | None = None


def open_data(names: str | Sequence[str], reading: Reading | None = None, *, layout: str | None = None) -> Source:
    """Open data in any layout that is known.

    Args:
        names: a folder, a table, or shards: globs, ranges, addresses; several names are shards.
        reading: how to read them.
        layout: name of the layout in `LAYOUTS`; by default it is recognised.

    Raises:
        ConfigError: there is nothing, it is of no known layout, or it cannot be read as the layout that is named.
    """
    how = reading or Reading()
    listed = [names] if isinstance(names, str) else list(names)
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"there is no layout {layout!r}{suggest(layout, LAYOUTS)}")
    path = Path(listed[0])
    found: Source | None = None
    if len(listed) == 1 and path.exists():
        for name in [layout] if layout else LAYOUTS:
            found = LAYOUTS[name](path, how)
            if found is not None:
                break
        if found is None and (layout or path.is_dir()):
            expected = _EXPECTED[layout] if layout else "; ".join(_EXPECTED.values())
            raise ConfigError(f"{path} is not laid out as {layout or 'anything that is known'}: {expected}")
    if found is None:
        found = Shards(open_shards(listed), texts=how.texts)
    return _kept(found, how.where)


def _kept(source: Source, where: Mapping[str, Sequence[str]]) -> Source:
    if not where:
        return source
    if not isinstance(source, Files):
        raise ConfigError("where: samples can be chosen of files and tables, not of shards")
    for name, values in where.items():
        if not any(name in record.meta for record in source.records):
            known = sorted({field for record in source.records[:100] for field in record.meta})
            raise ConfigError(f"where: no sample has {name!r}{suggest(name, known)}")
        wanted = {str(value) for value in values}
        source = replace(source, records=[r for r in source.records if str(r.meta.get(name)) in wanted])
    if not source.records:
        raise ConfigError(f"where: no sample has {', '.join(f'{n} {list(v)}' for n, v in where.items())}")
    return source


def _split(root: Path, split: str, has: Callable[[Path], bool]) -> Path | None:
    """The folder that holds the data itself: the root, or its part for the split."""
    if has(root):
        return root
    if has(root / split):
        return root / split
    other = [name for name in SPLITS if has(root / name)]
    if other:
        raise ConfigError(f"{root} has no {split!r}; it has {', '.join(other)}: choose one with split")
    return None


# ------------------------------------------------------------------------------------------------------- layouts


def _clip_benchmark(root: Path, how: Reading) -> Source | None:
    folder = _split(root, how.split, lambda path: (path / "nshards.txt").is_file()) if root.is_dir() else None
    if folder is None:
        return None
    about = folder.parent if folder == root and not (root / "classnames.txt").exists() else root
    try:
        count = int(_lines(folder / "nshards.txt")[0])
    except (ValueError, IndexError):
        raise ConfigError(f"{folder / 'nshards.txt'} does not say how many shards there are") from None
    shards = open_shards([str(folder / f"{number}.tar") for number in range(count)])
    kind = (_lines(about / "dataset_type.txt") or ["classification"])[0].strip().lower()
    if kind == "retrieval":
        return Shards(shards, lines=True, questions=("retrieval",))
    return Shards(
        shards,
        label="npy" if kind == "multilabel" else "cls",
        classes=[line.strip() for line in _lines(about / "classnames.txt")],
        templates=[line.strip() for line in _lines(about / "zeroshot_classification_templates.txt") if line.strip()],
        questions=("zero_shot",),
    )


def _esc50(root: Path, how: Reading) -> Source | None:
    table = root / "meta" / "esc50.csv"
    if not table.is_file():
        return None
    rows = read_table(table)
    records: list[Record] = []
    for number, row in rows:
        name = _needed(table, number, row, "filename")
        category = _needed(table, number, row, "category").replace("_", " ")
        meta = {"label": category, "fold": row.get("fold"), "esc10": row.get("esc10"), "clip": row.get("src_file")}
        records.append(Record(Path(name).stem, {"audio": [root / "audio" / name]}, meta=meta))
    classes = sorted({record.meta["label"] for record in records})
    return Files(root, records, classes, ["This is a sound of {c}."], ("zero_shot",))


def _clotho(root: Path, how: Reading) -> Source | None:
    names = {"test": "evaluation", "val": "validation", "train": "development"}
    tables = sorted(root.glob("clotho_captions_*.csv")) if root.is_dir() else [root] if "clotho" in root.name else []
    if not tables:
        return None
    part = names.get(how.split, how.split)
    chosen = [table for table in tables if table.stem.endswith(part)] or (tables if len(tables) == 1 else [])
    if not chosen:
        raise ConfigError(f"{root} has no captions of {part!r}; it has {', '.join(t.name for t in tables)}")
    (table, *_) = chosen
    part = table.stem.rpartition("_")[2]
    home = table.parent
    audio = next((f for f in (home / part, home / "audio" / part, home / f"clotho_audio_{part}") if f.is_dir()), home)
    columns = [f"caption_{i}" for i in range(1, 6)]
    return replace(_rows(table, replace(how, files="file_name", texts=columns, folder=audio)), questions=("retrieval",))


def _audiocaps(root: Path, how: Reading) -> Source | None:
    table = root if root.is_file() else next(iter(sorted(root.glob(f"**/{how.split}.csv"))), None)
    if table is None or table.suffix != ".csv" or "youtube_id" not in _head(table):
        return None
    home = table.parent
    folders = [f for name in ("", "audio", f"audio/{how.split}", how.split) if (f := home / name).is_dir()]
    sounds = {path.stem: path for folder in folders for path in sorted(folder.iterdir()) if _kind(path) == "audio"}
    captions: dict[str, list[str]] = {}
    files: dict[str, Path] = {}
    for number, row in read_table(table):
        clip = _needed(table, number, row, "youtube_id")
        names = (clip, f"Y{clip}", str(row.get("audiocap_id")), f"{clip}_{row.get('start_time')}")
        path = next((sounds[name] for name in names if name in sounds), None)
        if path is not None:  # of the clips, many have left YouTube
            files[clip] = path
            captions.setdefault(clip, []).append(_needed(table, number, row, "caption"))
    if not files:
        raise ConfigError(f"none of the sounds that {table} names lie in {', '.join(map(str, folders))}")
    return Files(
        home, [Record(clip, {"audio": [files[clip]]}, captions[clip]) for clip in files], (), (), ("retrieval",)
    )


def _winoground(root: Path, how: Reading) -> Source | None:
    table = root / "examples.jsonl"
    if not table.is_file() or "caption_1" not in _head(table):
        return None
    records: list[Record] = []
    for number, row in read_table(table):
        for i in (0, 1):
            name, caption = (_needed(table, number, row, f"{what}_{i}") for what in ("image", "caption"))
            path = root / "images" / (name if Path(name).suffix else f"{name}.png")
            meta = {"set": row.get("id", number), "tag": row.get("collapsed_tag")}
            records.append(Record(name, {"image": [path]}, [caption], meta))
    return Files(root, records, (), (), ("compositional",))


def _folders(root: Path, how: Reading) -> Source | None:
    def has_classes(path: Path) -> bool:
        return path.is_dir() and any(_medium(p) for p in path.iterdir() if p.is_dir() and p.name not in SPLITS)

    folder = _split(root, how.split, has_classes) if root.is_dir() else None
    if folder is None:
        return None
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _medium(path))
    records: list[Record] = []
    for number, name in enumerate(names):
        for path in sorted(p for p in (folder / name).rglob("*") if _kind(p) and p.is_file()):
            beside = path.with_suffix(".txt")
            texts = [" ".join(beside.read_text("utf-8-sig").split())] if beside.is_file() else []
            meta = {"label": name.replace("_", " "), "folder": name, "folder_number": number}
            records.append(Record(str(path.relative_to(folder)), {_kind(path): [path]}, texts, meta))
    return Files(folder, records, [name.replace("_", " ") for name in names], (), ("zero_shot",))


def _shards(root: Path, how: Reading) -> Source | None:
    def has_shards(path: Path) -> bool:
        return path.is_dir() and ((path / MANIFEST).is_file() or any(path.glob("*.tar")))

    folder = _split(root, how.split, has_shards) if root.is_dir() else None
    return None if folder is None else Shards(open_shards([str(folder)]), texts=how.texts)


def _table(root: Path, how: Reading) -> Source | None:
    tables = sorted(p for p in root.iterdir() if p.suffix in TABLES) if root.is_dir() else [root]
    named = [p for name in (how.split, "metadata") for p in tables if p.stem == name]
    chosen = named[:1] or (tables if len(tables) == 1 else [])
    if not chosen or chosen[0].suffix not in TABLES:
        return None
    return _rows(chosen[0], how)


def _rows(table: Path, how: Reading) -> Files:
    """A line per sample; lines with the same file, or the same `key`, are captions of one."""
    rows = list(read_table(table))
    columns = list(dict.fromkeys(name for _, row in rows[:1000] for name in row))
    files = how.files or next((c for c in _FILE_COLUMNS if c in columns), None)
    label = how.label or next((c for c in _LABEL_COLUMNS if c in columns), None)
    texts = list(how.texts) or [c for c in columns if c.lower() in _TEXT_COLUMNS or re.fullmatch(r"caption_?\d+", c)]
    for column in [files, label, how.key, *texts]:
        if column is not None and column not in columns:
            raise ConfigError(f"{table} has no column {column!r}{suggest(column, columns)}")
    if files is None:
        raise ConfigError(f"{table} has no column of files ({', '.join(_FILE_COLUMNS)}); name it in a spec: files: …")
    home = how.folder or table.parent
    found: dict[str, Record] = {}
    for number, row in rows:
        name = _needed(table, number, row, files)
        path = home / name
        kind = _kind(path)
        if not kind:
            raise ConfigError(f"{table}, row {number}: {name} is of no known kind: {', '.join(sorted(_KIND_OF))}")
        said = [text for column in texts for text in _captions(row.get(column))]
        key = str(row.get(how.key)) if how.key else name
        meta = {k: v for k, v in row.items() if k not in (files, *texts) and v not in (None, "")}
        if label is not None and row.get(label) not in (None, ""):
            meta["label"] = row[label]
        old = found.get(key)
        # As sets of captions are written: a line for each, all with the file's name.
        found[key] = replace(old, texts=[*old.texts, *said]) if old else Record(key, {kind: [path]}, said, meta)
    questions = [q for q, there in (("zero_shot", label), ("retrieval", texts)) if there]
    return Files(home, list(found.values()), (), (), questions)


LAYOUTS: Mapping[str, Callable[[Path, Reading], Source | None]] = {
    "clip_benchmark": _clip_benchmark,
    "shards": _shards,
    "esc50": _esc50,
    "clotho": _clotho,
    "audiocaps": _audiocaps,
    "winoground": _winoground,
    "folders": _folders,
    "table": _table,
}
"""Layout -> how it is opened; None where the data are not of it. In the order in which they are tried."""

_EXPECTED: Mapping[str, str] = {
    "clip_benchmark": "there is no nshards.txt",
    "shards": "there are no .tar files",
    "esc50": "there is no meta/esc50.csv",
    "clotho": "there is no clotho_captions_….csv",
    "audiocaps": "there is no test.csv with a column youtube_id",
    "winoground": "there is no examples.jsonl with caption_0 and caption_1",
    "folders": "there are no folders with pictures or sounds",
    "table": "there is no table (.csv, .tsv, .jsonl, .parquet), or several of which none is named after the split",
}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _head(table: Path) -> Mapping[str, Any]:
    return next((row for _, row in read_table(table)), {})


def _kind(path: Path) -> str:
    return _KIND_OF.get(path.suffix.lower()[1:], "")


def _medium(folder: Path) -> bool:
    return any(_kind(path) for path in folder.iterdir()) or any(
        _kind(path) for sub in folder.iterdir() if sub.is_dir() for path in sub.iterdir()
    )


def _captions(value: Any) -> list[str]:
    """A cell as captions: a list of them, or one."""
    values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]  # pyright: ignore[reportUnknownArgumentType]
    return [text for v in values if v is not None and (text := " ".join(str(v).split()))]


def _needed(table: Path, number: int, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value in (None, ""):
        raise ConfigError(f"{table}, row {number}: nothing stands in the column {column!r}")
    return str(value)
