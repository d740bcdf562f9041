"""`python -m deployments.reaper FOLDER`: cleans up after a run whose own process was killed.

It waits for the end of its standard input, which is a pipe that only that process holds open. A run that stopped in
order has removed its folder by then, and there is nothing to do. Ray's own arrangements take more than a minute for
some of its daemons, and leave the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from deployments.processes import end_processes, marked

_TERM_WAIT_S = 1.0


def start(folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    """A reaper for the run in `folder`; close its stdin, or end, to set it off."""
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.reaper", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environ,
        start_new_session=True,  # Ctrl-C in a terminal goes to every process of the session's foreground group.
    )


def main() -> None:
    """Wait, then clean up."""
    folder = Path(sys.argv[1])
    sys.stdin.buffer.read()
    if folder.is_dir():
        # Where the run itself still lives, it could not remove its folder, and may still have logs open there.
        end_processes([p for p in marked(folder) if p.pid != os.getppid()], _TERM_WAIT_S)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
