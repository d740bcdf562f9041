"""/v1/completions: prompts in four shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from deployments.protocol import GenerationRequest
from tests.fakes.dispatcher import Script
from tests.unit.api.conftest import Api
from tests.unit.api.test_chat import events

PATH = "/v1/completions"


def asking(prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, **fields}


@pytest.mark.parametrize(
    ("prompt", "choices"), [("hello", 1), (["hello", "he"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2), (["one"], 1)]
)
async def test_shapes_of_prompt(api: Api, prompt: Any, choices: int) -> None:
    answer = await api.post(PATH, json=asking(prompt))
    body = answer.json()
    assert answer.status_code == 200
    assert [choice["text"] for choice in body["choices"]] == ["hello world"] * choices
    assert [choice["index"] for choice in body["choices"]] == list(range(choices))
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["usage"]["prompt_tokens"] == sum(len(r.prompt_ids) for r in api.dispatcher.requests)
    assert {r.sampling.max_tokens for r in api.dispatcher.requests} == {16}


async def test_ids_are_taken_as_they_are_and_text_gets_bos(api: Api) -> None:
    await api.post(PATH, json=asking([5, 6]))
    await api.post(PATH, json=asking("hello"))
    ids, text = (request.prompt_ids for request in api.dispatcher.requests)
    assert ids == (5, 6)
    assert text == await api.codec.encode("hello")


async def test_prompts_times_n(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    def script(request: GenerationRequest) -> Script:
        return speak(f"{request.prompt_ids[0]}{request.sampling.choice}")

    api = make_api(script)
    body = (await api.post(PATH, json=asking([[5], [6]], n=2, best_of=2))).json()
    assert [choice["text"] for choice in body["choices"]] == ["50", "51", "62", "63"]
    ids = [request.request_id for request in api.dispatcher.requests]
    assert [i.split("-", 2)[2] for i in ids] == ["0-0", "0-1", "1-0", "1-1"]
    assert body["usage"]["prompt_tokens"] == 2


async def test_stream(api: Api) -> None:
    *chunks, done = events(await api.post(PATH, json=asking(stream=True)))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert done == "data: [DONE]"


async def test_logprobs(make_api: Callable[..., Api], speak: Callable[..., Script]) -> None:
    api = make_api(speak("ab€", logprobs=True))
    [choice] = (await api.post(PATH, json=asking(logprobs=1))).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "\ufffd", "\ufffd", "\ufffd"]
    assert logprobs["text_offset"] == [0, 1, 2, 2, 2]
    assert len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 5
    assert logprobs["top_logprobs"][0]["a"] == logprobs["token_logprobs"][0]
    assert api.dispatcher.requests[0].sampling.logprobs == 1


async def test_an_empty_text_becomes_bos(api: Api) -> None:
    assert (await api.post(PATH, json=asking(""))).status_code == 200
    assert len(api.dispatcher.requests[0].prompt_ids) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 1025, "n": 2}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 300}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
    ],
)
async def test_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    answer = await api.post(PATH, json={**asking(), **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not api.dispatcher.requests


@pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": ""}, {"best_of": 1}, {"logprobs": False}, {"n": None}])
async def test_no_ops(api: Api, fields: dict[str, Any]) -> None:
    assert (await api.post(PATH, json=asking(**fields))).status_code == 200
