"""Folders and files that are made beside their final place, and renamed: one with its name is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from deployments.errors import ConfigError


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, under a lock made by `make(empty folder)` if it is not there; other processes wait for it.

    Raises:
        ConfigError: the parent folder can't be written. Whatever `make` raises leaves nothing behind.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f"{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"{target.parent} can't be written ({error.strerror}); set HEADROOM_HOME to a writable folder"
        ) from None
    try:
        if not target.is_dir():
            _make(target, make)
    finally:
        lock.release()
    return target


def write_whole(path: Path, content: bytes) -> None:
    """The file, whose readers see all of it or what was there before, even after a power cut.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what was written
    partial.replace(path)


def make_new(target: Path, make: Callable[[Path], None]) -> None:
    """`target`, made by `make(empty folder)`, for a person who named it.

    Raises:
        ConfigError: it is there, or can't be written. Whatever `make` raises leaves nothing behind.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; name a folder that isn't")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(
            f"{target} can't be written ({reason}); name a folder on a disk with room for the model, that you may write"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make(target: Path, make: Callable[[Path], None]) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for folder in target.parent.iterdir():
        # Of a process that was killed: this one holds its lock now. Target "a" has ".a.17", and ".a.b.17" is not its.
        if folder.stem == partial.stem and folder.suffix[1:].isdecimal():
            shutil.rmtree(folder)
    partial.mkdir()
    try:
        make(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
