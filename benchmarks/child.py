"""A child process that answers one JSON line with one JSON line, so that each contender has an interpreter of its own.

The child's standard output is the pipe; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ChildFailed(Exception):
    """The child ended or answered with an error."""


class Child:
    """Starts `python -m MODULE`; it sleeps, without using a core, between `ask`s.

    Args:
        module: runs `answer_lines`.
        log: file that takes the child's standard error.
        env: variables to set besides this process's own.
    """

    def __init__(self, module: str, log: Path, env: dict[str, str] | None = None) -> None:
        self._module = module
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=os.environ | (env or {}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The child's answer.

        Raises:
            ChildFailed: with the end of the child's log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> ChildFailed:
        code = self._process.wait()
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        return ChildFailed(f"{self._module} ended with code {code}; the end of {self._log}:\n{tail}")

    def close(self) -> None:
        """Let the child end; kill it if it has not within 10 s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what a dead child never read
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def answer_lines(handle: Callable[..., dict[str, Any]]) -> None:
    """The child's main loop: `handle(**request)` for each line, until standard input ends."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        pipe.write(json.dumps(handle(**json.loads(line))) + "\n")
        pipe.flush()
