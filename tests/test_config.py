"""Settings: what goes through JSON comes back equal, wrong fields are named, foreign files run nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import mmcontrast.recipes
from mmcontrast.config import ConfigError, Configurable, class_path, from_dict, suggest, to_dict
from mmcontrast.encoders import MultiEncoder, ViT
from mmcontrast.objectives import InfoNCE
from mmcontrast.recipe import load_recipe
from mmcontrast.trainer import Trainer
from tests import tiny

HERE = (__name__,)
RECIPES = sorted(p.stem for p in Path(mmcontrast.recipes.__path__[0]).glob("*.py") if p.stem != "__init__")


class Leaf(Configurable):
    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        size: int = 3

    def __init__(self, config: Config, scale: int = 1) -> None:
        self.size = config.size * scale


class Twig(Leaf):
    """Inherits its settings."""


class Twiglet(Twig):
    @dataclass(kw_only=True)
    class Config(Twig.Config):
        extra: str = "x"


class Tree(Configurable):
    @dataclass(kw_only=True)
    class Config(Configurable.Config):
        leaf: Leaf.Config
        rate: float = 0.5
        flag: bool = False
        count: int | None = None
        place: Path = Path("a/b")
        pair: tuple[int, str] = (1, "a")
        names: tuple[str, ...] = ()
        boxes: list[float] = field(default_factory=list[float])
        mode: Literal["mean", "last", 3] = "mean"
        either: int | str = 1
        leaves: dict[str, Leaf.Config] = field(default_factory=dict[str, Leaf.Config])
        deep: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict[str, dict[str, tuple[int, ...]]])
        branch: Leaf.Config | str | None = None
        anything: Any = None

    def __init__(self, config: Config) -> None:
        self.config = config


def _json(config: Configurable.Config) -> Any:
    return json.loads(json.dumps(to_dict(config), allow_nan=False))


def _full() -> Tree.Config:
    return Tree.Config(
        leaf=Twig.Config(size=7),
        rate=1,
        flag=True,
        count=4,
        place=Path("/x/y z"),
        pair=(2, "ü"),
        names=("a", "b"),
        boxes=[1.5, 2.0],
        mode=3,
        either="text",
        leaves={"one": Leaf.Config(), "two": Twiglet.Config(extra="y")},
        deep={"a": {"b": (1, 2)}, "c": {}},
        branch=Leaf.Config(size=9),
        anything=[1, {"k": None}],
    )


# ------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_comes_back_from_json_equal(name: str) -> None:
    recipe = load_recipe(name)
    back = from_dict(_json(recipe))
    assert back == recipe and type(back) is Trainer.Config
    assert _json(back) == _json(recipe)
    changed = _json(recipe)
    changed["model"]["dim"] += 1
    assert from_dict(changed) != recipe, "the comparison cannot fail"


def test_there_are_recipes() -> None:
    assert "emoji" in RECIPES


def test_a_tree_of_every_kind_of_field_comes_back_equal() -> None:
    tree = _full()
    back = from_dict(_json(tree), trust=HERE)
    assert back == tree
    assert [type(v) for v in (back.leaf, back.leaves["two"], back.branch)] == [
        Twig.Config,
        Twiglet.Config,
        Leaf.Config,
    ]
    assert isinstance(back.place, Path) and isinstance(back.rate, float) and isinstance(back.deep["a"]["b"], tuple)
    assert from_dict(_json(Tree.Config(leaf=Leaf.Config())), trust=HERE) == Tree.Config(leaf=Leaf.Config())


def test_a_class_that_inherits_its_settings_is_the_one_that_is_built() -> None:
    assert type(Twig.Config().build()) is Twig and type(Leaf.Config().build()) is Leaf
    assert type(from_dict(_json(Twig.Config()), trust=HERE).build()) is Twig
    assert Twig.Config is not Leaf.Config and issubclass(Twig.Config, Leaf.Config)
    assert Twiglet.Config(size=2).build(scale=5).size == 10
    assert class_path(Twig.Config) == f"{__name__}:Twig.Config"
    with pytest.raises(ConfigError, match="configures no class"):
        Configurable.Config().build()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "nan, which JSON cannot hold"),
        (-math.inf, "-inf, which JSON cannot hold"),
        ({"deep": [1, {"x": math.inf}]}, "inf, which JSON cannot hold"),
        ({1: "a"}, "keys of a setting must be str"),
        (b"bytes", "type bytes cannot be written"),
        ({1, 2}, "type set cannot be written"),
        (Leaf(Leaf.Config()), "type Leaf cannot be written"),
    ],
)
def test_what_json_cannot_hold_is_refused_on_the_way_out(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_dict(Tree.Config(leaf=Leaf.Config(), anything=value))


def test_a_plain_dataclass_is_refused() -> None:
    @dataclass
    class Plain:
        x: int = 1

    with pytest.raises(ConfigError, match="Plain is a plain dataclass: derive it from Configurable.Config"):
        to_dict(Tree.Config(leaf=Leaf.Config(), anything=Plain()))


# ------------------------------------------------------------------------------------------------- wrong fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rat": 1.0}, r"^config: \S+Tree.Config has no field 'rat'; did you mean 'rate'\?$"),
        ({"zzzzz": 1.0}, r"has no field 'zzzzz'; known: anything, boxes, branch, .*rate$"),
        ({"leaf": ...}, r"^config: \S+Tree.Config needs 'leaf'$"),
        ({"leaf": None}, r"^config.leaf: expected an object with the key 'class', got None$"),
        ({"leaf": {"size": 1}}, r"^config.leaf: expected an object with the key 'class', got \{'size': 1\}$"),
        ({"leaf": {"class": f"{__name__}:Tree"}}, r"^config.leaf: \S+Tree.Config needs 'leaf'$"),
        ({"leaf": {"class": f"{__name__}:Leaf", "size": "3"}}, r"^config.leaf.size: expected int, got '3'$"),
        ({"leaf": {"class": f"{__name__}:Leaf", "sise": 3}}, r"^config.leaf: .*did you mean 'size'\?$"),
        ({"leaf": {"class": f"{__name__}:Leaf", "size": 3.0}}, r"^config.leaf.size: expected int, got 3.0$"),
        (
            {"leaf": {"class": f"{__name__}:Leaf", "size": True}},
            r"^config.leaf.size: expected int, got True$",
        ),
        (
            {"leaf": {"class": f"{__name__}:Leaf", "size": None}},
            r"^config.leaf.size: expected int, got None$",
        ),
        ({"rate": True}, r"^config.rate: expected float, got True$"),
        ({"rate": "0.5"}, r"^config.rate: expected float, got '0.5'$"),
        ({"rate": math.nan}, r"^config.rate: expected a finite number, got nan$"),
        ({"rate": math.inf}, r"^config.rate: expected a finite number, got inf$"),
        ({"boxes": [1.0, -math.inf]}, r"^config.boxes\[1\]: expected a finite number, got -inf$"),
        ({"flag": 1}, r"^config.flag: expected bool, got 1$"),
        ({"flag": None}, r"^config.flag: expected bool, got None$"),
        ({"count": 1.5}, r"^config.count: expected int, got 1.5$"),
        ({"place": 3}, r"^config.place: expected Path, got 3$"),
        ({"pair": [1]}, r"^config.pair: expected 2 values, got 1$"),
        ({"pair": [1, 2]}, r"^config.pair\[1\]: expected str, got 2$"),
        ({"pair": "1a"}, r"^config.pair: expected a list, got '1a'$"),
        ({"names": "abc"}, r"^config.names: expected a list, got 'abc'$"),
        ({"names": ["a", None]}, r"^config.names\[1\]: expected str, got None$"),
        ({"mode": "men"}, r"^config.mode: 'men' is none of 'mean', 'last', 3$"),
        ({"mode": 3.0}, r"^config.mode: 3.0 is none of"),
        ({"mode": []}, r"^config.mode: \[\] is none of"),
        ({"either": 1.5}, r"^config.either: expected int, got 1.5; or config.either: expected str, got 1.5$"),
        ({"leaves": []}, r"^config.leaves: expected an object, got \[\]$"),
        ({"leaves": {"one": 3}}, r"^config.leaves.one: expected an object with the key 'class', got 3$"),
        ({"deep": {"a": {"b": [1, "x"]}}}, r"^config.deep.a.b\[1\]: expected int, got 'x'$"),
        ({"branch": {"class": f"{__name__}:Leaf", "sise": 1}}, r"config.branch: .*did you mean 'size'"),
        ({"branch": 3}, r"config.branch: expected str, got 3$"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], message: str) -> None:
    data = _json(Tree.Config(leaf=Leaf.Config())) | change
    data = {name: value for name, value in data.items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        from_dict(data, trust=HERE)


def test_a_config_of_another_kind_is_refused() -> None:
    data = _json(tiny.model_config())
    data["encoders"]["image"] = _json(InfoNCE.Config())
    with pytest.raises(ConfigError, match=r"config.encoders.image: .*InfoNCE.Config is not a .*Encoder.Config"):
        from_dict(data)


def test_near_words_are_suggested() -> None:
    assert suggest("imge", ["image", "text"]) == "; did you mean 'image'?"
    assert suggest("audio", ["text", "image"]) == "; known: image, text"
    assert suggest("audio", []) == "; known: none"


# ------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize(
    "path",
    [
        "os:system",
        "subprocess:Popen",
        "builtins:eval",
        "builtins:object",
        "mmcontrast.config:importlib",
        "mmcontrast.config:importlib.import_module",
        "mmcontrast.config:ConfigError",
        "mmcontrast.config:to_dict",
        "mmcontrast.config:Configurable.Config",
        "mmcontrast.trainer:os.system",
        "mmcontrast.trainer:Trainer.fit",
        "mmcontrast.encoders.multi:nn.Linear",
        "mmcontrast.no_such:Thing",
        "mmcontrast:no_such",
        "mmcontrast.encoders:",
        "mmcontrast.:x",
        "mmcontrast..config:Configurable",
        "mmcontrast",
        "",
        ":",
        "mmcontrast_other:X",
        "tests.tiny:Path",
    ],
)
def test_a_name_that_is_no_configurable_class_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^model: "):
        from_dict({"class": path, "args": "echo"}, where="model")


EVIL = """
from pathlib import Path
from mmcontrast.config import Configurable

Path({mark!r}).write_text("ran")

class Innocent(Configurable):
    pass
"""


def _evil(folder: Path, name: str) -> Path:
    """A module that leaves a mark when it is imported; returns the mark."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f"{name}.mark"
    (folder / f"{name}.py").write_text(EVIL.format(mark=str(mark)))
    return mark


def test_only_what_is_trusted_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = _evil(tmp_path, "evil_module")
    monkeypatch.syspath_prepend(tmp_path)
    tree = _json(Tree.Config(leaf=Leaf.Config())) | {"anything": {"class": "evil_module:Innocent"}}
    data = {"class": "evil_module:Innocent"}
    for trust in ((), ("evil",), ("evil_module.sub",), ("other.py",)):
        with pytest.raises(ConfigError, match="if you trust the module .* name it with --trust"):
            from_dict(data, trust=trust)
    assert from_dict(tree, trust=HERE).anything == {"class": "evil_module:Innocent"}  # a value stays a value
    with pytest.raises(ConfigError, match="config.leaf: 'evil_module:Innocent' is not a class of mmcontrast"):
        from_dict(tree | {"leaf": data}, trust=HERE)
    assert not mark.exists() and "evil_module" not in sys.modules

    built = from_dict(data, trust=("evil_module",)).build
    assert mark.read_text() == "ran" and class_path(built.__self__.owner) == "evil_module:Innocent"
    del sys.modules["evil_module"]


def test_a_module_is_trusted_by_its_file(tmp_path: Path) -> None:
    mark = _evil(tmp_path, "evil_by_file")
    config = from_dict({"class": "evil_by_file:Innocent"}, trust=(str(tmp_path / "evil_by_file.py"),))
    assert mark.exists() and class_path(config.owner) == "evil_by_file:Innocent"
    with pytest.raises(ConfigError, match="there is no file"):
        from_dict({"class": "gone:X"}, trust=(str(tmp_path / "gone.py"),))


def test_a_file_in_a_run_beside_the_package_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout `mmcontrast.runs.foreign.evil` can be imported; being importable is no reason to trust it."""
    mark = _evil(tmp_path / "runs" / "foreign", "evil")
    monkeypatch.setattr(mmcontrast, "__path__", [*mmcontrast.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match="is not a class of mmcontrast"):
        from_dict({"class": "mmcontrast.runs.foreign.evil:Innocent"})
    assert not mark.exists()
    trusted = from_dict({"class": "mmcontrast.runs.foreign.evil:Innocent"}, trust=("mmcontrast.runs.foreign.evil",))
    assert mark.exists() and trusted.owner is not None  # it could have been imported


def test_the_reason_why_a_trusted_module_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs_more:X.*No module named 'a_library_that_is_not_there'"):
        from_dict({"class": "needs_more:X"}, trust=("needs_more",))


# ------------------------------------------------------------------------------------------------- recipes

OWN = """
from dataclasses import dataclass
import torch
from mmcontrast.data import Stream
from mmcontrast.encoders import MultiEncoder, TextTransformer
from mmcontrast.encoders.image import ImageEncoder
from mmcontrast.objectives import InfoNCE
from mmcontrast.trainer import Trainer

class MeanColour(ImageEncoder):
    @dataclass(kw_only=True)
    class Config(ImageEncoder.Config):
        side: int = 8

    def __init__(self, config, restore=None):
        super().__init__(config, size=config.side, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.layer = torch.nn.Linear(3, 5)
        self.dim = 5
        self.finish(config, pretrained=False)

    def forward(self, x):
        return self.layer(self.normalise(x).mean((2, 3))), None

def recipe():
    text = TextTransformer.Config(context_length=8, width=8, layers=1, heads=1)
    return Trainer.Config(
        model=MultiEncoder.Config(encoders={"image": MeanColour.Config(side=4), "text": text}, dim=6),
        data=Stream.Config(shards=("x",)), objectives={"clip": InfoNCE.Config()}, steps=1, global_batch=2,
    )
"""

ASK = """
import sys
from mmcontrast import load
z = load(sys.argv[1], trust=sys.argv[2:]).encode("image", [sys.argv[1] + "/a.png"])
print(type(load(sys.argv[1], trust=sys.argv[2:]).encoder("image")).__name__, [round(v, 4) for v in z[0].tolist()])
"""


def test_an_encoder_of_ones_own_comes_back_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "mean_colour.py"
    file.write_text(OWN)
    recipe = load_recipe(str(file))
    assert class_path(type(recipe.model.encoders["image"])) == "mean_colour:MeanColour.Config"
    assert load_recipe(str(file)) == recipe, "loading twice must give the same classes"

    run = tiny.write_run(tmp_path / "run", recipe.model)
    (run / "a.png").write_bytes(tiny.png("red"))
    data = _json(recipe)
    with pytest.raises(ConfigError, match="config.model.encoders.image: 'mean_colour:MeanColour' is not a class"):
        from_dict(data)
    assert from_dict(data, trust=("mean_colour",)) == recipe

    from mmcontrast import load

    want = load(run, trust=("mean_colour",)).encode("image", [tiny.png("red")])[0].tolist()
    found = subprocess.run(
        [sys.executable, "-c", ASK, str(run), str(file)], cwd="/", capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == f"MeanColour {[round(v, 4) for v in want]}"


def test_a_recipe_is_found_by_name_file_config_and_folder(tmp_path: Path) -> None:
    by_name = load_recipe("emoji")
    shipped = Path(mmcontrast.recipes.__path__[0]) / "emoji.py"
    assert load_recipe(str(shipped)) == by_name  # though a package called emoji is installed, too
    (tmp_path / "config.json").write_text(json.dumps(to_dict(by_name)))
    assert load_recipe(str(tmp_path)) == by_name == load_recipe(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("emojy", None, r"there is no recipe 'emojy'; did you mean 'emoji'\?; or give a .py file"),
        ("no/such/run", None, r"there is no recipe 'no/such/run'; known: .*emoji"),
        ("gone.py", None, r"there is no file '.*gone.py'"),
        ("bare_recipe.py", "x = 1", r"has no function recipe\(\) that returns a Trainer.Config"),
        ("wrong_recipe.py", "def recipe(): return 3", r"makes a int, not a Trainer.Config"),
        ("json.py", "", r"json.py has the name of another module, 'json'; rename the file"),
        ("torch.py", "", r"torch.py has the name of another module, 'torch'; rename the file"),
        ("run.v2.py", "", r"rename it without the dots in 'run.v2'"),
        ("empty/config.json", "{}", r"config: expected an object with the key 'class'"),
        ("list/config.json", "[]", r"config.json cannot be read: not an object"),
        ("half/config.json", '{"class": ', r"config.json cannot be read"),
        ("gone/config.json", None, r"config.json cannot be read"),
        ("other.json", "{}", r"there is no recipe '.*other.json'"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path) if "." in name else name)
    assert "torch" not in name or Path(str(sys.modules["torch"].__file__)).name == "__init__.py"


def test_a_config_of_a_part_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_dict(ViT.Config())))
    with pytest.raises(ConfigError, match="makes a Config, not a Trainer.Config"):
        load_recipe(str(tmp_path))


def test_settings_build_what_they_name() -> None:
    model = from_dict(_json(tiny.model_config(dim=4))).build()
    assert type(model) is MultiEncoder and model.config.dim == 4
