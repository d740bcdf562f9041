"""Settings as README.md and the pages of docs/ write them: each key at the place where it is taken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from deployments.config_file import ServeConfig
from deployments.settings import parse_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARGS = "applications.args."


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all settings, lists without their indices: applications.args.models.pools.name."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in models_in(field.annotation):
            yield from keys_of(part, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


KEYS = frozenset(keys_of(ServeConfig))
PARTS = frozenset(key.rpartition(".")[0] for key in KEYS)


def shown(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of a YAML tree, down to where keys are the user's own (max_memory, tenant_weights)."""
    if isinstance(tree, list):
        for item in tree:
            yield from shown(item, prefix)
    elif isinstance(tree, dict) and prefix.rstrip(".") in PARTS:
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from shown(value, f"{prefix}{key}.")


def test_paths_tell_equal_names_apart() -> None:
    assert {f"{ARGS}{path}" for path in ("api.resources", "models.pools.resources", "models.pools.name")} < KEYS
    tree = {"applications": [{"args": {"api": {"resources": {"front": 1}}, "models": [{"pools": [{"sauce": 1}]}]}}]}
    assert set(shown(tree)) - KEYS == {f"{ARGS}models.pools.sauce"}
    assert f"{ARGS}models.pools.resources" not in set(shown(tree))


def test_the_readme_lists_every_key_in_its_place() -> None:
    (listed,) = re.findall(r"^```yaml$(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    parse_settings(yaml.safe_load(listed)["applications"][0]["args"])
    whole = yaml.safe_load(re.sub(r"^( *)# ", r"\1", listed, flags=re.MULTILINE))  # autoscaling too, beside replicas
    ours = set(shown(whole))
    serves = {path for path in re.findall(r"`([\w.]+)`", README) if path in KEYS and not path.startswith(ARGS)}
    assert ours | serves == KEYS
    args = whole["applications"][0]["args"]
    args["models"][0]["pools"][0].pop("replicas")
    parse_settings(args)


def fragments() -> Iterator[Any]:
    """(path below which it stands, tree) of each block of YAML on a page that is a part of a config."""
    parts = {key.rpartition(".")[2]: key.rpartition(".")[0] for key in PARTS if key}
    for page in PAGES:
        for i, block in enumerate(re.findall(r"^```(?:yaml)?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)):
            try:
                tree = yaml.safe_load(block)
            except yaml.YAMLError:
                continue  # a command, and what it prints
            if isinstance(tree, dict) and tree.keys() & parts.keys():
                first = next(key for key in tree if key in parts)
                yield pytest.param(parts[first], tree, id=f"{page.name}:{i}:{first}")


FRAGMENTS = list(fragments())


def test_there_are_fragments() -> None:
    assert {param.values[0] for param in FRAGMENTS} == {"", "applications.args.models"}


@pytest.mark.parametrize(("place", "tree"), FRAGMENTS)
def test_a_fragment_has_keys_that_are_taken_there(place: str, tree: Any) -> None:
    found = set(shown(tree, f"{place}." if place else ""))
    assert found <= KEYS, sorted(found - KEYS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_keys_of_a_page_are_settings(page: Path) -> None:
    roots = {"api": ARGS, "models": ARGS, "http_options": "", "pools": f"{ARGS}models."}
    for path in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:: [^`]*)?`", page.read_text(encoding="utf-8")):
        if (first := path.partition(".")[0]) in roots:
            assert roots[first] + path in KEYS, path
