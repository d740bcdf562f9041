"""Files in the kernel's page cache: how much of them is there, and how to take them out. Linux alone."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' pages. It keeps those that a process has mapped, and all where the file
    system is in main memory; `resident` tells."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(paths: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache, 0 to 1.

    To a process that neither owns a file nor may write to it, Linux says that all of them are.

    Raises:
        OSError: the kernel does not tell.
    """
    flags = b"".join(_flags(path) for path in paths)
    return sum(flag & 1 for flag in flags) / len(flags)


def _flags(path: Path) -> bytes:
    """Of each page a byte, whose lowest bit says whether it is in the cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        flags = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        failed = _LIBC.mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), flags)
        del first  # what it points to can't be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return bytes(flags)
