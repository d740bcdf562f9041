"""What is known of one HTTP request while it is answered."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

from starlette.requests import Request

from deployments.api.limits import Admission

SCOPE_KEY = "headroom.visit"


@dataclass(slots=True)
class Visit:
    """One HTTP request, from arrival to its line in the log. Holds no text of prompt or answer."""

    request_id: str
    """The client's own, if it is short and plain, else made; returned in every answer."""
    arrived: float
    """The event loop's clock, seconds."""
    unique: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tells apart requests whose clients sent the same id."""
    status: int | None = None
    complete: bool = False
    """Whether the whole answer was sent."""
    key: str | None = None
    """Name of the API key."""
    admission: Admission | None = None
    """What its key's limits know of it."""
    model: str | None = None
    choices: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    taken_up_tokens: int = 0
    """Of the prompts of which a replica has taken up a choice; each prompt counts once."""
    dispatched: float | None = None
    """When its choices were first sent to the ledger."""
    granted: float | None = None
    """When replicas had taken up all of them."""
    first_token: float | None = None
    error: str | None = None
    """Code of the error that the client was told."""

    @property
    def outcome(self) -> str:
        """How it ended: ok, client_gone, the error's code, or the status of an answer without one."""
        if self.error is not None:
            return self.error
        if self.status is None or not self.complete:
            return "client_gone"
        return "ok" if self.status < 400 else f"http_{self.status}"

    @property
    def engine_id(self) -> str:
        """Prefix of the ids under which ledger and replicas know the choices."""
        return f"{self.request_id}-{self.unique[:8]}"

    @property
    def used_tokens(self) -> int:
        """Prompts that a replica took up, and output."""
        return self.taken_up_tokens + self.output_tokens

    def note_first_token(self) -> None:
        """Remember when the first token came."""
        if self.first_token is None:
            self.first_token = asyncio.get_running_loop().time()


def visit_of(request: Request) -> Visit:
    """The visit that `AccessMiddleware` opened for this request."""
    visit = request.scope[SCOPE_KEY]
    assert isinstance(visit, Visit)
    return visit
