"""The generated files are what their own commands write."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from deployments import cli
from tests.k8s.manifests import K8S, ROOT

GENERATED = sorted(p for p in K8S.rglob("serve_config.yaml"))


@pytest.mark.parametrize("path", GENERATED, ids=lambda p: p.parent.relative_to(K8S).as_posix())
def test_files_are_their_commands(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k8s").mkdir()
    for name in ("serve_config.yaml", "tests/configs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(K8S / "base", tmp_path / "k8s/base")
    monkeypatch.chdir(tmp_path)
    header = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    command = " ".join(header).removeprefix("Written by: ")
    arguments = shlex.split(command)
    assert arguments[:2] == ["headroom", "k8s"]
    assert cli.main(arguments[1:]) == 0
    folder = path.parent.relative_to(ROOT)
    written = {p.name for p in (tmp_path / folder).iterdir()}
    assert "serve_config.yaml" in written
    for name in written:
        found, expected = ((base / folder / name).read_text(encoding="utf-8") for base in (ROOT, tmp_path))
        assert found == expected, f"{folder / name} differs; renew it: {command}"
