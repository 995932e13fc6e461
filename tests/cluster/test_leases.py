"""Leases by counters: a fake clock, a fake log, and the real rules."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trackers import Trackers, file_body, manifest_id, running, until

from cluster.leases import SLICE_SECONDS, Expiry, LeaseTimer, Renewals
from state_machine import queries
from state_machine.commands import ExpirePeers, RenewPeers

LEASE = 30.0


def test_a_counter_that_stands_still_for_a_lease_is_silent() -> None:
    timer = LeaseTimer(LEASE)
    assert timer.observe([("a", 1), ("b", 1)], 0.0) == []
    assert timer.observe([("a", 2), ("b", 1)], 29.0) == []
    assert timer.observe([("a", 2), ("b", 1)], 30.0) == [("b", 1)]
    assert timer.observe([("a", 2)], 59.0) == [("a", 2)], "timed from when it was first seen at 29"


def test_an_election_forgets_nobody() -> None:
    timer = LeaseTimer(LEASE)
    timer.observe([("a", 1)], 0.0)
    timer.forget()
    assert timer.observe([("a", 1)], 1_000.0) == [], "whatever the old leader knew, timing begins anew"
    assert timer.observe([("a", 1)], 1_029.0) == []
    assert timer.observe([("a", 1)], 1_030.0) == [("a", 1)]


def test_who_left_is_timed_no_more() -> None:
    timer = LeaseTimer(LEASE)
    timer.observe([("a", 1), ("b", 1)], 0.0)
    timer.observe([("b", 1)], 1.0)
    assert len(timer) == 1


@given(
    steps=st.lists(
        st.tuples(st.floats(0.1, 20.0), st.sets(st.sampled_from("abc")), st.booleans()), max_size=30
    )
)
def test_nobody_expires_before_a_lease_and_everybody_after_one(
    steps: list[tuple[float, set[str], bool]],
) -> None:
    """Each step: time passes, some are renewed, perhaps a new leader. The model keeps, per peer, when its
    present counter was first seen by the present leader."""
    timer, counters, first_seen, now = LeaseTimer(LEASE), dict.fromkeys("abc", 0), {}, 0.0
    for seconds, renewed, elected in steps:
        now += seconds
        for peer in renewed:
            counters[peer] += 1
            first_seen.pop(peer, None)
        if elected:
            timer.forget()
            first_seen.clear()
        silent = {}
        for part in ("a", "bc"):
            silent.update(timer.observe([(peer, counters[peer]) for peer in part], now, ord(part[0])))
        for peer, counter in counters.items():
            since = first_seen.setdefault(peer, now)
            assert (peer in silent) == (now - since >= LEASE)
            assert silent.get(peer, counter) == counter


async def test_renewals_are_gathered_and_kept_when_they_do_not_go_through() -> None:
    sent: list[tuple[str, ...]] = []
    reachable = False

    async def propose(command: RenewPeers) -> bool:
        sent.append(command.peer_ids)
        return reachable

    renewals = Renewals(propose)
    await renewals.renew()
    assert sent == [], "nobody was heard: nothing is logged"
    for peer in ("a", "b", "a"):
        renewals.heard(peer)
    await renewals.renew()
    assert (sent, len(renewals)) == ([("a", "b")], 2)
    reachable = True
    renewals.heard("c")
    await renewals.renew()
    assert (sorted(sent[-1]), len(renewals)) == (["a", "b", "c"], 0)


async def test_expiry_names_the_counter_it_saw() -> None:
    sent: list[ExpirePeers] = []

    async def propose(command: ExpirePeers) -> bool:
        sent.append(command)
        return True

    expiry = Expiry(LeaseTimer(LEASE), propose)
    await expiry.round([[("a", 7)]], 0.0)
    assert await expiry.round([[("a", 7)]], LEASE) == 1
    assert sent == [ExpirePeers((("a", 7),))]


def _slow_parts(parts: int) -> Iterator[list[tuple[str, int]]]:
    for number in range(parts):
        until = time.monotonic() + 2 * SLICE_SECONDS
        while time.monotonic() < until:
            pass
        yield [(f"peer {number}", 1)]


async def test_a_round_over_many_peers_lets_others_work_meanwhile() -> None:
    expired: list[ExpirePeers] = []

    async def propose(command: ExpirePeers) -> bool:
        expired.append(command)
        return True

    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    expiry = Expiry(LeaseTimer(LEASE), propose)
    await expiry.round(_slow_parts(20), 0.0)
    other = asyncio.create_task(others())
    assert await expiry.round(_slow_parts(20), LEASE) == 20
    other.cancel()
    assert turns >= 20
    assert [len(command.peers) for command in expired] == [20]


async def test_an_election_in_the_middle_of_a_round_forgets_nobody() -> None:
    async def propose(command: ExpirePeers) -> bool:
        raise AssertionError(f"expired under another leader: {command}")

    expiry = Expiry(LeaseTimer(LEASE), propose)
    await expiry.round(_slow_parts(4), 0.0)
    asyncio.get_running_loop().call_soon(expiry.timer.forget)
    assert await expiry.round(_slow_parts(4), LEASE) == 0
    assert await expiry.round(_slow_parts(4), LEASE + 1) == 0


QUICK = {"lease_seconds": 0.4, "announce_seconds": 0.1, "renew_seconds": 0.05}


async def _seeding(trackers: Trackers) -> tuple[str, str]:
    anna = await trackers.user("anna")
    await trackers.group("boats", anna)
    await trackers.call("PUT", "/v1/groups/boats/files/hull", body=file_body(), session=anna)
    peer = await trackers.peer("anna's", anna)
    fact = {"group": "boats", "name": "hull", "manifest_id": manifest_id("a"), "pieces": 2, "complete": True}
    assert (await trackers.announce(peer, anna, whole=True, facts=[fact])).status == 200
    return anna, peer


def _lives(trackers: Trackers, peer: str, node: int = 0) -> bool:
    info = queries.peer(trackers[node].machine.state, peer)
    return info is not None and info.counter is not None


@pytest.mark.parametrize("elections", [0, 3])
async def test_heartbeats_at_any_node_keep_a_peer_alive_and_silence_ends_it(
    tmp_path: Path, elections: int
) -> None:
    async with running(tmp_path, 3, changes=QUICK) as trackers:
        anna, peer = await _seeding(trackers)
        entries = len(trackers.cluster.log)
        for number in range(20):  # two and a half leases
            reply = await trackers.announce(peer, anna, addresses=[], node=number % 3)
            assert not reply.json["whole_wanted"]
            if elections and number % 5 == 4:
                trackers.cluster.elect(f"n{number % 3 + 1}")
            await asyncio.sleep(0.05)
        assert all(_lives(trackers, peer, node) for node in range(3))
        logged = trackers.cluster.log[entries:]
        assert len(logged) <= 3 * 30, "heartbeats are not logged one by one"
        assert trackers[0].service.announcer.logged + trackers[1].service.announcer.logged <= 2

        await until(lambda: not _lives(trackers, peer), seconds=2.0)
        revisions = {node.machine.revision for node in trackers.nodes}
        assert len(revisions) == 1, "gone from every node at the same revision"
        swarm = await trackers.call("GET", "/v1/groups/boats/files/hull/swarm", session=anna, node=1)
        assert swarm.json["peers"] == []
        reply = await trackers.announce(peer, anna, addresses=[], node=2)
        assert reply.json["whole_wanted"], "who was forgotten says everything anew"


async def test_leaving_is_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, changes={}) as trackers:
        anna, peer = await _seeding(trackers)
        assert (await trackers.announce(peer, anna, leaving=True)).status == 200
        assert not _lives(trackers, peer)


async def test_a_follower_does_not_expire_anyone(tmp_path: Path) -> None:
    async with running(tmp_path, 2, changes=QUICK) as trackers:
        _, peer = await _seeding(trackers)
        trackers.cluster.elect(None)
        await asyncio.sleep(0.8)
        assert _lives(trackers, peer)
        trackers.cluster.elect("n2")
        elected = asyncio.get_running_loop().time()
        await until(lambda: not _lives(trackers, peer), seconds=2.0)
        assert asyncio.get_running_loop().time() - elected >= 0.35, "timed from the election"
