"""Shards -> embeddings on the disk, in partitions: a build that was ended goes on where it was.

    PARTITIONS/plan.json         what is embedded: model, data, modality
    PARTITIONS/000003.npy        vectors [n, D] float32 of the samples of one partition that have the modality
    PARTITIONS/000003.parquet    their rows
    PARTITIONS/000003.json       samples that were skipped; written last, so a partition that has one is whole

A modality may be a pool, such as image+text: a sample's vector is then the unit-norm sum of those of its parts that it
has. Several processes take partitions by locking them, each with a model of its own. Letters: n samples, D dimensions.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError
from mmcontrast.data.reader import Example, Reader
from mmcontrast.decode import DECODERS
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.index.rows import table_of
from mmcontrast.eval.index.segment import Part, write_rows
from mmcontrast.eval.index.vectors import open_vectors, write_vectors
from mmcontrast.eval.models import load_asked
from mmcontrast.eval.parts import Parts
from mmcontrast.launch import device_of
from mmcontrast.sharding import World
from mmcontrast.shards import FORMATS, BadSample, ShardSet

SAMPLES = 8192
"""Samples of a partition: at most so many are embedded again after a crash."""
POOL = "+"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is embedded, and by whom.

    Attributes:
        model: where it is, as `eval.models.load_asked` takes it.
        shards: the samples.
        modality: of the model, or several joined by +.
        source: number of these shards in the index.
        batch_size: samples encoded at once.
        workers: processes that read and decode, of each process that encodes; 0 decodes there.
        processes: that encode, each with a model of its own: one per GPU, or 1.
        trust: modules whose classes the model's config may name.
    """

    model: str
    shards: ShardSet
    modality: str
    source: int = 0
    batch_size: int = 128
    workers: int = 0
    processes: int | None = None
    trust: Collection[str] = ()

    @property
    def partitions(self) -> Sequence[range]:
        """Samples of each partition."""
        n = len(self.shards)
        return [range(start, min(start + SAMPLES, n)) for start in range(0, n, SAMPLES)]


class _Batches(Dataset[tuple[Batch, list[Example]]]):
    """Batch number -> the batch and its examples, of some samples; damaged ones left out and named."""

    def __init__(self, reader: Reader, samples: range, size: int) -> None:
        self.reader, self.samples, self.size = reader, samples, size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.size)

    def __getitem__(self, number: int) -> tuple[Batch, list[Example]]:
        wanted = {extension for extensions in self.reader.members.values() for extension in extensions}
        examples: list[Example] = []
        skipped: list[tuple[str, str, str]] = []
        for position in self.samples[number * self.size : (number + 1) * self.size]:
            if not wanted.isdisjoint(self.reader.shards.extensions(position)):
                try:
                    examples.append(self.reader.example(position))
                except BadSample as error:
                    skipped.append((*self.reader.shards.name(position), str(error)))
        batch = self.reader.collate(examples, skipped=skipped)
        return batch, [Example(e.position, e.key, {}, e.meta) for e in examples]


def embed_partitions(
    folder: Path, work: Work, plan: Mapping[str, Any], ranks: World | None = None, *, progress: bool = False
) -> None:
    """Embed what is not embedded yet; partitions of another plan are removed first.

    Args:
        folder: of the partitions, on a disk that all processes see.
        work: what is embedded.
        plan: what the vectors depend on.
        ranks: the processes that torchrun started; each calls this, and goes on when all is embedded.
        progress: show a bar on standard error.

    Raises:
        ConfigError: shards or a modality that cannot be read, or a process that failed.
    """
    ranks = ranks or World.alone()
    plan = {**plan, "samples": SAMPLES}
    if ranks.rank == 0:
        Parts(folder, plan)  # alone, since parts of another plan are removed
    ranks.wait()
    parts = Parts(folder, plan)
    count = work.processes or max(1, torch.cuda.device_count())
    if count < 1:
        raise ConfigError(f"processes is {work.processes}; at least 1 must encode")
    with _Watch(work, parts, progress, ranks.size) as watch:
        if count == 1 or ranks.size > 1:
            _encode(parts, work, device_of(), watch.add)
            ranks.wait()
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, and hang
        pipes = [context.Pipe(duplex=False) for _ in range(count)]
        processes = [
            context.Process(target=_process, args=(parts, work, rank, count, pipe[1]), daemon=work.workers == 0)
            for rank, pipe in enumerate(pipes)
        ]
        try:
            for process in processes:
                process.start()
            for _, theirs in pipes:
                theirs.close()  # so that the death of a process ends our reading
            _listen([ours for ours, _ in pipes], watch.add)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def read_parts(folder: Path, work: Work) -> tuple[list[Part], list[tuple[str, str, str]]]:
    """What all partitions hold, and the samples that were skipped as (shard, key, reason)."""
    import pyarrow.parquet as pq

    parts: list[Part] = []
    skipped: list[tuple[str, str, str]] = []
    for number in range(len(work.partitions)):
        name = f"{number:06d}"
        skipped += [tuple(s) for s in json.loads((folder / f"{name}.json").read_text("utf-8"))["skipped"]]
        parts.append(Part(open_vectors(folder / f"{name}.npy"), pq.read_table(folder / f"{name}.parquet")))
    return parts, skipped


def _process(parts: Parts, work: Work, rank: int, count: int, pipe: Any) -> None:
    try:
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
        _encode(parts, work, device_of(rank), pipe.send)
        pipe.send(None)
    except BaseException as error:
        pipe.send(f"{error}" if isinstance(error, ConfigError) else repr(error))


def _listen(pipes: Sequence[Any], add: Callable[[int], None]) -> None:
    from multiprocessing.connection import wait

    open_pipes = list(pipes)
    while open_pipes:
        ready: list[Any] = [*wait(open_pipes)]
        for pipe in ready:
            try:
                said = pipe.recv()
            except EOFError:
                said = "it was killed, perhaps because memory ran out; start again, and it goes on from here"
            if isinstance(said, str):
                raise ConfigError(f"a process that encodes failed: {said}")
            if said is None:
                open_pipes.remove(pipe)
            else:
                add(said)


def _encode(parts: Parts, work: Work, device: torch.device, add: Callable[[int], None]) -> None:
    """Embed every partition that nobody has embedded and nobody is embedding."""
    model = load_asked(work.model, trust=work.trust, device=device).model
    names = work.modality.split(POOL)
    reader = Reader(work.shards, {m: model.encoder(m).transform(train=False) for m in names}, lacking=True)
    for number, samples in enumerate(work.partitions):
        with parts.claim(number) as ours:
            if ours:
                _write(parts, number, model, reader, samples, work, add)


def _write(
    parts: Parts,
    partition: int,
    model: MultiEncoder,
    reader: Reader,
    samples: range,
    work: Work,
    add: Callable[[int], None],
) -> None:
    """Embed one partition."""
    z: list[Any] = [np.zeros((0, model.config.dim), np.float32)]
    examples: list[Example] = []
    skipped: list[tuple[str, str, str]] = []
    batches = _Batches(reader, samples, work.batch_size)
    for number, (batch, seen) in enumerate(DataLoader(batches, batch_size=None, num_workers=work.workers)):
        if seen:
            z.append(_pooled(model, batch))
        examples += seen
        skipped += batch.skipped
        add(len(samples[number * work.batch_size : (number + 1) * work.batch_size]))
    columns = {
        "key": [e.key for e in examples],
        "shard": [reader.shards.name(e.position)[0] for e in examples],
        "source": [work.source] * len(examples),
        "position": [e.position for e in examples],
        "text": [text_of(reader.shards, e.position) for e in examples],
    }
    table = table_of(columns, [e.meta for e in examples])
    try:
        write_vectors(parts.path(partition, ".npy"), z, model.config.dim)
    except ConfigError as error:
        raise ConfigError(f"{work.model}: {error}") from None
    write_rows(parts.path(partition, ".parquet"), [table], table.schema)
    parts.finish(partition, {"skipped": skipped}, ".npy", ".parquet")


def _pooled(model: MultiEncoder, batch: Batch) -> Any:
    """[n, D]: the unit-norm sum of what each sample has."""
    z = torch.zeros(len(batch), model.config.dim)
    for modality, x in batch.inputs.items():
        z[batch.rows[modality]] += model.embed(modality, x).float().cpu()
    return (z if len(batch.inputs) < 2 else torch.nn.functional.normalize(z, dim=1)).numpy()


def text_of(shards: ShardSet, position: int) -> str | None:
    """A sample's text, to be shown; None where it has none that can be read."""
    for extension in FORMATS["text"]:
        with suppress(KeyError, BadSample):
            return DECODERS["text"](shards.read(position, extension))
    return None


class _Watch:
    """A bar over the samples, those of earlier runs included but not counted in the rate; of several, over a share."""

    def __init__(self, work: Work, parts: Parts, progress: bool, among: int) -> None:
        from tqdm import tqdm

        done = sum(len(s) for i, s in enumerate(work.partitions) if parts.done(i))
        self._bar: Any = tqdm(
            total=-(-len(work.shards) // among),
            initial=done // among,
            desc="embed" if among == 1 else f"embed, one of {among}",
            unit="sample",
            unit_scale=True,
            disable=not progress,
        )

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def add(self, samples: int) -> None:
        self._bar.update(samples)
