"""A checkpoint's files, read while they are loaded so that the load finds them in the page cache.

`from_pretrained` maps them, and where it quantises on the way it touches one tensor after the other on one thread: a
disk then reads little at a time, and waits while a tensor is converted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event

from deployments.checkpoint import shards
from deployments.engine.background import beside
from deployments.errors import ConfigError
from placement.errors import PlacementError
from placement.hardware import format_bytes
from placement.probe import available_memory

log = logging.getLogger(__name__)

BLOCK_BYTES = 16 * 2**20
READERS = 4
"""Threads: of one alone the disk is asked for nothing while a block is copied."""


def reading_ahead(model_dir: Path) -> AbstractContextManager[None]:
    """Read the files of the checkpoint in `model_dir`, in order, until the block ends. What goes wrong is logged alone:
    the load meets it too."""
    return beside(lambda ended: _read_ahead(model_dir, ended))


def worth_reading(size: int, available: int) -> bool:
    """Whether files of `size` bytes stay in the page cache until they are loaded: they may take half of the `available`
    bytes of main memory."""
    return 2 * size <= available


def read_through(files: Sequence[Path], ended: Event) -> int:
    """Read them in blocks, in order, until `ended` is set; the bytes that were read.

    Raises:
        OSError: a file can't be read.
    """
    blocks = iter([(path, start) for path in files for start in range(0, path.stat().st_size, BLOCK_BYTES)])
    failed = Event()

    def read() -> int:
        buffer, done = memoryview(bytearray(BLOCK_BYTES)), 0
        for path, start in blocks:  # each is for the reader that asks first
            if ended.is_set() or failed.is_set():
                break
            try:
                done += _read_block(path, start, buffer)
            except OSError:
                failed.set()
                raise
        return done

    with ThreadPoolExecutor(READERS) as pool:
        readers = [pool.submit(read) for _ in range(READERS)]
        return sum(reader.result() for reader in readers)


def _read_block(path: Path, start: int, buffer: memoryview) -> int:
    """Through Python's buffer: that reads on where a file system gives less than was asked for, and copies no block."""
    with path.open("rb") as file:
        file.seek(start)
        return file.readinto(buffer)


def _read_ahead(model_dir: Path, ended: Event) -> None:
    try:
        files, available = shards(model_dir), available_memory()
        size = sum(path.stat().st_size for path in files)
        if not worth_reading(size, available):
            log.info(
                "files of %s are not read ahead of the load: that is more than half of the main memory available, %s",
                format_bytes(size), format_bytes(available),
            )  # fmt: skip
            return
        began = time.perf_counter()
        done = read_through(files, ended)
    except (OSError, ConfigError, PlacementError) as error:
        log.warning("files are not read ahead of the load: %s", error)
    else:
        taken = time.perf_counter() - began
        log.info("read ahead of the load: %s of %s in %.1f s", format_bytes(done), format_bytes(size), taken)
