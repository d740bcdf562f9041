"""API keys: what a key file says of each, and whose key a request shows. Only hashes of keys are kept.

A key file is a YAML list, one line per key, as `headroom key new NAME` prints them:

    - {name: alice, sha256: 9f86d0...}
    - {name: batch, sha256: 60303a..., tenant: research, weight: 2, requests_per_minute: 600, concurrent_requests: 32}
    - {name: prometheus, sha256: fd61a0..., roles: [admin]}

Keys have 256 random bits, so a plain hash can't be turned back into one: nothing slow or salted is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from deployments.config_file import repeated_keys
from deployments.errors import ConfigError
from deployments.settings import mistakes

Role = Literal["api", "admin"]
"""What a key opens: models and generation, or `/metrics` and what else watches the whole service."""

PREFIX = "hr-"
_Limit = Annotated[int, Field(ge=1, le=10**12)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class ApiKey(BaseModel):
    """One key, by its hash, and what it may do. None sets no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: _Name
    """For the access log and for error messages."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key's UTF-8 bytes, in hex."""
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] = ("api",)
    tenant: _Name | None = None
    """Whose share of the room, and whose prefix cache, the key uses; default: the key's name."""
    weight: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Of the tenant, so of all its keys; default: the model's `tenant_weights`, or 1."""
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    """Prompt and output together."""
    concurrent_requests: _Limit | None = None

    @field_validator("roles", mode="before")
    @classmethod
    def _list_of_roles(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @property
    def owner(self) -> str:
        """The tenant's name."""
        return self.tenant or self.name

    @property
    def salt(self) -> str:
        """The tenant's prefix-cache salt, so that no tenant can find out by timing what another has cached."""
        return hashlib.blake2b(self.owner.encode(), digest_size=8, person=b"cache-salt").hexdigest()


_KEYS = TypeAdapter(tuple[ApiKey, ...])


def digest(key: bytes) -> str:
    """SHA-256 of a key, in hex."""
    return hashlib.sha256(key).hexdigest()


def plain_key(key: str) -> ApiKey:
    """A key without a name, from the environment: opens everything, and is a tenant of its own."""
    hashed = digest(key.encode("utf-8", "surrogateescape"))
    return ApiKey(name=f"key-{hashed[:12]}", sha256=hashed, roles=("api", "admin"))


def find_key(keys: Sequence[ApiKey], shown: bytes) -> ApiKey | None:
    """The key of these bytes. All are compared, each in constant time: how long it takes tells nothing."""
    hashed = digest(shown)
    matching = [key for key in keys if hmac.compare_digest(key.sha256, hashed)]
    return matching[0] if matching else None


def parse_keys(content: bytes, where: str) -> tuple[ApiKey, ...]:
    """The keys of a file. No error quotes it: someone may have put a key where its hash belongs.

    Args:
        where: names the file in errors.

    Raises:
        ConfigError: not a list of keys, or two of them have the same name or hash.
    """
    try:
        text = content.decode("utf-8")
        items = yaml.safe_load(text)
        keys = _KEYS.validate_python(tuple(items) if isinstance(items, list) else items)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 at byte {error.start}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(map(_describe, mistakes(error)))) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where} is not YAML{place}; `headroom key new NAME` prints a line for it") from None
    for _, line in repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader)):
        raise ConfigError(f"{where}:{line}: a field is given twice")
    _check_differ(keys, where)
    weights = {key.owner: key.weight for key in keys if key.weight is not None}
    return tuple(key.model_copy(update={"weight": weights.get(key.owner)}) for key in keys)


def _describe(error: Any) -> str:
    loc = error["loc"]
    if not loc:
        return "must be a list of keys, as `headroom key new NAME` prints them"
    what = f"key {loc[0] + 1}" + (f": {loc[1]}" if len(loc) > 1 else "")
    if error["type"] == "extra_forbidden":
        if not re.fullmatch(r"[a-z_]{1,24}", loc[1]):  # It may be a key that someone put there.
            what = f"key {loc[0] + 1}: a field"
        return f"{what} is not known; there are {', '.join(ApiKey.model_fields)}"
    return f"{what}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _check_differ(keys: Sequence[ApiKey], where: str) -> None:
    names = Counter(key.name for key in keys)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{where}: two keys are named {', '.join(sorted(twice))}; names must differ")
    by_hash: dict[str, str] = {}
    weights: dict[str, int] = {}
    for key in keys:
        if (other := by_hash.setdefault(key.sha256, key.name)) != key.name:
            raise ConfigError(f"{where}: {other} and {key.name} are the same key; remove one")
        if key.weight is not None and weights.setdefault(key.owner, key.weight) != key.weight:
            raise ConfigError(
                f"{where}: tenant {key.owner} has weights {weights[key.owner]} and {key.weight}; give one"
            )


def new_key(draw: Callable[[int], str] = secrets.token_urlsafe) -> str:
    """A key of 256 random bits, 46 characters."""
    return PREFIX + draw(32)


def line_of(key: ApiKey) -> str:
    """The key's line in a key file: the fields that differ from their defaults."""
    fields = key.model_dump(mode="json", exclude_defaults=True)
    body: str = yaml.safe_dump(fields, default_flow_style=True, sort_keys=False, width=10**6)
    return f"- {body.strip()}"
