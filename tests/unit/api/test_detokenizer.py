"""Pieces of text join to what the tokenizer's own decode gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from deployments.api.detokenizer import Vocabulary
from tests.unit.api.conftest import byte_fallback_backend, byte_level_backend, metaspace_backend

BACKENDS = {
    "byte-level": byte_level_backend(),
    "byte-fallback": byte_fallback_backend(),
    "metaspace": metaspace_backend(),
}


def pieces(backend: Tokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = Vocabulary(backend).detokenizer()
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", BACKENDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_joins_to_decode_of_random_ids(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() + 2), max_size=40))
    assert "".join(pieces(backend, ids)) == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_joins_to_any_text(name: str, text: str) -> None:
    backend = BACKENDS[name]
    ids = backend.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(backend, ids)) == backend.decode(ids, skip_special_tokens=True)


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_embedded_models_tokenizer(demo_folder: Path, data: st.DataObject) -> None:
    backend = _demo(demo_folder)
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=40))
    assert "".join(pieces(backend, ids)) == backend.decode(ids, skip_special_tokens=True)


_cache: dict[Path, Tokenizer] = {}


def _demo(folder: Path) -> Tokenizer:
    if folder not in _cache:
        _cache[folder] = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return _cache[folder]


def test_holds_back_an_incomplete_character_only() -> None:
    backend = BACKENDS["byte-level"]
    ids = backend.encode("a€b", add_special_tokens=False).ids
    assert pieces(backend, ids) == ["a", "", "", "€", "b", ""]


def test_byte_tokens_settle_when_another_token_follows() -> None:
    backend = BACKENDS["byte-fallback"]
    euro = [backend.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert pieces(backend, [*euro, backend.token_to_id("a")]) == ["", "", "", "€a", ""]


def test_sentencepiece_drops_the_first_space_alone() -> None:
    backend = BACKENDS["byte-fallback"]
    the = backend.token_to_id("▁the")
    assert pieces(backend, [the, the]) == ["the", " the", ""]


def test_incomplete_end_becomes_replacement() -> None:
    backend = BACKENDS["byte-level"]
    ids = backend.encode("€", add_special_tokens=False).ids
    assert pieces(backend, ids[:2]) == ["", "", "\ufffd"]


def test_special_tokens_have_a_name_but_no_text() -> None:
    backend = BACKENDS["byte-level"]
    token = Vocabulary(backend)[backend.token_to_id("<|end|>")]
    assert (token.text, token.name, token.special) == (b"", b"<|end|>", True)


def test_a_window_stays_short() -> None:
    """Decoding costs the same at token 10 and token 10,000."""
    backend = BACKENDS["byte-fallback"]
    vocabulary = Vocabulary(backend)
    lengths: list[int] = []
    decode = vocabulary.decode
    vocabulary.decode = lambda ids: lengths.append(len(ids)) or decode(ids)  # type: ignore[method-assign,func-returns-value]  # counts, then decodes
    detokenizer = vocabulary.detokenizer()
    for _ in range(2000):
        detokenizer.push(backend.token_to_id("▁the"))
    assert max(lengths) <= 2
