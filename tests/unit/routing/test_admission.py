from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.protocol import LOCAL_EPOCH, Grant
from deployments.routing.admission import Admission

GRANT = Grant("g", "q", "default", "r0", 3, 7, 2, expires_at=10.0)


LOCAL = replace(GRANT, grant_id="local", ledger_epoch=LOCAL_EPOCH)


def admission(ledger_epoch: int = 7) -> Admission:
    built = Admission(replica_id="r0", pool="default", epoch=3, block_size=16, capacity_blocks=10, max_context=160)
    built.acknowledge(0, ledger_epoch)
    return built


@pytest.mark.parametrize(
    ("grant", "now", "words"),
    [
        (None, 0.0, "no grant"),
        (replace(GRANT, replica_id="r1"), 0.0, "names replica r1"),
        (replace(GRANT, replica_epoch=2), 0.0, "epoch 2"),
        (replace(GRANT, ledger_epoch=6), 0.0, "ledger 7 has taken over"),
        (GRANT, 10.0, "expired 0.0 s ago"),
    ],
)
def test_what_is_not_taken_up(grant: Grant | None, now: float, words: str) -> None:
    own = admission()
    assert words in (own.take_up(grant, now) or "")
    assert own.report().held == ()


def test_a_grant_is_taken_up_once() -> None:
    own = admission()
    assert own.take_up(GRANT, 9.9) is None
    own.end("g", prompt_tokens=1, output_tokens=1)
    assert "before" in (own.take_up(GRANT, 9.9) or "")


@pytest.mark.parametrize("ledger_epoch", [7, LOCAL_EPOCH])
def test_it_takes_so_many_requests_at_once_and_says_so(ledger_epoch: int) -> None:
    own = admission()
    own.max_requests = 2
    for key in ("a", "b"):
        assert own.take_up(replace(GRANT, grant_id=key, ledger_epoch=ledger_epoch), 0.0) is None
    late = replace(GRANT, grant_id="late", ledger_epoch=ledger_epoch)
    assert "2 requests are here, and it takes 2 at once" in (own.take_up(late, 0.0) or "")
    assert own.report().max_requests == 2
    own.end("a", prompt_tokens=1, output_tokens=1)
    assert own.take_up(late, 0.0) is None


def test_a_revoked_grant_is_refused_and_reported_as_ended_until_acknowledged() -> None:
    own = admission()
    own.report()
    own.revoke("g", GRANT.expires_at)
    assert own.changed
    assert "its client has left" in (own.take_up(GRANT, 1.0) or "")
    own.revoke("g", GRANT.expires_at)  # told again, because the report was not answered yet
    told = own.report()
    assert (told.held, told.ended) == ((), (("g", 0, 0),))
    own.acknowledge(told.sequence, 7)
    assert own.report().ended == ()
    assert own.take_up(replace(GRANT, grant_id="h"), 10.0 - 1e-6) is None
    assert own.free_blocks == 8


def test_what_was_taken_up_is_not_revoked() -> None:
    own = admission()
    assert own.take_up(GRANT, 1.0) is None
    own.revoke("g", GRANT.expires_at)
    assert own.take_up(replace(GRANT, grant_id="h", expires_at=30.0), 20.0) is None  # the first is not in memory now
    own.revoke("g", GRANT.expires_at)
    told = own.report()
    assert (told.held, told.ended) == ((("g", 2), ("h", 2)), ())
    own.end("g", prompt_tokens=1, output_tokens=2)
    own.revoke("h", 30.0)
    assert own.report().ended == (("g", 1, 2),)


def test_spent_grants_are_forgotten_after_their_expiry() -> None:
    own = admission()
    for k in range(100):
        own.take_up(replace(GRANT, grant_id=f"g{k}", expires_at=10.0 + k), 9.0 + k)
    assert len(own._spent) == 1


def test_a_draining_replica_refuses_and_says_so() -> None:
    own = admission()
    own.report()
    own.drain()
    assert own.changed
    assert "draining" in (own.take_up(GRANT, 0.0) or "")
    assert own.report().draining


def test_held_is_the_more_of_granted_and_used() -> None:
    own = admission()
    own.take_up(GRANT, 0.0)
    assert own.report().held == (("g", 2),)
    own.hold("g", 1)
    assert not own.changed
    own.hold("g", 5)
    assert own.changed
    assert own.report().held == (("g", 5),)


def test_what_ended_is_reported_until_acknowledged() -> None:
    own = admission()
    own.take_up(GRANT, 0.0)
    own.end("g", prompt_tokens=16, output_tokens=9)
    lost, kept = own.report(), own.report()
    assert lost.ended == kept.ended == (("g", 16, 9),)
    assert kept.sequence == lost.sequence + 1
    own.acknowledge(kept.sequence, 7)
    assert own.report().ended == ()


def test_an_answer_to_an_older_report_keeps_what_ended_since() -> None:
    own = admission()
    own.take_up(GRANT, 0.0)
    early = own.report()
    own.end("g", prompt_tokens=16, output_tokens=9)
    own.acknowledge(early.sequence, 7)
    assert own.report().ended == (("g", 16, 9),)


def test_a_new_ledger_is_owed_a_report_that_knows_it() -> None:
    own = admission()
    first = own.report()
    assert not own.changed
    own.acknowledge(first.sequence, 8)
    assert own.changed
    assert own.report().ledger_epoch == 8
    own.acknowledge(2, 7)  # the old ledger lingers
    assert own.report().ledger_epoch == 8


# Local grants


def test_a_local_grant_is_taken_up_when_its_blocks_are_free_and_reported() -> None:
    own = admission()
    own.take_up(replace(GRANT, blocks=6), 0.0)
    assert own.take_up(replace(LOCAL, blocks=5), 0.0) == "the request needs 5 blocks, and 4 are free"
    assert own.take_up(replace(LOCAL, blocks=4), 0.0) is None
    assert own.report().held == (("g", 6), ("local", 4))


def test_blocks_that_requests_grew_into_are_not_free() -> None:
    own = admission()
    own.take_up(GRANT, 0.0)
    own.hold("g", 12)
    assert own.take_up(replace(LOCAL, blocks=1), 0.0) == "the request needs 1 blocks, and 0 are free"


def test_a_ledgers_grant_is_held_to_what_local_ones_left() -> None:
    own = admission()
    own.take_up(replace(LOCAL, blocks=7), 0.0)
    assert own.take_up(replace(GRANT, blocks=4), 0.0) == "the request needs 4 blocks, and 3 are free"
    own.end("local", prompt_tokens=1, output_tokens=1)
    own.take_up(replace(GRANT, grant_id="large", blocks=9), 0.0)
    assert own.take_up(replace(GRANT, blocks=4), 0.0) is None  # the ledger counts by itself again


@pytest.mark.parametrize(
    ("grant", "now", "words"),
    [
        (replace(LOCAL, replica_id="r1"), 0.0, "names replica r1"),
        (LOCAL, 10.0, "expired"),
        (LOCAL, 9.0, "taken up before"),
    ],
)
def test_otherwise_a_local_grant_is_as_any_other(grant: Grant, now: float, words: str) -> None:
    own = admission()
    own.take_up(LOCAL, 0.0)
    assert words in (own.take_up(grant, now) or "")


def test_a_draining_replica_takes_no_local_grants() -> None:
    own = admission()
    own.drain()
    assert "draining" in (own.take_up(LOCAL, 0.0) or "")


def test_preemptions_are_reported() -> None:
    own = admission()
    assert own.report().preemptions == 0
    own.preemptions = 3
    assert own.report().preemptions == 3


def test_draining_twice_is_reported_once() -> None:
    own = admission()
    own.drain()
    own.report()
    own.drain()
    assert not own.changed
