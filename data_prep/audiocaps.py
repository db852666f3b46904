"""AudioCaps -> shards: sounds of ten seconds from YouTube, with one caption for training and five for the other splits.

    FOLDER/train.csv, val.csv, test.csv     audiocap_id, youtube_id, start_time, caption; a row per caption
    FOLDER/**/NAME.wav (flac, ogg, mp3)     as downloaders name them: see `names`

Kim et al. 2019, https://aclanthology.org/N19-1011; https://github.com/cdjkim/audiocaps. Only the captions are given
out; recordings that cannot be had any more are refused, so say how many there are beside a result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcontrast.config import ConfigError
from mmcontrast.data_prep.source import (
    SPLITS,
    Item,
    Row,
    Source,
    captions_of,
    first_there,
    folder_there,
    numbered,
    sound_member,
)
from mmcontrast.data_prep.table import whole_table
from mmcontrast.shard_writer import Sample
from mmcontrast.shards import FORMATS, BadSample

COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")


@dataclass(frozen=True)
class Clip:
    """A recording and the rows that caption it."""

    split: str
    youtube: str
    start: str
    ids: Sequence[str]
    captions: Sequence[str]
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class AudioCaps(Source):
    """AudioCaps: sounds of YouTube with one caption or five (the extra [audio]).

    A sample is a sound (`wav` or as it was kept), its first caption (`txt`), and metadata: `captions`, all of them;
    `youtube` and `start`, in seconds; `audiocap_ids`; `seconds`. Splits are those of the corpus.
    """

    folder: Path
    """Where train.csv, val.csv and test.csv are, or dataset/ with them."""
    audio: Path | None = None
    """Where the recordings are, at any depth; by default in the same folder."""

    def about(self, split: str) -> Mapping[str, Any]:
        """Source and licence."""
        return {
            "source": "AudioCaps",
            "licence": "captions: MIT; recordings: of their owners, by YouTube's terms",
            "paper": "https://aclanthology.org/N19-1011",
        }

    def rows(self) -> Sequence[Row]:
        """One per recording."""
        folder = first_there(self.folder, "train.csv", "dataset/train.csv").parent
        audio = folder_there(self.audio or self.folder)
        there: dict[str, list[Path]] = {}
        for path in sorted(audio.rglob("*")):
            if path.suffix.lower()[1:] in FORMATS["audio"]:
                there.setdefault(path.stem, []).append(path)
        if not there:
            raise ConfigError(f"{audio} has no recordings; say with --audio where they are")
        found: list[tuple[str, Clip]] = []
        for split in SPLITS:
            clips: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
            for number, cells in whole_table(folder / f"{split}.csv", COLUMNS):
                clips.setdefault((str(cells["youtube_id"]), str(cells["start_time"])), []).append((number, cells))
            for (youtube, start), rows in clips.items():
                ids = [str(cells["audiocap_id"]) for _, cells in rows]
                captions = [str(cells["caption"] or "") for _, cells in rows]
                paths = [p for name in names(youtube, start, ids) for p in there.get(name, ())]
                paths.sort(key=lambda p: split not in p.relative_to(audio).parts)  # stable: the name decides next
                clip = Clip(split, youtube, start, ids, captions, paths[0] if paths else None)
                found.append((f"{split}.csv, row {rows[0][0]}, {youtube}", clip))
        return numbered(found)

    def encode(self, row: Row) -> Sequence[Item]:
        """A sound with its captions."""
        clip: Clip = row.data
        if clip.path is None:
            raise BadSample("no recording")
        caption, meta = captions_of(clip.captions)
        sound, seconds = sound_member(clip.path)
        start = float(clip.start) if clip.start.replace(".", "", 1).isdecimal() else None
        meta |= {"youtube": clip.youtube, "start": start, "audiocap_ids": list(clip.ids), "seconds": seconds}
        return [Item(clip.split, Sample(f"{row.number:06d}", {**sound, "txt": caption, "json": meta}))]


def names(youtube: str, start: str, ids: Sequence[str]) -> list[str]:
    """What a recording may be called, without extension: by its video, video and second, or a row's id."""
    return [f"{youtube}_{start}", f"Y{youtube}_{start}", youtube, f"Y{youtube}", *ids]
