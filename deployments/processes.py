"""The processes of one run: all that descend from its Ray, found by a mark in their environment.

A mark survives what parentage does not: a daemon whose parent ended belongs to the system's first process. Some of
Ray's daemons write their title over their environment; they are known by the log files that they write in the run's
folder (one who only reads them, such as `tail`, is none of it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

MARK = "HEADROOM_RUN"
"""Environment variable that names the run by its folder; set before Ray starts, inherited by all that it starts."""


def marked(folder: Path) -> list[psutil.Process]:
    """Processes that run and carry the mark of the run in `folder`; never this one."""
    own = psutil.Process().pid
    return [p for p in psutil.process_iter() if p.pid != own and (_mark(p) == str(folder) or _logs_to(p, folder))]


def end_processes(processes: Sequence[psutil.Process], wait_s: float) -> None:
    """Ask each process to end, and kill those that still run after `wait_s` seconds. Ended ones are passed over."""
    for process in processes:
        _signal(process.terminate)
    _, left = psutil.wait_procs(processes, timeout=wait_s)
    for process in left:
        _signal(process.kill)
    psutil.wait_procs(left, timeout=wait_s)


def _mark(process: psutil.Process) -> str | None:
    try:
        mark: str | None = process.environ().get(MARK)
        return mark
    except (psutil.Error, OSError):  # It ended, is another user's, or is a zombie: none of ours to end.
        return None


def _logs_to(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(f.mode != "r" and Path(f.path).is_relative_to(folder) for f in process.open_files())
    except (psutil.Error, OSError):
        return False


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return
