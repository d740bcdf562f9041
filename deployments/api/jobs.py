"""A parsed body to the generation requests that answer it: ids, limits, sampling; one request per choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.api.schemas import ChatBody, CompletionBody, GenerationBody
from deployments.api.served import ServedModel
from deployments.errors import BadRequest, ContextLengthExceeded
from deployments.protocol import GenerationRequest, Sampling

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default on /v1/completions; a chat may fill the context."""
MAX_REQUESTS = 2048
"""Most choices of one HTTP request, over all its prompts."""
GREEDY_BELOW = 1e-5
"""Temperatures under it are greedy in float32 anyway, and dividing by them overflows."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: what the requests of one HTTP request have in common."""

    request_id: str
    """Unique per HTTP request, and starting with the id that the client sees."""
    salt: str
    """Tenant salt of the prefix cache; empty where no API keys tell callers apart."""
    seed: int
    """Unsigned 64-bit, drawn for this request; used where the client gives none."""
    tenant: str = ""
    """By the API key; empty where there is none, and `user` names the tenant."""
    weight: int | None = None
    """Of the tenant, by the API key."""


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request's work, ready to dispatch."""

    model: ServedModel
    model_name: str
    """As the client named it."""
    requests: tuple[GenerationRequest, ...]
    """Choice `c` of prompt `p` is number `p * n + c`, which is also its index in the answer."""
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return self.tokens_of(range(len(self.requests)))

    def tokens_of(self, choices: Iterable[int]) -> int:
        """Of the prompts that these choices continue; each counted once."""
        return sum(len(self.requests[prompt * self.n].prompt_ids) for prompt in {c // self.n for c in choices})


async def chat_job(body: ChatBody, model: ServedModel, caller: Caller) -> Job:
    """Render and encode a conversation.

    Raises:
        BadRequest: the template refuses it, or it doesn't fit the context.
    """
    ids = await model.text.encode_chat([message.rendered() for message in body.messages])
    _check_ids(ids, model, "messages")
    ids += model.text.start_ids
    wished = body.max_tokens or body.max_completion_tokens
    max_tokens = wished or model.room_after(len(ids), body.pool)
    param = "max_completion_tokens" if body.max_completion_tokens else "max_tokens" if wished else "messages"
    _check_length(len(ids), max_tokens, model.context_in(body.pool), param)
    logprobs = body.top_logprobs if body.logprobs else None
    return _job(body, model, caller, [ids], max_tokens, logprobs)


async def completion_job(body: CompletionBody, model: ServedModel, caller: Caller) -> Job:
    """Encode the prompts.

    Raises:
        BadRequest: a prompt is empty, has ids that the model doesn't, or doesn't fit the context.
    """
    if len(body.prompt) * body.n > MAX_REQUESTS:
        raise BadRequest(
            f"{len(body.prompt)} prompts with n = {body.n} make {len(body.prompt) * body.n} choices; "
            f"at most {MAX_REQUESTS} in one request",
            param="prompt",
        )
    max_tokens = body.max_tokens or COMPLETION_MAX_TOKENS
    prompts = []
    for prompt in body.prompt:
        ids = await model.text.encode(prompt) if isinstance(prompt, str) else prompt
        _check_ids(ids, model, "prompt")
        ids += model.text.start_ids
        _check_length(len(ids), max_tokens, model.context_in(body.pool), "max_tokens" if body.max_tokens else "prompt")
        prompts.append(ids)
    return _job(body, model, caller, prompts, max_tokens, body.logprobs)


def _job(
    body: GenerationBody,
    model: ServedModel,
    caller: Caller,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    logprobs: int | None,
) -> Job:
    if body.min_tokens > max_tokens:
        raise BadRequest(f"'min_tokens' is {body.min_tokens}, over max_tokens, {max_tokens}", param="min_tokens")
    biases = _biases(body, model.text.vocab_size)
    requests = [
        GenerationRequest(
            request_id=f"{caller.request_id}-{p}-{c}",
            prompt_ids=ids,
            sampling=_sampling(body, model, caller, p * body.n + c, max_tokens, logprobs, biases),
            salt=caller.salt,
            tenant=caller.tenant or body.user or "",
            priority=body.priority,
            pool=body.pool,
            weight=caller.weight,
        )
        for p, ids in enumerate(prompts)
        for c in range(body.n)
    ]
    return Job(model, body.model, tuple(requests), body.n, body.stop, body.stream, body.include_usage)


def _sampling(
    body: GenerationBody,
    model: ServedModel,
    caller: Caller,
    choice: int,
    max_tokens: int,
    logprobs: int | None,
    biases: tuple[tuple[int, float], ...],
) -> Sampling:
    only_likeliest = body.top_p == 0  # The limit of a nucleus that shrinks.
    return Sampling(
        max_tokens=max_tokens,
        seed=caller.seed if body.seed is None else body.seed % 2**64,
        choice=choice,
        min_tokens=body.min_tokens,
        temperature=body.temperature if body.temperature >= GREEDY_BELOW else 0.0,
        top_k=1 if only_likeliest else max(body.top_k, 0),
        top_p=1.0 if only_likeliest else body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=biases,
        logprobs=logprobs,
        end_ids=() if body.ignore_eos else model.text.end_ids,
    )


def _biases(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = tuple((int(token), bias) for token, bias in body.logit_bias.items())
    for token, _ in biases:
        if token >= vocab_size:
            raise BadRequest(
                f"'logit_bias' names token {token}; the vocabulary ends at {vocab_size - 1}", param="logit_bias"
            )
    return biases


def _check_ids(ids: tuple[int, ...], model: ServedModel, param: str) -> None:
    if not ids:
        raise BadRequest(f"{param!r} is empty: it gives no token to start from", param=param)
    if min(ids) < 0 or max(ids) >= model.text.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise BadRequest(
            f"{param!r} holds token {wrong}; the vocabulary is 0 to {model.text.vocab_size - 1}", param=param
        )


def _check_length(prompt: int, max_tokens: int, max_context: int, param: str) -> None:
    if prompt + max_tokens > max_context:
        raise ContextLengthExceeded(
            f"this model's context is {max_context} tokens, but the request needs {prompt + max_tokens} "
            f"({prompt} in the prompt, {max_tokens} for the output): shorten the prompt or lower max_tokens",
            param=param,
        )
