"""Messages between versions: each is told apart before anything else in it is read."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from deployments import protocol
from deployments.metrics import vitals
from deployments.metrics.histogram import Buckets
from deployments.protocol import (
    PROTOCOL_VERSION,
    GenerationRequest,
    Grant,
    IngressNotice,
    Refusal,
    ReplicaState,
    ReserveRequest,
    Sampling,
    mismatch,
)
from deployments.routing.dispatch import error_of
from tests.unit.routing.worlds import ledger, state, wish

SHAPES = {3: "9df75c3e15806813"}
"""Version -> digest of the fields of everything that crosses processes, and of whether it is a dataclass or a tuple."""
MESSAGES = [
    wish("a"),
    GenerationRequest("a", (1, 2), Sampling(max_tokens=1, seed=1)),
    state("a"),
    IngressNotice("a"),
]


def shapes() -> str:
    classes = [
        kind
        for module in (protocol, vitals)
        for _, kind in sorted(inspect.getmembers(module, inspect.isclass))
        if (is_dataclass(kind) or issubclass(kind, tuple)) and kind.__module__ == module.__name__
    ]
    text = "\n".join(f"{kind.__name__}: {is_dataclass(kind)} {fields_of(kind)}" for kind in [*classes, Buckets])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fields_of(kind: type) -> list[tuple[str, str]]:
    """(name, type as it is written) of a dataclass or named tuple."""
    if is_dataclass(kind):
        return [(field.name, str(field.type)) for field in fields(kind)]
    return [(name, kind.__annotations__[name].__forward_arg__) for name in kind._fields]


def of_another_version(message: Any, version: int, *, longer: bool) -> Any:
    """As it arrives from a process whose class has only the first two fields, or one more at the end."""
    values = [version, *(getattr(message, field.name) for field in fields(message)[1:])]
    arrived = object.__new__(type(message))
    arrived.__setstate__([*values, "new"] if longer else values[:2])
    return arrived


def test_a_changed_shape_raises_the_version() -> None:
    assert {PROTOCOL_VERSION: shapes()} == SHAPES, (
        f"a class that crosses processes has changed: raise PROTOCOL_VERSION unless {PROTOCOL_VERSION} was never "
        f"released, and set SHAPES to its number and {shapes()!r}"
    )


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_travel_and_are_read_by_their_own_version(message: Any) -> None:
    arrived = pickle.loads(pickle.dumps(message))
    assert arrived == message
    assert arrived.version == PROTOCOL_VERSION
    assert mismatch(arrived, "the test") is None


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize(("version", "longer"), [(PROTOCOL_VERSION - 1, False), (PROTOCOL_VERSION + 1, True)])
def test_an_older_and_a_newer_one_are_known_by_version_and_id(message: Any, version: int, longer: bool) -> None:
    arrived = of_another_version(message, version, longer=longer)
    reason = mismatch(arrived, "the ledger")
    assert reason is not None
    for part in (f"{type(message).__name__} is of protocol {version}, the ledger reads {PROTOCOL_VERSION}", "rolling"):
        assert part in reason
    assert getattr(arrived, fields(message)[1].name) == "a"


@pytest.mark.parametrize("version", [PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1])
def test_a_ledger_refuses_others_and_serves_its_own(version: int) -> None:
    def other(message: Any) -> Any:
        return of_another_version(message, version, longer=version > PROTOCOL_VERSION)

    book = ledger(state("ours"))
    refusal = book.reserve(other(wish("a")), 0.1)
    assert isinstance(refusal, Refusal)
    assert (refusal.kind, refusal.request_id) == ("version", "a")
    error = error_of(refusal)
    assert type(error).__name__ == "NoReplica"  # 503: it passes when the update is done
    assert (error.message, error.retry_after_s) == (refusal.message, 5)
    with pytest.raises(ValueError, match=f"replica theirs: ReplicaState is of protocol {version}"):
        book.report(other(state("theirs")), 0.1)
    with pytest.raises(ValueError, match=f"ingress theirs: IngressNotice is of protocol {version}"):
        book.notice(other(IngressNotice("theirs")), 0.1)
    assert [replica.replica_id for replica in book.view(0.1).replicas] == ["ours"]
    assert isinstance(book.reserve(wish("b"), 0.1), Grant)


def test_every_message_begins_with_its_version() -> None:
    carry = [
        kind for kind in vars(protocol).values() if is_dataclass(kind) and "version" in (f.name for f in fields(kind))
    ]
    assert {kind.__name__ for kind in carry if isinstance(kind, type)} == {
        kind.__name__ for kind in (ReserveRequest, GenerationRequest, ReplicaState, IngressNotice)
    }
    assert all(fields(kind)[0].name == "version" for kind in carry)
