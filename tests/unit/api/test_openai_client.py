"""The official client, unmodified."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import openai
import pytest

from deployments.errors import Overloaded
from deployments.settings import ApiSettings
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api

TALK: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def connect(api: Api, key: str = "unused") -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(app=api.app)
    http = httpx.AsyncClient(transport=transport)
    return openai.AsyncOpenAI(api_key=key, base_url="http://test/v1", http_client=http, max_retries=0)


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    async with connect(api) as made:
        yield made


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tiny", messages=TALK, user="me", n=2)
    assert [choice.message.content for choice in answer.choices] == ["hello world"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 14


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="tiny", messages=TALK, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello world"
    assert chunks[-1].usage is not None


async def test_an_answer_can_be_sent_back(client: openai.AsyncOpenAI) -> None:
    first = await client.chat.completions.create(model="tiny", messages=TALK)
    talk = [*TALK, first.choices[0].message.model_dump(), *TALK]
    again = await client.chat.completions.create(model="tiny", messages=talk)  # type: ignore[arg-type]  # what a client sends back
    assert again.choices[0].message.content == "hello world"


async def test_stream_helper_and_extra_body(client: openai.AsyncOpenAI, api: Api) -> None:
    extra = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "min_tokens": 1, "repetition_penalty": 1.2}
    async with client.chat.completions.stream(model="tiny", messages=TALK, extra_body=extra) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "hello world"
    sampling = api.dispatcher.requests[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.end_ids, sampling.min_tokens) == (3, 0.1, (), 1)


async def test_logprobs(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    async with connect(make_api(speak("ab", logprobs=True))) as client:
        chat = await client.chat.completions.create(model="tiny", messages=TALK, logprobs=True, top_logprobs=2)
        assert chat.choices[0].logprobs is not None
        assert [entry.token for entry in chat.choices[0].logprobs.content or []] == ["a", "b"]
        text = await client.completions.create(model="tiny", prompt="x", logprobs=2)
        assert text.choices[0].logprobs is not None
        assert text.choices[0].logprobs.text_offset == [0, 1]


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = await client.completions.create(model="tiny", prompt=[[5, 6]], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny", "gpt-tiny", "org/tiny"]
    assert (await client.models.retrieve("org/tiny")).id == "org/tiny"


async def test_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=TALK)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="tiny", messages=TALK, temperature=9)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id


async def test_refusals_and_keys(make_api: Callable[..., Api]) -> None:
    api = make_api(
        Script(refusal=Overloaded("full", retry_after_s=2)), ApiSettings(api_keys_env="K"), environment={"K": "k"}
    )
    async with connect(api, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
    async with connect(api, "k") as client:
        with pytest.raises(openai.RateLimitError) as refusal:
            await client.chat.completions.create(model="tiny", messages=TALK, stream=True)
        assert refusal.value.response.headers["retry-after"] == "2"


async def test_a_stream_that_breaks_raises(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    async with connect(make_api(Script(speak("abc", finish="error").chunks))) as client:
        stream = await client.chat.completions.create(model="tiny", messages=TALK, stream=True)
        with pytest.raises(openai.APIError, match="aborted"):
            async for _ in stream:
                pass
