"""How far a request has come: what its client was given, and what to ask the next replica for. Pure."""

from __future__ import annotations

from dataclasses import replace

from deployments.protocol import GenerationRequest, TokenChunk


class Progress:
    """One request over all its attempts.

    Each attempt has an id of its own, so that what is left of one (a call that is cancelled late, a grant that comes
    when nobody waits for it any more) can't be taken for another.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.produced: list[int] = []
        """Output ids that the client was given."""
        self.attempts = 0
        self.resumes = False
        """Whether it lost a replica that it was granted. One that was refused there has lost nothing but time."""
        self.losses = 0
        """Attempts that ended with their replica after it had taken the request up."""
        self.pool: str | None = None
        """Where the tokens come from: others may quantise otherwise, so the rest comes from there too."""

    def next_attempt(self) -> GenerationRequest:
        """The request for one more attempt: the prompt with all output so far, which the replica recomputes."""
        request, number = self.request, self.attempts
        self.attempts += 1
        return replace(
            request,
            request_id=f"{request.request_id}~{number}" if number else request.request_id,
            prompt_ids=request.prompt_ids + tuple(self.produced),
            resumed_tokens=request.resumed_tokens + len(self.produced),
        )

    def note(self, chunk: TokenChunk, pool: str) -> TokenChunk:
        """A chunk that an attempt in `pool` brought, as the client is given it."""
        if chunk.token_ids:
            self.produced += chunk.token_ids
            self.pool = pool
        name = self.request.request_id
        return chunk if chunk.request_id == name else chunk._replace(request_id=name)
