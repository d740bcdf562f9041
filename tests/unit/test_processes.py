"""Finding and ending the processes of one run; the reaper of a run that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from deployments import reaper
from deployments.processes import MARK, end_processes, marked

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@contextmanager
def python(code: str, folder: Path) -> Iterator[psutil.Process]:
    """A process of the run in `folder`, up and running."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, MARK: str(folder)}
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"up\n"
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def test_processes_of_a_run_are_found_and_no_others(tmp_path: Path) -> None:
    with python(SLEEP, tmp_path / "a") as ours, python(SLEEP, tmp_path / "b"):
        assert marked(tmp_path / "a") == [ours]
        assert marked(tmp_path / "c") == []


def test_process_that_overwrote_its_environment_is_found_by_its_log(tmp_path: Path) -> None:
    with (tmp_path / "daemon.out").open("wb") as log:
        daemon = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=log)
    with (tmp_path / "daemon.out").open("rb") as log:
        reader = subprocess.Popen([sys.executable, "-c", SLEEP], stdin=log, stdout=subprocess.DEVNULL)
    try:
        assert [p.pid for p in marked(tmp_path)] == [daemon.pid]
    finally:
        for process in (daemon, reader):
            process.kill()
            process.wait()


def test_stubborn_processes_are_killed_and_ended_ones_passed_over(tmp_path: Path) -> None:
    with python(STUBBORN, tmp_path) as stubborn, python(SLEEP, tmp_path) as willing:
        willing.kill()
        willing.wait()
        end_processes([willing, stubborn], wait_s=0.3)
        assert not stubborn.is_running()


def test_reaper_cleans_up_once_its_starter_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with python(SLEEP, folder) as left, python(SLEEP, tmp_path / "other") as other:
        waiting = reaper.start(folder, dict(os.environ))
        time.sleep(0.3)
        assert waiting.poll() is None
        assert left.is_running()
        waiting.communicate(timeout=10)  # Closes its stdin, as the end of the starter does.
        assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
        assert other.is_running()
    assert not folder.exists()


def test_reaper_of_a_run_that_stopped_in_order_does_nothing(tmp_path: Path) -> None:
    with python(SLEEP, tmp_path / "gone") as unrelated:
        waiting = reaper.start(tmp_path / "gone", dict(os.environ))
        waiting.communicate(timeout=10)
        assert waiting.returncode == 0
        assert unrelated.is_running()
