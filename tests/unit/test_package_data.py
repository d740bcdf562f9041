"""An installed package has the files that the source tree has."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["deployments", "placement"])
def test_every_file_that_is_no_module_is_packaged(package: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    folders = {ROOT / name.replace(".", "/"): patterns for name, patterns in data.items()}
    packaged = {file for folder, patterns in folders.items() for each in patterns for file in folder.glob(each)}
    files = {
        file for file in (ROOT / package).rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc", ".toml")
    }
    assert {file for file in files if not any(part.startswith(".") for part in file.parts)} <= packaged
