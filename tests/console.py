"""Commands in Markdown with what they print: fenced blocks of the language `console`, each with one `$ command`.

    python -m tests.console docs/placement.md      runs every command again and writes what it printed

`tests/contract/test_docs.py` runs them too and compares, so that no figure on a page outlives the code.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"^```console\n\$ (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n(?P<output>.*?)^```$", re.MULTILINE | re.DOTALL
)
_WIDTH = 120


def blocks(text: str) -> list[tuple[str, str]]:
    """(command, output) of every block, as written."""
    return [(match["command"], match["output"]) for match in _BLOCK.finditer(text)]


def run(command: str) -> str:
    """What a command prints, errors too, run at the root of the repository by this Python; long lines are wrapped."""
    words = shlex.split(command.replace("\\\n", " "))
    if words[0] != "python":
        raise ValueError(f"{command!r}: a page's commands start with python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(_WIDTH)}
    done = subprocess.run(
        [sys.executable, *words[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    return "".join(f"{line}\n" for text in done.stdout.splitlines() for line in _wrapped(text))


def _wrapped(text: str) -> list[str]:
    if len(text) <= _WIDTH:
        return [text]
    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def renew(text: str) -> str:
    """`text` with what its commands print now."""
    return _BLOCK.sub(lambda match: f"```console\n$ {match['command']}\n{run(match['command'])}```", text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(renew(page.read_text(encoding="utf-8")), encoding="utf-8")
