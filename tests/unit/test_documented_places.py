"""Files, headings, decisions and variables that pages and code name are there."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.commands import ROOT, prose_of, spans

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARTS = ("benchmarks", "deployments", "docs", "k8s", "placement", "tests")
FILES = [path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*") if path.is_file()]
FILES += [path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file()]
SOURCES = [path for path in FILES if path.suffix in (".py", ".cu", ".cuh", ".yaml", ".toml") or path.name == "Makefile"]
NOT_OURS = {"/openapi.json", "keys.yaml"}
"""An endpoint, and a file that a user makes."""


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tells_of_the_past(page: Path) -> bool:
    """What it names may be called otherwise by now."""
    return page.name == "log.md" or page.parent.name == "decisions"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page.read_text(encoding="utf-8"))):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            where = page.parent / name if name else page
            assert where.exists(), target
            assert not anchor or anchor in anchors(where), target


@pytest.mark.parametrize("page", [page for page in PAGES if not tells_of_the_past(page)], ids=lambda page: page.name)
def test_files_in_backticks_are_there(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"[\w./*-]+\.(?:py|md|json|ya?ml|cuh?|toml|svg|js|html|css)", span) and span not in NOT_OURS:
            assert any(fnmatch(f"/{path}", f"*/{span}") for path in FILES), span


def test_pages_that_code_names_are_there() -> None:
    for source in SOURCES:
        for name in re.findall(r"docs/[\w./-]+\.md", read(source)):
            assert (ROOT / name).exists(), f"{source}: {name}"


def test_decisions_are_there() -> None:
    for source in (*SOURCES, *PAGES):
        for number in re.findall(r"\b[Dd]ecision (\d{1,4})\b", read(source)):
            assert list((ROOT / "docs/decisions").glob(f"{int(number):04d}-*.md")), f"{source}: {number}"


def test_variables_that_pages_name_are_read() -> None:
    code = "".join(read(source) for source in SOURCES)
    for page in PAGES:
        for name in re.findall(r"\bHEADROOM_[A-Z_]+\b", page.read_text(encoding="utf-8")):
            assert name in code, f"{page.name}: {name}"
