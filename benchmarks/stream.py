"""How fast pictures and sounds come from shards, beside other packages; that they are right; that memory stays.

    python -m benchmarks.stream [--quick] [--only SECTION ...] [--json FILE]

Standard output has one JSON object per arm, standard error progress and at the end a Markdown table; FILE has all.

* Images: shards of JPEGs with captions -> random crops of 224 x 224 and tokens, in batches of 64. The peer is
  open_clip's own pipeline (`get_wds_dataset`, its transform and tokenizer), as shipped but for the line that newer
  versions of webdataset need (its issue 935; see `stream_arms.open_clip`). Its batches are normalised floats, ours are
  bytes that the tower normalises where it computes; `image_rate_W_K_normalised` does that here, in the process that
  takes the batches. W is the pictures' width (480 x 360 or 640 x 480, JPEG quality 90), K the workers.
* Raw: all bytes in the stream's shuffled order, checksums compared; the peer is webdataset's iterator, which reads the
  same shards from end to end and compares nothing.
* Audio: 10 s of 48 kHz from memory to samples; the peer is the faster of soundfile and torchcodec. `audio_crop_F` is
  10 s from the middle of 60 s / all 60 s, which a cost in proportion makes 0.17.

Ratios are medians of same-round ratios: rates ours / the peer's (more is better), times ours / the peer's. `image_rate`
is the least `image_rate_W_K`; `half_scale_rate_640` has pictures decoded at half their resolution, with one worker.
These are no ratios: `image_max_level` is the largest difference of any pixel of any crop from `stream_data.plain_crop`,
in levels of 255; `half_scale_psnr_640` the median in dB between half and exact decoding of the same box, with `_drawn`
of the box as drawn, up to a pixel off; `half_scale_same_class` the share of crops to which an ImageNet classifier
(EfficientNet-Lite0) gives the same name, `half_scale_cosine` the median cosine of its features, beside `quality_85_…`
for exact decoding of the same pictures saved again at quality 85; `memory_growth` the resident memory of process and
workers in the last fifth of the epochs / in the second fifth.

The data are described in `stream_data`. Two cores; fewer make the figures with workers meaningless.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import stream_arms as arms
from benchmarks import stream_data
from benchmarks.counters import resident_mb
from benchmarks.harness import Goal, Report, Work, alternate, command, in_processes, median_ratio, require, say, tell
from benchmarks.stream_data import SIZES, SOUND_RATE
from mmcontrast.decode import Box, audio, picture
from mmcontrast.encoders.image import random_box

SIDES = (arms.SIDE, arms.SIDE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of one run.

    Attributes:
        widths: of the pictures.
        workers: numbers of worker processes.
        batch: pictures in a batch.
        batches: in a pass.
        shards: tars; at least as many as workers.
        distinct: photographs; they come several times.
        rounds: measured rounds.
        crops: whose pixels are compared, per width.
        classified: crops that the classifier sees.
        seconds: of the recordings, a short and a long one.
        epochs: of the check of memory.
        epoch: batches in one of those.
    """

    widths: tuple[int, ...] = (480, 640)
    workers: tuple[int, ...] = (0, 1, 2)
    batch: int = 64
    batches: int = 20
    shards: int = 8
    distinct: int = 128
    rounds: int = 5
    crops: int = 200
    classified: int = 200
    seconds: tuple[float, float] = (10, 60)
    epochs: int = 20
    epoch: int = 16


QUICK = Plan(batches=10, rounds=3, distinct=32, crops=40, classified=50, epochs=10)

Section = Callable[[Plan, Path, Report], None]
"""Measures something with a folder for its data."""


def images(plan: Plan, folder: Path, report: Report) -> None:
    """Rates of our stream and of open_clip's."""
    for width in plan.widths:
        data = folder / str(width)
        pictures = plan.batch * plan.batches
        bits = stream_data.shards(data, pictures=pictures, distinct=plan.distinct, width=width, count=plan.shards)
        for workers in plan.workers:
            say(f"pictures of width {width}, {workers} workers")
            _images(plan, data, width, workers, bits, report)
    rates = {f"image_rate_{w}_{k}" for w in plan.widths for k in plan.workers}
    report.ratios["image_rate"] = min(report.ratios[name] for name in rates)
    halves = {k: report.ratios.get(f"half_scale_rate_640_{k}") for k in plan.workers}
    found = halves.get(1, next(iter(halves.values())))
    if found is not None:
        report.ratios["half_scale_rate_640"] = found


def _images(plan: Plan, data: Path, width: int, workers: int, bits: float, report: Report) -> None:
    sizes = {"workers": workers, "batch": plan.batch, "batches": plan.batches}
    ours = partial(arms.ours, data, **sizes)
    passes = {"ours": ours(), "ours normalised": ours(normalise=True), "open_clip": arms.open_clip(data, **sizes)}
    if width >= 640:
        passes["ours half"] = ours(half_scale=True)
    watch = arms.Stopwatch()
    skip = max(1, workers)
    works: dict[str, Work] = {name: partial(_timed, watch, start, skip) for name, start in passes.items()}
    seconds = alternate(works, rounds=plan.rounds, clock=watch)
    rows = plan.batch * (plan.batches - skip - 1)
    for name, values in seconds.items():
        rate = rows / statistics.median(values)
        more = {"width": width, "bits_per_pixel": bits, "pictures_per_second": rate, "rounds": len(values), **sizes}
        report.arm(f"images/{name}", seconds=statistics.median(values), **more)
    for name, label in (("ours", "image_rate_{}_{}"), ("ours normalised", "image_rate_{}_{}_normalised")):
        report.ratios[label.format(width, workers)] = median_ratio(seconds, "open_clip", name)
    if width >= 640:
        report.ratios[f"half_scale_rate_{width}_{workers}"] = median_ratio(seconds, "open_clip", "ours half")


def _timed(watch: arms.Stopwatch, start: arms.Pass, skip: int) -> int:
    return watch.steady(start(), skip)


def pixels(plan: Plan, folder: Path, report: Report) -> None:
    """How far crops are from the plain path, and half the resolution from the exact one."""
    say("pixels")
    for width in plan.widths:
        worst, differing, compared = 0, 0, 0
        near: list[float] = []
        drawn: list[float] = []
        for data, box in _crops(plan.crops, width, plan.distinct):
            found = picture(data)
            exact = found.crop(box, SIDES)
            apart = (exact.int() - stream_data.plain_crop(data, box, SIDES).int()).abs()
            worst, differing = max(worst, int(apart.max())), differing + int((apart > 0).sum())
            compared += apart.numel()
            if width >= 640:
                half = found.crop(box, SIDES, half_scale=True)
                near.append(psnr(half, found.crop(_even(box), SIDES)))
                drawn.append(psnr(half, exact))
        report.arm("pixels/ours", width=width, crops=plan.crops, max_level=worst, share_differing=differing / compared)
        report.ratios[f"image_max_level_{width}"] = worst
        if near:
            report.arm("pixels/ours half", width=width, crops=plan.crops, psnr=near_summary(near))
            report.ratios[f"half_scale_psnr_{width}"] = statistics.median(near)
            report.ratios[f"half_scale_psnr_{width}_drawn"] = statistics.median(drawn)
    report.ratios["image_max_level"] = max(report.ratios[f"image_max_level_{width}"] for width in plan.widths)


def _crops(count: int, width: int, distinct: int) -> list[tuple[bytes, Box]]:
    """Photographs with a crop of each as training draws them."""
    torch.manual_seed(0)
    made = stream_data.photographs(min(count, distinct), width)
    height = SIZES[width][0]
    return [(made[i % len(made)], random_box(height, width, (0.9, 1.0))) for i in range(count)]


def _even(box: Box) -> Box:
    top, left, height, width = box
    edges = (top // 2 * 2, left // 2 * 2, (top + height) // 2 * 2, (left + width) // 2 * 2)
    return edges[0], edges[1], edges[2] - edges[0], edges[3] - edges[1]


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio of bytes, in dB."""
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def near_summary(values: Sequence[float]) -> dict[str, float]:
    """Least, median and largest."""
    return {"least": min(values), "median": statistics.median(values), "largest": max(values)}


def effect(plan: Plan, folder: Path, report: Report) -> None:
    """What half the resolution changes for a classifier, beside a slightly stronger compression."""
    say("what half the resolution changes")
    try:
        classify = arms.classifier()
    except ImportError as error:
        report.left_out["half_scale_same_class"] = str(error)
        return
    from PIL import Image

    crops = _crops(plan.classified, 640, plan.distinct)

    def again(data: bytes) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(data)).save(file, "JPEG", quality=85)
        return file.getvalue()

    ways: Mapping[str, Callable[[bytes, Box], Tensor]] = {
        "exact": lambda data, box: picture(data).crop(box, SIDES),
        "half": lambda data, box: picture(data).crop(box, SIDES, half_scale=True),
        "quality_85": lambda data, box: picture(again(data)).crop(box, SIDES),
    }
    found = {name: classify([way(data, box) for data, box in crops]) for name, way in ways.items()}
    classes, features = found["exact"]
    for name, label in (("half", "half_scale"), ("quality_85", "quality_85")):
        same = float((found[name][0] == classes).double().mean())
        cosine = float((found[name][1] * features).sum(1).median())
        report.arm(f"effect/{name}", crops=len(crops), same_class=same, median_cosine=cosine)
        report.ratios[f"{label}_same_class"] = same
        report.ratios[f"{label}_cosine"] = cosine


def raw(plan: Plan, folder: Path, report: Report) -> None:
    """Reading alone."""
    say("raw reading")
    data = folder / "raw"
    pictures = plan.batch * plan.batches
    stream_data.shards(data, pictures=pictures, distinct=plan.distinct, width=480, count=plan.shards)
    works: dict[str, Work] = {
        "ours": arms.raw_ours(data),
        "webdataset": arms.raw_webdataset(data),
    }
    assert works["ours"]() == works["webdataset"](), "the arms did not read the same"
    seconds = alternate(works, rounds=3 * plan.rounds)
    report.timed(seconds, prefix="raw", samples=pictures)
    report.ratios["raw_rate"] = median_ratio(seconds, "webdataset", "ours")


def sounds(plan: Plan, folder: Path, report: Report) -> None:
    """Decoding of recordings, whole and in part."""
    short, long = plan.seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    for extension in stream_data.CODECS:
        say(f"sounds, {extension}")
        data = stream_data.sound(short, extension)
        decoders = arms.sound_arms(data)
        if "torchcodec" not in decoders:
            report.left_out[f"audio/{extension}/torchcodec"] = "torchcodec or FFmpeg's libraries are not installed"
        lengths = {name: len(decoder(data)) for name, decoder in decoders.items()}
        assert max(lengths.values()) - min(lengths.values()) < 0.1 * SOUND_RATE, lengths
        works: dict[str, Work] = {name: partial(decoder, data) for name, decoder in decoders.items()}
        seconds = alternate(works, rounds=8 * plan.rounds)
        report.timed(seconds, prefix=f"audio/{extension}", audio_seconds=short)
        best = min(seconds.keys() - {"ours"}, key=lambda name: statistics.median(seconds[name]))
        report.ratios[f"audio_time_{extension}"] = median_ratio(seconds, "ours", best)
        report.ratios[f"audio_time_{extension}_soundfile"] = median_ratio(seconds, "ours", "soundfile")
        whole = stream_data.sound(long, extension)
        start, frames = round((long - short) / 2 * SOUND_RATE), round(short * SOUND_RATE)
        parts = alternate(
            {"part": partial(_part, whole, start, frames), "whole": partial(_part, whole, 0, None)},
            rounds=2 * plan.rounds,
        )
        report.timed(parts, prefix=f"audio/{extension}", audio_seconds=long, of_it=short)
        report.ratios[f"audio_crop_{extension}"] = median_ratio(parts, "part", "whole")
    torch.set_num_threads(threads)


def _part(data: bytes, start: int, frames: int | None) -> Tensor:
    return audio(data).read(start, frames)


def memory(plan: Plan, folder: Path, report: Report) -> None:
    """Resident memory over many epochs."""
    say(f"memory over {plan.epochs} epochs")
    data = folder / "memory"
    stream_data.shards(data, pictures=plan.batch * plan.epoch, distinct=plan.distinct, width=480, count=plan.shards)
    sizes = {"workers": max(plan.workers), "batch": plan.batch, "batches": plan.epoch, "epochs": plan.epochs}
    # Not a daemon, which may have no workers.
    ((growth, held),) = in_processes(partial(growth_over_epochs, data, **sizes), daemon=False)
    report.arm("memory/ours", peak_mb=max(held), first_mb=held[0], last_mb=held[-1], **sizes)
    report.ratios["memory_growth"] = growth


def growth_over_epochs(
    folder: Path, *, workers: int, batch: int, batches: int, epochs: int
) -> tuple[float, list[float]]:
    """Resident memory in the last fifth of the epochs / in the second fifth; MB of this process and its workers."""
    made = arms.stream(folder, workers=workers, batch=batch)
    held: list[float] = []
    for step, found in enumerate(made.batches(0, batches * epochs), 1):
        assert len(found) == batch
        if step % batches == 0:
            held.append(resident_mb())
    fifth = epochs // 5
    return statistics.median(held[-fifth:]) / statistics.median(held[fifth : 2 * fifth]), held


SECTIONS: Mapping[str, Section] = {
    "images": images,
    "pixels": pixels,
    "effect": effect,
    "raw": raw,
    "audio": sounds,
    "memory": memory,
}

GOALS = (
    *(
        Goal(f"image_rate_{width}_{workers}", f"pictures of width {width}, {workers} workers, rate", at_least=goal)
        for width in (480, 640)
        for workers, goal in ((0, 3.0), (1, 3.0), (2, 2.5))
    ),
    Goal("image_rate", "the least of these", at_least=2.5),
    Goal("half_scale_rate_640", "half the resolution, width 640, 1 worker, rate", at_least=3.7),
    Goal("image_max_level", "largest difference of a pixel, levels of 255", 1),
    Goal("half_scale_psnr_640", "half the resolution, median PSNR in dB", at_least=39),
    Goal("half_scale_same_class", "crops that a classifier names the same, half the resolution"),
    Goal("quality_85_same_class", "the same, JPEG quality 85 for 90"),
    Goal("raw_rate", "reading alone, rate / webdataset", at_least=2.0),
    *(Goal(f"audio_time_{e}", f"{e}, time / the faster peer", 1.05) for e in stream_data.CODECS),
    *(Goal(f"audio_crop_{e}", f"{e}, 10 s of 60 s, time / the whole") for e in stream_data.CODECS),
    Goal("memory_growth", "resident memory, late epochs / early", 1.02),
)


def run(plan: Plan, sections: Mapping[str, Section] = SECTIONS) -> Report:
    """Measure the sections in order."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        for section in sections.values():
            section(plan, Path(folder), report)
    return report


def main() -> None:
    """The command."""
    quick = "under two minutes: fewer pictures and rounds"
    parser = command("stream", __doc__, quick=quick, only=SECTIONS)
    asked = parser.parse_args()
    require("skimage", "pandas")
    report = run(QUICK if asked.quick else Plan(), {name: SECTIONS[name] for name in asked.only or SECTIONS})
    tell(report, GOALS, asked.json)


if __name__ == "__main__":
    main()
