"""API keys, from the environment variable that the settings name."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from deployments.errors import ConfigError, Unauthorized


class ApiKeys:
    """Checks a request's key and names its tenant. Without keys everyone is let in, as one tenant."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def tenant(self, authorization: str | None) -> str:
        """The tenant's prefix-cache salt, so that no key can find out by timing what another has cached.

        Args:
            authorization: the request's Authorization header.

        Raises:
            Unauthorized: no key, or an unknown one.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("an API key is needed: send the header 'Authorization: Bearer KEY'")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, other) for other in self._digests]  # All of them: the time tells nothing.
        if not any(known):
            raise Unauthorized("this API key is not known to this server")
        return hashlib.blake2b(digest, digest_size=8, person=b"cache-salt").hexdigest()


def load_keys(variable: str | None, environment: Mapping[str, str]) -> ApiKeys:
    """The keys in `variable`, separated by commas; None means that no key is asked for.

    Raises:
        ConfigError: the variable is unset or holds no key: serving without would be a surprise.
    """
    if variable is None:
        return ApiKeys([])
    keys = [key.strip() for key in environment.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(f"api.api_keys_env names {variable}, which is unset or empty: put API keys in it")
    return ApiKeys(keys)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
