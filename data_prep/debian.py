"""Files of Debian packages: installed, unpacked in a folder, or fetched into a cache without root's rights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmcontrast.config import ConfigError


def package_files(source: str, packages: Sequence[str], folders: Sequence[str], *, root: Path, fetch: bool) -> Path:
    """The folder under which the packages' files lie as they would under /.

    Args:
        source: name of the folder in the cache.
        packages: what brings the files.
        folders: relative folders that must be there.
        root: / if the packages are installed, or where they were unpacked.
        fetch: download and unpack them into the user's cache instead, unless they are there.

    Raises:
        ConfigError: a folder is not there, with the commands that bring it; or a command fails.
    """
    if fetch:
        root = _cache() / source
        if not all((root / folder).is_dir() for folder in folders):
            _fetch(root, packages)
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        names = " ".join(packages)
        raise ConfigError(
            f"{root / missing[0]} is not there. Install it: `apt-get install {names}`. Or, without root's rights: "
            f"`apt-get download {names} && for f in *.deb; do dpkg-deb -x $f DIR; done`, then --root DIR; --fetch does "
            "that for you. The same packages are on https://packages.debian.org"
        )
    return root


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcontrast" / "debian"


def _fetch(root: Path, packages: Sequence[str]) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"--fetch needs {tool}, which this machine lacks; download {', '.join(packages)} from "
                "https://packages.debian.org, unpack them in one folder and name it with --root"
            )
    root.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {', '.join(packages)} into {root}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        whole = Path(folder) / "files"
        _run(["apt-get", "download", *packages], Path(folder))
        for archive in sorted(Path(folder).glob("*.deb")):
            _run(["dpkg-deb", "-x", str(archive), str(whole)], Path(folder))
        shutil.rmtree(root, ignore_errors=True)
        whole.rename(root)  # last, so that a folder in the cache is whole


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg-deb: error"))]
        raise ConfigError(
            f"`{' '.join(command)}` failed: {'; '.join(said) or done.stderr.strip()[-300:]}; `apt-get update` may help"
        )
