"""What a comparison is asked for and what it finds, as JSON between its processes and in its file. All sizes are bytes,
all durations seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.settings import PoolSettings


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Workload(_Value):
    """What every quantisation is measured with."""

    concurrency: tuple[Annotated[int, Field(ge=1)], ...]
    """Requests at once, one burst of each."""
    input: Annotated[int, Field(ge=1)]
    """Tokens of each prompt."""
    output: Annotated[int, Field(ge=2)]
    """Tokens of each answer."""
    window: Annotated[int, Field(ge=2)]
    """Tokens of the windows that perplexity is computed in; see `deployments.engine.perplexity`."""
    stride: Annotated[int, Field(ge=1)]


class Job(_Value):
    """One quantisation to measure, for a process of its own."""

    model: str
    """Name, for messages."""
    folder: Path
    text: Path
    pool: PoolSettings
    workload: Workload
    cache: Path
    """Where checkpoints quantised on the CPU are kept."""


class Level(_Value):
    """A burst of requests at once. Times are medians over the requests."""

    requests: int
    tokens_per_s: float
    """Output tokens of all requests over the time to the last one's end."""
    first_token_s: float
    token_s: float
    """Per output token after the first."""
    request_s: float
    """To the last token."""


class Memory(_Value):
    """Of all devices together."""

    weights: int
    """Planned, and checked against what is loaded."""
    kv_cache: int
    """Planned, and allocated so."""
    reserve: int
    """Planned: what is neither."""
    measured: int
    """On GPUs what is taken on them at the end, by all processes; on the CPU by how much the process's resident
    memory rose at its peak, with every page of the KV cache touched."""
    capacity_tokens: int
    """KV tokens that fit."""

    @property
    def planned(self) -> int:
        """What the plan accounts for."""
        return self.weights + self.kv_cache + self.reserve


class Quality(_Value):
    """How well the text is predicted."""

    perplexity: float
    scored_tokens: int
    text_tokens: int


class Measured(_Value):
    """One quantisation, measured."""

    kind: Literal["measured"] = "measured"
    quantization: str
    dtype: str
    """Of computation and of what stays unquantised."""
    devices: tuple[str, ...]
    """The name of each stage's."""
    attention: str
    quantise_s: float | None
    """Quantising on the CPU, done once and kept; None: it was kept already, or is part of loading."""
    load_s: float
    """From the checkpoint to an engine that takes requests."""
    memory: Memory
    quality: Quality
    levels: tuple[Level, ...]


class Quantised(_Value):
    """The checkpoint was quantised, which distorts what this process would measure: another one goes on."""

    kind: Literal["quantised"] = "quantised"
    seconds: float


class Failed(_Value):
    """One quantisation that could not be measured."""

    kind: Literal["failed"] = "failed"
    quantization: str
    reason: str
    """One line."""


Row = Annotated[Measured | Failed, Field(discriminator="kind")]
Answer = Annotated[Measured | Quantised | Failed, Field(discriminator="kind")]

SCHEMA: Literal["headroom.compare/1"] = "headroom.compare/1"
"""Its number is raised when the JSON changes shape."""


class Comparison(_Value):
    """All of it, and what it was made with."""

    schema_: Literal["headroom.compare/1"] = Field(default=SCHEMA, alias="schema")
    model: str
    revision: str | None
    text: str
    """Name of the file."""
    workload: Workload
    hourly_price: float | None
    """Of the machine, in any currency."""
    started: str
    """UTC, ISO 8601."""
    machine: str
    versions: dict[str, str]
    rows: tuple[Row, ...]

    def cost_per_million(self, level: Level) -> float | None:
        """Price of a million output tokens, their prompts included, while the machine is as busy as in the burst."""
        return None if self.hourly_price is None else self.hourly_price / 3600 / level.tokens_per_s * 1e6
