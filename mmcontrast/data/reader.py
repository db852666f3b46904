"""Samples of some shards as model inputs: what training, evaluation and the index read alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch

from mmcontrast.batch import Batch
from mmcontrast.config import ConfigError, suggest
from mmcontrast.decode import DECODERS, metadata
from mmcontrast.randomness import fold_seed
from mmcontrast.shards import FORMATS, METADATA, BadSample, ShardSet
from mmcontrast.signals import signal

SIGNAL = "timeseries"  # the one kind whose decoder needs the sample's metadata, too


class Transform(Protocol):
    """Decoded sample -> model input, and a list of those -> one batch; runs in loader workers."""

    kind: str

    def __call__(self, value: Any) -> Any:
        """One decoded sample -> one model input."""
        ...

    def begin(self, value: Any) -> Callable[[], Any]:
        """The same in two parts: all random draws are made now, the rest when the result is called, in any thread."""
        ...

    def cut(self, value: Any, made: Any) -> bool:
        """Whether the model input lacks a part of the sample for its length."""
        ...

    def collate(self, values: Sequence[Any]) -> Any:
        """Model inputs of several samples -> one batch of them."""
        ...


@dataclass(frozen=True)
class Example:
    """One decoded and transformed sample. `inputs` has the modalities that the sample has.

    Attributes:
        position: of the sample; in a stream of several sources, counted over all of them.
        source: the source that it is of, where there are several.
        cut: modalities of which a part was left out, for their length.
    """

    position: int
    key: str
    inputs: Mapping[str, Any]
    meta: Mapping[str, Any]
    source: str = ""
    cut: Collection[str] = ()


class Reader:
    """Samples of some shards as model inputs; what training, evaluation and the index read alike."""

    def __init__(
        self,
        shards: ShardSet,
        transforms: Mapping[str, Transform],
        members: Mapping[str, tuple[str, ...]] | None = None,
        made: Collection[str] = (),
        *,
        lacking: bool = False,
    ) -> None:
        """Read the modalities that have a transform.

        Args:
            shards: the samples.
            transforms: modality -> transform; its `kind` says which decoder and which members.
            members: modality -> extensions that hold it, in order of preference; by default those of the kind.
            made: modalities that are not read from these shards; a `Compose` makes them.
            lacking: modalities that no sample has are left out, unless `members` names extensions or there is no other.

        Raises:
            ConfigError: a modality that no sample has, or a kind that nothing decodes.
        """
        self.shards, self.transforms = shards, transforms
        for modality, transform in transforms.items():
            if transform.kind not in (*DECODERS, SIGNAL):
                known = (*DECODERS, SIGNAL)
                raise ConfigError(f"{modality!r} is of kind {transform.kind!r}{suggest(transform.kind, known)}")
        read = {m: t for m, t in transforms.items() if m not in made}
        self.members = {m: (members or {}).get(m, FORMATS[t.kind]) for m, t in read.items()}
        had = {m: e for m, e in self.members.items() if any(shards.counts.get(extension) for extension in e)}
        if lacking and (had or made):
            self.members = {m: e for m, e in self.members.items() if m in had or (members or {}).get(m)}
        for modality, extensions in self.members.items():
            if modality not in had:
                # Few, by frequency: dots in the keys make every member an extension of its own.
                have = sorted(shards.counts, key=lambda e: (-shards.counts[e], e))
                more = f" and {len(have) - 8} more" if len(have) > 8 else ""
                raise ConfigError(
                    f"no sample has the modality {modality!r} (members {', '.join(extensions)}); "
                    f"the shards have: {', '.join(have[:8]) or 'nothing'}{more}"
                )

    def raw(self, position: int, modality: str) -> Any:
        """The decoded value of one modality, or None where the sample lacks it.

        Raises:
            BadSample: it is there and damaged.
        """
        for extension in self.members[modality]:
            try:
                data = self.shards.read(position, extension)
            except KeyError:
                continue
            kind = self.transforms[modality].kind
            return signal(data, partial(self._facts, position, modality)) if kind == SIGNAL else DECODERS[kind](data)
        return None

    def _facts(self, position: int, modality: str) -> Mapping[str, Any]:
        """What the metadata say of one modality: the field of its name, or all of them."""
        meta = self.meta(position)
        own = meta.get(modality)
        return cast(Mapping[str, Any], own) if isinstance(own, Mapping) else meta

    def meta(self, position: int) -> Mapping[str, Any]:
        """The sample's labels and groups; empty where it has none.

        Raises:
            BadSample: they are damaged.
        """
        try:
            return metadata(self.shards.read(position, METADATA))
        except KeyError:
            return {}

    def example(self, position: int, *, meta: bool = True) -> Example:
        """One sample, transformed.

        Raises:
            BadSample: a member is damaged, or the sample has none of the modalities.
        """
        raw = {m: value for m in self.members if (value := self.raw(position, m)) is not None}
        return self.begin(position, raw, self.meta(position) if meta else {})()

    def begin(self, position: int, raw: Mapping[str, Any], meta: Mapping[str, Any]) -> Callable[[], Example]:
        """Decoded values of a sample -> what makes of them what the model takes. All random draws are made here.

        Raises:
            BadSample: there is none, or one of them cannot be used; also from what is returned.
        """
        if not raw:
            raise BadSample(f"has none of {', '.join(self.transforms)}")
        begun = {m: self.transforms[m].begin(value) for m, value in raw.items()}
        return partial(self._finish, position, self.shards.name(position)[1], raw, begun, meta)

    def _finish(
        self,
        position: int,
        key: str,
        raw: Mapping[str, Any],
        begun: Mapping[str, Callable[[], Any]],
        meta: Mapping[str, Any],
    ) -> Example:
        inputs = {m: finish() for m, finish in begun.items()}
        cut = [m for m, made in inputs.items() if self.transforms[m].cut(raw[m], made)]
        return Example(position, key, inputs, meta, cut=cut)

    def collate(self, examples: Sequence[Example], skipped: Sequence[tuple[str, str, str]] = ()) -> Batch:
        """Examples -> Batch."""
        return collate(self.transforms, examples, skipped=skipped)


def collate(
    transforms: Mapping[str, Transform],
    examples: Sequence[Example],
    groups: Sequence[str] = (),
    skipped: Sequence[tuple[str, str, str]] = (),
) -> Batch:
    """Examples -> Batch; `groups` names the metadata fields that become group labels.

    A sample without the field is a group of its own.
    """
    inputs: dict[str, Any] = {}
    rows: dict[str, torch.Tensor] = {}
    for modality, transform in transforms.items():
        having = [i for i, e in enumerate(examples) if modality in e.inputs]
        rows[modality] = torch.tensor(having, dtype=torch.int64)
        if having:
            inputs[modality] = transform.collate([examples[i].inputs[modality] for i in having])
    labels = {name: torch.tensor([_label(name, e) for e in examples], dtype=torch.int64) for name in groups}
    ids = torch.tensor([e.position for e in examples], dtype=torch.int64)
    cut = {m: torch.tensor([i for i, e in enumerate(examples) if m in e.cut], dtype=torch.int64) for m in transforms}
    sources = [e.source for e in examples]
    return Batch(inputs, rows, ids, labels, [e.key for e in examples], skipped, sources, cut)


def _label(name: str, example: Example) -> int:
    value = example.meta.get(name)
    return fold_seed("sample", example.position) if value is None else fold_seed("group", str(value))
