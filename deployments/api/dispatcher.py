"""The one thing that the API knows of ledger, replicas and engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from deployments.metrics.board import Observation
from deployments.protocol import GenerationRequest, TokenChunk


class Dispatcher(Protocol):
    """Sends the requests of one served model to its replicas.

    An implementation holds to this contract, which `tests/contract` checks:

    - `dispatch` returns only once blocks were granted and the replica has taken the request up, so that the
      caller can still answer with a refusal's status. It never returns for a request that was refused.
    - The generator yields chunks in order and ends after exactly one terminal chunk. A failure after `dispatch`
      returned arrives as that chunk (`finish_reason="error"`), not as an exception.
    - `aclose()` before the terminal chunk cancels the request and releases its grant; so does cancelling the
      task that awaits `dispatch` or the next chunk. Closing twice, or after the end, does nothing. It holds before
      the first chunk was asked for, too: Python skips the `finally` of a generator that never started, so
      `dispatch` must have advanced it.
    - Requests don't wait for each other: the choices of one HTTP request are dispatched side by side.
    """

    async def dispatch(self, request: GenerationRequest, *, wait_limit_s: float) -> AsyncGenerator[TokenChunk, None]:
        """Wait up to `wait_limit_s` seconds for a grant and for a replica that takes it up.

        Raises:
            ContextLengthExceeded: longer than any replica's capacity.
            Overloaded: the queue is full or the wait too long; carries `retry_after_s`.
            NoReplica: no replica of the model is alive.
            EngineFailed: the replica could not take the request up.
        """
        ...

    async def observe(self) -> Observation | None:
        """What there is to show of this model on the metrics page; None while its ledger does not answer."""
        ...

    @property
    def max_context(self) -> int | None:
        """Longest prompt + output in tokens that a replica holds; None while that was never known of each pool."""
        ...

    @property
    def ledger_answered(self) -> bool:
        """Whether its ledger ever heard of this ingress, so that it may show an older state of it."""
        ...

    def living_context(self, pool: str | None) -> int | None:
        """Longest prompt + output in tokens that each replica of a pool holds which can take work now, or where none
        can, the largest that is known: of that pool, or the most of all pools for None. None while none ever was."""
        ...

    def context_of(self, pool: str) -> int | None:
        """Longest prompt + output in tokens that a replica of one pool holds; None while that is not known."""
        ...

    async def is_ready(self) -> bool:
        """Whether a replica can take work now."""
        ...
