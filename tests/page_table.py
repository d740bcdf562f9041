"""A table that a module prints, on a page between the comments `<!-- name -->` and `<!-- end of name -->`."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "docs" / "models.md"


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    """What is before, between and after the comments.

    Raises:
        ValueError: the page does not have both, once each.
    """
    text = page.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} needs one line {start.strip()} and one {end.strip()}; put the table between them")
    before, _, rest = text.partition(start)
    table, _, after = rest.partition(end)
    return before + start, table, end + after


def shown(page: Path, name: str) -> str:
    """The page's table."""
    return _parts(page, name)[1]


def renew(page: Path, name: str, table: str) -> None:
    """Put `table` in the place of the page's."""
    before, _, after = _parts(page, name)
    page.write_text(before + table + after, encoding="utf-8")
