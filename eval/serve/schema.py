"""What requests and answers look like. The OpenAPI description is made of these classes and their texts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TEXT = 4_000
MAX_FILE_BYTES = 16 << 20
MAX_PARTS = 8
MAX_TOP = 200
MAX_WHERE = 2_000
MAX_NAMES = 64  # channels of a signal that a query names
ID = r"^\d{1,9}-\d{1,18}$"
"""Of a sample: a source of the index, and its place there."""


class _Strict(BaseModel):
    """What clients send: an unknown field is an error, or else a mistyped one would silently do nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Part(_Strict):
    """A piece of a query: a text, a file's content, or a stored sample; exactly one of `text`, `data` and `like`."""

    modality: Annotated[str | None, Field(max_length=100, description="One of the model's; not for `like`.")] = None
    text: Annotated[str | None, Field(max_length=MAX_TEXT)] = None
    data: Annotated[
        str | None,
        Field(
            max_length=MAX_FILE_BYTES * 4 // 3 + 4,
            description="A file in base64: JPEG, PNG or WebP; WAV, FLAC, Ogg or MP3; .npy [time, channels].",
        ),
    ] = None
    like: Annotated[str | None, Field(pattern=ID, description="The id of a stored sample.")] = None
    of: Annotated[
        str | None, Field(max_length=200, description="The index that stores it, by default the one that is searched.")
    ] = None
    rate: Annotated[float | None, Field(gt=0, description="Samples per second of a signal.")] = None
    channels: Annotated[
        list[Annotated[str, Field(max_length=100)]] | None,
        Field(max_length=MAX_NAMES, description="Names of a signal's columns; the tower's own by default."),
    ] = None
    weight: Annotated[float, Field(ge=-10, le=10, description="Below 0: away from it.")] = 1.0


class Search(_Strict):
    """A query. Several parts are sought together."""

    index: Annotated[str, Field(max_length=200)]
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]
    top: Annotated[int, Field(ge=1, le=MAX_TOP)] = 24
    where: Annotated[
        str | None,
        Field(
            max_length=MAX_WHERE,
            description="Answers must pass this filter on the columns: label = 'dog' and rate >= 16000; also !=, in "
            "('a', 'b'), not, or, is null.",
        ),
    ] = None
    joint: Annotated[
        Literal["auto", "sum", "product"],
        Field(
            description="How parts are brought together: by the sum of their embeddings, by weight, or by the product "
            "of the modalities that is Symile's score. `auto` takes the product where the model was trained so and "
            "all other modalities are given."
        ),
    ] = "auto"


class Medium(BaseModel):
    """Something of a sample that can be shown: what `media/{modality}` and `plot/{modality}` answer for."""

    modality: str
    kind: Literal["image", "audio", "timeseries"]


class Sample(BaseModel):
    """A stored sample."""

    id: str
    key: str
    shard: str
    text: str | None
    media: list[Medium]
    metadata: dict[str, Any]


class Hit(Sample):
    """An answer; the score is the cosine of the query's embedding and the sample's, or for a product Symile's score."""

    score: float


class Hits(BaseModel):
    """Answers, best first, and how long they took to find; `passing` is how many samples pass the filter."""

    index: str
    milliseconds: float
    joint: Literal["sum", "product"]
    passing: int
    hits: list[Hit]


class Group(BaseModel):
    """Near-duplicates: some of the samples of a group, and how many it has."""

    count: int
    samples: list[Hit]


class Groups(BaseModel):
    """Near-duplicates: samples that are connected by pairs whose cosine reaches the threshold.

    The largest groups, with some samples of each, whose score is their largest cosine with another of the group;
    `count` says how many groups there are, `redundant` how many samples beyond the first of each.
    """

    index: str
    threshold: float
    looked_at: int
    count: int
    redundant: int
    groups: list[Group]


class Value(BaseModel):
    """A value of a column, and how many samples have it."""

    value: str | bool
    count: int


class Column(BaseModel):
    """A column of the metadata that a filter may ask for.

    `values` are the most frequent ones, none where there are so many that nobody would choose from them; `low` and
    `high` the ends of a column of numbers; `lacking` the samples without a value.
    """

    name: str
    kind: str
    values: list[Value]
    low: float | None
    high: float | None
    lacking: int


class Tower(BaseModel):
    """A modality that the model can be asked in; a signal's tower tells its rate and channels."""

    name: str
    kind: str
    rate: float | None = None
    channels: list[str] | None = None


class Model(BaseModel):
    """The model that made an index, and that answers queries to it."""

    name: str
    hash: str
    towers: list[Tower]


class Description(BaseModel):
    """An index.

    `readable` is false where its shards are gone or changed: then it finds samples and cannot show them. `joint` is how
    the model was trained to bring several modalities together.
    """

    name: str
    modality: str
    kind: str
    count: int
    dim: int
    type: str
    recall_at_10: float | None
    joint: Literal["sum", "product"]
    readable: bool
    model: Model


class Envelope(BaseModel):
    """One channel: the least and the greatest value of each of its columns in time."""

    name: str
    low: list[float]
    high: list[float]


class Plot(BaseModel):
    """A sound or a signal, to be drawn."""

    seconds: float
    rate: float
    units: str | None
    channels: list[Envelope]
    omitted: int = 0


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    error: str
