"""Command lines of this project as its pages and docstrings write them, and the parsers that take them."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_BEGINNING = re.compile(
    r"(?:\$ |\w+=\S+ |\w+=\$\(|\.venv/bin/)*(?=(?:python -m [\w.]+|benchmarks\.\w+|headroom [a-z]|make [a-z]|pytest\b))"
)
_FLAG = re.compile(r"--?[a-z]")
LONG_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@dataclass(frozen=True)
class Line:
    """A command line."""

    words: tuple[str, ...]
    comment: str
    """What is behind its #."""
    whole: bool
    """Meant to be run as it is; otherwise a mention, which may leave things out."""

    @property
    def flags(self) -> list[str]:
        """Of the command and of its comment, without values."""
        own = self.words[3:] if self.words[0] == "python" else self.words[1:]
        return [word.partition("=")[0] for word in own if _FLAG.match(word)] + LONG_FLAG.findall(self.comment)


def lines_of_page(text: str) -> Iterator[Line]:
    """Of Markdown: blocks, and spans in backticks."""
    for block in _FENCE.findall(text):
        yield from _block(block)
    prose = prose_of(text)
    yield from _block("\n".join(line[4:] for line in prose.splitlines() if line.startswith("    ")))
    yield from _mentions(prose)


def lines_of_module(path: Path) -> Iterator[Line]:
    """Of the docstring of a Python file: indented lines, whose explanation is behind two spaces, and spans."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    yield from _block(re.sub(r"(?<=\S)  +(?=[^\\#\s])", "  # ", "\n".join(indented)))
    yield from _mentions(text)


def _block(text: str) -> Iterator[Line]:
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        yield from _parsed(line.strip(), whole="[" not in line and "..." not in line)


def _mentions(text: str) -> Iterator[Line]:
    for span in spans(text):
        yield from _parsed(span, whole=False)


def spans(text: str) -> list[str]:
    """What stands in backticks beside the blocks of a page, each on one line."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose_of(text))]


def prose_of(text: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", text)


def _parsed(line: str, *, whole: bool) -> Iterator[Line]:
    if found := _BEGINNING.match(line):
        command, _, comment = line[found.end() :].partition(" #")
        command = re.split(r"[|>&)]", command if whole else re.sub(r"[][]", "", command))[0]
        yield Line(tuple(shlex.split(command)), comment, whole)


class _Found(Exception):
    """A parser, at the moment at which it was to parse."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        super().__init__()
        self.parser = parser
        self.arguments = list(arguments)


def parser_of(module: str, arguments: Sequence[str]) -> _Found:
    """The parser that a module's `main` gives these arguments to, and those of them that it gets."""

    def stop(parser: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> NoReturn:
        assert given is not None, f"main() of {module} takes no arguments"
        raise _Found(parser, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            importlib.import_module(module).main(list(arguments))
        except _Found as found:
            return found
    raise AssertionError(f"main() of {module} parses no arguments")


def module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module that `headroom ...`, `python -m ...` or `benchmarks.NAME ...` runs, and its arguments."""
    name, *rest = words[2:] if words[0] == "python" else words
    name = "deployments.cli" if name == "headroom" else name
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"no module {name}"
    return (f"{name}.__main__" if spec.submodule_search_locations else name), rest


@cache
def parses(module: str) -> bool:
    """Whether a module's arguments are a parser's; a few take two folders, or nothing."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    return "argparse" in source or "parse_args" in source


def options_of(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Flags that a parser knows, and those of the subcommands that are among the arguments."""
    known = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices.keys() & set(arguments):
                known |= options_of(action.choices[name], arguments)
    return known
