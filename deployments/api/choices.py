"""One choice on its way from token chunks to shown text: detokenised, cut at stop strings, counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deployments.api.detokenizer import Detokenizer
from deployments.api.stops import StopMatcher
from deployments.errors import EngineFailed
from deployments.protocol import Sampling, TokenChunk, TokenLogprob

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    """A token's log-probability, and the character of the choice's text where the token begins."""

    offset: int
    token: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What one chunk adds to a choice. The last piece has a finish reason."""

    text: str = ""
    logprobs: tuple[PlacedLogprob, ...] = ()
    finish_reason: Finish | None = None


class ChoiceText:
    """The text of one choice as its chunks arrive.

    A stop string is looked for in the text after the first `min_tokens` tokens. Where one completes, the text ends
    before it, the choice is finished whatever the engine does next, and its tokens count up to the one that
    completed it. Log-probabilities follow the text: tokens that begin in what was cut are left out, and so is the
    end token.
    """

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], sampling: Sampling) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._sampling = sampling
        self._waiting: deque[PlacedLogprob] = deque()
        self._decoded = 0
        self._shown = 0
        self.output_tokens = 0
        self.cached_tokens = 0

    def feed(self, chunk: TokenChunk) -> Piece:
        """Add a chunk.

        Raises:
            EngineFailed: the chunk says that the request failed, or was aborted under a client that is there.
        """
        reason = chunk.finish_reason
        if reason == "error" or reason == "abort":
            raise EngineFailed(chunk.error or "the request was aborted by the server; send it again")
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
        ended = reason == "stop" and chunk.token_ids[-1:] and chunk.token_ids[-1] in self._sampling.end_ids
        shown_ids = chunk.token_ids[:-1] if ended else chunk.token_ids
        texts = []
        for i, token_id in enumerate(shown_ids):
            self.output_tokens += 1
            if chunk.logprobs:
                self._waiting.append(PlacedLogprob(self._decoded, chunk.logprobs[i]))
            text, hit = self._match(self._detokenizer.push(token_id))
            texts.append(text)
            if hit:
                return self._piece(texts, "stop", cut=True)
        self.output_tokens += len(chunk.token_ids) - len(shown_ids)
        return self._piece(texts, None) if reason is None else self._finish(texts, reason)

    def _match(self, text: str) -> tuple[str, bool]:
        self._decoded += len(text)
        if self._matcher is None or not text or self.output_tokens <= self._sampling.min_tokens:
            return text, False
        return self._matcher.push(text)

    def _finish(self, texts: list[str], reason: Finish) -> Piece:
        text, hit = self._match(self._detokenizer.flush())
        texts.append(text)
        if hit:
            return self._piece(texts, "stop", cut=True)
        if self._matcher is not None:
            texts.append(self._matcher.flush())
        return self._piece(texts, reason)

    def _piece(self, texts: list[str], finish: Finish | None, *, cut: bool = False) -> Piece:
        text = "".join(texts)
        self._shown += len(text)
        return Piece(text, self._release(everything=finish is not None and not cut), finish)

    def _release(self, *, everything: bool) -> tuple[PlacedLogprob, ...]:
        released = []
        while self._waiting and (everything or self._waiting[0].offset < self._shown):
            released.append(self._waiting.popleft())
        return tuple(released)
