from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RUN = """
import os, subprocess, sys
from pathlib import Path
from deployments import reaper

folder = Path(sys.argv[1])
marked = os.environ | {"HEADROOM_RUN": str(folder)}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=marked)
with (folder / "log").open("w"):  # as Ray's, where it could not be shut down in time
    reaper.start(folder, dict(os.environ)).communicate()
    print(child.wait(60), folder.exists())
"""


def test_it_ends_what_a_run_left_but_not_the_run_that_is_still_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "-15 False\n"), done.stderr
