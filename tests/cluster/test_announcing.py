"""Gathering announcements: few wait for others within the window, many wait for nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.announcing import BATCH_ANNOUNCEMENTS, BATCH_ANNOUNCEMENTS_MAX, Announcer
from cluster.settings import ServiceSettings
from state_machine import codec
from state_machine.commands import (
    Announcement,
    AnnouncePeers,
    AnyCommand,
    CreateGroup,
    Fact,
    PublishFile,
    PutPeer,
    RegisterUser,
)
from state_machine.machine import StateMachine
from state_machine.outcomes import AnnounceValue, Applied

MANIFEST_ID = "ab" * 32
FOREVER_SECONDS = 3600.0


class _Log:
    """A log of one node, which takes a batch when it is told to."""

    def __init__(self, window_seconds: float) -> None:
        self.machine = StateMachine()
        self.batches: list[AnnouncePeers] = []
        self.under_way = asyncio.Event()  # set: nothing is held up
        self.under_way.set()
        self.apply(RegisterUser("anna", "$argon2id$x", 1))
        self.apply(CreateGroup("boats", "anna", 1))
        self.apply(
            PublishFile(
                "boats", "hull", "file", 1 << 24, 8, 1 << 21, "sha256", MANIFEST_ID, False, "anna", 1, 1
            )
        )
        settings = ServiceSettings(
            cluster_id="c", data_dir=Path("unused"), announce_window_seconds=window_seconds
        )
        self.announcer = Announcer(
            self.machine, settings, self._propose, lambda peer_id: None, self._barrier, lambda: 1
        )

    def apply(self, command: AnyCommand) -> Applied:
        [outcome] = self.machine.apply([codec.encode(command)])
        assert isinstance(outcome, Applied), outcome
        return outcome

    async def _propose(self, command: AnnouncePeers) -> tuple[AnnounceValue, ...]:
        self.batches.append(command)
        await self.under_way.wait()
        values: tuple[AnnounceValue, ...] = self.apply(command).value
        return values

    async def _barrier(self) -> None:
        pass

    def announce(self, number: int, pieces: int) -> asyncio.Task[AnnounceValue]:
        peer_id = "abcdefghijklmnopqrstuvwxyz234567"[number] * 52
        self.apply(PutPeer(peer_id, "anna", 1))
        fact = Fact("boats", "hull", MANIFEST_ID, pieces, False)
        announcement = Announcement(peer_id, "anna", ("https://10.0.0.1:1",), (fact,), True)
        return asyncio.create_task(self.announcer.announce(announcement))


async def test_enough_of_them_do_not_wait_for_the_window() -> None:
    log = _Log(FOREVER_SECONDS)
    tasks = [log.announce(number, 1) for number in range(BATCH_ANNOUNCEMENTS)]
    async with asyncio.timeout(5):
        values = await asyncio.gather(*tasks)
    assert all(value.known for value in values)
    assert [len(batch.announcements) for batch in log.batches] == [BATCH_ANNOUNCEMENTS]


async def test_few_of_them_share_an_entry_when_the_window_ends() -> None:
    log = _Log(0.02)
    tasks = [log.announce(number, 1) for number in range(BATCH_ANNOUNCEMENTS - 1)]
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert [len(batch.announcements) for batch in log.batches] == [BATCH_ANNOUNCEMENTS - 1]


async def test_those_that_follow_a_full_batch_are_sent_when_their_window_ends() -> None:
    log = _Log(0.02)
    tasks = [log.announce(number, 1) for number in range(BATCH_ANNOUNCEMENTS + 3)]
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert [len(batch.announcements) for batch in log.batches] == [BATCH_ANNOUNCEMENTS, 3]


async def test_while_one_batch_is_under_way_the_next_one_grows() -> None:
    log = _Log(FOREVER_SECONDS)
    log.under_way.clear()
    tasks = [log.announce(number, 1) for number in range(BATCH_ANNOUNCEMENTS)]
    while not log.batches:
        await asyncio.sleep(0)
    tasks += [log.announce(number, 2) for number in range(BATCH_ANNOUNCEMENTS + 5)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(log.batches) == 1
    log.under_way.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert [len(batch.announcements) for batch in log.batches] == [
        BATCH_ANNOUNCEMENTS,
        BATCH_ANNOUNCEMENTS + 5,
    ]


async def test_no_batch_holds_the_loop_for_long() -> None:
    log = _Log(FOREVER_SECONDS)
    log.under_way.clear()
    tasks = [log.announce(number % 32, number) for number in range(BATCH_ANNOUNCEMENTS_MAX + 40)]
    while not log.batches:
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    log.under_way.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert max(len(batch.announcements) for batch in log.batches) == BATCH_ANNOUNCEMENTS_MAX


async def test_after_a_large_batch_a_smaller_one_waits_a_moment_for_those_just_answered() -> None:
    log = _Log(FOREVER_SECONDS)
    log.under_way.clear()
    tasks = [log.announce(number, 1) for number in range(BATCH_ANNOUNCEMENTS)]
    while not log.batches:
        await asyncio.sleep(0)
    tasks += [log.announce(number, 2) for number in range(BATCH_ANNOUNCEMENTS + 8)]
    for _ in range(10):
        await asyncio.sleep(0)
    log.under_way.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
        smaller = [log.announce(number, 3) for number in range(BATCH_ANNOUNCEMENTS)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(log.batches) == 2
        joining = [log.announce(number, 4) for number in range(8)]
        await asyncio.gather(*smaller, *joining)
        await asyncio.gather(*[log.announce(number, 5) for number in range(BATCH_ANNOUNCEMENTS)])
    sizes = [len(batch.announcements) for batch in log.batches]
    assert sizes == [16, 24, 24, 16], "and where fewer say anything from then on, fewer are sent"
