"""The package works as a checkout, editable, and from a wheel: eval/, data_prep/ and recipes/ are found in each."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import mmcontrast.eval, mmcontrast.data_prep, mmcontrast.recipes, mmcontrast.objectives, mmcontrast.cli"
PRINT = IMPORTS + "; print(mmcontrast.eval.__file__); from mmcontrast import load; print(load.__module__)"


def test_every_package_is_in_the_wheel(tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    inside = {
        ".".join(("mmcontrast", *p.parent.relative_to(ROOT / "mmcontrast").parts))
        for p in (ROOT / "mmcontrast").rglob("__init__.py")
    }
    beside = {
        ".".join(("mmcontrast", *p.parent.relative_to(ROOT).parts))
        for name in ("eval", "data_prep", "recipes")
        for p in (ROOT / name).rglob("__init__.py")
    }
    assert listed == inside | beside

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    wanted = {
        f"mmcontrast/{p.relative_to(ROOT)}" for d in ("eval", "data_prep", "recipes") for p in (ROOT / d).rglob("*.py")
    }
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "mmcontrast").rglob("*.py")} | {"mmcontrast/py.typed"}
    wanted |= {f"mmcontrast/{p.relative_to(ROOT)}" for p in (ROOT / "eval" / "serve" / "page").iterdir()}
    assert wanted <= names and not any(n.startswith("tests") for n in names)

    # From another folder, with only the wheel's content on the path; -P keeps the current folder out.
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {PRINT}"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0].startswith(str(tmp_path / "site"))


def test_a_checkout_uses_its_own_files() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {PRINT}"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(ROOT / "eval" / "__init__.py"), "mmcontrast.checkpoint"]
