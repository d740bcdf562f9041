"""Folders that are made once: under a lock, beside their final place, and renamed. A folder with its name is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from deployments.errors import ConfigError


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(empty folder)` if it is not there; other processes wait for it.

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


def _make(target: Path, make: Callable[[Path], None]) -> None:
    for stale in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(stale)  # of a process that was killed: this one holds its lock now
    partial = target.parent / f".{target.name}.{os.getpid()}"
    partial.mkdir()
    try:
        make(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
