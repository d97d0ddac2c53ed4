"""The shipped configurations: of runs, of studies, and of corpora."""

from __future__ import annotations

from pathlib import Path

import drt.version


def find_config(name: str, *, folder: str = "") -> Path:
    """A file's path, or the shipped configuration of that name.

    Args:
        name: a path, or a shipped configuration's name such as "demo" or "data/pg19".
        folder: where among the shipped ones to look.

    Raises:
        ValueError: neither exists; the shipped names are listed.
    """
    path = Path(name)
    return path if path.is_file() else find_shipped(name, folder=folder)


def find_shipped(name: str, *, folder: str = "") -> Path:
    """The shipped configuration of a name, as `find_config` finds it where there is no such file.

    Raises:
        ValueError: there is none; the shipped names are listed.
    """
    shipped = shipped_file(name, folder=folder)
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
    raise ValueError(f"no configuration file {name}; shipped ones: {names}")


def shipped_file(name: str, *, folder: str = "") -> Path:
    """Where the shipped configuration of a name would be, with or without .yaml."""
    return _folder() / folder / f"{name.removesuffix('.yaml')}.yaml"


def _folder() -> Path:
    """configs/ beside the sources in a checkout, inside the package when installed."""
    package = Path(drt.version.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"
