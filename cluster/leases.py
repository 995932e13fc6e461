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

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from state_machine.commands import ExpirePeers, RenewPeers

PEERS_PER_COMMAND_MAX: Final = 8_192
EXPIRED_PER_COMMAND_MAX: Final = 512  # each leaves its swarms, which is more work than a renewal
SLICE_SECONDS: Final = 0.002  # of going through all peers at a time
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
    """Times counters. Pure: the clock's reading is given. Counters come in parts, a peer always in the same
    one, so that a million of them need not be gone through at once."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self.elections = 0
        # Of each part: the election it was seen after, and (counter, when first seen) by peer.
        self._seen: dict[int, tuple[int, dict[str, tuple[int, float]]]] = {}

    def __len__(self) -> int:
        return sum(len(seen) for election, seen in self._seen.values() if election == self.elections)

    def forget(self) -> None:
        """At an election: every counter is timed from zero."""
        self.elections += 1

    def observe(
        self, counters: Iterable[tuple[str, int]], now: float, part: int = 0
    ) -> list[tuple[str, int]]:
        """Take in the counters of all living peers of a part; return those that stood still for a lease."""
        election, before = self._seen.get(part, (0, {}))
        if election != self.elections:
            before = {}
        after: dict[str, tuple[int, float]] = {}
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
        self._seen[part] = (self.elections, after)
        return silent


class Expiry:
    """What the leader does every tenth of a lease."""

    def __init__(self, timer: LeaseTimer, propose: Callable[[ExpirePeers], Awaitable[bool]]) -> None:
        self.timer = timer
        self._propose = propose

    async def round(self, parts: Iterable[Iterable[tuple[str, int]]], now: float) -> int:
        """How many were proposed for expiry. One that was not agreed on is proposed again next round."""
        loop = asyncio.get_running_loop()
        election = self.timer.elections
        silent: list[tuple[str, int]] = []
        until = loop.time() + SLICE_SECONDS
        for number, counters in enumerate(parts):
            silent += self.timer.observe(counters, now, number)
            if loop.time() >= until:
                await asyncio.sleep(0)
                until = loop.time() + SLICE_SECONDS
                if self.timer.elections != election:
                    return 0  # all are timed anew
        for start in range(0, len(silent), EXPIRED_PER_COMMAND_MAX):
            if not await self._propose(ExpirePeers(tuple(silent[start : start + EXPIRED_PER_COMMAND_MAX]))):
                break
        return len(silent)
