"""Chat messages to the model's prompt text, by the model's Jinja template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from deployments.errors import BadRequest, ConfigError

_PROBE = "headroomprobe"
Messages = Sequence[Mapping[str, str]]


class ChatTemplate:
    """Renders messages, each with `role` and `content`, and opens the assistant's turn.

    Args:
        tokenizer: a transformers tokenizer; its special tokens are the template's variables, and its sandboxed
            Jinja environment renders.
        source: the template.

    Raises:
        ConfigError: the template is not valid Jinja.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = source
        try:
            self._apply([{"role": "user", "content": _PROBE}])
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat_template, line {error.lineno}: {error.message}") from None
        except (TemplateError, TypeError, ValueError, LookupError):
            pass  # It compiles; that it dislikes this conversation is for a request to find out.

    def render(self, messages: Messages) -> str:
        """The prompt, special tokens included as text: tokenise it without adding any.

        Raises:
            BadRequest: the template refuses the messages (roles that don't alternate, no system role), or leaves
                out a tool's message.
        """
        text = self._apply_or_refuse(messages)
        tool_turns = [i for i, message in enumerate(messages) if message["role"] == "tool"]
        if tool_turns and not self._shows_tools(messages):
            raise BadRequest(
                "this model's chat template does not render messages of role 'tool'; "
                "send the result as a user message, or set `chat_template` of the model",
                param=f"messages[{tool_turns[0]}].role",
            )
        return text

    def _shows_tools(self, messages: Messages) -> bool:
        probe = [{**m, "content": _PROBE} if m["role"] == "tool" else {**m, "content": "-"} for m in messages]
        expected = sum(m["role"] == "tool" for m in messages)
        return self._apply_or_refuse(probe).count(_PROBE) >= expected

    def _apply_or_refuse(self, messages: Messages) -> str:
        try:
            return self._apply(messages)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise BadRequest(
                f"the model's chat template can't render these messages: {error}", param="messages"
            ) from None

    def _apply(self, messages: Messages) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self._source,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text


def find_template(tokenizer: Any, setting: str | None) -> ChatTemplate | None:
    """The model's template: from the `chat_template` setting (Jinja, or the path of a file), else the tokenizer's own.

    Raises:
        ConfigError: the file can't be read, the tokenizer has several templates and no default, or bad Jinja.
    """
    if setting is not None:
        return ChatTemplate(tokenizer, _read_setting(setting))
    if not tokenizer.chat_template:
        return None
    try:
        return ChatTemplate(tokenizer, tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(f"chat_template: set one for this model: {error}") from None


def is_template(setting: str) -> bool:
    """Whether a `chat_template` is Jinja, and not the path of a file."""
    return "{" in setting or "\n" in setting


def _read_setting(setting: str) -> str:
    if is_template(setting):
        return setting
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {setting} is neither Jinja nor a file that can be read: {error}") from None
