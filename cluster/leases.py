"""Leases: who has been silent for too long, by counters and monotonic clocks, never by wall clocks.

Owned here: gathering the signs of life this node heard (`Renewals`), and timing every peer's counter
while this node leads (`LeaseTimer`). Left to others: what expiry does (`rules/swarms.py`).

A peer's lease in the state is a counter that each logged sign of life raises. The leader notes when it
first saw the present counter, by its own monotonic clock, from its election at the earliest; a counter
that stood still for a lease is proposed for expiry *if it is still that*. So a failover forgets nobody,
and a step of a wall clock does nothing. Silent peers leave within the lease, plus one renewal round,
plus one round of the timer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from state_machine.commands import ExpirePeers, RenewPeers

PEERS_PER_COMMAND_MAX: Final = 8_192
ROUNDS_PER_LEASE: Final = 10


class Renewals:
    """The peers this node heard from since they were last renewed."""

    def __init__(self, propose: Callable[[RenewPeers], Awaitable[bool]]) -> None:
        self._propose = propose
        self._heard: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._heard)

    def heard(self, peer_id: str) -> None:
        self._heard[peer_id] = None

    async def renew(self) -> None:
        """One entry for all that were heard; more only when they are thousands. Those of an entry that
        did not go through are kept for the next round: renewing twice does no harm."""
        heard = list(self._heard)
        self._heard.clear()
        for start in range(0, len(heard), PEERS_PER_COMMAND_MAX):
            batch = heard[start : start + PEERS_PER_COMMAND_MAX]
            if not await self._propose(RenewPeers(tuple(batch))):
                for peer_id in heard[start:]:
                    self._heard[peer_id] = None
                return


class LeaseTimer:
    """Times counters. Pure: the clock's reading is given."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._seen: dict[str, tuple[int, float]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def forget(self) -> None:
        """At an election: every counter is timed from zero."""
        self._seen.clear()

    def observe(self, counters: Iterable[tuple[str, int]], now: float) -> list[tuple[str, int]]:
        """Take in the counters of all living peers; return those that stood still for a lease."""
        before, after = self._seen, {}
        silent: list[tuple[str, int]] = []
        latest = now - self._lease_seconds
        for peer_id, counter in counters:
            known = before.get(peer_id)
            if known is None or known[0] != counter:
                after[peer_id] = (counter, now)
            else:
                after[peer_id] = known
                if known[1] <= latest:
                    silent.append((peer_id, counter))
        self._seen = after
        return silent


class Expiry:
    """What the leader does every tenth of a lease."""

    def __init__(self, timer: LeaseTimer, propose: Callable[[ExpirePeers], Awaitable[bool]]) -> None:
        self.timer = timer
        self._propose = propose

    async def round(self, counters: Iterable[tuple[str, int]], now: float) -> int:
        """How many were proposed for expiry. One that was not agreed on is proposed again next round."""
        silent = self.timer.observe(counters, now)
        for start in range(0, len(silent), PEERS_PER_COMMAND_MAX):
            if not await self._propose(ExpirePeers(tuple(silent[start : start + PEERS_PER_COMMAND_MAX]))):
                break
        return len(silent)
