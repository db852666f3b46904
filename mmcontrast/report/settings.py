"""Which settings of a run are its own: those that differ from the defaults of the classes that they configure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple, cast

from mmcontrast.config import CLASS_KEY, ConfigError, Configurable, from_dict, to_dict


class Setting(NamedTuple):
    """A setting, and what it would be if nobody had said anything; None where that must be said."""

    name: str
    value: str
    default: str | None


def settings(config: Mapping[str, Any], *, trust: Collection[str] = ()) -> tuple[list[Setting], str | None]:
    """Of a run's `config.json`, what differs from the defaults; or all of it and why the defaults are not known."""
    try:
        built = from_dict(config, trust=trust)
    except (ConfigError, TypeError) as error:
        return [Setting(name, value, None) for name, value in _flat(config, "")], str(error)
    return list(_own(built, "")), None


def _own(config: Configurable.Config, where: str, like: Configurable.Config | None = None) -> Iterator[Setting]:
    """What differs from the class's defaults, or from another one of the same class."""
    for f in fields(config):
        name, value = f"{where}{f.name}", getattr(config, f.name)
        default = getattr(like, f.name) if like is not None else _default(f)
        if isinstance(value, Configurable.Config):
            yield from _nested(name, value, default)
        elif isinstance(value, Mapping) and any(isinstance(v, Configurable.Config) for v in value.values()):
            usual = cast(Mapping[str, Any], default) if isinstance(default, Mapping) else {}
            for key, item in cast(Mapping[str, Any], value).items():
                if isinstance(item, Configurable.Config):
                    yield from _nested(f"{name}.{key}", item, usual.get(key, MISSING))
        elif default is MISSING or to_dict(value) != to_dict(default):
            yield Setting(name, _said(to_dict(value)), None if default is MISSING else _said(to_dict(default)))


def _nested(name: str, value: Configurable.Config, default: Any) -> Iterator[Setting]:
    if type(default) is type(value):
        yield from _own(value, f"{name}.", default)
        return
    usual = _class(default) if isinstance(default, Configurable.Config) else None
    yield Setting(name, _class(value), usual)
    yield from _own(value, f"{name}.")


def _class(config: Configurable.Config) -> str:
    return "" if config.owner is None else config.owner.__name__


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _flat(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in cast(Mapping[str, Any], value).items():
            yield from _flat(item, f"{where}.{key}" if where else str(key))
    elif where.rpartition(".")[2] == CLASS_KEY:
        yield where.rpartition(".")[0] or CLASS_KEY, str(value).rpartition(":")[2]
    else:
        yield where, _said(value)


def _said(value: Any) -> str:
    """As a person writes it."""
    if isinstance(value, list):
        return ", ".join(_said(item) if not isinstance(item, list) else f"({_said(item)})" for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_said(item)}" for key, item in cast(dict[str, Any], value).items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
