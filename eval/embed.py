"""Data + a model -> embeddings of every modality, in the order of the samples; shared by ranks, kept on the disk."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmcontrast.config import ConfigError
from mmcontrast.data.compose import Compose
from mmcontrast.data.reader import Reader
from mmcontrast.data.threads import processors
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.chunks import Chunk, Chunks, Composed, Sample
from mmcontrast.eval.embedded import Embedded
from mmcontrast.eval.layouts import open_data
from mmcontrast.eval.parts import Parts, write_at_once
from mmcontrast.eval.sources import Shards, Source
from mmcontrast.eval.together import agree, world
from mmcontrast.shards import BadSample, ShardSet

_CHUNKS = 32  # batches of a part at most: so many are embedded again after a crash
_WORKERS = 8
_PARTS = 64  # of any data that are large enough: ranks that can share them


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings on the disk: who embeds the same data with the same model again reads them.

    FOLDER/MODEL/DATA-MODALITY holds parts of some thousand samples (`parts.py`); one that was ended goes on there.

    Attributes:
        folder: of all models and data; may be removed at any time when nobody uses it.
        model: changes when weights, settings or preparation do.
    """

    folder: Path
    model: str

    def open(self, source: Source, modality: str, **said: Any) -> Parts:
        """The parts of a modality of some data.

        Raises:
            ConfigError: the folder cannot be written.
        """
        facts = {"model": self.model, "data": source.fingerprint, "modality": modality, "samples": len(source)}
        facts |= {"lines": getattr(source, "lines", False), "torch": torch.__version__, **said}
        return Parts(self.folder / self.model / f"{source.fingerprint}-{modality}", facts)


@dataclass
class _Part:
    """Embeddings of some chunks, and what was damaged: number of a sample -> why.

    Attributes:
        samples: number -> sample, without inputs, where examples are composed: only making one tells what it is.
    """

    z: dict[str, Tensor]
    rows: dict[str, Tensor]
    samples: dict[int, Sample]
    skipped: dict[int, str]


_known: ContextVar[dict[Any, _Part] | None] = ContextVar("known", default=None)


@contextmanager
def remembering(known: dict[Any, Any]) -> Generator[None]:
    """What is embedded within is kept in `known`, and what the same model has embedded before is taken from there.

    Its weights must not change while `known` is used. Composed examples are not kept.
    """
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def embed(
    model: MultiEncoder,
    data: Sequence[str] | ShardSet | Source,
    *,
    modalities: Sequence[str] | None = None,
    compose: Compose.Config | None = None,
    draw: int = 0,
    batch_size: int = 128,
    workers: int | None = None,
    progress: bool = False,
    cache: EmbeddingCache | None = None,
) -> Embedded:
    """Embed all samples of some data.

    Ranks that share the work (`together.sharing`) each embed a part of it, in the batches of one process, and all of
    them get the whole.

    Args:
        model: used in evaluation mode.
        data: names as `open_data` takes them, or what was opened, since opening foreign shards means a scan.
        modalities: which to embed; by default all of the model.
        compose: how an example is made of samples in shards; by default it is one sample as it is.
        draw: which of the examples that `compose` can make of an anchor; each number always means the same ones.
        batch_size: samples encoded at once.
        workers: processes that read and decode; 0 does it in this one. By default 0 where the model is on the CPU,
            which it keeps busy, and 8 beside a GPU, or this rank's share of the processors.
        progress: show a bar on standard error.
        cache: where embeddings are kept; composed examples are not.

    Raises:
        ConfigError: data that cannot be opened, a modality that no sample has, no sample left, or settings that make
            no sense.
    """
    if workers is None:
        workers = 0 if next(model.parameters()).device.type == "cpu" else min(_WORKERS, processors())
    if workers < 0 or batch_size < 1:
        raise ConfigError(f"workers is {workers} and batch_size {batch_size}; at least 0 and 1 are needed")
    transforms = {m: model.encoder(m).transform(train=False) for m in modalities or model.modalities}
    source = Shards(data) if isinstance(data, ShardSet) else open_data(data) if isinstance(data, Sequence) else data
    reader, facts = None, dict[str, float]()
    if isinstance(source, Shards):
        settings = compose or Compose.Config()
        reader = Reader(source.shards, transforms, made=settings.made())
    whole = _Part({}, {}, {}, {})
    if compose is None:
        for modality, transform in transforms.items():
            if not source.has(transform.kind):
                raise ConfigError(f"no sample has the modality {modality!r}: there are no files of {transform.kind}")
        # One by one, so that each can be kept by itself.
        known = _known.get()
        known = {} if known is None else known
        for modality, transform in transforms.items():
            key = (model, source.fingerprint, getattr(source, "lines", False), modality, batch_size)
            found = known.get(key)
            if found is None:
                chunks = Chunks(source, {modality: transform}, batch_size)
                found = known[key] = _together(model, chunks, workers, progress, cache)
            whole.z |= found.z
            whole.rows |= found.rows
            whole.skipped |= {i: why for i, why in found.skipped.items() if i not in whole.skipped}
        _describe(source, transforms, whole)
    else:
        if reader is None:
            raise ConfigError("examples can be composed of samples in shards only; write shards: mmcontrast prep")
        composed: Compose = compose.build(reader)
        whole = _together(model, Composed(source, transforms, batch_size, composed, draw), workers, progress, None)
        facts = dict(composed.facts)
    samples = [whole.samples[number] for number in sorted(whole.samples)]
    skipped = [(*source.name(number), whole.skipped[number]) for number in sorted(whole.skipped)]
    if not samples:
        where = ", ".join(dict.fromkeys(source.name(number)[0] for number in range(min(len(source), 20))))
        reasons = "; ".join(dict.fromkeys(reason for *_, reason in skipped[:20]))
        raise ConfigError(f"none of the {len(source)} samples of {where} could be read: {reasons[:300]}")
    kept = torch.tensor(sorted(whole.samples))
    for modality, rows in list(whole.rows.items()):
        there = torch.isin(rows, kept)
        if not bool(there.all()):
            whole.z[modality], rows = whole.z[modality][there], rows[there]
        whole.rows[modality] = torch.searchsorted(kept, rows)
    return Embedded(
        z={m: z for m, z in whole.z.items() if len(z)},
        rows={m: whole.rows[m] for m, z in whole.z.items() if len(z)},
        keys=[s.key for s in samples],
        positions=torch.tensor([s.position for s in samples]),
        meta=[s.meta for s in samples],
        skipped=skipped,
        fingerprint=source.fingerprint,
        source=source,
        shard_reader=reader,
        kinds={m: t.kind for m, t in transforms.items()},
        facts=facts,
    )


def _describe(source: Source, modalities: Iterable[str], whole: _Part) -> None:
    """Keys and metadata of all samples that are whole and have one of the modalities; the others are skipped."""
    there = torch.zeros(len(source), dtype=torch.bool)
    for rows in whole.rows.values():
        there[rows] = True
    for number, has_some in enumerate(there.tolist()):
        if number in whole.skipped:
            continue
        if not has_some:
            whole.skipped[number] = f"has none of {', '.join(modalities)}"
            continue
        try:
            whole.samples[number] = Sample(number, source.name(number)[1], {}, source.meta(number))
        except BadSample as error:
            whole.skipped[number] = str(error)


def _together(model: MultiEncoder, chunks: Chunks, workers: int, progress: bool, cache: EmbeddingCache | None) -> _Part:
    """Embed all chunks; each rank does some parts, and all of them know the whole."""
    ranks, names = world(), list(chunks.transforms)
    # The same parts whatever the ranks: as many as give each of them some, and not so large that much is lost.
    length = min(_CHUNKS, max(1, len(chunks) // _PARTS))
    parts = [range(start, min(start + length, len(chunks))) for start in range(0, len(chunks), length)]
    mine: dict[int, _Part] = {}
    opened = None if cache is None else _open(cache, chunks, length)
    problem: Exception | None = None
    try:
        wanted = {number: parts[number] for number in range(ranks.rank, len(parts), ranks.size)}
        mine = dict(_embedded(model, chunks, wanted, workers, progress and ranks.rank == 0, opened))
    except Exception as error:
        problem = error
    agree(problem)
    told = {number: ({m: part.rows[m] for m in names}, part.samples, part.skipped) for number, part in mine.items()}
    everywhere: dict[int, Any] = {}
    for of_rank in ranks.gather_objects(told):
        everywhere |= of_rank
    found = _Part({}, {}, {}, {})
    for number in range(len(parts)):
        found.samples |= everywhere[number][1]
        found.skipped |= everywhere[number][2]
    for m in names:
        rows: list[Tensor] = [everywhere[number][0][m] for number in range(len(parts))]
        found.rows[m] = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        dim = max(ranks.gather_objects(max((p.z[m].shape[1] for p in mine.values()), default=0)))
        found.z[m] = torch.empty(len(found.rows[m]), dim)
        start = 0
        for number, of_part in enumerate(rows):
            place = found.z[m][start : start + len(of_part)]
            start += len(of_part)
            if number in mine and len(of_part):
                place.copy_(mine[number].z.pop(m))  # not kept twice
            if len(of_part):
                ranks.broadcast(place, number % ranks.size)
    return found


def _open(cache: EmbeddingCache, chunks: Chunks, length: int) -> Parts:
    """The parts of the one modality on the disk, on rank 0 first: it removes those of another plan."""
    (modality,) = chunks.transforms
    opened: Parts | None = None
    for first in (True, False):
        problem: Exception | None = None
        if (world().rank == 0) is first:
            try:
                opened = cache.open(chunks.source, modality, batch=chunks.size, chunks=length)
            except Exception as error:
                problem = error
        agree(problem)
    assert opened is not None
    return opened


def _embedded(
    model: MultiEncoder,
    chunks: Chunks,
    wanted: Mapping[int, range],
    workers: int,
    progress: bool,
    opened: Parts | None,
) -> Iterator[tuple[int, _Part]]:
    """Some parts, those first that are on the disk already."""
    from tqdm import tqdm

    names = list(chunks.transforms)
    left: dict[int, range] = {}
    known = 0
    for number, part in wanted.items():
        kept = None if opened is None else _read(opened, number, names)
        if kept is None:
            left[number] = part
        else:
            known += _samples(chunks, part)
            yield number, kept
    total = sum(_samples(chunks, part) for part in wanted.values())
    bar: Any = tqdm(
        total=total,
        initial=known,
        desc=f"embed {', '.join(names)}",
        unit="sample",
        unit_scale=True,
        disable=not progress,
    )
    order = [chunk for part in left.values() for chunk in part]
    workers = min(workers, len(order))
    loaded: Iterator[Chunk] = iter(DataLoader(chunks, batch_size=None, sampler=order, num_workers=workers))
    with bar:
        for number, part in left.items():
            z: dict[str, list[Tensor]] = {m: [] for m in names}
            rows: dict[str, list[Tensor]] = {m: [] for m in names}
            made = _Part({}, {}, {}, {})
            for place in part:
                chunk = next(loaded)
                for m in names:
                    z[m] += [model.embed(m, x).float().cpu() for x in chunk.batches[m]]
                    rows[m].append(chunk.rows[m])
                made.samples |= chunk.samples
                made.skipped |= chunk.skipped
                bar.update(_samples(chunks, range(place, place + 1)))
            made.z = {m: torch.cat(found) if found else torch.zeros(0, 0) for m, found in z.items()}
            made.rows = {m: torch.cat(found) for m, found in rows.items()}
            if opened is not None:
                _keep(opened, number, made)
            yield number, made


def _samples(chunks: Chunks, part: range) -> int:
    return min(part.stop * chunks.size, chunks.count()) - part.start * chunks.size


def _read(opened: Parts, number: int, names: Sequence[str]) -> _Part | None:
    """A part that is on the disk; None where there is none that is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not opened.done(number):
        return None
    try:
        found = load_file(opened.path(number, ".safetensors"))
        z, rows = ({m: found[f"{what}.{m}"] for m in names} for what in ("z", "rows"))
        skipped = {int(i): str(why) for i, why in opened.read(number)["skipped"]}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # somebody else's hand: what we write is whole
        return None
    return _Part(z, rows, {}, skipped)


def _keep(opened: Parts, number: int, part: _Part) -> None:
    from safetensors.torch import save_file

    tensors = {f"z.{m}": z.contiguous() for m, z in part.z.items()} | {f"rows.{m}": r for m, r in part.rows.items()}
    try:
        write_at_once(opened.path(number, ".safetensors"), lambda path: save_file(tensors, path))
        opened.finish(number, {"skipped": sorted(part.skipped.items())}, ".safetensors")
    except OSError as error:
        raise ConfigError(
            f"the cache {opened.folder} cannot be written: {error.strerror or error}; name another --cache, or none"
        ) from None


def has(data: ShardSet | Source, model: MultiEncoder, modality: str) -> bool:
    """Whether any sample has the modality.

    Raises:
        ConfigError: the model does not have the modality.
    """
    source = Shards(data) if isinstance(data, ShardSet) else data
    return source.has(model.encoder(modality).kind)
