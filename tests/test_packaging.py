"""A plain (not editable) installation holds the whole package."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).parents[1]
PACKAGE = "ray_train_geo"


def _setuptools() -> dict[str, Any]:
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return settings["tool"]["setuptools"]


def _packages() -> dict[str, Path]:
    folders = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.actors": ROOT / "actors"}
    for init in (ROOT / PACKAGE).rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        folders[".".join(parts)] = init.parent
    return folders


def test_every_package_is_listed() -> None:
    assert sorted(_setuptools()["packages"]) == sorted(_packages())


def test_every_data_file_is_listed() -> None:
    listed = _setuptools()["package-data"]
    for package, folder in _packages().items():
        for path in folder.iterdir():
            if path.is_dir() and not (path / "__init__.py").exists() and path.name == "data":
                assert "data/*" in listed.get(package, []), path
            if path.is_file() and path.suffix != ".py":
                patterns = listed.get(package, [])
                assert any(fnmatch.fnmatch(path.name, p) for p in patterns), path
