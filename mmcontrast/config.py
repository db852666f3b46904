"""Settings: a class carries its own `Config`, and a tree of configs is a run.

    class Encoder(Configurable):
        @dataclass(kw_only=True)
        class Config(Configurable.Config):
            width: int = 192
        def __init__(self, config: Config): ...

`Encoder.Config(width=64).build()` makes the object. `to_dict` and `from_dict` carry a tree through JSON; each
node names the class it configures, and only classes of this package, or of modules that the caller trusts,
are built.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

CLASS_KEY = "class"


class ConfigError(ValueError):
    """A setting or an input that cannot be used; its text is all that a person needs to mend it."""


class RunError(RuntimeError):
    """A run that cannot go on, by no fault of its settings; its text is all that a person needs."""


class Configurable:
    """A class whose settings are the dataclass `Config` nested in it."""

    @dataclass(kw_only=True)
    class Config:
        """Settings; `build()` makes the object that they configure."""

        owner: ClassVar[type[Any] | None] = None

        def build(self, *args: Any, **kwargs: Any) -> Any:
            """Make the object: `Owner(config, *args, **kwargs)`."""
            if self.owner is None:
                raise ConfigError(f"{type(self).__qualname__} configures no class: nest it in a Configurable")
            return self.owner(self, *args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if config is None:
            # A class that inherits its settings still needs its own Config: build() must make this class.
            config = dataclass(kw_only=True)(type("Config", (cls.Config,), {"__module__": cls.__module__}))
            config.__qualname__ = f"{cls.__qualname__}.Config"
            config.__doc__ = cls.Config.__doc__
            cls.Config = config
        config.owner = cls


def suggest(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, otherwise the known words."""
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known)) or 'none'}"


def class_path(cls: type[Any]) -> str:
    """`module:Qualified.Name` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def to_dict(value: Any) -> Any:
    """A config tree as plain JSON values; every config becomes a dict that names the class it configures."""
    if isinstance(value, Configurable.Config):
        if value.owner is None:
            raise ConfigError(f"{type(value).__qualname__} configures no class")
        head = {CLASS_KEY: class_path(value.owner)}
        return head | {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    if is_dataclass(value):
        raise ConfigError(f"{type(value).__qualname__} is a plain dataclass: derive it from Configurable.Config")
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        if not all(isinstance(k, str) for k in items):
            raise ConfigError(f"the keys of a setting must be str, got {list(items)!r}")
        return {k: to_dict(v) for k, v in items.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [to_dict(v) for v in cast(Sequence[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"a setting is {value}, which JSON cannot hold; use a finite number or None")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ConfigError(f"a setting of type {type(value).__name__} cannot be written to JSON: {value!r}")


def from_dict(data: Any, *, trust: Collection[str] = (), where: str = "config") -> Any:
    """Rebuild a config tree.

    Args:
        data: what `to_dict` made.
        trust: modules, by name or by .py file, whose classes may be named beside this package's; nothing else
            is imported.
        where: what errors call the place of `data`.

    Raises:
        ConfigError: an untrusted or unknown class, an unknown, missing or wrongly typed field; says where.
    """
    if not isinstance(data, Mapping) or CLASS_KEY not in data:
        raise ConfigError(f"{where}: expected an object with the key {CLASS_KEY!r}, got {data!r:.100}")
    items = dict(cast(Mapping[str, Any], data))
    config_class = _find_class(str(items.pop(CLASS_KEY)), trust, where)
    hints = get_type_hints(config_class)
    known = {f.name: f for f in fields(config_class)}
    for name in items:
        if name not in known:
            raise ConfigError(f"{where}: {class_path(config_class)} has no field {name!r}{suggest(name, known)}")
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [n for n in needed if n not in items]:
        raise ConfigError(f"{where}: {class_path(config_class)} needs {', '.join(map(repr, missing))}")
    return config_class(**{n: _convert(v, hints[n], trust=trust, where=f"{where}.{n}") for n, v in items.items()})


def import_file(path: Path) -> types.ModuleType:
    """Run a .py file as the module of its name, which loader workers and `from_dict` then find again.

    Raises:
        ConfigError: no such file, or its name is another module's.
    """
    name, path = path.stem, path.resolve()
    if not path.is_file():
        raise ConfigError(f"there is no file {str(path)!r}")
    if "." in name:
        raise ConfigError(f"{path.name} cannot be imported: rename it without the dots in {name!r}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # the file may be younger than the last look at its folder
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    # A recipe called torch.py would otherwise stand in for torch in every later import.
    if spec is None or spec.origin != str(path):
        raise ConfigError(f"{path.name} has the name of another module, {name!r}; rename the file")
    return loaded or importlib.import_module(name)


def _is_own(module: str) -> bool:
    """Whether a module ships with this package.

    The first name alone does not tell: in a checkout `mmcontrast.runs.x` would be a file of a run beside it.
    """
    top, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    here = Path(__file__).parent
    parts = {"eval", "data_prep", "recipes", *(p.stem for p in here.iterdir())}
    return top == "mmcontrast" and (not rest or part in parts)


def _find_class(path: str, trust: Collection[str], where: str) -> type[Any]:
    module, _, name = path.partition(":")
    files = [Path(t) for t in trust if t.endswith(".py") and Path(t).stem == module]
    if not (_is_own(module) or module in trust or files):
        raise ConfigError(
            f"{where}: {path!r} is not a class of mmcontrast; if you trust the module or .py file that "
            "defines it, name it with --trust"
        )
    try:
        found: Any = import_file(files[0]) if files else importlib.import_module(module)
        for part in name.split("."):
            found = found.__dict__[part]
    except (KeyError, AttributeError):
        raise ConfigError(f"{where}: there is no class {path!r}") from None
    except ImportError as error:
        raise ConfigError(f"{where}: there is no class {path!r}: {error}") from None
    # Checked on the class, not by calling it: a foreign file must not be able to name any other callable.
    if not (isinstance(found, type) and issubclass(found, Configurable)):
        raise ConfigError(f"{where}: {path!r} is not a Configurable class")
    return found.Config


def _convert(value: Any, hint: Any, *, trust: Collection[str], where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors: list[str] = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(value, option, trust=trust, where=where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError("; or ".join(dict.fromkeys(errors)))
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise ConfigError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
        return value
    if isinstance(hint, type) and issubclass(hint, Configurable.Config):
        built = from_dict(value, trust=trust, where=where)
        if not isinstance(built, hint):
            raise ConfigError(f"{where}: {class_path(type(built))} is not a {class_path(hint)}")
        return built
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected an object, got {value!r}")
        return {
            str(k): _convert(v, args[1], trust=trust, where=f"{where}.{k}")
            for k, v in cast(Mapping[Any, Any], value).items()
        }
    if origin is tuple or origin is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        values = cast(Sequence[Any], value)
        variadic = origin is list or (len(args) == 2 and args[1] is Ellipsis)
        if not variadic and len(values) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(values)}")
        item_hints = [args[0]] * len(values) if variadic else list(args)
        items = [
            _convert(v, h, trust=trust, where=f"{where}[{i}]")
            for i, (v, h) in enumerate(zip(values, item_hints, strict=True))
        ]
        return tuple(items) if origin is tuple else items
    return _scalar(value, hint, where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value}")
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where}: expected {name}, got {value!r}")
