"""The state folder: converted models, locks, Ray's token and the logs of the last run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "HEADROOM_HOME"


def state_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """`$HEADROOM_HOME`, else `headroom` in `$XDG_CACHE_HOME`, else `~/.cache/headroom`. Not created here."""
    if chosen := environ.get(VARIABLE):
        return Path(chosen).expanduser().absolute()
    cache = environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "headroom"
