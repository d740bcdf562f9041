"""Where a ledger finds the grants that are promised: by grant, by request, and by the instant at which they expire."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from deployments.protocol import Grant
from deployments.routing.account import ReplicaAccount


class GrantIndex:
    """All promised grants of one ledger."""

    def __init__(self) -> None:
        self._account_of: dict[str, ReplicaAccount] = {}
        self._newest_of: dict[str, str] = {}
        """Request id -> its newest grant."""
        self._expiries: deque[tuple[float, str]] = deque()
        """(instant after which an unlisted grant can't exist, grant id), oldest first."""

    def add(self, grant: Grant, account: ReplicaAccount, gone_at: float) -> None:
        """A new grant, which can't be held any more from `gone_at` on unless its replica has said so; never sooner than
        those before it."""
        self._account_of[grant.grant_id] = account
        self._newest_of[grant.request_id] = grant.grant_id
        self._expiries.append((gone_at, grant.grant_id))

    def remove(self, grant: Grant) -> None:
        """The grant has ended."""
        del self._account_of[grant.grant_id]
        if self._newest_of.get(grant.request_id) == grant.grant_id:
            del self._newest_of[grant.request_id]

    def account_of(self, grant_id: str) -> ReplicaAccount | None:
        """The account that a grant is charged to; None when it has ended or was never made."""
        return self._account_of.get(grant_id)

    def of_request(self, request_id: str) -> str | None:
        """Id of a request's newest grant; None when it has none."""
        return self._newest_of.get(request_id)

    def expired(self, now: float) -> list[str]:
        """Ids of grants whose time is up. Each is named once; some have ended, some are held."""
        due: list[str] = []
        while self._expiries and self._expiries[0][0] <= now:
            due.append(self._expiries.popleft()[1])
        return due

    def check_integrity(self, accounts: Iterable[ReplicaAccount]) -> None:
        """Raise AssertionError, with the ids, when the accounts' promises are others than those here."""
        owned = {grant_id: account for account in accounts for grant_id in account.promises}
        differing = sorted(owned.keys() ^ self._account_of.keys())
        assert owned == self._account_of, f"index of grants: {differing} differ"
        for request_id, grant_id in self._newest_of.items():
            assert grant_id in owned, f"request {request_id} points at grant {grant_id}, which has ended"
        pending = {grant_id for _, grant_id in self._expiries}
        endless = [key for key, a in owned.items() if not a.promises[key].listed and key not in pending]
        assert not endless, f"grants that nothing would end: {endless}"
