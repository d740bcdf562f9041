"""What crosses processes: ingress, ledger, replica and engine speak in these values alone.

Frozen dataclasses (chunks: tuples) of plain Python values: cheap to pickle, comparable in tests, and free of torch and
ray.
Token counts are tokens, block counts are KV blocks, durations are seconds, and instants are Unix seconds.

What asks or tells says its protocol's version, and is read only by those of the same one: others refuse it by name
(`mismatch`), so an answer needs none. Instances travel as the list of their values, and a receiver fills its own fields
with them in order. Hence `version` is the first, and the id that a refusal needs the second: they are where another
version's reader looks for them, whatever comes after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from deployments.metrics.vitals import IngressVitals, ReplicaVitals

PROTOCOL_VERSION = 3
"""Raised when any of these classes changes shape (`tests/unit/test_protocol.py` knows the shapes of this version)."""

REFUSED = "not taken up: "
"""How the error of a replica's first and only chunk begins when it refuses a grant; the request is then retried."""

LOST = "the engine is gone: "
"""How the error of a request's last chunk begins when its replica can't go on with it, but another may."""

LOCAL_EPOCH = 0
"""`Grant.ledger_epoch` of a grant that an ingress made by itself because the ledger gave no answer."""


class Message(Protocol):
    """What asks or tells."""

    @property
    def version(self) -> int:
        """The protocol that it was written in."""
        ...


def mismatch(message: Message, reader: str) -> str | None:
    """Why `reader` can't read the message: both versions and the way out. None if it can."""
    if message.version == PROTOCOL_VERSION:
        return None
    return (
        f"{type(message).__name__} is of protocol {message.version}, {reader} reads {PROTOCOL_VERSION}: "
        "a rolling update between versions of Headroom is not done yet; if it stays, deploy all from one version"
    )


FinishReason = Literal["stop", "length", "abort", "error"]
"""How a request ended: an end token or stop string, the token limit, the client's leaving, a failure."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one choice's tokens are drawn. Neutral values switch a step off.

    `seed` is always concrete: the ingress draws one where the client gave none, so that a request
    recomputed on another replica draws the same tokens.
    """

    max_tokens: int
    seed: int
    """Unsigned 64-bit; a token's random number is a hash of (seed, position, choice)."""
    choice: int = 0
    """Index among the `n` choices of one HTTP request."""
    min_tokens: int = 0
    """End tokens are masked until this many tokens were produced."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in `transformers`; an encoder's input is not counted."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    """Both over the output alone, as in OpenAI's API."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """None: no log-probabilities; k >= 0: the chosen token's and those of the k likeliest."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end the request (the model's EOS ids); empty under `ignore_eos`."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A promise of `blocks` KV blocks on one replica to one request, made before dispatch."""

    grant_id: str
    request_id: str
    pool: str
    replica_id: str
    """Serve's unique id of the replica."""
    replica_epoch: int
    ledger_epoch: int
    """Start time in ns of the ledger that made it; a replica refuses grants older than the newest ledger it knows.
    `LOCAL_EPOCH`: no ledger made it, and the replica takes it up only if it has that many blocks free."""
    blocks: int
    """Without those that it is expected to share."""
    expires_at: float
    """Unix seconds until which the replica takes the grant up; afterwards it refuses it."""
    shared_blocks: int = 0
    """Blocks of the request's prefix that running requests hold there already: it needs `blocks` and these together,
    and these are paid for once."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt's leading whole granules as a chain of hashes (`deployments.granules`): equal means equal tokens."""

    granule_tokens: int
    hashes: tuple[int, ...]
    """Unsigned 64-bit; each covers the prompt from its first token, the tenant's salt and the granule's size."""


@dataclass(frozen=True, slots=True)
class ReserveRequest:
    """What the ledger must know to size, queue or refuse a request. No token ids, no text."""

    version: int = field(default=PROTOCOL_VERSION, kw_only=True)
    request_id: str
    ingress_id: str
    prompt_tokens: int
    max_tokens: int
    wait_limit_s: float
    """How long the request may wait in the queue before it is refused."""
    pool: str | None = None
    """Insists on one pool; None lets the policy choose."""
    tenant: str = ""
    """Who asks: those who wait share the room between tenants, by weight."""
    priority: int = 0
    """Orders a tenant's own requests: lower is served first."""
    prefix: Prefix | None = None
    """What the prompt begins with, to find replicas that have it cached; None: not looked for."""
    weight: int | None = None
    """Of the tenant, from its API key; None: as the ledger's settings have it."""
    resumes: bool = False
    """It was granted, and lost that replica, after the take-up or before. It waits however many do, before all others,
    and makes room for none: no more requests can lose a replica than had room there. One that the replica refused asks
    again as a new one: of such there might be any number."""


RefusalKind = Literal["too_long", "queue_full", "deadline", "no_replica", "unknown_pool", "version"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why no grant was made. Data rather than an exception, which Ray would wrap and lose the fields of."""

    request_id: str
    kind: RefusalKind
    message: str
    """States what was needed, what was there, and which knob to turn."""
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One choice to generate: token ids in, token ids out."""

    version: int = field(default=PROTOCOL_VERSION, kw_only=True)
    request_id: str
    """Unique per choice: the HTTP request's id, a dash, prompt and choice indices."""
    prompt_ids: tuple[int, ...]
    """Of an encoder-decoder the encoder's input, and the decoder's first token behind it."""
    sampling: Sampling
    grant: Grant | None = None
    """None only in process (tests, benchmarks): a replica refuses a request without a grant."""
    salt: str = ""
    """Tenant salt of the prefix cache: blocks are shared only between equal salts."""
    resumed_tokens: int = 0
    """How many of the last `prompt_ids` are output that an earlier attempt produced. They count as output: for
    penalties, `min_tokens`, `max_tokens` and random numbers. Chunks bring what comes after them."""
    tenant: str = ""
    """As in `ReserveRequest`."""
    priority: int = 0
    """As in `ReserveRequest`."""
    pool: str | None = None
    """As in `ReserveRequest`."""
    weight: int | None = None
    """As in `ReserveRequest`."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt as the client sent it."""
        return len(self.prompt_ids) - self.resumed_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural log) of one produced token, with the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenChunk(NamedTuple):
    """All tokens one step produced for one request; exactly one chunk per request is terminal.

    A chunk is terminal when `finish_reason` is set. An end token is part of `token_ids` of the terminal chunk
    (it counts as produced; the ingress does not show its text). There is one for each token, and a tuple takes a third
    of a frozen dataclass's time to make or pickle.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Parallel to `token_ids`, or empty when not asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Message for the client when `finish_reason` is "error"."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache; set on a request's first chunk, and 0 where it resumes."""

    def joined(self, later: TokenChunk) -> TokenChunk:
        """This chunk and the one after it as one: what a reader that fell behind gets."""
        return TokenChunk(
            self.request_id,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.error,
            max(self.cached_tokens, later.cached_tokens),
        )


@dataclass(frozen=True, slots=True)
class CachedGranules:
    """Which granules of prompts a replica has cached: all, or only those that changed. By hash, see `Prefix`."""

    whole: bool = False
    """What is not named is not cached; otherwise it is as it was."""
    used: tuple[int, ...] = ()
    """Running requests hold their blocks, and those of all granules before them in their chain."""
    idle: tuple[int, ...] = ()
    """Kept for as long as nobody needs the room."""
    gone: tuple[int, ...] = ()


NO_CHANGE = CachedGranules()
"""Nothing new about any granule."""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica's report to the ledger: on change, at most every 100 ms unless it asks for ends sooner, and a heartbeat
    each second."""

    version: int = field(default=PROTOCOL_VERSION, kw_only=True)
    replica_id: str
    pool: str
    epoch: int
    """Raised at each start of the replica's engine."""
    sequence: int
    """Grows by one each report of an epoch, so that a late report is recognised."""
    block_size: int
    capacity_blocks: int
    max_context: int
    """Longest prompt + output in tokens (the lesser of the model's context and the capacity)."""
    held: tuple[tuple[str, int], ...] = ()
    """(grant id, blocks) of every request that the replica has taken up and not ended: the more of what it holds now
    and what it was granted, so that a new ledger rebuilds the promises of the one before."""
    ended: tuple[tuple[str, int, int], ...] = ()
    """(grant id, prompt tokens, output tokens) of requests ended since the last report; 0 and 0 of a revoked grant that
    was never taken up and never will be."""
    draining: bool = False
    ledger_epoch: int = 0
    """Newest ledger epoch that the replica knows (from the answers to its reports). A ledger sells nothing on a replica
    that does not know it yet: grants of the ledger before could still be taken up there."""
    shared_blocks: int = 0
    """How much less than the sum of `held` is really held, because requests share prefixes; whole granules count."""
    granules: CachedGranules = NO_CHANGE
    """Every change since the last report that this ledger acknowledged, or the whole for one that has none yet."""
    preemptions: int = 0
    """Since the start of its epoch: from these the ledger learns how much to promise."""
    vitals: ReplicaVitals | None = None
    """For the metrics page; about once a second."""
    max_requests: int | None = None
    """Most requests that it takes at once, however few blocks they need; None: as many as there is room for."""


@dataclass(frozen=True, slots=True)
class ReportAnswer:
    """The ledger's answer to a replica's report."""

    epoch: int
    """Of the ledger."""
    waiting_tokens: int = 0
    """What waits for the replica's pool, if that scales: grants, in tokens."""
    revoked: tuple[tuple[str, float], ...] = ()
    """(grant id, `expires_at`) of grants that nobody waits for and that the replica was not heard to have taken up: it
    is to refuse them, and to report them as ended unless it has taken them up. Told until it did either."""
    end_within_ms: int | None = None
    """How soon after its last report the replica is to report the end of a request, because requests wait for what that
    frees; None: with its other changes."""


@dataclass(frozen=True, slots=True)
class ReplicaSpot:
    """What an ingress needs to know of a replica to place a request by itself. Counts are blocks."""

    replica_id: str
    pool: str
    epoch: int
    block_size: int
    capacity_blocks: int
    headroom_blocks: int
    max_context: int
    requests_left: int | None = None
    """How many more it takes at once; None: as many as there is room for."""


@dataclass(frozen=True, slots=True)
class LedgerNews:
    """The ledger's answer to an ingress's notice."""

    epoch: int
    max_context: int | None
    """Longest prompt + output in tokens that a replica holds, by the largest known of each pool or the last that it
    had; None while one pool never had any."""
    living_contexts: tuple[tuple[str, int], ...] = ()
    """(pool, longest prompt + output in tokens that each of its replicas holds that can take work now); empty while
    there are none, or the ledger is new."""
    warming: bool = False
    """Whether the ledger is new and waits for the replicas' reports."""
    expected_output_tokens: int = 0
    spots: tuple[ReplicaSpot, ...] = ()
    """Replicas that can take work now."""
    silent: tuple[tuple[str, int], ...] = ()
    """(replica id, epoch) of replicas whose heartbeats stopped: frozen, cut off or dead."""
    pool_contexts: tuple[tuple[str, int], ...] = ()
    """(pool, longest prompt + output in tokens) of pools that have a known replica, the largest, or had one."""
    wake: tuple[str, ...] = ()
    """Pools without a replica that are to get one, because requests wait for it."""


@dataclass(frozen=True, slots=True)
class IngressNotice:
    """What an ingress tells the ledger: at once when there is something to tell, and each second to renew its lease."""

    version: int = field(default=PROTOCOL_VERSION, kw_only=True)
    ingress_id: str
    unused: tuple[str, ...] = ()
    """Ids of grants that no replica can have taken up; a grant that one took up ends with that replica's report."""
    left: tuple[str, ...] = ()
    """Ids of grants sent to their replicas that nobody waits for any more, and that may or may not be taken up."""
    cancelled: tuple[str, ...] = ()
    """Request ids whose client left before the ledger's answer came."""
    lost: tuple[tuple[str, int], ...] = ()
    """(replica id, epoch) of replicas that a call found dead or gone."""
    vitals: IngressVitals | None = None
    """For the metrics page; about once a second."""
