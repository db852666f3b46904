"""What is known of some shards, as plain values: what the table, the JSON file and the page are all made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mmcontrast.check.demand import Plan
from mmcontrast.check.summary import Numbers


@dataclass(frozen=True)
class Place:
    """A sample: its shard, its key, and its position among the shards that were opened."""

    shard: str
    key: str
    position: int


@dataclass(frozen=True)
class Repeat:
    """Content that comes `count` times, first at `place`; `text` is what a caption or a label says."""

    count: int
    place: Place
    text: str | None = None


@dataclass(frozen=True)
class Repeats:
    """Samples with equal content.

    Attributes:
        surplus: samples beyond the first of each content.
        chance: probability that two different samples are equal.
        met: equal ones that a sample meets in a batch; None where it is not known for every sample.
        top: contents that come more than once, the most frequent first.
    """

    surplus: int
    chance: float
    met: float | None
    top: list[Repeat]


@dataclass(frozen=True)
class LookAlikes:
    """Pictures that look like another one of other content; pairs of examples with the bits in which they differ."""

    samples: int
    pairs: list[tuple[Place, Place, int]]


@dataclass(frozen=True)
class Modality:
    """One modality of the samples that were examined.

    Attributes:
        kind: image, text, audio or timeseries.
        samples: how many have it undamaged.
        missing: how many lack it.
        numbers: measure -> its distribution.
        words: property -> word -> samples.
        flags: what is remarkable -> samples.
        repeats: equal content.
        alike: similar pictures; None for other kinds.
        asked: what the recipe's tower takes, such as `side` or `tokens` -> value.
        short: samples below, or for `seconds` and `tokens` above, what is asked.
    """

    kind: str
    samples: int
    missing: int
    numbers: dict[str, Numbers]
    words: dict[str, dict[str, int]]
    flags: dict[str, int]
    repeats: Repeats
    alike: LookAlikes | None
    asked: dict[str, float]
    short: dict[str, int]


@dataclass(frozen=True)
class Shared:
    """Samples whose content, or whose look, evaluation data have too."""

    modality: str
    by: str
    samples: int
    evaluation_samples: int
    pairs: list[tuple[Place, Place]]


@dataclass
class Evaluated:
    """Evaluation data beside the shards; `problem` says why they could not be read."""

    name: str
    patterns: tuple[str, ...]
    composed: bool
    samples: int = 0
    examined: int = 0
    bad: int = 0
    shared: list[Shared] = field(default_factory=list[Shared])
    problem: str | None = None


@dataclass(frozen=True)
class Labels:
    """A group that the recipe names.

    Attributes:
        samples: how many carry it.
        distinct: labels.
        chance: probability that two different samples are of one group.
        met: others of its group that a sample meets in a batch; None where it is not known for every sample.
        top: the largest groups.
    """

    samples: int
    distinct: int
    chance: float
    met: float | None
    top: list[Repeat]


@dataclass(frozen=True)
class Finding:
    """One sentence or two: what, how much, the limit, the remedy. Its level is error, warning or note."""

    level: str
    topic: str
    text: str


@dataclass(frozen=True)
class Damaged:
    """Samples of one shard with one reason, and keys of a few; `left_out` ones were lost to breaks of the tar."""

    shard: str
    reason: str
    samples: int
    examples: list[str]
    left_out: bool


@dataclass
class Report:
    """All that was found."""

    patterns: tuple[str, ...]
    recipe: str | None
    shards: int
    samples: int
    bytes: int
    per_shard: Numbers
    examined: int
    seed: int
    bad: int
    left_out: int
    damage: list[Damaged]
    members: dict[str, int]
    fields: dict[str, int]
    present: list[tuple[list[str], int]]
    repeated_keys: int
    without_manifest: list[str]
    made: tuple[str, ...]
    max_bad_fraction: float
    modalities: dict[str, Modality] = field(default_factory=dict[str, Modality])
    groups: dict[str, Labels] = field(default_factory=dict[str, Labels])
    evaluations: list[Evaluated] = field(default_factory=list[Evaluated])
    plan: Plan | None = None
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(f.level == "error" for f in self.findings)

    @property
    def bad_share(self) -> float:
        """Estimated share of damaged samples, of all that were written."""
        total = self.samples + self.left_out
        return (self.left_out + self.samples * self.bad / max(1, self.examined)) / max(1, total)

    def as_json(self) -> dict[str, Any]:
        """Plain values; None where a number is not finite."""
        found = asdict(self) | {"passed": self.passed, "bad_share": self.bad_share}
        found["present"] = [{"modalities": m, "samples": n} for m, n in self.present]
        return found
