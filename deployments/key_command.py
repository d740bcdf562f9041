"""`headroom key new NAME`: a new API key, and its line for the key file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pydantic import ValidationError

from deployments.api.keys import ApiKey, digest, line_of, new_key
from deployments.errors import ConfigError
from placement.plan_command import OneLineParser

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")


def main(arguments: Sequence[str]) -> int:
    """Print a new key and its line. The key is nowhere else: not in the line, not in a file.

    Raises:
        ConfigError: one line.
    """
    options = _parser().parse_args(arguments)
    key = new_key()
    given = {name: value for name in ("tenant", "weight", *LIMITS) if (value := getattr(options, name)) is not None}
    try:
        entry = ApiKey(name=options.name, sha256=digest(key.encode()), roles=tuple(options.role or ("api",)), **given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        option = "NAME" if first["loc"][0] == "name" else f"--{first['loc'][0]}".replace("_", "-")
        raise ConfigError(f"{option}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    print(f"key, for {options.name} alone; it is not shown again:\n{key}\n")
    print(f"line, for the file that api.api_keys_file names:\n{line_of(entry)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="headroom key", description="API keys: see docs/operations.md, Keys and limits.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser("new", help="print a new key and its line for the key file")
    new.add_argument("name", metavar="NAME", help="of the key, in the access log")
    new.add_argument("--tenant", help="whose share and prefix cache it uses; default: its own")
    new.add_argument("--weight", type=int, metavar="N", help="of the tenant while requests wait; default: 1")
    for limit in LIMITS:
        new.add_argument(f"--{limit.replace('_', '-')}", type=int, metavar="N", help="default: no limit")
    new.add_argument(
        "--role", action="append", choices=["api", "admin"], help="what it opens, may be repeated; default: api"
    )
    return parser
