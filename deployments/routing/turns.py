"""Serves those who wait: in the fair order, past those for whom there is no room, and never for long past the same one.

A request that waits for room may be passed by requests behind it that find room now: the gaps are of no use to it. What
passes a request while it stands first in its line is counted, and once that is as many tokens as the longest request
that a replica could hold, one replica is kept for it: the one with the most headroom among those that could hold it.
What becomes free there is for nobody else, so it is served at the latest when the requests running there have ended, or
before that on any other replica with room. Being passed therefore costs a request at most as much work as one request
of the longest sort, and then one replica's running requests; the rule has no constant to tune, and one replica at most
stands partly idle for each kind of request. That idleness is why a replica isn't kept sooner: it costs all others up to
a replica's room while it lasts, so as much is let pass first.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from deployments.protocol import Grant, Refusal
from deployments.routing.account import ReplicaAccount
from deployments.routing.fleet import Fleet
from deployments.routing.policy import score
from deployments.routing.waiting import Waiter, WaitingQueue

Outcome = Grant | Refusal
Answer = Callable[[Waiter, ReplicaAccount | None, float], Outcome | None]
"""Grants or refuses a waiter at that time, on the replica kept for it too; None when it must go on waiting."""


class Turns:
    """Whose turn it is.

    Args:
        queue: who waits.
        fleet: the replicas.
        rng: breaks ties.
    """

    def __init__(self, queue: WaitingQueue, fleet: Fleet, rng: random.Random) -> None:
        self._queue = queue
        self._fleet = fleet
        self._rng = rng
        self._kept_for: dict[str, tuple[Waiter, ReplicaAccount]] = {}
        """Request id -> the waiter, and the replica kept for it."""
        self._comings = 0
        """How often replicas came or went."""
        self._settled = True
        """Nothing has changed since nobody could be served; every first was asked, or lacks the room."""
        self._all_judged = False
        """All firsts were asked since a replica came, went, or was given back: now only room is news."""
        self._unjudged = 0
        """How many wait who were not asked since a replica came or went. Behind who leaves one of them may be first."""

    def stir(self, freed: ReplicaAccount | None = None) -> None:
        """Someone may be answered again: who has room on the replica that has more of it than before, or everyone."""
        if freed is None:
            self._comings += 1
            self._unjudged = len(self._queue)
            self._all_judged = self._settled = False
        elif _room(freed) >= self._queue.least_room:
            self._settled = False

    def join(self, waiter: Waiter, answer: Answer | None, now: float) -> Outcome | None:
        """Let a request wait; one for which there is room behind all who wait in vain is answered at once.

        Args:
            waiter: the request. One of the replicas could hold it, unless nobody is answered.
            answer: None while nobody is answered.
            now: Unix seconds.
        """
        in_vain = self._settled or not self._queue
        self._queue.join(waiter)
        self._unjudged += 1
        if answer is not None:
            self._judge(waiter)
        if not self._queue.is_first(waiter):
            return None
        self._settled = False
        return self._serve(answer, now, only=waiter) if in_vain and answer is not None else None

    def leave(self, request_id: str, *, granted_tokens: int = 0) -> Waiter | None:
        """Take a waiter out; None when it doesn't wait."""
        waiter = self._queue.leave(request_id, granted_tokens=granted_tokens)
        if waiter is not None:
            self._settled = False
            self._unjudged -= waiter.judged != self._comings
            self._all_judged &= not self._unjudged  # in other lines too, where its tenant was charged: tags order them
            if request_id in self._kept_for:
                self._give_back(request_id)
        return waiter

    def next(self, answer: Answer, now: float) -> Outcome | None:
        """Answer one of those who wait; None when nobody can be answered now, which costs nothing the next time."""
        if self._settled:
            return None
        return self._serve_kept(answer, now) or self._serve(answer, now)

    def check_integrity(self) -> None:
        """Raise AssertionError when a replica is kept for a request that doesn't wait, or a count is wrong."""
        self._queue.check_integrity()
        unjudged = self._queue.count(lambda waiter: waiter.judged != self._comings)
        assert unjudged == self._unjudged, f"waiters not asked lately: counted {self._unjudged}, there are {unjudged}"
        lost = [key for key in self._kept_for if key not in self._queue]
        assert not lost, f"replicas are kept for {lost}, which don't wait"

    def _serve_kept(self, answer: Answer, now: float) -> Outcome | None:
        for key, (waiter, account) in list(self._kept_for.items()):
            if not self._fleet.is_sold(account):
                self._give_back(key)
                continue
            room = max(_room(account), self._fleet.room_tokens(waiter.request.pool))
            if waiter.judged != self._comings or room >= waiter.least_room:
                if (outcome := answer(waiter, account, now)) is not None:
                    self._finish(waiter, outcome, [])
                    return outcome
                self._judge(waiter)
        return None

    def _serve(self, answer: Answer, now: float, only: Waiter | None = None) -> Outcome | None:
        """Answer the first who can be answered, or `only`, where it is known that nobody else can be."""
        if only is None and self._all_judged and self._fleet.room_tokens(None) < self._queue.least_room:
            self._settled = True
            return None
        passed: list[Waiter] = []
        rooms: dict[str | None, int] = {}
        for waiter in self._queue.firsts():
            if waiter.request.request_id in self._kept_for:
                continue
            pool = waiter.request.pool
            if pool not in rooms:
                rooms[pool] = self._fleet.room_tokens(pool)
            news = waiter.judged != self._comings or rooms[pool] >= waiter.least_room
            if waiter is only or (only is None and news):
                if (outcome := answer(waiter, None, now)) is not None:
                    self._finish(waiter, outcome, passed)
                    return outcome
                self._judge(waiter)
            passed.append(waiter)
        self._keep(passed)
        self._settled = self._all_judged = True
        return None

    def _judge(self, waiter: Waiter) -> None:
        self._unjudged -= waiter.judged != self._comings
        waiter.judged = self._comings

    def _finish(self, waiter: Waiter, outcome: Outcome, passed: list[Waiter]) -> None:
        tokens = waiter.size.grant_tokens if isinstance(outcome, Grant) else 0
        for other in passed:
            other.passed_tokens += tokens
        self._keep(passed)
        self.leave(waiter.request.request_id, granted_tokens=tokens)

    def _keep(self, passed: list[Waiter]) -> None:
        for waiter in passed:
            if waiter.passed_tokens and waiter.passed_tokens >= self._fleet.longest_tokens(waiter.request.pool):
                candidates = self._fleet.best(waiter.size, waiter.request.pool, self._rng)
                if candidates:
                    roomiest = max(candidates, key=lambda account: score(account, waiter.size))
                    self._fleet.keep(roomiest)
                    self._kept_for[waiter.request.request_id] = waiter, roomiest

    def _give_back(self, request_id: str) -> None:
        self._fleet.give_back(self._kept_for.pop(request_id)[1])
        self._all_judged = self._settled = False


def _room(account: ReplicaAccount) -> int:
    """In tokens."""
    return account.headroom_blocks * account.block_size
