"""What documentation says that a command prints is what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import console

PLACEMENT = "docs/placement.md"
PAGES = (PLACEMENT,)


def page_blocks(page: str) -> list[tuple[str, str]]:
    """(command, output) of every console block of a page."""
    return console.blocks((console.ROOT / page).read_text(encoding="utf-8"))


COMMANDS = [pytest.param(page, *block, id=f"{page}:{i}") for page in PAGES for i, block in enumerate(page_blocks(page))]


@pytest.mark.parametrize(("page", "command", "output"), COMMANDS)
def test_a_command_prints_what_its_page_says(page: str, command: str, output: str) -> None:
    assert output
    assert console.run(command) == output, f"renew {page}: python -m tests.console {page}"


def test_the_example_takes_the_caps_that_the_refusals_name() -> None:
    ours = [block for block in page_blocks(PLACEMENT) if "bloom-3b" in block[0] and "--quantize-" not in block[0]]
    taken = [command for command, _ in ours if "--explain" in command]
    refused = [output for command, output in ours if command not in taken]
    named = [re.search(r"max_memory: (\S+), in the same ratio", " ".join(output.split())) for output in refused]
    assert [match and match[1] for match in named] == [re.search(r"--max-memory (\S+)", text)[1] for text in taken]  # type: ignore[index]  # found, or the test fails


def test_the_picture_is_the_commands(tmp_path: Path) -> None:
    page = (console.ROOT / PLACEMENT).read_text(encoding="utf-8")
    (command,) = re.findall(r"^python -m placement .* --svg docs/placement\.svg$", page, re.MULTILINE)
    console.run(command.replace("docs/placement.svg", str(tmp_path / "drawn.svg")))
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    assert drawn == (console.ROOT / "docs/placement.svg").read_text(encoding="utf-8"), f"draw it again: {command}"


def test_blocks_of_a_page() -> None:
    page = "Text\n```console\n$ python -c \\\n  'print(1)'\n1\n```\nmore\n```console\n$ python -V\n```\n"
    assert console.blocks(page) == [("python -c \\\n  'print(1)'", "1\n"), ("python -V", "")]
    renewed = console.renew(page)
    assert renewed.startswith("Text\n```console\n$ python -c \\\n  'print(1)'\n1\n```\nmore\n")
    assert console.blocks(renewed)[1][1].startswith("Python 3.")
    with pytest.raises(ValueError, match="start with python"):
        console.run("rm x")
