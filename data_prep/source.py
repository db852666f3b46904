"""What every raw corpus is to `prepare`: rows that are found quickly, each of which becomes samples or is refused.

    @dataclass(frozen=True, kw_only=True)
    class Letters(Grouped):
        \"\"\"Scanned letters and what they say.\"\"\"

        folder: Path
        \"\"\"Where the scans are.\"\"\"

        def about(self, split): return {"source": "letters", "licence": "CC0"}
        def rows(self): return numbered((p.name, p) for p in sorted(self.folder.glob("*.jpg")))
        def encode(self, row):
            members = {"jpg": checked_image(row.data), "txt": row.data.with_suffix(".txt").read_text()}
            return [Item(self.split_of(writer(row)), Sample(f"{row.number:08d}", members))]

Its fields are the flags of `mmcontrast prep`. Rows are listed in one process and encoded in several, so sources hold
settings alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mmcontrast.config import ConfigError
from mmcontrast.decode import audio, image
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Row:
    """What may become samples.

    Attributes:
        number: its place in the source, from which keys are made.
        where: how a person finds it: `row 17`, or a file's path.
        data: what `encode` needs; it goes to another process.
    """

    number: int
    where: str
    data: Any


@dataclass(frozen=True)
class Item:
    """A sample, and the split that it is for."""

    split: str
    sample: Sample


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus whose splits are its own."""

    @property
    def splits(self) -> Sequence[str]:
        """The splits that are written, each a folder; a wrong setting is found here, before anything is replaced.

        Raises:
            ConfigError: there cannot be any.
        """
        return SPLITS

    def about(self, split: str) -> Mapping[str, Any]:
        """What the manifest of a split says of it: source, licence, and whatever else holds for all samples."""
        raise NotImplementedError

    def rows(self) -> Iterable[Row]:
        """All rows, in an order that never changes; a sequence, where their number is known.

        Raises:
            ConfigError: the corpus is not there. It is raised here, not while rows are taken.
        """
        raise NotImplementedError

    def encode(self, row: Row) -> Sequence[Item]:
        """The samples of a row; none where it has nothing to give.

        Raises:
            BadSample: it is refused, for this reason, in few words that can be counted. OSError and UnicodeDecodeError
                refuse it as well.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Grouped(Source):
    """A corpus that is divided by a hash of each sample's group: a caption, a concept, a patient, a speaker."""

    val: float = 0.05
    """Share of the groups for validation."""
    test: float = 0.1
    """Share of the groups for testing."""

    @property
    def splits(self) -> Sequence[str]:
        """Training, and what has a share."""
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test < 1):
            raise ConfigError(f"val {self.val} and test {self.test} must be 0 or more and leave a share for training")
        return ["train", *(["val"] if self.val else []), *(["test"] if self.test else [])]

    def split_of(self, group: str) -> str:
        """The split of a group: a pure function of its name, so it never moves when others come or go."""
        place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
        return "test" if place < self.test else "val" if place - self.test < self.val else "train"


@dataclass(frozen=True, kw_only=True)
class Folded(Source):
    """A corpus that its authors divided into numbered folds, which keep a patient or a recording together."""

    folds: ClassVar[range]

    val_folds: tuple[int, ...] = ()
    """Which to validate on."""
    test_folds: tuple[int, ...] = ()
    """Which to test on."""

    @property
    def splits(self) -> Sequence[str]:
        """What has folds; training has those that are not held out."""
        held = [*self.val_folds, *self.test_folds]
        if not set(held) <= set(self.folds) or len(set(held)) < len(held):
            raise ConfigError(f"folds {held} are held out; name some of {_span(self.folds)}, each once")
        train = ["train"] if len(held) < len(self.folds) else []
        return [*train, *(["val"] if self.val_folds else []), *(["test"] if self.test_folds else [])]

    def split_of_fold(self, fold: int) -> str:
        """The split of a fold.

        Raises:
            BadSample: there is no such fold.
        """
        if fold not in self.folds:
            raise BadSample(f"its fold is none of {_span(self.folds)}")
        return "test" if fold in self.test_folds else "val" if fold in self.val_folds else "train"


def _span(numbers: range) -> str:
    return f"{numbers[0]} to {numbers[-1]}"


def numbered(rows: Iterable[tuple[str, Any]]) -> list[Row]:
    """Rows from their (where, data), numbered from 0."""
    return [Row(number, where, data) for number, (where, data) in enumerate(rows)]


def folder_there(folder: Path) -> Path:
    """The folder.

    Raises:
        ConfigError: it is none.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}")
    return folder


def first_there(folder: Path, *names: str) -> Path:
    """The first of several places where a part of a corpus may lie.

    Raises:
        ConfigError: none of them is there.
    """
    for name in names:
        if (path := folder / name).exists():
            return path
    raise ConfigError(f"{folder_there(folder)} has none of {', '.join(names)}; is it the corpus's folder?")


def captions_of(texts: Iterable[Any]) -> tuple[str, dict[str, Any]]:
    """Several captions -> the first one, for `txt`, and metadata with all of them under `captions`.

    Raises:
        BadSample: there is none.
    """
    captions = [caption for text in texts if (caption := " ".join(str(text or "").split()))]
    if not captions:
        raise BadSample("no caption")
    return captions[0], {"captions": captions}


def picture_member(path: Path) -> dict[str, bytes]:
    """Extension -> bytes of a picture that can be decoded.

    Raises:
        BadSample: it cannot, or it is of another format.
        OSError: it cannot be read.
    """
    extension = path.suffix.lower()[1:]
    if extension not in FORMATS["image"]:
        raise BadSample(f"not one of {', '.join(FORMATS['image'])}")
    data = path.read_bytes()
    image(data)
    return {extension: data}


def sound_member(path: Path) -> tuple[dict[str, bytes], float]:
    """Extension -> bytes of a recording that can be decoded, and its length in seconds.

    Raises:
        BadSample: it cannot, or it is of another format.
        OSError: it cannot be read.
        ConfigError: the extra [audio] is not installed.
    """
    extension = path.suffix.lower()[1:]
    if extension not in FORMATS["audio"]:
        raise BadSample(f"not one of {', '.join(FORMATS['audio'])}")
    data = path.read_bytes()
    sound = audio(data)
    sound.read()
    return {extension: data}, round(sound.frames / sound.rate, 3)


def signal_member(values: NDArray[Any]) -> dict[str, bytes]:
    """A recording [T, channels] as the member that `signals` reads.

    Floats become float32 and integers int16, the two types that hold what instruments record.

    Raises:
        BadSample: it is empty, or has values that are not finite or beyond 16 bits.
    """
    if not values.size or not np.isfinite(values).all():
        raise BadSample("signal has values that are not finite" if values.size else "signal is empty")
    whole = values.dtype.kind in "iu"
    if whole and (values.min() < -(1 << 15) or values.max() >= 1 << 15):
        raise BadSample("signal has values beyond 16 bits")
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(values, "<i2" if whole else "<f4"), allow_pickle=False)
    return {"npy": file.getvalue()}
