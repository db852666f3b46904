"""A data set and what is asked about it, without code: a spec file, a well-known name, or the data alone.

# birds.yaml; TOML says the same
data: images/test            # relative to this file
templates: ["a photo of a {c}, a kind of bird."]
tasks:
zero_shot:
retrieval: {k: [1, 5, 10, 50]}
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from mmcontrast.config import CLASS_KEY, ConfigError, Configurable, class_path, from_dict, suggest
from mmcontrast.encoders.multi import MultiEncoder
from mmcontrast.eval.captions import Captions
from mmcontrast.eval.compositional import Compositional
from mmcontrast.eval.few_shot import FewShot
from mmcontrast.eval.geometry import Geometry
from mmcontrast.eval.joint import Joint
from mmcontrast.eval.knn import KNN
from mmcontrast.eval.layouts import Reading, open_data
from mmcontrast.eval.linear_probe import LinearProbe
from mmcontrast.eval.models import Training
from mmcontrast.eval.published import PUBLISHED, published
from mmcontrast.eval.retrieval import Retrieval
from mmcontrast.eval.sources import Source
from mmcontrast.eval.task import EmbeddedTask
from mmcontrast.eval.zero_shot import ZeroShot

TASKS: Mapping[str, type[EmbeddedTask]] = {
    "zero_shot": ZeroShot,
    "retrieval": Retrieval,
    "geometry": Geometry,
    "linear_probe": LinearProbe,
    "knn": KNN,
    "few_shot": FewShot,
    "compositional": Compositional,
    "captions": Captions,
    "joint": Joint,
}
"""The questions that can be asked of any data set, by name."""
_ASKED = ("zero_shot", "retrieval")  # where neither the data nor the user says
_SPECS = (".yaml", ".yml", ".toml")
_OF_LANGUAGE = {"classes", "templates", "prompts"}
PROMPTED = ("zero_shot", "few_shot")
"""Tasks that are asked once in each language."""
_PROMPTS = ("templates", "prompts", "negative_templates", "negative_prompts")


class Spec(Configurable):
    """A data set and what is asked about it."""

    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        """The settings of a spec file."""

        data: tuple[str, ...]
        """Where the samples are: a folder, a table, or shards; relative to the spec file."""
        name: str = ""
        """What results call it."""
        layout: str | None = None
        """How it is laid out (`mmcontrast.eval.layouts.LAYOUTS`); None recognises it."""
        split: str = "test"
        """The part of a data set that has several."""
        train: tuple[str, ...] = ()
        """Where the samples are that probes learn from, laid out as `data`; without it, the split train of `data`."""
        train_where: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, "tuple[Any, ...]"])
        """Metadata field or column -> values to keep of them."""
        files: str | None = None
        """Column of a table with files."""
        texts: tuple[str, ...] = ()
        """Columns of a table with captions; of shards, members or metadata fields as json:FIELD, which may be lists."""
        key: str | None = None
        """Column of a table whose equal values are one sample; by default the file."""
        folder: str | None = None
        """Where the files of a table lie, relative to the spec file; by default beside the table."""
        where: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, "tuple[Any, ...]"])
        """Metadata field or column -> values to keep, such as fold: [5]."""
        label: str | None = None
        """Column of a table, or metadata field, with the class."""
        classes: tuple[str, ...] = ()
        """Names of all classes, or a file with one a line."""
        templates: tuple[str, ...] = ()
        """Prompts with {c} for the class name, or a file with one a line."""
        prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts."""
        negative_templates: tuple[str, ...] = ()
        """Prompts with {c} for the absence of a class, or a file with one a line."""
        negative_prompts: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])
        """Class -> its own prompts for its absence."""
        drop_empty: bool = False
        """Where labels are lists: leave out samples whose list is empty."""
        language: str | None = None
        """Of the prompts and captions."""
        languages: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
        """Language -> its `classes` (all in the order of the others, or label -> name), `templates` and `prompts`;
        tasks with prompts are then asked once in each."""
        pair: tuple[str, str] | None = None
        """Modalities; None takes the first of the model that the data have, and its text."""
        group: str | None = None
        """Metadata field whose equal values are right answers to each other."""
        bootstrap_by: str | None = None
        """Metadata field, such as patient, over whose values intervals are."""
        tasks: dict[str, dict[str, Any]] = field(default_factory=dict[str, "dict[str, Any]"])
        """Name in `TASKS` -> settings of it; empty asks what the data are made for."""

    def __init__(self, config: Config) -> None:
        for name in config.tasks:
            if name not in TASKS:
                raise ConfigError(f"{config.name}: there is no task {name!r}{suggest(name, TASKS)}")
        for language, said in config.languages.items():
            if unknown := sorted(said.keys() - _OF_LANGUAGE):
                where = f"{config.name}: languages.{language}"
                raise ConfigError(f"{where} has {unknown[0]!r}{suggest(unknown[0], _OF_LANGUAGE)}")
        self.config = config

    def open(self) -> Source:
        """Open the data.

        Raises:
            ConfigError: they are not there, or are not laid out as said.
        """
        return self._open(self.config.data, self.config.split, self.config.where)

    def open_train(self) -> Source:
        """Open what probes learn from.

        Raises:
            ConfigError: as `open`.
        """
        c = self.config
        return self._open(c.train or c.data, "train", c.train_where)

    def _open(self, data: Sequence[str], split: str, where: Mapping[str, Sequence[Any]]) -> Source:
        c = self.config
        reading = Reading(
            split=split,
            files=c.files,
            texts=c.texts,
            label=c.label,
            key=c.key,
            where={name: [str(value) for value in values] for name, values in where.items()},
            folder=None if c.folder is None else Path(c.folder),
        )
        return open_data(data, reading, layout=c.layout)

    def questions(
        self, model: MultiEncoder, source: Source, training: Training | None = None, language: str | None = None
    ) -> dict[str, EmbeddedTask]:
        """Task -> the question as it is asked of this model.

        Args:
            model: which is asked.
            source: the data.
            training: what is known of how it was trained.
            language: one of `languages`, of which only tasks with prompts are asked; by default all tasks as they are.

        Raises:
            ConfigError: settings that a task does not have, or the model has no text to compare with.
        """
        c = self.config
        x, y = c.pair or _pair(model, source)
        training = training or Training()
        known = [m for m in model.modalities if m != x and source.has(model.encoder(m).kind)]
        common: dict[str, Any] = {"data": list(c.data), "bootstrap_by": c.bootstrap_by}
        classified: dict[str, Any] = {
            "modality": x,
            "classes": c.classes,
            "drop_empty": c.drop_empty,
            **({} if c.label is None else {"label": c.label}),
        }
        own: dict[str, dict[str, Any]] = {
            "zero_shot": {
                **classified,
                "prompt_modality": y,
                "scale": training.scale_of(x, y),
                **{name: getattr(c, name) for name in _PROMPTS},
            },
            **dict.fromkeys(("linear_probe", "knn"), classified),
            "few_shot": {**classified, "prompt_modality": y, "templates": c.templates, "prompts": c.prompts},
            "retrieval": {"pair": [x, y], "group": c.group},
            **dict.fromkeys(("geometry", "compositional"), {"pair": [x, y]}),
            "captions": {"modality": x, "text": y},
            "joint": {
                "candidate": x,
                "known": known,
                "label": c.group,
                "score": "product" if any({x, *known} <= trained for trained in training.products) else "sum",
            },
        }
        if language is not None:
            said = self._in_language(language, source)
            own = {name: {**own[name], **said} for name in PROMPTED}
        found: dict[str, EmbeddedTask] = {}
        for name, settings in (c.tasks or dict.fromkeys(source.questions or _ASKED, {})).items():
            if name not in own:
                continue
            said = {CLASS_KEY: class_path(TASKS[name]), **common, **own[name], **settings}
            found[name] = from_dict(said, where=f"{c.name}: {name}").build()
        return found

    def _in_language(self, language: str, source: Source) -> dict[str, Any]:
        """Settings of tasks with prompts: what classes are called, their prompts, and templates if there are some."""
        c, said = self.config, self.config.languages[language]
        names, prompts = said.get("classes") or {}, said.get("prompts") or {}
        if isinstance(names, list):
            listed, classes = cast(list[Any], names), c.classes or source.classes
            if len(listed) != len(classes):
                raise ConfigError(
                    f"{c.name}: languages.{language} lists {len(listed)} classes of {len(classes)} that the spec or "
                    "the data list; name all in their order, or say what each label is called, as {label: name}"
                )
            names = dict(zip(classes, listed, strict=True))
        return {
            "names": {str(k): str(v) for k, v in names.items()},
            "prompts": {str(k): [v] if isinstance(v, str) else v for k, v in prompts.items()},
            **({"templates": said["templates"]} if said.get("templates") else {}),
        }


def _pair(model: MultiEncoder, source: Source) -> tuple[str, str]:
    """The first modality of the model that the data have, and its text."""
    kinds = {m: model.encoder(m).kind for m in model.modalities}
    texts = [m for m, kind in kinds.items() if kind == "text"]
    there = [m for m, kind in kinds.items() if kind != "text" and source.has(kind)]
    others = there or [m for m in kinds if m not in texts]
    if not texts or not others:
        raise ConfigError(f"the model has {', '.join(kinds)}: say with pair what is to be compared with what")
    return others[0], texts[0]


def read_spec(given: str) -> Spec.Config:
    """What is named on the command line: a spec file, `NAME:PATH` of a well-known data set, or data.

    Raises:
        ConfigError: a spec file that cannot be read, or that says what is not understood.
    """
    path = Path(given)
    name, colon, rest = given.partition(":")
    if path.suffix.lower() in _SPECS:
        return _spec({"name": path.stem, **_read(path)}, path.parent, str(path))
    if colon and name in PUBLISHED:
        return _spec({"name": name, "data": rest, "published": name}, Path(), given)
    return Spec.Config(name=given, data=(given,))


def override(
    config: Spec.Config, *, tasks: Sequence[str], templates: Sequence[str], train: Sequence[str] = (), **said: Any
) -> Spec.Config:
    """A spec with what the command line says instead; what it leaves unsaid is None or empty."""
    changes = {name: value for name, value in said.items() if value is not None}
    if tasks:
        changes["tasks"] = {name: config.tasks.get(name, {}) for name in tasks}
    if templates:
        changes["templates"] = tuple(templates)
    if train:
        changes["train"] = tuple(train)
    return replace(config, **changes)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".toml":
            return tomllib.loads(text)
        import yaml

        found = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        # yaml's own class of errors has no common base with others that are worth naming.
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must say `data: …` and what is asked about it; it holds {type(found).__name__}")
    return cast(dict[str, Any], found)


def _spec(given: Mapping[str, Any], home: Path, where: str) -> Spec.Config:
    said = dict(published(str(given["published"])) if "published" in given else {}) | dict(given)
    said.pop("published", None)
    for key in ("classes", "templates", "negative_templates"):
        if isinstance(said.get(key), str):
            said[key] = _lines_of(home / said[key])
    for key in ("data", "train", "texts"):
        if isinstance(said.get(key), str):
            said[key] = [said[key]]
    for key in ("data", "train"):
        if isinstance(said.get(key), list):
            said[key] = [_beside(home, entry) for entry in said[key]]
    if isinstance(said.get("folder"), str):
        said["folder"] = str(home / said["folder"])
    for key in ("where", "train_where"):
        if isinstance(said.get(key), dict):
            said[key] = {k: v if isinstance(v, list) else [v] for k, v in said[key].items()}
    for key in ("prompts", "negative_prompts"):
        if isinstance(said.get(key), dict):
            said[key] = {str(k): [v] if isinstance(v, str) else v for k, v in said[key].items()}
    languages: Any = said.get("languages")
    if isinstance(languages, dict):
        said["languages"] = {str(k): _language(home, v) for k, v in cast(dict[Any, Any], languages).items()}
    tasks = said.get("tasks")
    if isinstance(tasks, list):
        said["tasks"] = {str(name): {} for name in cast(list[Any], tasks)}
    elif isinstance(tasks, dict):
        said["tasks"] = {name: settings or {} for name, settings in cast(dict[str, Any], tasks).items()}
    found = from_dict({CLASS_KEY: class_path(Spec), **said}, where=where)
    return cast(Spec.Config, found)


def _language(home: Path, said: Any) -> Any:
    """What a spec says of one language, with the lines of files that it names; a list alone are its classes."""
    found: Any = {"classes": said} if isinstance(said, list) else said
    if not isinstance(found, dict):
        return found
    read = cast(dict[str, Any], found)
    return {
        k: _lines_of(home / v) if k in ("classes", "templates") and isinstance(v, str) else v for k, v in read.items()
    }


def _beside(home: Path, data: Any) -> Any:
    """Relative to the spec file, unless it is absolute or an address."""
    return str(home / data) if isinstance(data, str) and "://" not in data else data


def _lines_of(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
