"""/v1/chat/completions, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deployments.errors import NoReplica, Overloaded
from deployments.protocol import GenerationRequest, Refusal, TokenChunk
from deployments.routing.dispatch import error_of
from tests.fakes.dispatcher import Script, chunks_of
from tests.unit.api.conftest import Api

CHAT = "/v1/chat/completions"
TALK = [{"role": "user", "content": "hi"}]


def asking(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": TALK, **fields}


def events(answer: httpx.Response) -> list[Any]:
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


async def test_whole_answer(api: Api) -> None:
    answer = await api.post(CHAT, json=asking())
    body = answer.json()
    assert answer.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello world", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    [request] = api.dispatcher.requests
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": 7,
        "total_tokens": len(request.prompt_ids) + 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_engine_gets_what_was_asked(api: Api) -> None:
    fields: dict[str, Any] = {
        "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": -1,
        "frequency_penalty": 1, "presence_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"7": -100},
        "logprobs": True, "top_logprobs": 3, "min_tokens": 2,
    }  # fmt: skip
    await api.post(CHAT, json=asking(**fields))
    sampling = api.dispatcher.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (9, 2, 2**64 - 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert (sampling.logit_bias, sampling.logprobs) == (((7, -100.0),), 3)
    assert sampling.end_ids == api.codec.end_ids


async def test_defaults(api: Api) -> None:
    await api.post(CHAT, json=asking())
    request = api.dispatcher.requests[0]
    assert request.sampling.max_tokens == 256 - len(request.prompt_ids)
    assert (request.sampling.temperature, request.sampling.logprobs, request.salt) == (1.0, None, "")
    assert (request.tenant, request.priority) == ("", 0)


async def test_user_and_priority_go_along(api: Api) -> None:
    await api.post(CHAT, json=asking(user="ann", priority=-3, n=2))
    assert [(request.tenant, request.priority) for request in api.dispatcher.requests] == [("ann", -3)] * 2


async def test_a_pool_is_insisted_on_and_bounds_the_context(api: Api) -> None:
    api.dispatcher.pool_contexts = {"small": 100}
    for pool in ("small", "never seen", None):
        assert (await api.post(CHAT, json=asking(pool=pool))).status_code == 200
    asked = [(r.pool, len(r.prompt_ids) + r.sampling.max_tokens) for r in api.dispatcher.requests]
    assert asked == [("small", 100), ("never seen", 256), (None, 256)]
    error = (await api.post(CHAT, json=asking(pool="small", max_tokens=101))).json()["error"]
    assert (error["code"], "100 tokens" in error["message"]) == ("context_length_exceeded", True)


async def test_an_unknown_pool_is_a_bad_request(make_api: Callable[..., Api]) -> None:
    refusal = Refusal("q", "unknown_pool", "model tiny has no pool 'x'; it has a, b")
    answer = await make_api(Script(refusal=error_of(refusal))).post(CHAT, json=asking(pool="x"))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["message"]) == (400, "pool", refusal.message)


async def test_a_seed_is_drawn_where_none_is_given(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    seeds = iter([11, 12])
    api = make_api(speak("x"), draw_seed=lambda: next(seeds))
    await api.post(CHAT, json=asking())
    await api.post(CHAT, json=asking())
    assert [request.sampling.seed for request in api.dispatcher.requests] == [11, 12]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ignore_eos": True}, {"end_ids": ()}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_k": 1, "top_p": 1.0}),
        ({"temperature": 1e-300}, {"temperature": 0.0}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"max_tokens": 4, "max_completion_tokens": 4}, {"max_tokens": 4}),
    ],
)
async def test_values_on_their_way(api: Api, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (await api.post(CHAT, json=asking(**fields))).status_code == 200
    sampling = api.dispatcher.requests[0].sampling
    assert {name: getattr(sampling, name) for name in expected} == expected


async def test_stream(api: Api) -> None:
    answer = await api.post(CHAT, json=asking(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    first, *rest, done = events(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest) == "hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in rest][-1] == "stop"
    assert {chunk["id"] for chunk in (first, *rest)} == {first["id"]}
    assert all("usage" not in chunk for chunk in rest)
    assert done == "data: [DONE]"


async def test_stream_with_usage(api: Api) -> None:
    answer = await api.post(CHAT, json=asking(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = events(answer)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"], done) == ([], 7, "data: [DONE]")


async def test_choices_interleave(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    words = ["aaaa", "bbbb", "cccc"]
    api = make_api(lambda request: speak(words[request.sampling.choice], step_s=0.002))
    answer = await api.post(CHAT, json=asking(n=3, stream=True))
    chunks = [chunk["choices"][0] for chunk in events(answer)[:-1]]
    for index, word in enumerate(words):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["delta"].get("content", "") for chunk in mine) == word
        assert [chunk["finish_reason"] for chunk in mine if chunk["finish_reason"]] == ["stop"]
    order = [chunk["index"] for chunk in chunks[3:]]
    assert order != sorted(order)


async def test_n_choices_share_prompt_and_seed(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(lambda request: speak("abc", cached_tokens=request.sampling.choice + 2))
    body = (await api.post(CHAT, json=asking(n=3, seed=5))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    requests = api.dispatcher.requests
    assert len({request.request_id for request in requests}) == 3
    assert [request.sampling.choice for request in requests] == [0, 1, 2]
    assert {request.sampling.seed for request in requests} == {5}
    assert body["usage"]["prompt_tokens"] == len(requests[0].prompt_ids)
    assert body["usage"]["completion_tokens"] == 3 * 4
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_logprobs(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("a€", logprobs=True))
    body = (await api.post(CHAT, json=asking(logprobs=True, top_logprobs=2))).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[97], [0xE2], [0x82], [0xAC]]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "a€"
    assert content[0]["token"] == "a"
    assert content[0]["logprob"] < 0
    assert len(content[0]["top_logprobs"]) == 2


async def test_logprobs_in_a_stream(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("ab", logprobs=True))
    chunks = events(await api.post(CHAT, json=asking(logprobs=True, stream=True)))[1:-1]
    tokens = [entry["token"] for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert tokens == ["a", "b"]


async def test_impossible_logprobs_stay_json(make_api: Callable[..., Api], codec: Any) -> None:
    from deployments.protocol import TokenLogprob

    [token] = codec._ids("a", add_special=False)
    lowest = TokenLogprob(token, float("-inf"), ((token, float("nan")),))
    api = make_api(Script([TokenChunk("", (token,), (lowest,), "length")]))
    [entry] = (await api.post(CHAT, json=asking(logprobs=True))).json()["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


async def test_a_stop_string_cancels_the_engine(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("one STOP two", finish="length"))
    body = (await api.post(CHAT, json=asking(stop=["STOP"]))).json()
    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("one ", "stop")
    assert body["usage"]["completion_tokens"] == len("one STOP")
    assert api.dispatcher.cancelled == [api.dispatcher.requests[0].request_id]


async def test_length(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    body = (await make_api(speak("abc", finish="length")).post(CHAT, json=asking(max_tokens=3))).json()
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_its_status(make_api: Callable[..., Api], stream: bool) -> None:
    api = make_api(Script(refusal=Overloaded("the queue is full", retry_after_s=3)))
    answer = await api.post(CHAT, json=asking(stream=stream))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")


@pytest.mark.parametrize("stream", [False, True])
async def test_n_is_all_or_nothing(make_api: Callable[..., Api], speak: Callable[..., Script], stream: bool) -> None:
    def script(request: GenerationRequest) -> Script:
        late = Script(refusal=NoReplica("gone"), grant_after_s=0.02)
        return late if request.sampling.choice == 1 else speak("abcdef", step_s=0.01)

    api = make_api(script)
    answer = await api.post(CHAT, json=asking(n=3, stream=stream))
    assert answer.status_code == 503
    assert not api.dispatcher.running
    assert len(api.dispatcher.cancelled) == 2


async def test_failure_before_and_after_the_status(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    said = speak("abc", finish="length").chunks[:-1]
    api = make_api(Script([*said, TokenChunk("", finish_reason="error", error="the replica died")]))
    whole = await api.post(CHAT, json=asking())
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "the replica died")
    streamed = events(await api.post(CHAT, json=asking(stream=True)))
    assert streamed[-1]["error"]["code"] == "engine_failed"
    assert "data: [DONE]" not in streamed
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in streamed[:-1]) == "ab"


async def test_a_stream_without_an_end_is_a_failure(make_api: Callable[..., Api]) -> None:
    answer = await make_api(Script(chunks_of([70, 71])[:-1])).post(CHAT, json=asking())
    assert answer.status_code == 500
    assert "without saying why" in answer.json()["error"]["message"]


async def test_content_parts_and_developer(api: Api) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    talk = [{"role": "developer", "content": "brief"}, {"role": "user", "content": parts}]
    await api.post(CHAT, json=asking(messages=talk))
    expected = await api.codec.encode_chat(
        [{"role": "system", "content": "brief"}, {"role": "user", "content": "one\ntwo"}]
    )
    assert api.dispatcher.requests[0].prompt_ids == expected


async def test_an_alias_is_answered_under_its_name(api: Api) -> None:
    body = (await api.post(CHAT, json=asking(model="org/tiny"))).json()
    assert body["model"] == "org/tiny"


async def test_max_context(api: Api) -> None:
    answer = await api.post(CHAT, json=asking(max_tokens=256))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "256 tokens" in error["message"]
    long = await api.post(CHAT, json=asking(messages=[{"role": "user", "content": "z" * 300}]))
    assert (long.status_code, long.json()["error"]["param"]) == (400, "messages")
    assert not api.dispatcher.requests


async def test_a_chat_without_max_tokens_asks_for_what_the_largest_replica_holds(api: Api) -> None:
    await api.post(CHAT, json=asking())
    api.dispatcher.max_context = 100
    await api.post(CHAT, json=asking())
    wide, narrow = (len(r.prompt_ids) + r.sampling.max_tokens for r in api.dispatcher.requests)
    assert (wide, narrow) == (256, 100)


async def test_while_the_largest_replica_is_absent_a_chat_asks_for_what_is_served_unless_it_is_longer(api: Api) -> None:
    api.dispatcher.max_context, api.dispatcher.living_contexts = 200, {"small": 100}
    await api.post(CHAT, json=asking())
    prompt = len(api.dispatcher.requests[0].prompt_ids)
    api.dispatcher.living_contexts = {"small": prompt}  # leaves not a token
    await api.post(CHAT, json=asking())
    api.dispatcher.living_contexts = {"small": 100}
    await api.post(CHAT, json=asking(max_tokens=150 - prompt))
    api.dispatcher.pool_contexts = {"large": 200}
    await api.post(CHAT, json=asking(pool="large"))
    await api.post(CHAT, json=asking(max_tokens=201 - prompt))
    asked = [len(r.prompt_ids) + r.sampling.max_tokens for r in api.dispatcher.requests]
    assert asked == [100, 200, 150, 200]  # the last one was refused


async def test_in_a_pool_a_chat_asks_for_what_each_of_its_replicas_holds(api: Api) -> None:
    api.dispatcher.max_context, api.dispatcher.pool_contexts = 200, {"uneven": 200, "other": 120}
    api.dispatcher.living_contexts = {"uneven": 100, "other": 120}
    for pool in ("uneven", "other", None):
        await api.post(CHAT, json=asking(pool=pool))
    prompt = len(api.dispatcher.requests[0].prompt_ids)
    await api.post(CHAT, json=asking(pool="uneven", max_tokens=200 - prompt))
    asked = [len(r.prompt_ids) + r.sampling.max_tokens for r in api.dispatcher.requests]
    assert asked == [100, 120, 120, 200]
