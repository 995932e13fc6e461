"""Rights, the watch, failover and quarantine, with real trackers behind proxies and real peers.

The long forms are programs: `make revocation`, `make live`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio
from liar import Liar

from chaos_tests.people import PASSWORD, until
from chaos_tests.revocation import GROUP, SOURCE, Place, place, trial
from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError
from cluster.api.types import WatchMessage
from peer.manifest import Manifest
from peer.reports import PeerSettings
from peer.session import open_session

pytestmark = pytest.mark.asyncio(loop_scope="module")
MOVE_ON_SECONDS = 1.0
WITNESSES = 3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def at(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    async with place(1, tmp_path_factory.mktemp("rig"), file_bytes=16 << 20, upload="4M") as made:
        yield made


class Stalls:
    """How long this process itself was held up: the machine's fault, not the product's."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._task = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.02)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - before - 0.02)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.mark.parametrize(("way", "fault"), [("kick", ""), ("kick", "paused"), ("remove file", "")])
async def test_a_right_ends_when_it_is_withdrawn(at: Place, way: str, fault: str) -> None:
    stalls = Stalls()
    try:
        seen = await trial(at, 1, way, fault)
    finally:
        await stalls.stop()
    assert seen.refused, seen
    assert seen.seconds < seen.bar_seconds + stalls.longest_seconds, (seen, stalls.longest_seconds)
    if way == "kick":
        assert seen.witness_bytes, "the other member lost its transfer"


async def collect(client: TrackerClient, since: int, upto: int) -> list[tuple[int, Any]]:
    """What one watch says of the group from a revision to another."""
    heard: list[tuple[int, Any]] = []
    async with aclosing(client.watch([f"/groups/{GROUP}"], since)) as news:
        async for item in news:
            if isinstance(item, WatchMessage):
                heard.append((item.revision, [(event.type, event.path) for event in item.events]))
                if item.revision >= upto:
                    return heard
    raise AssertionError("the watch ended")


async def test_the_watch_goes_on_through_the_leaders_death(at: Place) -> None:
    """Ordered, unique, without a gap: what the product's follower heard while leaders died is, to the message, what
    each node tells afterwards of the same revisions."""
    owner = await at.owner()
    since = (await owner.list_revocations(GROUP)).revision
    applicant = TrackerClient(at.rig.direct(), ca=at.ca)
    await applicant.register("applicant", PASSWORD)
    applicant = applicant.as_session((await applicant.login("applicant", PASSWORD)).session)
    last = asyncio.get_running_loop().create_future()
    heard: list[tuple[int, Any]] = []

    async def follow() -> None:
        async with aclosing(owner.watch([f"/groups/{GROUP}"], since)) as news:
            async for item in news:
                if isinstance(item, WatchMessage):
                    heard.append((item.revision, [(event.type, event.path) for event in item.events]))
                if heard and last.done() and heard[-1][0] >= last.result():
                    return

    async def change() -> int:
        done = await applicant.request_join(GROUP)
        done = await applicant.delete_join_request(GROUP, "applicant")
        return done.revision

    following = asyncio.create_task(follow())
    try:
        revision = 0
        for round_number in range(2):
            for _ in range(4):
                revision = await change()
            if round_number < 1:
                leader = await at.rig.leader()
                assert leader is not None
                killing = asyncio.create_task(at.rig.kill(leader))
                for _ in range(4):
                    revision = await change()
                await killing
                await at.rig.start(leader)
        last.set_result(revision)
        await asyncio.wait_for(following, 30)
        revisions = [number for number, _ in heard]
        assert revisions == sorted(set(revisions))
        await at.heal()
        for node in at.rig.nodes.values():
            async with TrackerClient([f"https://127.0.0.1:{node.http}"], ca=at.ca) as alone:
                session = (await alone.login(at.seeder.name, PASSWORD)).session
                told = await asyncio.wait_for(collect(alone.as_session(session), since, revision), 20)
            assert told == [each for each in heard if each[0] <= revision], node.node_id
            # Resumed in the middle, on any node: the rest and nothing else.
            middle = revisions[len(revisions) // 2]
            async with TrackerClient([f"https://127.0.0.1:{node.http}"], ca=at.ca) as alone:
                rest = await asyncio.wait_for(collect(alone.as_session(session), middle, revision), 20)
            assert rest == [each for each in told if each[0] > middle]
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await applicant.close()


@pytest.mark.parametrize("fault", ["killed", "paused"])
async def test_a_client_moves_on_when_its_node_dies(at: Place, fault: str) -> None:
    leader = await at.rig.leader()
    preferred = next(node for node in at.rig.node_ids if node != leader)
    first = f"https://127.0.0.1:{at.rig.nodes[preferred].http}"
    client = TrackerClient([first, *at.rig.direct(preferred)], ca=at.ca)
    stalls = Stalls()
    try:
        client = client.as_session((await client.login(at.seeder.name, PASSWORD)).session)
        await client.list_files(GROUP)
        await at.hurt(preferred, fault)
        begun = time.monotonic()
        await client.list_files(GROUP)
        seconds = time.monotonic() - begun
        assert seconds < MOVE_ON_SECONDS + stalls.longest_seconds
        # From then on the dead one costs nothing.
        begun = time.monotonic()
        for _ in range(5):
            await client.list_files(GROUP)
        assert time.monotonic() - begun < MOVE_ON_SECONDS + stalls.longest_seconds
    finally:
        await stalls.stop()
        await client.close()
        await at.heal()


async def test_one_liar_cannot_quarantine_and_several_members_can(at: Place) -> None:
    manifest_id, pieces = await at.share(GROUP)
    owner = await at.owner()
    liar_member = await at.member(GROUP)
    # A member that reports an honest peer, as often as it likes, under one name.
    report = t.ReportBody(name=SOURCE, manifest_id=manifest_id, peer_id=at.seeder.peer_id, fault="bad_piece")
    for _ in range(6):
        await liar_member.trackers.report_peer(GROUP, report)
    assert not (await owner.list_quarantine(GROUP)).peers
    # A peer that lies to members, who notice and report each for himself.
    kept = at.seeder.home / "manifests" / manifest_id
    manifest = Manifest.decode(kept.read_bytes(), manifest_id)
    assert manifest.pieces == pieces
    liar = Liar(liar_member, GROUP, SOURCE, manifest)
    await liar.start()

    async def fall_for_it(number: int) -> None:
        """A member that gets the file, and ends; in this process, which saves the starts of four."""
        name = f"victim-{number}"
        folder = at.rig.folder / name
        trackers = tuple(at.rig.direct())
        settings = PeerSettings(home=folder / "home", trackers=trackers, ca=at.ca, listen="127.0.0.1:0")
        session = await open_session(settings)
        try:
            await session.register(name, PASSWORD)
            await session.login(name, PASSWORD)
            async with TrackerClient(trackers, ca=at.ca) as client:
                await client.as_session((await client.login(name, PASSWORD)).session).request_join(GROUP)
            await owner.put_member(GROUP, name, "accept")
            report = await session.get(
                GROUP, SOURCE, folder, down_bytes_per_second=0, checksum=False, on_progress=lambda _: None
            )
        finally:
            await session.close()
        assert report.verified
        assert (folder / SOURCE).read_bytes() == at.source.read_bytes()

    try:
        await asyncio.gather(*(fall_for_it(number) for number in range(WITNESSES)))
        for number in range(WITNESSES, 2 * WITNESSES):  # one may have had every piece from somebody else
            if len(liar.deceived) < WITNESSES:
                await fall_for_it(number)

        async def quarantined() -> bool:
            return {peer.peer_id for peer in (await owner.list_quarantine(GROUP)).peers} == {
                liar_member.peer_id
            }

        await until(quarantined, "the liar is in quarantine", 10)
        with pytest.raises(TrackerError):  # a plain member cannot lift it
            await liar_member.trackers.lift_quarantine(GROUP, liar_member.peer_id)
        await at.seeder.ok("group", "quarantine", GROUP, "--lift", liar_member.peer_id)
        assert not (await owner.list_quarantine(GROUP)).peers
    finally:
        await liar.stop()
        with contextlib.suppress(TrackerError):
            await liar_member.trackers.close()
