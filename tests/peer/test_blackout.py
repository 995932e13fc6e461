"""All trackers are gone: what was begun goes on, what is new begins from what peers know, and nobody gets more than
its token allows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from conftest import Peers, get, share, until
from trackers import Trackers, running

from peer.reports import Limits, Progress, PsRow, State
from peer.session import LocalSession
from peer.swarm_events import WaitReason

NOTICED = {
    reason.value
    for reason in (
        WaitReason.TOKEN_EXPIRED,
        WaitReason.REFUSED,
        WaitReason.NO_PEERS,
        WaitReason.NO_PEERS_NO_TRACKER,
    )
}


async def all_gone(trackers: Trackers) -> None:
    for node in trackers.nodes:
        await node.service.stop()
        await node.runner.cleanup()


def known(session: LocalSession, name: str, seeder: LocalSession) -> bool:
    """Whether it has heard of the file, and that this seeder has it."""
    engine = session._engine
    assert engine is not None
    file = engine.agent.known.file("boats", name)
    if file is None:
        return False
    peers = engine.agent.known.peers("boats", file.manifest_id)
    return any(peer.peer_id == seeder._identity.peer_id and peer.complete for peer in peers)


async def test_a_new_download_begins_from_what_was_last_heard(peers: Peers, tmp_path: Path) -> None:
    before, after, small = tmp_path / "before.bin", tmp_path / "after.bin", tmp_path / "small.bin"
    for path, size in ((before, 3 << 20), (after, 3 << 20), (small, 1000)):
        path.write_bytes(os.urandom(size))
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, before)
    await share(ben, small)  # ben takes part in the group, and has asked for neither of the others
    await share(ada, after)  # this he hears of by the watch, the other by asking once
    await until(lambda: known(ben, "before.bin", ada) and known(ben, "after.bin", ada))
    await all_gone(peers.trackers)
    engine = ben._engine
    assert engine is not None
    await until(lambda: engine.agent.away)
    for path in (before, after):
        report = await get(ben, path.name, tmp_path / "there")
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()
        assert report.received_bytes == 3 << 20
    # A removed file would not be known any more; a name nobody spoke of never was.
    assert engine.agent.known.file("boats", "never.bin") is None


async def test_it_is_remembered_over_a_restart(peers: Peers, tmp_path: Path) -> None:
    source, small = tmp_path / "hull.bin", tmp_path / "small.bin"
    source.write_bytes(os.urandom(3 << 20))
    small.write_bytes(b"x")
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    await share(ben, small)
    await until(lambda: known(ben, "hull.bin", ada))
    await peers.close(ben)
    await all_gone(peers.trackers)
    ben = await peers.open("ben")
    await get(ben, "hull.bin", tmp_path / "there")
    assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()


async def test_a_dead_seeder_is_replaced_by_one_that_peers_tell_of(peers: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(12 << 20))
    ada, ben, cho = await peers.open("ada"), await peers.open("ben"), await peers.open("cho")
    await share(ada, source)
    await get(ben, "hull.bin", tmp_path / "bens")
    getting = asyncio.create_task(get(cho, "hull.bin", tmp_path / "chos", down=3 << 20))
    engine = cho._engine
    while engine is None or not list(engine.getting.drivers()):
        await asyncio.sleep(0.01)
        engine = cho._engine
    driver = next(engine.getting.drivers())
    await until(lambda: driver.received_bytes)
    await all_gone(peers.trackers)
    await peers.close(ada)
    await getting
    assert (tmp_path / "chos/hull.bin").read_bytes() == source.read_bytes()


async def test_what_was_taken_off_is_forgotten(peers: Peers, tmp_path: Path) -> None:
    source, small = tmp_path / "hull.bin", tmp_path / "small.bin"
    source.write_bytes(b"hull")
    small.write_bytes(b"x")
    ada, ben = await peers.open("ada"), await peers.open("ben")
    await share(ada, source)
    await share(ben, small)
    await until(lambda: known(ben, "hull.bin", ada))
    reply = await peers.trackers.call("DELETE", "/v1/groups/boats/files/hull.bin", session=peers.owner)
    assert reply.status == 200
    engine = ben._engine
    assert engine is not None
    await until(lambda: engine.agent.known.file("boats", "hull.bin") is None)


@pytest.fixture
async def short(tmp_path: Path) -> AsyncIterator[Peers]:
    """Tokens that live for twelve seconds."""
    async with running(tmp_path / "trackers", 2, changes={"token_seconds": 12.0}) as trackers:
        made = Peers(trackers, tmp_path)
        try:
            yield made
        finally:
            await made.close_all()


async def unreachable(trackers: Trackers) -> None:
    """Nobody listens, and what was connected is cut. The services go on."""
    for node in trackers.nodes:
        for site in list(node.runner.sites):
            await site.stop()
        assert node.runner.server is not None
        for connection in node.runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()


async def reachable(trackers: Trackers) -> None:
    for node in trackers.nodes:
        await web.TCPSite(node.runner, "127.0.0.1", node.port).start()


async def test_after_its_token_a_download_waits_says_why_and_goes_on(short: Peers, tmp_path: Path) -> None:
    source = tmp_path / "hull.bin"
    source.write_bytes(os.urandom(40 << 20))
    ada = await short.open("ada", up_bytes_per_second=1 << 20)
    ben = await short.open("ben")
    await share(ada, source)
    getting = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there"))

    async def row() -> PsRow | None:
        return next(iter(await ben.ps()), None)

    async def wait_for(state: State, seconds: float, reason: str = "") -> PsRow:
        async with asyncio.timeout(seconds):
            while True:
                found = await row()
                if found is not None and found.state is state and found.done_bytes and reason in found.reason:
                    return found
                await asyncio.sleep(0.02)

    try:
        await wait_for(State.DOWNLOADING, 15)
        # An outage much shorter than half a life: it moves on, and nobody says anything.
        before = await row()
        await unreachable(short.trackers)
        until_at = asyncio.get_running_loop().time() + 1.5
        while asyncio.get_running_loop().time() < until_at:
            seen = await row()
            assert seen is not None
            assert seen.reason not in NOTICED
            await asyncio.sleep(0.05)
        await reachable(short.trackers)
        assert before is not None
        assert seen.done_bytes > before.done_bytes
        engine = ben._engine
        assert engine is not None
        await until(lambda: not engine.agent.away and not engine.agent._old("boats"))
        # A long one: at the token's end it waits, and says so.
        await unreachable(short.trackers)
        told: list[Progress] = []
        follower = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", on_progress=told.append))
        waiting = await wait_for(State.WAITING, 25, WaitReason.TOKEN_EXPIRED.value)
        await asyncio.sleep(1.0)
        still = await row()
        # So is whoever asks for it now: what was begun needs neither a tracker nor a token to be followed.
        later = asyncio.create_task(get(ben, "hull.bin", tmp_path / "there", on_progress=told.append))
        async with asyncio.timeout(20):  # the command asks the trackers first, which are away
            while not any(progress.state is State.WAITING for progress in told):
                await asyncio.sleep(0.05)
        await asyncio.sleep(2.0)
        assert not follower.done()
        assert not later.done()
        for each in (follower, later):
            each.cancel()
        await asyncio.gather(follower, later, return_exceptions=True)
        said = {progress.message for progress in told if progress.state is State.WAITING}
        assert said == {WaitReason.TOKEN_EXPIRED.value}, "first it was told something else"
        assert still is not None
        assert still.done_bytes == waiting.done_bytes, "it got pieces without a token"
        assert not getting.done()
        # They are back: nobody has to do anything.
        await reachable(short.trackers)
        moved = await wait_for(State.DOWNLOADING, 30)
        assert moved.done_bytes >= still.done_bytes
        assert ada._engine is not None
        ada._engine.set_limits(Limits())
        await asyncio.wait_for(getting, 60)
        assert (tmp_path / "there/hull.bin").read_bytes() == source.read_bytes()
    finally:
        getting.cancel()
        await asyncio.gather(getting, return_exceptions=True)
