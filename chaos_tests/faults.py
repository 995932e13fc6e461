"""The faults operators meet, each as a thing that begins, ends, and can say whether it bit.

Owned here: what each kind does to the rig, and the schedule of a seed. A fault that cannot show an effect
(a node that really died, a link that really held bytes) does not count as having bitten, and a run whose
faults did not bite fails (`checkers.product.check_honesty`).
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos_tests.growing import growing
from chaos_tests.history import Fault
from cluster.raft.kill_points import VARIABLE, kill_point_names

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
    wrong: str = ""  # what the product did and must not do


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
            detail=running.detail, gone_ns=running.gone_ns, wrong=running.wrong,
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


def halves(*, one_way: bool = False) -> Act:
    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        nodes = chance.sample(rig.node_ids, len(rig.node_ids))
        middle = len(nodes) // 2
        running.target = f"{' '.join(nodes[:middle])} {'>' if one_way else '|'} {' '.join(nodes[middle:])}"
        pairs = [(a, b) for a in nodes[:middle] for b in nodes[middle:]]
        if one_way and chance.random() < 0.5:
            running.target = running.target.replace(">", "<")
            pairs = [(b, a) for a, b in pairs]
        await _cut(rig, running, pairs if one_way else _both(pairs), chance.uniform(1.5, 4))

    return act


async def _leader_among(rig: Rig, chance: random.Random) -> list[str]:
    """The nodes, shuffled, the leader at the end: between followers there is little to cut."""
    leader = await rig.leader()
    nodes = chance.sample(rig.node_ids, len(rig.node_ids))
    return sorted(nodes, key=lambda node: node == leader)


def bridge(*, one_way: bool = False) -> Act:
    """Two groups that only one node sees both of. One way: one of them hears the other, and is not heard."""

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        middle, *rest = await _leader_among(rig, chance)
        if one_way and chance.random() < 0.5:
            rest.reverse()  # the leader's group is the one that is not heard
        half = len(rest) // 2
        running.target = (
            f"{' '.join(rest[:half])} {'>' if one_way else '|'} {' '.join(rest[half:])} but for {middle}"
        )
        pairs = [(a, b) for a in rest[:half] for b in rest[half:]]
        await _cut(rig, running, pairs if one_way else _both(pairs), chance.uniform(1.5, 4))

    return act


def majorities_ring(*, one_way: bool = False) -> Act:
    """Every node sees its two neighbours on a ring, and no two see the same majority (of three nodes: a
    bridge). One way: what is not next to each other is heard in one direction only."""

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        nodes = await _leader_among(rig, chance)
        running.target = " ".join(nodes)
        await _cut(rig, running, ring_cuts(nodes, one_way), chance.uniform(1.5, 4))

    return act


def ring_cuts(nodes: list[str], one_way: bool) -> list[tuple[str, str]]:
    """The pairs of a ring whose first is not heard by the second."""
    count = len(nodes)
    apart = [(a, b) for i, a in enumerate(nodes) for b in nodes[i + 2 : count - (i == 0)]]
    pairs = apart or [(nodes[-1], nodes[-2])]
    return pairs if one_way else _both(pairs)


def slow_links(**speeds: list[float]) -> Act:
    """Some of the ways between nodes, each with one of these delays, or no wider than one of these widths."""

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        all_ways = [(a, b) for a in rig.node_ids for b in rig.node_ids if a != b]
        some = chance.sample(all_ways, chance.randint(len(all_ways) // 3, len(all_ways)))
        ways = [rig.way(a, b) for a, b in some]
        before = sum(way.bitten for way in ways)
        what = {name: chance.choice(choices) for name, choices in speeds.items()}
        running.target, running.detail = f"{len(ways)} links", str(what)
        try:
            for way in ways:
                way.set(**what)
            await asyncio.sleep(chance.uniform(2, 4))
            running.bit = sum(way.bitten for way in ways) > before
        finally:
            for way in ways:
                way.heal()

    return act


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
        await rig.fill_disk(node)
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


def damaged(what: str, damage: Callable[[Rig, str, random.Random], bool]) -> Act:
    """Damage in the middle of a journal: the node must refuse to start, and come back as a new one."""

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        node = chance.choice(rig.node_ids[1:])  # the first keeps the CA, without which nobody is invited
        running.target, running.detail = node, "no segment was old enough"
        done = False
        for _ in range(3):  # the log may be compacted away just then
            until = rig.recorder.now_ns() + 10_000_000_000
            async with growing(rig, rig.node_ids):
                while not rig.has_middle_segment(node) and rig.recorder.now_ns() < until:
                    await asyncio.sleep(0.1)
            await rig.kill(node)
            done = damage(rig, node, chance)
            if done:
                break
            await rig.start(node)
        if done:
            copy = rig.copy_damaged(node)
            wrong = await rig.refuses_to_start(node)
            running.bit, running.detail = not wrong, wrong or "refused to start"
            if wrong:
                running.wrong = f"{node} did not refuse {what} in its journal: {wrong}"
            else:
                shutil.rmtree(copy)
            await rig.replace(node)

    return act


def flip(rig: Rig, node: str, chance: random.Random) -> bool:
    return rig.flip_bit(node, chance)


def lose(rig: Rig, node: str, chance: random.Random) -> bool:
    return rig.lose_segment(node, chance)


async def missing_folder(rig: Rig, chance: random.Random, running: Running) -> None:
    """A node that lost its data folder may not vote as its old self: it is removed and added as new."""
    node = chance.choice(rig.node_ids[1:])  # the first keeps the CA, without which nobody is invited
    running.target = node
    running.bit = await rig.kill(node)
    await rig.replace(node)


OFTEN = ("append", "append.before", "append.after", "sync.before", "sync.after")  # steps of every batch


def kill_point(*areas: str, seconds: float = 8.0) -> Act:
    """Restart a node so that it dies at some step of its disk in these areas, and then start it plainly again."""
    names = [name for name in kill_point_names() if name.partition(".")[0] in areas]

    async def act(rig: Rig, chance: random.Random, running: Running) -> None:
        node = chance.choice(rig.node_ids)
        name = chance.choice(names)
        area, _, step = name.partition(".")
        often = area == "journal" and step in OFTEN
        point = f"{name}:{chance.randint(1, 40) if often else 1}"
        running.target, running.detail = node, point
        try:
            await rig.kill(node)
            if name.startswith("journal.truncate"):
                rig.tear_journal(node, chance)  # or there is nothing to cut off
            await rig.start(node, {VARIABLE: point})
            async with growing(rig, rig.node_ids):
                running.bit = await rig.dies_within(node, seconds)
        finally:
            await rig.kill(node)
            await rig.start(node)

    return act


async def killed_receiving(rig: Rig, chance: random.Random, running: Running) -> None:
    """A node is away until the others have compacted what it needs, and dies at some step of taking the
    snapshot that it is sent."""
    node = await _follower(rig, chance)
    others = [other for other in rig.node_ids if other != node]
    point = chance.choice([name for name in kill_point_names() if name.startswith("receive.")])
    running.target, running.detail = node, point
    try:
        await rig.kill(node)
        # Nothing that this node has may reach into what the others keep: two more snapshots of each.
        async with growing(rig, others):
            for _ in range(2):
                before = {other: rig.newest_snapshot(other) for other in others}
                await rig.until_newer_snapshots(others, before, 15.0)
            if ".remove." in point:  # what is removed is what an earlier try left behind
                await rig.start(node, {VARIABLE: "receive.sync.after"})
                await rig.dies_within(node, 10.0)
            await rig.start(node, {VARIABLE: point})
            running.bit = await rig.dies_within(node, 10.0)
    finally:
        await rig.kill(node)
        await rig.start(node)


async def _follower(rig: Rig, chance: random.Random) -> str:
    leader = await rig.leader()
    return chance.choice([node for node in rig.node_ids if node != leader])


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
        Kind("halves", halves()),
        Kind("halves, one way", halves(one_way=True)),
        Kind("bridge", bridge()),
        Kind("bridge, one way", bridge(one_way=True)),
        Kind("majorities ring", majorities_ring()),
        Kind("majorities ring, one way", majorities_ring(one_way=True)),
        Kind("slow links", slow_links(delay_seconds=[0.02, 0.08, 0.2]), _needs_proxies),
        Kind("narrow links", slow_links(bytes_per_second=[5e3, 20e3, 100e3]), _needs_proxies),
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
        Kind("flipped bit", damaged("a flipped bit", flip), needs_snapshots),
        Kind("missing segment", damaged("a missing segment", lose), needs_snapshots),
        Kind("missing data folder", missing_folder),
        Kind("killed at the journal", kill_point("journal", "head", "folder")),
        Kind("killed at the snapshot", kill_point("snapshot", seconds=20), needs_snapshots),
        Kind("killed receiving a snapshot", killed_receiving, needs_snapshots),
        Kind("out of descriptors", few_descriptors),
    )
}
SMOKE = (
    "kill the leader", "pause 2 s", "isolate the leader", "isolate the leader, incoming", "kill all", "slow links",
    "connection resets", "torn tail", "clock step",
)  # fmt: skip


class Schedule:
    """What comes next: every kind once in a shuffled order first, then again what has not bitten, one of them
    every other time; else at random. A seed fixes it, as far as the same faults bite."""

    def __init__(self, kinds: list[str], seed: int, pause_seconds: tuple[float, float]) -> None:
        self._chance = random.Random(f"faults/{seed}")
        self._kinds, self._pause_seconds = kinds, pause_seconds
        self._order = self._chance.sample(kinds, len(kinds))
        self._unbitten = list(self._order)
        self._again = False

    def next(self) -> tuple[float, str]:
        """(pause before it, kind)"""
        pause = self._chance.uniform(*self._pause_seconds)
        if self._order:
            return pause, self._order.pop()
        self._again = not self._again
        if self._unbitten and self._again:
            return pause, self._unbitten[0]
        return pause, self._chance.choice(self._kinds)

    def done(self, kind: str, bit: bool) -> None:
        if kind in self._unbitten:
            self._unbitten.remove(kind)
            if not bit:
                self._unbitten.append(kind)
