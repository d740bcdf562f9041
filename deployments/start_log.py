"""What the engines that start on this machine log, for a person who waits: the newest line, now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

EVERY_S = 3.0
_HEAD_BYTES, _TAIL_BYTES = 1024, 8192
_LINE = re.compile(rb"^engine (?:INFO|WARNING) (.+)\n", re.MULTILINE)
_ACTOR = re.compile(rb"^:actor_name:ServeReplica:[^:\n]*:(.+)\n", re.MULTILINE)
"""What Ray writes first: the application and the deployment of the file's replica."""


class StartLog:
    """The log files of Ray's workers, into which their engines' lines go too.

    Args:
        folder: where Ray keeps them.
        replicas: how many start; where it is more than one, each line says which of them logged it.
        clock: seconds, never going back.
    """

    def __init__(self, folder: Path, replicas: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._replicas, self._clock = folder, replicas, clock
        self._shown: dict[str, list[Path]] = {}
        """Files of each deployment, in the order in which their lines were shown first."""
        self._said: _Line | None = None
        self._said_at = -EVERY_S

    def news(self) -> str | None:
        """The newest line of any engine; None where it was given before, or one less than `EVERY_S` ago."""
        if self._clock() - self._said_at < EVERY_S:
            return None
        newest = _newest(self._folder)
        if newest is None or newest == self._said:
            return None
        self._said, self._said_at = newest, self._clock()
        return f"{self._replica(newest)}: {newest.text}" if self._replicas > 1 else newest.text

    def _replica(self, line: _Line) -> str:
        """Which one logged it: its deployment, which is named after model and pool, and a number."""
        files = self._shown.setdefault(line.deployment, [])
        if line.path not in files:
            files.append(line.path)
        return f"{line.deployment} {files.index(line.path) + 1}"


class _Line(NamedTuple):
    path: Path
    deployment: str
    text: str


def _newest(folder: Path) -> _Line | None:
    """The last line of an engine in the file that was written last of those with such lines."""
    try:
        for path in sorted(folder.glob("worker-*.err"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                if lines := _LINE.findall(file.read()):
                    actor = _ACTOR.search(head)
                    return _Line(path, _text(actor[1]) if actor else "replica", _text(lines[-1]))
    except FileNotFoundError:  # Ray moves those of workers that have ended; the next look finds the others
        pass
    return None


def _text(line: bytes) -> str:
    return line.decode(errors="replace")
