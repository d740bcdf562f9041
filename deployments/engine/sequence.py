"""One request as the scheduler sees it: its tokens, and how far they are computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True, eq=False)
class TokenSequence:
    """One request as the scheduler sees it. Read-only to others."""

    request_id: str
    prompt_ids: tuple[int, ...]
    salt: str
    max_tokens: int
    arrival: int
    """Priority: the lower, the older."""
    output_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(init=False)
    """Prompt and output: every token known so far."""
    computed: int = 0
    """Leading tokens of `ids` whose KV is written, or will be by the step in flight."""
    state: Literal["waiting", "running", "finished"] = "waiting"
    slot: int | None = None
    in_flight: bool = False
    """Named by a launched step that isn't complete; may outlast `state == "running"`."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when first admitted."""
    preemptions: int = 0
    turn: int = 0
    """When it was last picked for a step that had no budget for all decodes."""
    digests: list[bytes] = field(default_factory=list)
    """Block digests of `ids`, kept by the block manager across preemptions."""

    def __post_init__(self) -> None:
        self.ids = [*self.prompt_ids]

    @property
    def remaining(self) -> int:
        """Known tokens still to compute: 1 for a decode, more for a prefill."""
        return len(self.ids) - self.computed
