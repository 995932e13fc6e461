"""The faults operators meet, each as a thing that begins, ends, and can say whether it bit.

Owned here: what each kind does to the rig, and the schedule of a seed. A fault that cannot show an effect
(a node that really died, a link that really held bytes) does not count as having bitten, and a run whose
faults did not bite fails (`checkers.product.check_honesty`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos_tests.growing import growing
from chaos_tests.history import Fault

if TYPE_CHECKING:
    from chaos_tests.rig import Rig

Act = Callable[["Rig", random.Random, "Running"], Awaitable[None]]


@dataclass
class Running:
    """A fault under way: what it is about, and what it has shown."""

    target: str = ""
    detail: str = ""
    bit: bool = False
    gone_ns: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Kind:
    name: str
    act: Act  # begins, waits, ends; cancelled, it must still end
    needs: Callable[[Rig], str | None] = lambda _: None  # why it cannot be had here, or None


async def run(rig: Rig, kind: Kind, chance: random.Random) -> Fault:
    """Run one fault from begin to end and record it."""
    running = Running()
    begin = rig.recorder.now_ns()
    try:
        await kind.act(rig, chance, running)
    finally:
        fault = Fault(
            kind=kind.name, target=running.target, begin_ns=begin, end_ns=rig.recorder.now_ns(), bit=running.bit,
            detail=running.detail, gone_ns=running.gone_ns,
        )  # fmt: skip
        rig.recorder.add(fault)
    return fault


# --- processes ----------------------------------------------------------------------------------


async def _down(
    rig: Rig, chance: random.Random, running: Running, victims: list[str], seconds: float
) -> None:
    running.target, running.detail = " ".join(victims), f"down for {seconds:.1f} s"
    try:
        running.bit = all([await rig.kill(node) for node in victims])
        await asyncio.sleep(seconds)
    finally:
        await asyncio.gather(*(rig.start(node) for node in victims))


async def kill_one(rig: Rig, chance: random.Random, running: Running) -> None:
    await _down(rig, chance, running, [chance.choice(rig.node_ids)], chance.uniform(0.2, 3))


async def kill_leader(rig: Rig, chance: random.Random, running: Running) -> None:
    leader = await rig.leader()
    await _down(rig, chance, running, [leader or chance.choice(rig.node_ids)], chance.uniform(0.2, 3))
    running.bit = running.bit and leader is not None


async def kill_majority(rig: Rig, chance: random.Random, running: Running) -> None:
    victims = chance.sample(rig.node_ids, len(rig.node_ids) // 2 + 1)
    await _down(rig, chance, running, victims, chance.uniform(0.5, 3))


async def kill_all(rig: Rig, chance: random.Random, running: Running) -> None:
    await _down(rig, chance, running, list(rig.node_ids), chance.uniform(0.2, 1))


async def restart_storm(rig: Rig, chance: random.Random, running: Running) -> None:
    running.target = " ".join(rig.node_ids)
    count = 0
    for _ in range(chance.randint(3, 6)):
        node = chance.choice(rig.node_ids)
        count += await rig.kill(node)
        await rig.start(node)
        await asyncio.sleep(chance.uniform(0.0, 0.8))
    running.bit, running.detail = count >= 3, f"{count} restarts"


def pause(seconds: float, leader: bool) -> Act:
    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        node = (await rig.leader() if leader else None) or chance.choice(rig.node_ids)
        running.target, running.detail = node, f"{seconds} s"
        try:
            running.bit = rig.pause(node)
            await asyncio.sleep(seconds)
        finally:
            rig.go_on(node)

    return act


# --- links --------------------------------------------------------------------------------------


async def _cut(
    rig: Rig, running: Running, pairs: Iterator[tuple[str, str]] | list[tuple[str, str]], seconds: float
) -> None:
    """Hold everything that goes from the first of each pair to the second."""
    held = [rig.way(a, b) for a, b in pairs]
    before = sum(way.bitten for way in held)
    try:
        for way in held:
            way.set(held=True)
        await asyncio.sleep(seconds)
        running.bit = sum(way.bitten for way in held) > before
    finally:
        for way in held:
            way.heal()


def _both(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return pairs + [(b, a) for a, b in pairs]


def isolate_leader(one_way: str = "") -> Act:
    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        leader = await rig.leader() or chance.choice(rig.node_ids)
        pairs = [(leader, other) for other in rig.node_ids if other != leader]
        if one_way == "in":
            pairs = [(b, a) for a, b in pairs]
        elif not one_way:
            pairs = _both(pairs)
        running.target, running.detail = leader, one_way or "both ways"
        await _cut(rig, running, pairs, chance.uniform(1.5, 4))

    return act


async def halves(rig: Rig, chance: random.Random, running: Running) -> None:
    nodes = chance.sample(rig.node_ids, len(rig.node_ids))
    middle = len(nodes) // 2
    running.target = f"{' '.join(nodes[:middle])} | {' '.join(nodes[middle:])}"
    await _cut(
        rig, running, _both([(a, b) for a in nodes[:middle] for b in nodes[middle:]]), chance.uniform(1.5, 4)
    )


async def _leader_among(rig: Rig, chance: random.Random) -> list[str]:
    """The nodes, shuffled, the leader at the end: between followers there is little to cut."""
    leader = await rig.leader()
    nodes = chance.sample(rig.node_ids, len(rig.node_ids))
    return sorted(nodes, key=lambda node: node == leader)


async def bridge(rig: Rig, chance: random.Random, running: Running) -> None:
    """Two groups that only one node sees both of."""
    middle, *rest = await _leader_among(rig, chance)
    half = len(rest) // 2
    running.target = middle
    await _cut(
        rig, running, _both([(a, b) for a in rest[:half] for b in rest[half:]]), chance.uniform(1.5, 4)
    )


async def majorities_ring(rig: Rig, chance: random.Random, running: Running) -> None:
    """Every node sees its two neighbours on a ring, and no two see the same majority (of three nodes: a
    bridge)."""
    nodes = await _leader_among(rig, chance)
    count = len(nodes)
    running.target = " ".join(nodes)
    apart = [(a, b) for i, a in enumerate(nodes) for j, b in enumerate(nodes) if 1 < abs(i - j) < count - 1]
    await _cut(rig, running, apart or _both([(nodes[1], nodes[2])]), chance.uniform(1.5, 4))


async def slow_links(rig: Rig, chance: random.Random, running: Running) -> None:
    all_ways = [(a, b) for a in rig.node_ids for b in rig.node_ids if a != b]
    ways = [
        rig.way(a, b) for a, b in chance.sample(all_ways, chance.randint(len(all_ways) // 3, len(all_ways)))
    ]
    before = sum(way.bitten for way in ways)
    delay = chance.choice([0.02, 0.08, 0.2])
    running.target, running.detail = f"{len(ways)} links", f"{delay} s"
    try:
        for way in ways:
            way.set(delay_seconds=delay)
        await asyncio.sleep(chance.uniform(2, 4))
        running.bit = sum(way.bitten for way in ways) > before
    finally:
        for way in ways:
            way.heal()


def _spoil(**faults: float) -> Act:
    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        ways = [rig.way(a, b) for a in rig.node_ids for b in rig.node_ids if a != b]
        before = sum(way.bitten for way in ways)
        running.target, running.detail = "all links", str(faults)
        try:
            for way in ways:
                way.set(**faults)
            await asyncio.sleep(chance.uniform(1.5, 3))
            running.bit = sum(way.bitten for way in ways) > before
        finally:
            for way in ways:
                way.heal()

    return act


async def resets(rig: Rig, chance: random.Random, running: Running) -> None:
    running.target = "all links"
    count = 0
    for _ in range(chance.randint(3, 8)):
        count += rig.reset_links()
        await asyncio.sleep(chance.uniform(0.05, 0.5))
    running.bit, running.detail = count > 0, f"{count} connections"


async def users_cut_off(rig: Rig, chance: random.Random, running: Running) -> None:
    """One node cannot be reached by users and peers, while it goes on in the cluster."""
    node = chance.choice(rig.node_ids)
    link = rig.user_link(node)
    before = link.forward.bitten + link.backward.bitten
    running.target = node
    try:
        link.cut()
        await asyncio.sleep(chance.uniform(1, 3))
        running.bit = link.forward.bitten + link.backward.bitten > before
    finally:
        link.heal()
        link.reset()


# --- clocks, disks ------------------------------------------------------------------------------


def _needs_clock(rig: Rig) -> str | None:
    return None if rig.clocks else "no C compiler for the clock shim"


async def _clock_is_off(rig: Rig, node: str) -> bool:
    """Whether the node itself tells a time that is minutes off."""
    off = await rig.wall_clock_of(node)
    return off is not None and abs(off) > 200


async def clock_step(rig: Rig, chance: random.Random, running: Running) -> None:
    node = chance.choice(rig.node_ids)
    offset = chance.choice([-300.0, 300.0])
    running.target, running.detail = node, f"{offset:+.0f} s"
    try:
        rig.clocks[node].step(offset)
        await asyncio.sleep(chance.uniform(2, 5))
        running.bit = await _clock_is_off(rig, node)
    finally:
        rig.clocks[node].step(0)


async def clock_strobe(rig: Rig, chance: random.Random, running: Running) -> None:
    node = chance.choice(rig.node_ids)
    running.target = node
    try:
        for _ in range(chance.randint(10, 30)):
            rig.clocks[node].step(chance.choice([-300.0, 0.0, 300.0]))
            await asyncio.sleep(0.1)
            running.bit = running.bit or await _clock_is_off(rig, node)
    finally:
        rig.clocks[node].step(0)


def _needs_small_disk(rig: Rig) -> str | None:
    return None if rig.small_disks else "no small file system can be mounted (root needed)"


async def disk_full(rig: Rig, chance: random.Random, running: Running) -> None:
    node = await rig.leader() or chance.choice(rig.node_ids)
    running.target = node
    try:
        rig.fill_disk(node)
        for _ in range(60):
            await asyncio.sleep(0.1)
            if await rig.says_disk_full(node):
                running.bit = True
                break
        await asyncio.sleep(chance.uniform(0.5, 2))
    finally:
        rig.free_disk(node)


async def torn_tail(rig: Rig, chance: random.Random, running: Running) -> None:
    """Kill a node and cut bytes off its journal's end that it may not have synced: here, garbage after it,
    as a torn write leaves."""
    node = chance.choice(rig.node_ids)
    running.target = node
    try:
        killed = await rig.kill(node)
        running.bit = killed and rig.tear_journal(node, chance)
    finally:
        await rig.start(node)


async def flipped_bit(rig: Rig, chance: random.Random, running: Running) -> None:
    """Damage in the middle of a journal: the node must refuse to start, and come back as a new one."""
    node = chance.choice(rig.node_ids[1:])  # the first keeps the CA, without which nobody is invited
    running.target = node
    damaged = False
    for _ in range(3):  # the log may be compacted away just then
        until = rig.recorder.now_ns() + 10_000_000_000
        async with growing(rig, rig.node_ids):
            while not rig.can_flip(node) and rig.recorder.now_ns() < until:
                await asyncio.sleep(0.1)
        await rig.kill(node)
        damaged = rig.flip_bit(node, chance)
        if damaged:
            break
        await rig.start(node)
    refused = damaged and await rig.refuses_to_start(node)
    running.bit = refused
    running.detail = "refused to start" if refused else "no segment was old enough to damage"
    if damaged:
        await rig.replace(node)


async def missing_folder(rig: Rig, chance: random.Random, running: Running) -> None:
    """A node that lost its data folder may not vote as its old self: it is removed and added as new."""
    node = chance.choice(rig.node_ids[1:])  # the first keeps the CA, without which nobody is invited
    running.target = node
    running.bit = await rig.kill(node)
    await rig.replace(node)


def kill_point(*names: str, nth_max: int = 40, seconds: float = 4.0) -> Act:
    """Restart a node so that it dies at a step of its disk, and then start it plainly again."""

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        node = chance.choice(rig.node_ids)
        point = f"{chance.choice(names)}:{chance.randint(1, nth_max)}"
        running.target, running.detail = node, point
        try:
            await rig.kill(node)
            await rig.start(node, {"TRIMARAN_KILL_POINT": point})
            async with growing(rig, rig.node_ids):
                running.bit = await rig.dies_within(node, seconds)
        finally:
            await rig.kill(node)
            await rig.start(node)

    return act


async def few_descriptors(rig: Rig, chance: random.Random, running: Running) -> None:
    """A node with twelve file descriptors left and hundreds of idle connections: the others go on, it recovers."""
    node = chance.choice(rig.node_ids)
    running.target = node
    held = []
    try:
        rig.limit_descriptors(node, 12)
        held = await rig.hold_connections(node, 300)
        until = rig.recorder.now_ns() + 3_000_000_000
        while rig.recorder.now_ns() < until:
            running.bit = running.bit or not (await rig.answers_new_connections(node))
            await asyncio.sleep(0.2)
        running.detail = f"{len(held)} idle connections, 12 descriptors"
    finally:
        rig.limit_descriptors(node, None)
        for writer in held:
            with suppress(OSError):
                writer.close()


def _needs_proxies(rig: Rig) -> str | None:
    return None if rig.proxied else "there is no proxy between the nodes of this rig"


def _needs_namespaces(rig: Rig) -> str | None:
    return "losing packets needs the rig in namespaces" if rig.proxied else None


def needs_snapshots(rig: Rig) -> str | None:
    return None if rig.makes_snapshots else "the log is not set to be compacted in this run"


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("kill one", kill_one),
        Kind("kill the leader", kill_leader),
        Kind("kill a majority", kill_majority),
        Kind("kill all", kill_all),
        Kind("restart storm", restart_storm),
        Kind("pause 0.3 s", pause(0.3, leader=True)),
        Kind("pause 2 s", pause(2.0, leader=True)),
        Kind("pause 10 s", pause(10.0, leader=False)),
        Kind("isolate the leader", isolate_leader()),
        Kind("isolate the leader, outgoing", isolate_leader("out")),
        Kind("isolate the leader, incoming", isolate_leader("in")),
        Kind("halves", halves),
        Kind("bridge", bridge),
        Kind("majorities ring", majorities_ring),
        Kind("slow links", slow_links, _needs_proxies),
        Kind("garbled links", _spoil(garble_chance=0.02), _needs_proxies),
        Kind("doubled bytes", _spoil(duplicate_chance=0.02), _needs_proxies),
        Kind("lossy links", _spoil(reset_chance=0.02), _needs_proxies),
        Kind("lost packets", _spoil(loss_chance=0.2), _needs_namespaces),
        Kind("connection resets", resets, _needs_proxies),
        Kind("users cut off", users_cut_off),
        Kind("clock step", clock_step, _needs_clock),
        Kind("clock strobe", clock_strobe, _needs_clock),
        Kind("disk full", disk_full, _needs_small_disk),
        Kind("torn tail", torn_tail),
        Kind("flipped bit", flipped_bit),
        Kind("missing data folder", missing_folder),
        Kind(
            "killed at the journal", kill_point("journal.append", "journal.sync.before", "journal.sync.after")
        ),
        Kind(
            "killed at the snapshot",
            kill_point(
                "snapshot.sync.before",
                "snapshot.rename.before",
                "snapshot.rename.after",
                nth_max=1,
                seconds=15,
            ),
            needs_snapshots,
        ),
        Kind("out of descriptors", few_descriptors),
    )
}
SMOKE = (
    "kill the leader", "pause 2 s", "isolate the leader", "isolate the leader, incoming", "kill all", "slow links",
    "connection resets", "torn tail", "clock step",
)  # fmt: skip


def schedule(kinds: list[str], seed: int, seconds: float, each_once: bool) -> Iterator[tuple[float, str]]:
    """(pause before it, kind): every kind once in a shuffled order first, then at random until the time is
    up (the caller watches the clock)."""
    chance = random.Random(f"faults/{seed}")
    order = chance.sample(kinds, len(kinds)) if each_once else []
    while True:
        yield chance.uniform(0.5, 2.0), order.pop() if order else chance.choice(kinds)
