"""T5 over HTTP: text in, through the tokenizer, an engine process and back, as transformers' `generate()` has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from deployments.api.app import create_api
from deployments.api.codec import TextCodec
from deployments.api.served import ServedModel
from deployments.engine.client import EngineClient
from deployments.engine.messages import EngineSpec
from deployments.metrics.board import Observation
from deployments.protocol import GenerationRequest, TokenChunk
from deployments.settings import ApiSettings, PoolSettings
from tests.contract.families import ENCODER_DECODERS, VOCAB
from tests.t5 import save

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEXTS = ("the bear", "a cab and a bag", "fed a bee in a bed, a big bad bee")
OUTPUT = 12


def write_tokenizer(folder: Path) -> None:
    """Unigram with a metaspace and `</s>` behind each text, as T5's is."""
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["<pad>", "</s>", "<unk>", "▁", ",", *letters, *(f"▁{a}{b}" for a in letters for b in "aeiouy")]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>", "<unk>")])
    backend.add_tokens([f"<extra_{i}>" for i in range(VOCAB - backend.get_vocab_size())])
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


@dataclass
class EngineDispatcher:
    """Sends requests to one engine, whose room is enough for all."""

    engine: EngineClient
    max_context: int
    ledger_answered: bool = False

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        del wait_limit_s
        return self.engine.generate(request)

    async def observe(self) -> Observation | None:
        return None

    def living_context(self, pool: str | None) -> int | None:
        del pool
        return self.max_context

    def context_of(self, pool: str) -> int | None:
        del pool
        return None

    async def is_ready(self) -> bool:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(ENCODER_DECODERS[1].config, tmp_path_factory.mktemp("flan"))
    write_tokenizer(folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    pool = PoolSettings(
        device="cpu", stages=2, dtype="float32", quantization="fp32", cpu_device_memory="40MB", block_size=4, threads=1
    )
    engine = EngineClient()
    started = await engine.start(EngineSpec("t5", folder, pool, replicas_here=1, cache_dir=folder / "quantized"))
    assert started.attention == "gather cache (an encoder-decoder)"
    assert started.plan.max_context == 128
    dispatcher = EngineDispatcher(engine, started.plan.max_context)
    text = TextCodec.load(folder)
    model = ServedModel("t5", (), text, dispatcher, model_context=128, created=0, wait_limit_s=60)
    transport = httpx.ASGITransport(app=create_api([model], ApiSettings()))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
        yield client
    engine.stop()


def expected(folder: Path) -> list[str]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    texts = []
    for text in TEXTS:
        out = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=OUTPUT)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    assert len({*texts, ""}) > len(TEXTS), "an oracle that always says the same would show nothing"
    return texts


def body(prompt: str | list[int], **fields: Any) -> dict[str, Any]:
    return {"model": "t5", "prompt": prompt, "temperature": 0, "max_tokens": OUTPUT, **fields}


async def test_answers_are_those_of_generate(client: httpx.AsyncClient, folder: Path) -> None:
    """All at once."""
    answers = await asyncio.gather(*(client.post("/v1/completions", json=body(text)) for text in TEXTS))
    assert [answer.status_code for answer in answers] == [200] * len(TEXTS)
    assert [answer.json()["choices"][0]["text"].strip() for answer in answers] == [t.strip() for t in expected(folder)]


async def test_usage_counts_the_encoders_tokens_and_the_decoders_first(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/completions", json=body([7, 8, 9, 1], ignore_eos=True))).json()
    assert answer["usage"]["prompt_tokens"] == 4 + 1
    assert answer["usage"]["completion_tokens"] == OUTPUT


async def test_a_prompt_that_does_not_fit_the_context_is_refused(client: httpx.AsyncClient) -> None:
    longest = 128 - OUTPUT - 1
    assert (await client.post("/v1/completions", json=body([7] * longest))).status_code == 200
    refused = await client.post("/v1/completions", json=body([7] * (longest + 1)))
    assert refused.status_code == 400
    assert "context is 128 tokens, but the request needs 129" in refused.json()["error"]["message"]


async def test_a_chat_is_refused_as_there_is_no_template(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "hello"}]
    refused = await client.post("/v1/chat/completions", json={"model": "t5", "messages": messages})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "messages"
    assert "no chat template" in error["message"]
    assert "use /v1/completions" in error["message"]
