"""The text side of one model: its tokenizer, chat template and end tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deployments.api.detokenizer import Detokenizer, Vocabulary
from deployments.api.templates import Messages, find_template
from deployments.errors import BadRequest, ConfigError

_LONG_TEXT = 4096
"""Characters from which tokenising moves to a thread, so that it does not hold up the streams of others."""


class TextCodec:
    """Encodes prompts and conversations, and decodes what the model answers.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend.
        vocab_size: rows of the model's embedding; ids from there on are refused.
        end_ids: tokens that end an answer.
        chat_template: Jinja or a path; None takes the tokenizer's own.
        start_ids: what every prompt ends with: an encoder-decoder's first token of the decoder.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        end_ids: tuple[int, ...],
        chat_template: str | None = None,
        start_ids: tuple[int, ...] = (),
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bos_id: int | None = tokenizer.bos_token_id
        self._template = find_template(tokenizer, chat_template)
        self.vocabulary = Vocabulary(self._backend)
        self.vocab_size = vocab_size
        self.end_ids = end_ids
        self.start_ids = start_ids

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> TextCodec:
        """Read tokenizer and configs from a local model folder; no code of the folder is run.

        Raises:
            ConfigError: no tokenizer that can be used, or a bad chat template.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ConfigError(f"no tokenizer in {folder}: {' '.join(str(error).split())}") from None
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ConfigError(f"the tokenizer in {folder} has no tokenizer.json, which Headroom needs; convert it")
        config = _read_json(folder / "config.json")
        text_config = config.get("text_config") or config
        generation_config = _read_json(folder / "generation_config.json")
        return cls(
            tokenizer,
            vocab_size=int(text_config.get("vocab_size") or len(tokenizer)),
            end_ids=end_ids(generation_config, text_config, tokenizer.eos_token_id),
            chat_template=chat_template,
            start_ids=start_ids(generation_config, config),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        return self._template is not None

    async def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt, with the special tokens that the tokenizer adds, and never two BOS."""
        return await _off_loop_if_long(len(text), lambda: self._encode_plain(text))

    async def encode_chat(self, messages: Messages) -> tuple[int, ...]:
        """Ids of a conversation up to the open assistant's turn. The template writes the special tokens itself.

        Raises:
            BadRequest: no template, or one that refuses the messages.
        """
        template = self._template
        if template is None:
            raise BadRequest(
                "this model has no chat template: set `chat_template` of the model in the server's configuration, "
                "or use /v1/completions",
                param="messages",
            )
        length = sum(len(message["content"]) for message in messages)
        return await _off_loop_if_long(length, lambda: self._ids(template.render(messages), add_special=False))

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one choice."""
        return self.vocabulary.detokenizer()

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        ids = self._ids(text, add_special=True)
        doubled = self._bos_id is not None and ids[:2] == (self._bos_id, self._bos_id)
        return ids[1:] if doubled else ids

    def _ids(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        # The backend rather than the tokenizer's own call, which sets padding on the shared backend and so isn't
        # safe in threads.
        return tuple(self._backend.encode(text, add_special_tokens=add_special).ids)


async def _off_loop_if_long(length: int, encode: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
    return await asyncio.to_thread(encode) if length > _LONG_TEXT else encode()


def end_ids(generation_config: dict[str, Any], config: dict[str, Any], tokenizer_eos: int | None) -> tuple[int, ...]:
    """The tokens that end an answer: the generation config's, else the config's, and the tokenizer's EOS."""
    declared = generation_config.get("eos_token_id")
    if declared is None:
        declared = config.get("eos_token_id")
    several: Sequence[int] = declared if isinstance(declared, list) else [] if declared is None else [declared]
    last = [] if tokenizer_eos is None else [tokenizer_eos]
    return tuple(dict.fromkeys([*several, *last]))


def start_ids(generation_config: dict[str, Any], config: dict[str, Any]) -> tuple[int, ...]:
    """The decoder's first token of an encoder-decoder; () of other models.

    Raises:
        ConfigError: neither config names it.
    """
    if not config.get("is_encoder_decoder"):
        return ()
    for part in (generation_config, config):
        if isinstance(token := part.get("decoder_start_token_id"), int):
            return (token,)
    raise ConfigError(
        "config.json says is_encoder_decoder, but not what the decoder starts with; set decoder_start_token_id in it"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content
