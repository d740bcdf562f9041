"""The engine: submit, abort, step. Token ids in, token chunks out; the only thread that drives the stages.

One `step()` launches whatever can be launched, then waits for the oldest step in flight. With N stages there are N
slots, so every stage has work while one slot's tokens are read; with lookahead each slot has its next step launched
before the host has read the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, repeat
from operator import add

from deployments.engine.attention import RowSpan
from deployments.engine.blocks import BlockManager
from deployments.engine.budget import Chunks
from deployments.engine.draw import Draw
from deployments.engine.loader import LoadedModel
from deployments.engine.messages import EngineLimits
from deployments.engine.pipeline import Landing, Pipeline, open_pipeline
from deployments.engine.sampling import SampledToken
from deployments.engine.sampling_batch import Row
from deployments.engine.scheduler import Scheduler
from deployments.engine.stages import StepRows
from deployments.engine.step import StepItem, StepPlan
from deployments.protocol import FinishReason, GenerationRequest, TokenChunk, TokenLogprob
from placement.plan import Plan


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    request_id: str
    row: Row
    max_tokens: int
    end_ids: tuple[int, ...]
    produced: int
    """Tokens of the output, those that an earlier attempt produced included."""
    encoded: int
    """Leading tokens that are an encoder's; 0 without one."""


@dataclass(frozen=True, slots=True)
class _Launched:
    plan: StepPlan
    sampling: list[_Live]
    """Whose items sample, in order."""
    tokens: Landing


class Engine:
    """Continuous batching over paged KV blocks.

    Args:
        model: loaded as `plan` says.
        plan: its block count and size are the KV cache's.
        limits: of the scheduler.
        pipeline: runs the steps; by default that of the model's devices.
    """

    def __init__(self, model: LoadedModel, plan: Plan, limits: EngineLimits, pipeline: Pipeline | None = None) -> None:
        namespace = f"{plan.model}:{plan.quantization}:{plan.dtype}:{plan.kv_dtype}".encode()
        self._blocks = BlockManager(
            plan.num_blocks,
            plan.block_size,
            namespace=namespace,
            prefix_cache=limits.prefix_cache and not model.encodes,  # an encoder's tokens see those behind them
            granule_tokens=limits.granule_tokens,
        )
        self._pipeline = open_pipeline(model, plan, limits) if pipeline is None else pipeline
        by_hand = limits.prefill_chunk_tokens
        self._scheduler = Scheduler(
            self._blocks,
            slots=self._pipeline.depth,
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
            chunks=self._pipeline.chunks if by_hand is None else Chunks.fixed(by_hand),
            lookahead=self._pipeline.lookahead,
            whole_prompts=model.encodes,
        )
        self._encodes = model.encodes
        self._vocab_size = model.vocab_size
        self._max_context = plan.max_context
        self._live: dict[str, _Live] = {}
        self._flight: deque[_Launched] = deque()

    @property
    def blocks(self) -> BlockManager:
        """The KV cache's accounts, to read."""
        return self._blocks

    @property
    def pipeline(self) -> Pipeline:
        """The stages, to time while nothing runs."""
        return self._pipeline

    @property
    def scheduler(self) -> Scheduler:
        """The queues, to read."""
        return self._scheduler

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this, exclusive."""
        return self._vocab_size

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Seconds that each stage has computed since the start; empty where it is not measured."""
        return self._pipeline.busy_s

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its chunks come out of later steps.

        Raises:
            ValueError: the request can't be served as it is; nothing was queued.
        """
        outside = [token for token in request.prompt_ids if not 0 <= token < self._vocab_size]
        if outside:
            raise ValueError(f"prompt has token {outside[0]}, but the model's ids are 0 to {self._vocab_size - 1}")
        left = request.sampling.max_tokens - request.resumed_tokens
        if request.resumed_tokens and not (0 < request.resumed_tokens < len(request.prompt_ids) and left > 0):
            raise ValueError(
                f"{request.resumed_tokens} tokens to resume from must be fewer than the {len(request.prompt_ids)} ids "
                f"given and than max_tokens, {request.sampling.max_tokens}"
            )
        tokens = request.prompt_tokens + request.sampling.max_tokens
        if tokens > self._max_context:
            raise ValueError(
                f"prompt and max_tokens are {tokens} tokens, and a request has at most {self._max_context} here; "
                "lower max_tokens, shorten the prompt, or raise the pool's max_context"
            )
        encoded = request.prompt_tokens - 1 if self._encodes else 0
        if self._encodes and encoded < 1:
            raise ValueError(
                "the prompt of an encoder-decoder is the encoder's tokens and the decoder's first, 2 at least; it has "
                f"{request.prompt_tokens}"
            )
        name, sampling = request.request_id, request.sampling
        row = Row(sampling, request.prompt_tokens, self._vocab_size, encoded)
        self._scheduler.add(name, request.prompt_ids, max_tokens=left, salt=request.salt)
        self._live[name] = _Live(name, row, sampling.max_tokens, sampling.end_ids, request.resumed_tokens, encoded)

    def abort(self, request_id: str) -> None:
        """End a request without another chunk; unknown ids and ended requests are left alone."""
        if self._live.pop(request_id, None) is not None:
            self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._scheduler.has_work()

    def held(self) -> Iterator[tuple[str, int]]:
        """(request id, blocks held) of every request not ended."""
        return self._scheduler.held()

    def step(self) -> list[TokenChunk]:
        """Launch all that can be launched, wait for the oldest step in flight, and return what it produced.

        Nothing comes of a step whose requests are all in the middle of their prompts, or ended meanwhile.

        Raises:
            Exception: whatever a stage raised. The engine's state is then unknown: the process must end.
        """
        while self._launch_round():
            pass
        if not self._flight:
            return []
        oldest = self._flight.popleft()
        return self._land(oldest, oldest.tokens.result())

    def check_integrity(self) -> None:
        """Compare all accounts; raises `IntegrityError` when a block is lost or held twice."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """End the stages' threads."""
        self._pipeline.close()

    def _launch_round(self) -> bool:
        """One step of every slot that may take one; whether there was any."""
        before = len(self._flight)
        for slot in range(self._pipeline.depth):
            plan = self._scheduler.schedule(slot)
            if plan is not None:
                items = plan.items
                if plan.sampled < len(items):
                    items = tuple([item for item in items if item.samples])
                sampling = [self._live[item.request_id] for item in items]
                landing = self._pipeline.launch(slot, self._rows(plan.items), self._draw(sampling, items))
                self._flight.append(_Launched(plan, sampling, landing))
        return len(self._flight) > before

    def _rows(self, items: Sequence[StepItem]) -> StepRows:
        names, starts, fed, tables, samples = zip(*items, strict=True)
        ids = tuple(chain.from_iterable(fed))
        counts: Iterable[int] = repeat(1)
        positions, last_rows = starts, iter(range(len(ids)))
        if len(ids) > len(items):  # not decodes alone
            counts = list(map(len, fed))
            last_rows = islice(accumulate(counts, initial=-1), 1, None)
            positions = tuple(chain.from_iterable(map(range, starts, map(add, starts, counts))))
        encoded = [self._live[name].encoded for name in names] if self._encodes else repeat(0)
        spans = tuple(map(RowSpan, starts, counts, tables, encoded))
        return StepRows(ids, positions, spans, sampled=tuple(compress(last_rows, samples)))

    def _draw(self, sampling: Sequence[_Live], items: Sequence[StepItem]) -> Draw:
        if not items:
            return Draw((), (), ())
        _, starts, fed, tables, _ = zip(*items, strict=True)
        return Draw(tuple([live.row for live in sampling]), tuple(map(add, starts, map(len, fed))), tables)

    def _land(self, step: _Launched, tokens: list[SampledToken]) -> list[TokenChunk]:
        ids = [token.token_id for token in tokens]
        spoiled = [live.request_id for live, token in zip(step.sampling, tokens, strict=True) if token.bad]
        self._scheduler.complete(step.plan, ids, spoiled)
        return [
            self._emit(live, *token)
            for live, token in zip(step.sampling, tokens, strict=True)
            if live.request_id in self._live
        ]

    def _emit(self, live: _Live, token_id: int, bad: bool, logprob: TokenLogprob | None) -> TokenChunk:
        name = live.request_id
        cached = 0 if live.produced else self._scheduler.sequence(name).cached_tokens
        live.produced += 1
        if bad:
            self._end(name)
            error = "the model's logits were not finite, so no token could be drawn; retry, or lower logit_bias"
            return TokenChunk(name, finish_reason="error", error=error, cached_tokens=cached)
        reason: FinishReason | None = None
        if token_id in live.end_ids:
            reason = "stop"
        elif live.produced >= live.max_tokens:
            reason = "length"
        if reason is not None:
            self._end(name)
        return TokenChunk(name, (token_id,), () if logprob is None else (logprob,), reason, None, cached)

    def _end(self, request_id: str) -> None:
        del self._live[request_id]
        self._scheduler.finish(request_id)
