"""Fields of OpenAI's API that are not served: refused by name, unless their value asks for nothing.

Clients send many fields at their defaults (LangChain, LiteLLM, Open WebUI do). A value that changes nothing is
accepted, null above all; any other is refused rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deployments.errors import UnsupportedField

NoOps = Mapping[str, tuple[object, ...]]
"""Field -> the values, beside null, that ask for nothing."""

BODY: NoOps = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
STREAM_OPTIONS: NoOps = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
MESSAGE: NoOps = {"annotations": ([],), "audio": (), "function_call": (), "refusal": (), "tool_calls": ([],)}


def drop_no_ops(fields: Mapping[str, Any], no_ops: NoOps, path: str = "") -> dict[str, Any]:
    """`fields` without nulls and without the fields of `no_ops`.

    Args:
        path: where `fields` sits in the body, with a final dot, for the error's `param`.

    Raises:
        UnsupportedField: a field of `no_ops` has a value that asks for something.
    """
    kept = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name not in no_ops:
            kept[name] = value
        elif not any(type(value) is type(no_op) and value == no_op for no_op in no_ops[name]):
            raise UnsupportedField(_refusal(path + name, no_ops[name]), param=path + name)
    return kept


def _refusal(name: str, no_ops: tuple[object, ...]) -> str:
    allowed = " or ".join(json.dumps(value) for value in (None, *no_ops))
    return f"{name!r} is not supported by this server: leave it out, or send {allowed}"
