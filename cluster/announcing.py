"""Announcements: many, small, idempotent; gathered into few entries, or answered from here.

Owned here: which announcement needs the log at all, and gathering those that do. An announcement that
changes nothing is a heartbeat: it is noted for the next renewal (`leases.py`) and answered locally. The
others of a few tens of milliseconds share one entry; where they come so fast that there are enough of them
sooner, none waits for that time to pass. Left to others: what an announcement means
(`state_machine/rules/swarms.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from cluster.api import problems as kinds
from cluster.problems import ProblemError
from cluster.settings import ServiceSettings
from state_machine import limits, queries
from state_machine.commands import Announcement, AnnouncePeers, Fact
from state_machine.machine import StateMachine
from state_machine.model import split_swarm_key, swarm_key
from state_machine.outcomes import AnnounceValue

BATCH_BYTES_MAX: Final = limits.COMMAND_BYTES_MAX // 2
BATCH_ANNOUNCEMENTS: Final = 16  # enough to share an entry's cost
BATCH_ANNOUNCEMENTS_MAX: Final = 256  # applied, and answered, in one turn of the loop each
SETTLING_SECONDS: Final = 0.004

ProposeBatch = Callable[[AnnouncePeers], Awaitable[tuple[AnnounceValue, ...]]]
End = AnnounceValue | ProblemError
_Waiting = tuple[Announcement, Callable[[End], None]]
_encoder = msgspec.msgpack.Encoder()


def _again(problem: ProblemError) -> ProblemError:
    return ProblemError(
        problem.kind,
        problem.detail,
        hint="Announce again, to any node: announcing twice is announcing once.",
        retry_after_seconds=problem.retry_after_seconds,
    )


class Announcer:
    def __init__(
        self,
        machine: StateMachine,
        settings: ServiceSettings,
        propose: ProposeBatch,
        heard: Callable[[str], None],
        barrier: Callable[[], Awaitable[None]],
        wall_ms: Callable[[], int],
    ) -> None:
        self._machine = machine
        self._window_seconds = settings.announce_window_seconds
        self._propose = propose
        self._heard = heard
        self._barrier = barrier
        self._wall_ms = wall_ms
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._sent_last = 0  # how many were in the last batch
        self._timer: asyncio.TimerHandle | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self.local = 0  # answered without the log
        self.logged = 0

    async def announce(self, announcement: Announcement) -> AnnounceValue:
        """Raises `ProblemError` when the cluster did not take it."""
        value, changes = queries.announcement_effect(self._machine.state, announcement)
        if not changes and (not value.known or value.dropped):
            # What is missing may have been acknowledged elsewhere and not have arrived here yet.
            await self._barrier()
            value, changes = queries.announcement_effect(self._machine.state, announcement)
        if not changes:
            self._answered_here(announcement, value)
            return value
        self.logged += 1
        values = [await self._gathered(part, size) for part, size in self._parts(announcement)]
        return AnnounceValue(
            all(value.known for value in values),
            values[-1].whole_wanted,
            tuple(fact for value in values for fact in value.dropped),
        )

    def begin(self, announcement: Announcement, done: Callable[[End], None]) -> bool:
        """As `announce`, without a coroutine: `done` is called with the end, perhaps before this returns. False,
        and nothing begun, when it is not that simple."""
        value, changes = queries.announcement_effect(self._machine.state, announcement)
        if changes:
            size = len(_encoder.encode(announcement))
            if size > BATCH_BYTES_MAX:
                return False
            self.logged += 1
            self._gather(announcement, size, done)
            return True
        if not value.known or value.dropped:
            return False
        self._answered_here(announcement, value)
        done(value)
        return True

    def _answered_here(self, announcement: Announcement, value: AnnounceValue) -> None:
        if value.known and not announcement.leaving:
            self._heard(announcement.peer_id)
        self.local += 1

    def _parts(self, announcement: Announcement) -> list[tuple[Announcement, int]]:
        """One part, but for announcements of thousands of facts. Of those, a whole one from a peer that
        is known whole already becomes its difference: cut in parts, the first would withdraw the rest."""
        state = self._machine.state
        peer = queries.peer(state, announcement.peer_id)
        large = len(_encoder.encode(announcement)) > BATCH_BYTES_MAX
        if large and announcement.whole and peer is not None and peer.whole:
            said = {swarm_key(fact.group, fact.name, fact.manifest_id) for fact in announcement.facts}
            gone = tuple(
                Fact(*split_swarm_key(key), pieces=0, complete=False, gone=True)
                for key in sorted(state.swarms_of.get(announcement.peer_id, {}).keys() - said)
            )
            facts = (*announcement.facts, *gone)
            announcement = msgspec.structs.replace(announcement, facts=facts, whole=False)
        return _split(announcement)

    def _gathered(self, announcement: Announcement, size: int) -> asyncio.Future[AnnounceValue]:
        future: asyncio.Future[AnnounceValue] = asyncio.get_running_loop().create_future()

        def done(end: End) -> None:
            if future.done():
                return
            if isinstance(end, ProblemError):
                future.set_exception(end)
            else:
                future.set_result(end)

        self._gather(announcement, size, done)
        return future

    def _gather(self, announcement: Announcement, size: int, done: Callable[[End], None]) -> None:
        if self._waiting_bytes + size > BATCH_BYTES_MAX or len(self._waiting) >= BATCH_ANNOUNCEMENTS_MAX:
            self._send()
        self._waiting.append((announcement, done))
        self._waiting_bytes += size
        if self._timer is None:
            self._send_within(self._window_seconds)
        self._send_if_enough()

    def _send_if_enough(self) -> None:
        # While a batch is under way the next one grows: the busier, the more share an entry.
        if self._sending or len(self._waiting) < BATCH_ANNOUNCEMENTS:
            return
        if len(self._waiting) >= self._sent_last:
            self._send()
        else:
            # Whoever was just answered is about to say more: a moment, and they share an entry with these.
            self._send_within(SETTLING_SECONDS)

    def _send_within(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        self._timer = loop.call_later(seconds, self._send)

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if batch:
            self._sent_last = len(batch)
            task = asyncio.get_running_loop().create_task(self._send_batch(batch))
            self._sending.add(task)
            task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._send_if_enough()

    async def _send_batch(self, batch: list[_Waiting]) -> None:
        command = AnnouncePeers(tuple(announcement for announcement, _ in batch), self._wall_ms())
        ends: Sequence[End]
        try:
            ends = await self._propose(command)
        except ProblemError as problem:
            ends = [_again(problem)] * len(batch)
        except BaseException:
            for _, done in batch:
                done(
                    _again(
                        ProblemError(
                            kinds.OUTCOME_UNKNOWN, "The node ended before the cluster had confirmed it."
                        )
                    )
                )
            raise
        for (_, done), end in zip(batch, ends, strict=True):
            done(end)

    async def stop(self) -> None:
        """Send what was gathered, and wait for its end."""
        self._send()
        if self._sending:
            await asyncio.wait(set(self._sending))


def _split(announcement: Announcement) -> list[tuple[Announcement, int]]:
    """Parts that each fit into a command; only the first is whole, if the announcement was."""
    size = len(_encoder.encode(announcement))
    if size <= BATCH_BYTES_MAX:
        return [(announcement, size)]
    half = len(announcement.facts) // 2
    assert half, "a single fact fits into a command"
    first = msgspec.structs.replace(announcement, facts=announcement.facts[:half])
    last = msgspec.structs.replace(announcement, facts=announcement.facts[half:], whole=False)
    return [*_split(first), *_split(last)]
