"""Commands as pages and docstrings write them: modules, flags, targets and files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands import (
    LONG_FLAG,
    ROOT,
    Line,
    lines_of_module,
    lines_of_page,
    module_of,
    options_of,
    parser_of,
    parses,
    spans,
)

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    path for part in ("benchmarks", "deployments", "placement", "k8s") for path in (ROOT / part).rglob("*.py")
)
FOREIGN = {"--dry-run", "--hypothesis-profile"}
"""Flags that pages mention by themselves, of other programs."""


def lines(path: Path) -> list[Line]:
    if path.suffix == ".py":
        return list(lines_of_module(path))
    return list(lines_of_page(path.read_text(encoding="utf-8")))


LINES = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}: {' '.join(line.words)[:60]}")
    for path in (*PAGES, *MODULES)
    for line in lines(path)
]


def check_make(line: Line) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    for word in line.words[1:]:
        name, given, _ = word.partition("=")
        assert f"$({name})" in makefile if given else name in targets, word


def check_pytest(line: Line) -> None:
    for word in line.words[1:]:
        if "/" in word:
            assert (ROOT / word.partition("::")[0]).exists(), word


def check_module(line: Line) -> None:
    module, arguments = module_of(line.words)
    if not parses(module):
        assert not line.flags, f"{module} has no flags"
        return
    found = parser_of(module, arguments)
    known = options_of(found.parser, found.arguments)
    assert set(line.flags) <= known, sorted(set(line.flags) - known)
    if line.whole:
        try:
            found.parser.parse_args(found.arguments)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"its arguments are refused: {error}")


@pytest.mark.parametrize("line", LINES)
def test_a_command_is_one_that_there_is(line: Line) -> None:
    {"make": check_make, "pytest": check_pytest}.get(line.words[0], check_module)(line)


def test_flags_that_pages_mention_by_themselves_are_some_commands() -> None:
    known = set(FOREIGN)
    for (line,) in (param.values for param in LINES):
        if line.words[0] not in ("make", "pytest") and parses(module := module_of(line.words)[0]):
            found = parser_of(module, module_of(line.words)[1])
            known |= options_of(found.parser, found.arguments)
    for page in PAGES:
        for span in spans(page.read_text(encoding="utf-8")):
            assert set(LONG_FLAG.findall(span)) <= known, f"{page.name}: {span}"
