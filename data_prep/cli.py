"""`mmcontrast prep SOURCE`. Imported by the command at its start, so a source is imported when it is asked for.

The flags of a source are its fields, then those of `Command`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import tyro

SOURCES = {
    "emoji": ("OpenMoji", "OpenMoji pictures and their names, from pip packages (the extra [demo])."),
    "stamps": ("Stamps", "Tux Paint stamps: pictures with captions in many languages, from a Debian package."),
    "prompts": (
        "Prompts",
        "Asterisk's spoken prompts with their texts in five languages, from Debian packages (the extra [audio]).",
    ),
    "spoken": (
        "Spoken",
        "OpenMoji pictures with their names, spoken by eSpeak and written (the extras [demo,speech]).",
    ),
    "watch": ("Watch", "Shoulder exercises, recorded by a smartwatch, and their names (the extra [watch])."),
    "ecg": ("SimulatedECG", "Electrocardiograms of a simulator, with their reports: for trying things out."),
    "ptbxl": ("PTBXL", "PTB-XL: electrocardiograms with SCP statements and reports (the extra [ecg])."),
    "mimic_ecg": (
        "MIMICECG",
        "MIMIC-IV-ECG: electrocardiograms with the machine's reports (the extra [ecg]).",
    ),
    "mimic_cxr": (
        "MIMICCXR",
        "MIMIC-CXR-JPG: chest X-rays, their reports, and the patient's electrocardiogram (the extra [ecg]).",
    ),
    "esc50": ("ESC50", "ESC-50: environmental sounds of 50 classes in five folds (the extra [audio])."),
    "audiocaps": ("AudioCaps", "AudioCaps: sounds of YouTube with one caption or five (the extra [audio])."),
    "clotho": ("Clotho", "Clotho: sounds of Freesound with five captions each (the extra [audio])."),
    "speech_commands": ("SpeechCommands", "Speech Commands: single words of many speakers (the extra [audio])."),
    "librispeech": ("LibriSpeech", "LibriSpeech, or speech in its layout, with what is said (the extra [audio])."),
    "common_voice": (
        "CommonVoice",
        "Common Voice: sentences read aloud, one folder per language (the extra [audio]).",
    ),
    "flickr30k": ("Flickr30k", "Flickr30k: photographs with five captions each, in Karpathy's splits."),
    "coco": ("COCO", "COCO Captions: photographs with five captions each, in Karpathy's splits or their own."),
    "imagefolder": ("ImageFolder", "Pictures in SPLIT/CLASS folders, such as ImageNet, with the names of the classes."),
    "folder": ("Folder", "A folder of pictures, each with a text file beside it or in a folder named after its class."),
    "table": ("Table", "A CSV, TSV, JSON-lines or Parquet table of picture files and captions."),
}
"""Module of this package -> its class, and the first line of that class's description."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What can be said of every preparation."""

    out: Path
    """Folder that gets a folder of shards per split: train/ and so on."""
    workers: int | None = None
    """Processes that encode; by default one per processor. 0 does it in this one."""
    max_samples: int = 10_000
    """Samples per shard, at most."""
    overwrite: bool = False
    """Replace shards that are there. Without it, a preparation that was cut off goes on."""


def prep(arguments: Sequence[str]) -> None:
    """`prep SOURCE …`: write its shards."""
    name, *rest = arguments or ["--help"]
    if name in SOURCES:
        run_source(name, rest)
    else:
        commands: dict[str, Callable[..., None]] = {
            known: _described(sentence) for known, (_, sentence) in SOURCES.items()
        }
        tyro.extras.subcommand_cli_from_dict(
            commands | {"index": prep_index},
            prog="mmcontrast prep",
            description="Raw data -> shards with a manifest.",
            args=[name, *rest],
        )


def prep_usage() -> None:
    """Raw data -> shards with a manifest; `mmcontrast prep --help` lists the sources."""


def run_source(name: str, arguments: Sequence[str]) -> None:
    """Parse a source's flags and write its shards."""
    kind: type[Any] = getattr(importlib.import_module(f"mmcontrast.data_prep.{name}"), SOURCES[name][0])
    parser = make_dataclass("Parser", [], bases=(Command, kind), kw_only=True, frozen=True)
    parser.__doc__ = kind.__doc__
    asked: Any = tyro.cli(
        parser,
        prog=f"mmcontrast prep {name}",
        args=arguments,
        config=(tyro.conf.PositionalRequiredArgs,),
    )

    from mmcontrast.data_prep.prepare import prepare
    from mmcontrast.processes import processors

    source = kind(**{field.name: getattr(asked, field.name) for field in fields(kind)})
    workers = processors() if asked.workers is None else asked.workers
    prepare(source, asked.out, workers=workers, max_samples=asked.max_samples, overwrite=asked.overwrite)


def prep_index(shards: tyro.conf.Positional[str], out: Path | None = None, overwrite: bool = False) -> None:
    """Index and manifest for shards that others wrote, such as img2dataset.

    Args:
        shards: the folder with the .tar files; or the address of one, of a glob or a range (http, s3, gs, hf …).
        out: for remote shards: the folder that gets their index and manifest, to be opened instead of them.
        overwrite: write the manifest again.
    """
    from mmcontrast.data_prep.index import prepare

    prepare(shards, out=out, overwrite=overwrite)


def _described(sentence: str) -> Callable[..., None]:
    def stand_in() -> None:
        pass

    stand_in.__doc__ = sentence
    return stand_in
