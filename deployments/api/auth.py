"""Who may come in: the keys that are valid now, and the key that a request shows."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deployments.api.keys import ApiKey, Role, find_key, parse_keys, plain_key
from deployments.errors import ConfigError, Forbidden, Unauthorized
from deployments.settings import ApiSettings

REREAD_S = 1.0
"""A changed key file counts after this time at the latest, for the next request."""
_log = logging.getLogger("headroom.keys")


class KeyFile:
    """The keys of a file that may change while it is served.

    While requests come it is read once a second, and parsed when it differs: a few kilobytes, and unlike its time and
    size its content can't be the same by chance. A file that is gone or broken changes nothing: the keys before it
    stay valid, and the log says so. To lock everyone out, leave an empty list in it: `[]`.

    Args:
        clock: seconds that only grow.

    Raises:
        ConfigError: at the start the file can't be read, is not a key file, or has no key.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._content = self._read()
        self._keys = parse_keys(self._content, self._where)
        if not self._keys:
            raise ConfigError(f"{self._where} has no key; `headroom key new NAME` prints one and its line")
        self._complaint: str | None = None
        self._next = clock() + REREAD_S

    @property
    def _where(self) -> str:
        return f"api.api_keys_file {self._path}"

    def valid(self) -> tuple[ApiKey, ...]:
        """The keys of now."""
        if (now := self._clock()) >= self._next:
            self._next = now + REREAD_S
            self._refresh()
        return self._keys

    def _refresh(self) -> None:
        try:
            content = self._read()
            if content != self._content or self._complaint:
                self._keys, self._content = parse_keys(content, self._where), content
                _log.warning("%s was read again: %d keys are valid", self._where, len(self._keys))
        except ConfigError as error:
            if str(error) != self._complaint:
                _log.error("the %d keys before stay valid: %s", len(self._keys), error)
            self._complaint = str(error)
        else:
            self._complaint = None

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{self._where} can't be read ({os.strerror(error.errno or 0)}); `headroom key new NAME` prints a line "
                "for it"
            ) from None


class Gate:
    """Lets a request in, or refuses it. Without keys everyone is let in.

    Args:
        plain: keys from the environment.
        file: keys from a file; None: there is none.
        open_admin: whether admin endpoints ask for no key.
    """

    def __init__(self, plain: Sequence[ApiKey] = (), file: KeyFile | None = None, *, open_admin: bool = False) -> None:
        self._plain = tuple(plain)
        self._file = file
        self._open_admin = open_admin

    def asks(self, role: Role) -> bool:
        """Whether endpoints of this role ask for a key."""
        keyed = bool(self._plain) or self._file is not None
        return keyed and not (role == "admin" and self._open_admin)

    def admit(self, authorizations: Sequence[str], role: Role) -> ApiKey | None:
        """The key that the request shows; None where none is asked for.

        Args:
            authorizations: the values of all its Authorization headers, as Latin-1.

        Raises:
            Unauthorized: no key, or an unknown one.
            Forbidden: the key is not for this role.
        """
        if not self.asks(role):
            return None
        shown = _bearer(authorizations)
        key = find_key((*self._plain, *(self._file.valid() if self._file else ())), shown)
        if key is None:
            raise Unauthorized("this API key is not known to this server")
        if role not in key.roles:
            raise Forbidden(
                f"this endpoint is for keys with the role {role!r}; {key.name!r} has {', '.join(key.roles)}: use "
                "another, or change its roles in the server's key file"
            )
        return key


def _bearer(authorizations: Sequence[str]) -> bytes:
    if len(authorizations) > 1:  # A proxy may have checked the one that is not looked at here.
        raise Unauthorized("there are several Authorization headers: send one")
    scheme, _, key = (authorizations[0] if authorizations else "").partition(" ")
    if scheme.lower() != "bearer" or not (key := key.strip(" \t")):
        raise Unauthorized("an API key is needed: send the header 'Authorization: Bearer KEY'")
    return key.encode("latin-1")


def open_gate(settings: ApiSettings, environment: Mapping[str, str]) -> Gate:
    """The gate that the settings ask for.

    Raises:
        ConfigError: the variable or the file that they name holds no key: serving without would be a surprise.
    """
    plain = _plain_keys(settings.api_keys_env, environment) if settings.api_keys_env is not None else ()
    file = KeyFile(Path(settings.api_keys_file)) if settings.api_keys_file is not None else None
    return Gate(plain, file, open_admin=settings.admin_endpoints == "open")


def _plain_keys(variable: str, environment: Mapping[str, str]) -> tuple[ApiKey, ...]:
    keys = [key.strip() for key in environment.get(variable, "").split(",") if key.strip()]
    if not keys:
        raise ConfigError(f"api.api_keys_env names {variable}, which is unset or empty: put API keys in it")
    return tuple(plain_key(key) for key in keys)
