"""What the engines that start on this machine log, for a person who waits: the newest line, now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 3.0
_TAIL_BYTES = 8192
_LINE = re.compile(rb"^engine (?:INFO|WARNING) (.+)\n", re.MULTILINE)


class StartLog:
    """The log files of Ray's workers, into which their engines' lines go too.

    Args:
        folder: where Ray keeps them.
        clock: seconds, never going back.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._said: tuple[Path, str] | None = None
        self._said_at = -EVERY_S

    def news(self) -> str | None:
        """The newest line of any engine; None where it was given before, or one less than `EVERY_S` ago."""
        if self._clock() - self._said_at < EVERY_S:
            return None
        newest = _newest(self._folder)
        if newest is None or newest == self._said:
            return None
        self._said, self._said_at = newest, self._clock()
        return newest[1]


def _newest(folder: Path) -> tuple[Path, str] | None:
    """The file that was written last of those with lines of an engine, and the last of them."""
    try:
        for path in sorted(folder.glob("worker-*.err"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                if lines := _LINE.findall(file.read()):
                    return path, lines[-1].decode(errors="replace")
    except FileNotFoundError:  # Ray moves those of workers that have ended; the next look finds the others
        pass
    return None
