"""The JSON of answers: chat and text completions, whole and in chunks. Plain dicts: this runs for every token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from deployments.api.choices import PlacedLogprob
from deployments.api.detokenizer import Vocabulary

Json = dict[str, Any]
_LOWEST = -9999.0
"""OpenAI's value for "very unlikely"; JSON has no -Infinity."""


class Format(Protocol):
    """How one endpoint writes choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """The choice of a stream's first chunk, sent at the grant; None sends none."""
        ...

    def delta(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        """The choice of one chunk of a stream."""
        ...

    def whole(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        """One choice of a whole answer."""
        ...

    def logprobs(self, placed: Sequence[PlacedLogprob], vocabulary: Vocabulary) -> Json:
        """Log-probabilities of some tokens of one choice."""
        ...


class ChatFormat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        return _choice(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def delta(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return _choice(index, {"delta": {"content": text} if text else {}}, logprobs, finish_reason)

    def whole(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return _choice(index, {"message": message}, logprobs, finish_reason)

    def logprobs(self, placed: Sequence[PlacedLogprob], vocabulary: Vocabulary) -> Json:
        content = [
            {
                **_token(one.token.token_id, one.token.logprob, vocabulary),
                "top_logprobs": [_token(token, logprob, vocabulary) for token, logprob in one.token.top],
            }
            for one in placed
        ]
        return {"content": content, "refusal": None}


class CompletionFormat:
    """`/v1/completions`. `text_offset` counts characters of the choice's own text, from 0."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self, index: int) -> Json | None:  # noqa: ARG002 - the format's common shape
        return None

    def delta(self, index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
        return _choice(index, {"text": text}, logprobs, finish_reason)

    whole = delta

    def logprobs(self, placed: Sequence[PlacedLogprob], vocabulary: Vocabulary) -> Json:
        return {
            "tokens": [_name(one.token.token_id, vocabulary) for one in placed],
            "token_logprobs": [max(_LOWEST, one.token.logprob) for one in placed],
            "top_logprobs": [_top(one, vocabulary) for one in placed],
            "text_offset": [one.offset for one in placed],
        }


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Json:
    """Token counts of one HTTP request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def event(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


class ChunkWriter:
    """Writes the chunks of one stream, whose common fields are encoded once.

    Args:
        head: the chunk without its choices.
        null_usage: whether chunks say `"usage": null`, as OpenAI's do before a last one with the counts.
    """

    def __init__(self, head: Json, *, null_usage: bool) -> None:
        self._before = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._after = (b'],"usage":null}' if null_usage else b"]}") + b"\n\n"

    def write(self, choice: Json) -> bytes:
        """The event of a chunk with one choice."""
        return self._before + _encode(choice) + self._after


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of server-sent events pass over."""


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _encode(data: Json) -> bytes:
    return _ENCODER.encode(data).encode()


def _choice(index: int, content: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _name(token_id: int, vocabulary: Vocabulary) -> str:
    return vocabulary[token_id].name.decode("utf-8", "replace")


def _token(token_id: int, logprob: float, vocabulary: Vocabulary) -> Json:
    name = vocabulary[token_id].name
    return {"token": name.decode("utf-8", "replace"), "logprob": max(_LOWEST, logprob), "bytes": list(name)}


def _top(one: PlacedLogprob, vocabulary: Vocabulary) -> dict[str, float]:
    """The likeliest tokens and the chosen one; of tokens that read alike, the likelier."""
    top: dict[str, float] = {}
    for token_id, logprob in (*one.token.top, (one.token.token_id, one.token.logprob)):
        top.setdefault(_name(token_id, vocabulary), max(_LOWEST, logprob))
    return top
