"""Sources and where they lead. Conversion itself is tried in tests/contract, the hub in test_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deployments import store
from deployments.errors import ConfigError
from tests.fakes.hub import model_files


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that looks like GGUF and can't be converted."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def write_model(folder: Path) -> None:
    for name, content in model_files().items():
        (folder / name).write_bytes(content)


def test_folder_is_used_where_it_is(tmp_path: Path) -> None:
    write_model(tmp_path)
    local = store.fetch(str(tmp_path), home=tmp_path / "home")
    assert local.path == tmp_path
    assert local.max_context == 128
    assert not (tmp_path / "home").exists()


def test_folder_has_no_revision(tmp_path: Path) -> None:
    write_model(tmp_path)
    with pytest.raises(ConfigError, match="remove `revision`"):
        store.fetch(str(tmp_path), revision="main", home=tmp_path / "home")


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c", "two words"])
def test_missing_folder_is_not_taken_for_a_hub_id(source: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        store.fetch(source, home=tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        store.fetch(str(tmp_path / "x.gguf"), home=tmp_path)


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        store.fetch(str(tmp_path / "x.gguf"), home=tmp_path)


def test_missing_embedded_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "DEMO_PACKAGE", "a-package-that-nobody-installed")
    with pytest.raises(ConfigError, match="headroom fetch-demo"):
        store.fetch("demo", home=tmp_path)


class Converter:
    """Stands in for the process that converts: writes a model, or fails."""

    def __init__(self, error: str = "") -> None:
        self.runs = 0
        self.error = error

    def __call__(self, command: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        self.runs += 1
        folder = Path(command[-1])
        assert list(folder.iterdir()) == []
        if self.error:
            (folder / "config.json").write_text("half", encoding="utf-8")
            return subprocess.CompletedProcess(command, 1, "", self.error)
        write_model(folder)
        return subprocess.CompletedProcess(command, 0, "", "")


def test_converted_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = Converter()
    monkeypatch.setattr(subprocess, "run", converter)
    first = store.fetch(str(gguf), home=tmp_path / "home")
    assert store.fetch(str(gguf), home=tmp_path / "home") == first
    assert converter.runs == 1
    assert first.path.parent == tmp_path / "home" / "models"


def test_changed_file_and_changed_versions_convert_anew(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Converter())
    paths = {store.fetch(str(gguf), home=tmp_path / "home").path}
    os.utime(gguf, ns=(1, 1))
    paths.add(store.fetch(str(gguf), home=tmp_path / "home").path)
    monkeypatch.setattr(store, "CONVERTER_VERSION", store.CONVERTER_VERSION + 1)
    paths.add(store.fetch(str(gguf), home=tmp_path / "home").path)
    assert len(paths) == 3


def test_failed_conversion_leaves_nothing_and_can_be_repeated(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", Converter("Traceback\n  ...\nValueError: no such architecture\n"))
    with pytest.raises(ConfigError, match=r"can't be converted: ValueError: no such architecture"):
        store.fetch(str(gguf), home=tmp_path / "home")
    assert [p.name for p in (tmp_path / "home" / "models").iterdir() if p.is_dir()] == []
    monkeypatch.setattr(subprocess, "run", Converter())
    assert store.fetch(str(gguf), home=tmp_path / "home").max_context == 128


def test_disk_without_room(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 519})  # The file has 104 bytes, 5 * 104 = 520 are asked for.
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(ConfigError, match=r"free some or set HEADROOM_HOME"):
        store.fetch(str(gguf), home=tmp_path / "home")


def test_fetching_imports_no_torch(tmp_path: Path) -> None:
    write_model(tmp_path)
    code = "import sys, json; from pathlib import Path; from deployments import store, preflight, cli; "
    code += f"store.fetch({str(tmp_path)!r}, home=Path('unused')); "
    code += "print(json.dumps([name for name in ('torch', 'transformers', 'ray') if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
