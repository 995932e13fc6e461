"""Faults made of several: what the worst days are made of, and what operators do on them.

Owned here: compounds (a fault within a fault), changes of the membership and of the leader under load, and
the lists of kinds that runs use. Single faults stand in `faults.py`.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from chaos_tests import faults
from chaos_tests.faults import Act, Kind, Running
from chaos_tests.growing import growing

if TYPE_CHECKING:
    from chaos_tests.rig import Rig

COMPACTION_SECONDS_MAX = 15.0
PEERS_REST_SECONDS_MAX = 60.0
DOWNLOAD_SECONDS_MAX = 20.0  # until one is under way
AFTER_REST_SECONDS = 5.5  # downloads go on again by then (`checkers.availability`)
MINORITY_GONE = "kill a minority"  # `checkers.availability` asks of these two what they promise
MAJORITY_GONE = "a majority gone"


async def minority_gone(rig: Rig, chance: random.Random, running: Running) -> None:
    """Five survive any two, three any one: as many as may fail, the leader among them every other time."""
    count = (len(rig.node_ids) - 1) // 2
    leader = await rig.leader()
    victims = chance.sample(rig.node_ids, count)
    if leader and leader not in victims and chance.random() < 0.5:
        victims[0] = leader
    await _down_for(rig, running, victims, 8.0)


async def majority_gone(rig: Rig, chance: random.Random, running: Running) -> None:
    """Long enough to see that writes say so, and that downloads go on: nothing is done to peers meanwhile."""
    victims = chance.sample(rig.node_ids, len(rig.node_ids) // 2 + 1)
    try:
        await asyncio.wait_for(rig.peers_rest.acquire(), PEERS_REST_SECONDS_MAX)
    except (
        TimeoutError
    ):  # what is done to a peer waits for a tracker itself; then nothing is said of downloads
        await _down_for(rig, running, victims, 8.0)
        return
    try:
        await asyncio.sleep(AFTER_REST_SECONDS)
        until = rig.recorder.now_ns() + int(DOWNLOAD_SECONDS_MAX * 1e9)
        while not rig.downloads_go_on() and rig.recorder.now_ns() < until:
            await asyncio.sleep(0.2)
        await _down_for(rig, running, victims, 8.0)
    finally:
        rig.peers_rest.release()


async def _down_for(rig: Rig, running: Running, victims: list[str], seconds: float) -> None:
    running.target = " ".join(victims)
    try:
        running.bit = all([await rig.kill(node) for node in victims])
        gone = rig.recorder.now_ns()
        await asyncio.sleep(seconds)
        running.gone_ns = (gone, rig.recorder.now_ns())
        running.detail = f"down for {seconds:.0f} s"
    finally:
        await asyncio.gather(*(rig.start(node) for node in victims))


async def isolated_then_compacted(rig: Rig, chance: random.Random, running: Running) -> None:
    """The leader is cut off with writes pending on it; the others go on until they have compacted what it
    would need; then it comes back with a tail that nobody else has."""
    leader = await rig.leader() or chance.choice(rig.node_ids)
    others = [node for node in rig.node_ids if node != leader]
    ways = [rig.way(a, b) for other in others for a, b in ((leader, other), (other, leader))]
    running.target = leader
    before = {node: rig.newest_snapshot(node) for node in others}
    begin = rig.recorder.now_ns()
    try:
        for way in ways:
            way.set(held=True)
        async with growing(rig, others):
            compacted = await rig.until_newer_snapshots(others, before, COMPACTION_SECONDS_MAX)
        pending = sum(
            o.node == leader and o.call_ns > begin and bool(o.request_id)
            for o in rig.recorder.history.operations
        )
        running.detail = f"{pending} writes sent to it meanwhile, {compacted} of {len(others)} compacted"
        running.bit = pending > 0 and compacted > 0
    finally:
        for way in ways:
            way.heal()


async def majority_dies_at_rename(rig: Rig, chance: random.Random, running: Running) -> None:
    """A majority dies at the step where a new snapshot takes its name, each at its next one."""
    victims = chance.sample(rig.node_ids, len(rig.node_ids) // 2 + 1)
    side = chance.choice(("before", "after"))
    running.target = " ".join(victims)
    try:
        for node in victims:
            await rig.kill(node)
        await asyncio.gather(
            *(rig.start(node, {"TRIMARAN_KILL_POINT": f"snapshot.rename.{side}"}) for node in victims)
        )
        # Those that have died leave no majority, so the rest may make no snapshot any more: they are killed.
        died = 0
        until = rig.recorder.now_ns() + int(COMPACTION_SECONDS_MAX * 1e9)
        async with growing(rig, victims):
            while rig.recorder.now_ns() < until and died < len(victims):
                died = sum([await rig.dies_within(node, 0.1) for node in victims])
        running.detail = f"{side} the rename; {died} of {len(victims)} died at it"
        running.bit = died > 0
    finally:
        for node in victims:
            await rig.kill(node)
        await asyncio.gather(*(rig.start(node) for node in victims))


async def leader_dies_in_change(rig: Rig, chance: random.Random, running: Running) -> None:
    """A node is being removed when the leader dies; the operator asks again, and invites the node as new."""
    leader = await rig.leader() or rig.node_ids[0]
    candidates = [node for node in rig.node_ids[1:] if node != leader]  # the first keeps the CA
    leaving = chance.choice(candidates)
    running.target, running.detail = leader, f"while {leaving} was being removed"
    removal = asyncio.create_task(rig.remove(leaving, through=leader))
    await asyncio.sleep(chance.uniform(0.0, 0.06))
    under_way = not removal.done()
    killed = await rig.kill(leader)
    cut_off = (await asyncio.gather(removal, return_exceptions=True))[0]
    try:
        await rig.start(leader)
        await rig.replace(leaving)
    finally:
        running.bit = killed and under_way
        running.detail += ", which had no answer" if isinstance(cut_off, RuntimeError) else ", and was"


async def node_replaced(rig: Rig, chance: random.Random, running: Running) -> None:
    """An operator takes a living node out and lets it join again as a new one, while everyone works."""
    node = chance.choice(rig.node_ids[1:])
    running.target = node
    await rig.remove(node)
    ended = await rig.ends_within(node, 10.0)
    running.detail = "told, and stopped" if ended else "was not told within 10 s"
    await rig.replace(node)
    running.bit = True


async def leadership_moved(rig: Rig, chance: random.Random, running: Running) -> None:
    leader = await rig.leader()
    to = chance.choice([node for node in rig.node_ids if node != leader])
    running.target = to
    reply = await rig.transfer(to)
    running.bit = reply.end == "ok"
    running.detail = "moved" if running.bit else f"{reply.status} {reply.code}"


_ACTS: dict[str, tuple[Act, bool]] = {
    MINORITY_GONE: (minority_gone, False),
    MAJORITY_GONE: (majority_gone, False),
    "isolate the leader with writes pending, compact": (isolated_then_compacted, True),
    "kill a majority at the snapshot's rename": (majority_dies_at_rename, True),
    "kill the leader in a membership change": (leader_dies_in_change, False),
    "replace a node": (node_replaced, False),
    "move the leadership": (leadership_moved, False),
}
KINDS: dict[str, Kind] = faults.KINDS | {
    name: Kind(name, act, faults.needs_snapshots if snapshots else lambda _: None)
    for name, (act, snapshots) in _ACTS.items()
}
