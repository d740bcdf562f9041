"""`serve_config.yaml`: a standard Ray Serve config with one application, read with the line of each mistake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import ConfigError
from deployments.settings import Settings, describe, mistakes

Loc = Sequence[str | int]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HttpOptions(_Strict):
    """Serve's `http_options`, those that one machine can use."""

    host: str = "127.0.0.1"
    """0.0.0.0 serves the network."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    request_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Serve's own limit, which ends a stream without a word; `api.request_timeout_s` is the one that answers."""
    keep_alive_timeout_s: Annotated[int, Field(gt=0)] = 90
    root_path: str = ""


class Application(_Strict):
    """The one application."""

    name: str = "headroom"
    route_prefix: Annotated[str, Field(pattern="^/")] = "/"
    import_path: Literal["deployments.app:build"]
    args: Settings


class ServeConfig(_Strict):
    """What `headroom serve` takes of Serve's config schema; `serve run` takes all of it."""

    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode"
    """Either means the one proxy of this machine."""
    http_options: HttpOptions = HttpOptions()
    logging_config: dict[str, Any] | None = None
    """Serve's own, for the files in the log folder."""
    applications: Annotated[tuple[Application, ...], Field(min_length=1, max_length=1)]

    @property
    def application(self) -> Application:
        """The one application."""
        return self.applications[0]


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A parsed file: the checked values, and `args` as `deployments.app.build` takes them."""

    path: Path
    config: ServeConfig
    args: dict[str, Any]


def read_config(path: Path) -> ConfigFile:
    """Read and check the config at `path`.

    Raises:
        ConfigError: one line, `path:line: ` and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"config {path} can't be read: {reason}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a mapping with `applications` is needed, such as serve_config.yaml of the repository"
        )
    for key, line in repeated_keys(tree):
        raise ConfigError(f"{path}:{line}: {key} is given twice")
    try:
        config = ServeConfig.model_validate(data)
    except ValidationError as error:
        found = sorted((_line(tree, e["loc"]), describe(e)) for e in mistakes(error))
        raise ConfigError("; ".join(f"{path}:{line}: {what}" for line, what in found)) from None
    return ConfigFile(path, config, data["applications"][0]["args"])


def _line(node: yaml.Node, loc: Loc) -> int:
    """The line of the deepest part of `loc` that the file has."""
    line = int(node.start_mark.line)
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = int(found[0].start_mark.line), found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = int(node.start_mark.line)
    return line + 1


def repeated_keys(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """Keys that a mapping has twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from repeated_keys(item)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                yield key.value, key.start_mark.line + 1
            seen.add(key.value)
            yield from repeated_keys(value)
