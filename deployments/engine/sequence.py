"""One request as the scheduler sees it: its tokens, and how far they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from deployments.errors import HeadroomError


class TooLong(HeadroomError, ValueError):
    """A request that no number of preemptions could fit: `need` and `have` are tokens."""

    def __init__(self, request_id: str, need: int, have: int) -> None:
        super().__init__(
            f"request {request_id} needs {need} tokens of KV cache for prompt and max_tokens, the replica has {have}; "
            "lower max_tokens, shorten the prompt, or give the KV cache more memory"
        )
        self.need = need
        self.have = have


@dataclass(slots=True, eq=False)
class TokenSequence:
    """One request as the scheduler sees it. Read-only to others."""

    request_id: str
    prompt_ids: tuple[int, ...]
    salt: str
    max_tokens: int
    arrival: int
    """Priority: the lower, the older."""
    ids: list[int] = field(init=False)
    """Prompt and output: every token known so far."""
    length: int = field(init=False)
    """Tokens of prompt and output, pending ones included: those behind `ids` that steps in flight draw."""
    longest: int = field(init=False)
    """`length` with all of `max_tokens`."""
    pending_row: int = 0
    """Which of its step's sampled rows drew the last pending one."""
    computed: int = 0
    """Leading tokens whose KV is written, or will be by the steps in flight."""
    state: Literal["waiting", "running", "finished"] = "waiting"
    slot: int | None = None
    in_flight: int = 0
    """Launched steps that name it and are not complete; may outlast `state == "running"`."""
    decodes: bool = False
    """A step drew a token of it, so that it computes one at a time, until it is set back."""
    cacheable: bool = True
    """False once a step that wrote its KV was spoiled: nothing more goes to the prefix cache."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when first admitted."""
    preemptions: int = 0
    turn: int = 0
    """When it was last picked for a step that had no budget for all decodes."""
    block_table: tuple[int, ...] = ()
    """The blocks that its latest step named: the same tuple until a step needs one more."""
    digests: list[bytes] = field(default_factory=list)
    """Block digests of `ids`, kept by the block manager across preemptions."""

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids]
        self.length = len(self.ids)
        self.longest = self.length + self.max_tokens

    @property
    def output_ids(self) -> list[int]:
        """Output: every token known so far."""
        return self.ids[len(self.prompt_ids) :]

    @property
    def pending(self) -> int:
        """Tokens that are drawn by steps in flight."""
        return self.length - len(self.ids)

    @property
    def remaining(self) -> int:
        """Tokens to compute: 1 for a decode, more for a prefill, 0 when the last token of the output is on its way."""
        return self.length - self.computed if self.length < self.longest else 0

    def decode(self, row: int) -> tuple[int, ...]:
        """A launched step is fed the last token, as in `StepItem.ids`, and draws the next one as sampled row `row`."""
        length = self.length
        ids = (self.ids[-1] if len(self.ids) == length else -1 - self.pending_row,)
        self.computed = length
        self.in_flight += 1
        self.expect(row)
        return ids

    def expect(self, row: int) -> None:
        """A launched step draws the next token, as sampled row `row`."""
        self.length += 1
        self.pending_row = row
        self.decodes = True

    def set_back(self) -> None:
        """Its blocks were taken: it waits again, and nothing of it is computed."""
        self.state = "waiting"
        self.computed = 0
        self.decodes = False
        self.block_table = ()
        self.preemptions += 1
