"""Token ids to text, one id at a time.

What the pieces join to is exactly what the tokenizer's own `decode(ids, skip_special_tokens=True)` gives for all
ids at once (without `clean_up_tokenization_spaces`, which rewrites text that the model produced). Text is held
back only while a later token could still change it.
"""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"
_SPACE = "\u2581"
"""SentencePiece's spelling of a space."""
_LONGEST_CHAR = 4
"""Bytes of the longest UTF-8 character, hence the most tokens that one character is split over."""


class Detokenizer(Protocol):
    """The text of one choice as its tokens arrive."""

    def push(self, token_id: int) -> str:
        """Text that is certain now."""
        ...

    def flush(self) -> str:
        """The rest: no token follows. An incomplete character becomes U+FFFD."""
        ...


class Token(NamedTuple):
    """What one token stands for."""

    text: bytes
    """UTF-8 that it adds to the shown text; empty for special tokens."""
    name: bytes
    """As `text`, but special tokens are spelt out: what log-probabilities call the token."""
    special: bool
    """Whether decoding leaves it out: a special token, or an id without a token."""
    raw_byte: bool
    """One byte of SentencePiece's byte fallback."""


class Vocabulary:
    """The tokens of one tokenizer by id; shared by all its detokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        self._tokens: dict[int, Token] = {}
        self.byte_level = isinstance(tokenizer.decoder, ByteLevel)

    def __getitem__(self, token_id: int) -> Token:
        token = self._tokens.get(token_id)
        if token is None:
            token = self._tokens[token_id] = self._read(token_id)
        return token

    def decode(self, token_ids: list[int]) -> str:
        """The tokenizer's own decoding of all ids together, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one choice."""
        return ByteLevelDetokenizer(self) if self.byte_level else WindowDetokenizer(self)

    def _read(self, token_id: int) -> Token:
        spelling = self._tokenizer.id_to_token(token_id)
        if spelling is None or spelling in self._special:
            return Token(b"", (spelling or "").encode(), special=True, raw_byte=False)
        if self.byte_level:
            text = _from_byte_alphabet(spelling)
            return Token(text, text, special=False, raw_byte=False)
        byte = _BYTE_TOKEN.fullmatch(spelling)
        text = bytes.fromhex(byte[1]) if byte else spelling.replace(_SPACE, " ").encode()
        return Token(text, text, special=False, raw_byte=byte is not None)


class ByteLevelDetokenizer:
    """For byte-level BPE, where a text is the concatenation of its tokens' bytes: a table and a UTF-8 decoder."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._vocabulary[token_id].text)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: decode a short window, and show by how much it outgrew its settled part.

    The settled part is kept long enough to have text of its own, because many decoders treat the start of a text
    differently (SentencePiece drops one space there). A run of byte tokens is one unit to the decoder, which turns
    all of it into U+FFFD if any of it is not UTF-8: it settles when another token follows.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._settled: list[int] = []
        self._settled_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        token = self._vocabulary[token_id]
        if token.special:
            return ""
        self._pending.append(token_id)
        if token.raw_byte:
            return ""
        text = self._window()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_CHAR:
            return ""
        return self._settle(text)

    def flush(self) -> str:
        return self._settle(self._window()) if self._pending else ""

    def _window(self) -> str:
        return self._vocabulary.decode(self._settled + self._pending)

    def _settle(self, text: str) -> str:
        fresh = text[len(self._settled_text) :]
        alone = self._vocabulary.decode(self._pending)
        if alone:
            self._settled, self._settled_text = self._pending, alone
        else:
            self._settled, self._settled_text = self._settled + self._pending, text
        self._pending = []
        return fresh


def _from_byte_alphabet(spelling: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in spelling):
        return bytes(alphabet[char] for char in spelling)
    return spelling.encode()  # An added token, which is spelt as itself.


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's spelling of the 256 bytes: printable Latin-1 as itself, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
