"""Which faults come when: kinds of weather, each hard on something else.

Owned here: the choice of faults, their frequency, and the promises that hold only in some weather (a follower's
trouble must not cost a live leader its place; a short absence must not cost a snapshot).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chaos_tests.simulation.disk import EndAt
from chaos_tests.simulation.process import Process
from chaos_tests.simulation.world import World
from cluster.raft.messages import Message, SnapshotChunk, TimeoutNow, Vote

SMALL: dict[str, Any] = {
    "segment_bytes": 3_000,
    "log_bytes_before_snapshot": 9_000,
    "keep_tail_bytes": 3_000,
    "snapshot_chunk_bytes": 1_000,
    "append_bytes": 3_000,
    "append_entries": 8,
    "learner_lag_entries": 8,
}
ROOMY: dict[str, Any] = dict(
    SMALL, segment_bytes=30_000, log_bytes_before_snapshot=300_000, keep_tail_bytes=150_000
)


def _up(world: World) -> list[Process]:
    return [process for process in world.processes.values() if process.awake]


def _some(world: World) -> Process | None:
    up = _up(world)
    return world.chance.choice(up) if up else None


def _pair(world: World) -> tuple[str, str]:
    a, b = world.chance.sample(sorted(world.processes), 2)
    return a, b


def _restart_later(world: World, process: Process) -> None:
    world.clock.later(world.chance.uniform(0.05, 3.0), lambda: world.restart(process))


def cut_pair(world: World) -> None:
    world.network.cut_both(*_pair(world))
    _heal_later(world)


def cut_one_way(world: World) -> None:
    world.network.cut_one_way(*_pair(world))
    world.bites["cut_one_way"] += 1
    _heal_later(world)


def isolate(world: World) -> None:
    """One node from all others, the leader more often than not."""
    leader = world.leader()
    process = leader if leader is not None and world.chance.random() < 0.7 else _some(world)
    if process is None:
        return
    world.bites["isolated"] += 1
    one_way = world.chance.random() < 0.2
    for other in sorted(world.processes):
        if other != process.node_id:
            if one_way:
                world.network.cut_one_way(process.node_id, other)
            else:
                world.network.cut_both(process.node_id, other)
    _heal_later(world, 5.0)


def _heal_later(world: World, seconds_max: float = 4.0) -> None:
    world.clock.later(world.chance.uniform(0.1, seconds_max), world.network.heal)


def slow_links(world: World) -> None:
    for _ in range(3):
        world.network.delay[_pair(world)] = world.chance.choice([0.03, 0.15, 0.3])
    world.bites["slow_link"] += 1
    world.clock.later(world.chance.uniform(0.5, 4.0), world.network.delay.clear)


def lossy(world: World) -> None:
    world.network.loss = world.chance.uniform(0.01, 0.2)
    world.clock.later(world.chance.uniform(0.5, 3.0), lambda: setattr(world.network, "loss", 0.0))


def reset_connection(world: World) -> None:
    world.network.reset(*_pair(world))


def kill(world: World) -> None:
    process = world.leader() if world.chance.random() < 0.4 else _some(world)
    if process is not None:
        world.kill(process)
        _restart_later(world, process)


def power(world: World) -> None:
    process = world.leader() if world.chance.random() < 0.4 else _some(world)
    if process is not None:
        world.lose_power(process)
        _restart_later(world, process)


def power_everywhere(world: World) -> None:
    world.bites["power_lost_everywhere"] += 1
    for process in list(world.processes.values()):
        if process.up:
            world.lose_power(process)
            _restart_later(world, process)


def end_at_step(world: World) -> None:
    """End in the middle of disk work, at any of its steps; half the time the power goes with it."""
    process = _some(world)
    if process is None:
        return
    _end_then_restart(world, process, process.disk.steps + world.chance.randint(1, 25), None)


def end_at_snapshot(world: World) -> None:
    """The same, at a step of a snapshot's file (written, synced, renamed, the older one removed), or soon after it is in
    place, when the log lets go of what it covers."""
    process = _some(world)
    if process is not None and world.chance.random() < 0.5:
        process.disk.end_after_snapshot = world.chance.randint(1, 8)
        _end_then_restart(world, process, None, EndAt("snapshot-", "never"))
    elif process is not None:
        step = world.chance.choice(
            ["create", "append", "appended", "sync", "synced", "rename", "renamed", "remove"]
        )
        _end_then_restart(world, process, None, EndAt("snapshot-", step))


def end_while_receiving(world: World) -> None:
    """A follower is away until it needs a snapshot, and ends in the middle of receiving it, once or several times; half
    the time the power goes with it. Each next life finds what the one before had."""
    follower = _follower(world)
    if follower is None or not world.processes[follower].up or "receiving" in world.watching:
        return
    process = world.processes[follower]
    world.kill(process)
    lives = world.chance.randint(1, 3)

    def arrived(sender: str, receiver: str, message: Message) -> None:
        nonlocal lives
        if not isinstance(message, SnapshotChunk) or receiver != follower or process.disk.end_at is not None:
            return
        lives -= 1
        if not lives:
            del world.watching["receiving"]
        step = world.chance.choice(["create", "truncate", "append", "appended", "sync", "synced"])
        pieces = message.size_bytes // world.tuning["snapshot_chunk_bytes"] + 1
        once = step in ("create", "truncate")
        process.disk.end_at = EndAt(
            "snapshot-", step, ".part", 1 if once else world.chance.randint(1, pieces)
        )
        world.clock.later(0.1, lambda: look(10))

    def look(left: int) -> None:
        if process.up and left:
            world.clock.later(0.1, lambda: look(left - 1))
            return
        process.disk.disarm()
        if process.up:
            return
        world.bites["ended_while_receiving"] += 1
        if world.chance.random() < 0.5:
            world.lose_power(process)
        if world.chance.random() < 0.3 and process.disk.rot("snapshot-", ".part"):
            world.bites["part_rotted"] += 1
        world.clock.later(world.chance.uniform(0.0, 0.3), lambda: world.restart(process))

    def compact() -> None:
        leader = world.leader()
        if leader is not None and leader.core is not None:
            leader.deliver(leader.core.snapshotting.begin)
        world.clock.later(world.chance.uniform(0.2, 0.5), lambda: world.restart(process))

    def forget() -> None:
        if world.watching.get("receiving") is arrived:
            del world.watching["receiving"]

    world.watching["receiving"] = arrived
    world.clock.later(world.chance.uniform(0.5, 2.0), compact)
    world.clock.later(8.0, forget)


def _end_then_restart(world: World, process: Process, at_step: int | None, at: EndAt | None) -> None:
    process.disk.end_at_step, process.disk.end_at = at_step, at
    with_power = world.chance.random() < 0.5

    def after() -> None:
        process.disk.disarm()
        if not process.up and with_power:
            world.lose_power(process)
        world.clock.later(world.chance.uniform(0.05, 2.0), lambda: world.restart(process))

    world.clock.later(1.5 if at is None else 4.0, after)


def pause(world: World) -> None:
    process = world.leader() if world.chance.random() < 0.5 else _some(world)
    if process is not None:
        world.pause(process, world.chance.choice([0.05, 0.3, 1.0, 2.5, 4.0]))


def disk_full(world: World) -> None:
    process = world.leader() if world.chance.random() < 0.5 else _some(world)
    if process is None:
        return
    process.disk.room_bytes = process.disk.used_bytes() + world.chance.choice([0, 10, 500, 3000])

    def room() -> None:
        process.disk.room_bytes = None

    world.clock.later(world.chance.uniform(0.5, 4.0), room)


def failed_sync(world: World) -> None:
    process = _some(world)
    if process is not None:
        process.disk.fail_next_sync = True
        _restart_later(world, process)
        world.clock.later(3.5, lambda: world.restart(process))


def slow_disk(world: World) -> None:
    process = world.leader() if world.chance.random() < 0.5 else _some(world)
    if process is not None and process.syncer is not None:
        process.syncer.slow_until = world.clock.now + world.chance.uniform(0.2, 2.0)
        world.bites["slow_disk"] += 1


def damaged(world: World) -> None:
    """Rot, or a folder gone. One node at a time: the operator replaces it."""
    if world.damaged_node or world.lost_nodes or world.wishes:
        return
    process = _some(world)
    if process is None or process.core is None or not process.core.guard.is_voter:
        return
    world.damaged_node = process.node_id
    process.damaged = True
    world.kill(process)
    if world.chance.random() < 0.3:
        process.disk.vanish()
    elif world.chance.random() < 0.25 or not process.disk.rot("snapshot-", ".snap"):
        process.disk.rot("journal-")

    def back() -> None:
        # As a power-on would find it: whatever else may come over it waits until it has tried to start.
        world.restart(process)

    world.clock.later(0.05, back)


def change_members(world: World) -> None:
    if world.wishes or world.lost_nodes:
        return
    leader = world.leader()
    if leader is None or leader.core is None:
        return
    voters = [node.node_id for node in leader.core.membership.current.voters]
    if len(voters) <= 3 or (len(voters) < 6 and world.chance.random() < 0.5):
        world.wish("add", world.new_node())
    else:
        world.wish("remove", world.chance.choice(voters))
    if world.chance.random() < 0.3:
        # Two at once: the second must wait for the first, whichever leader it meets.
        world.wish("add", world.new_node())


def two_changes_at_once(world: World) -> None:
    """Ask the leader for two changes in one turn, and split the nodes so that both halves could believe in theirs."""
    leader = world.leader()
    if leader is None or leader.core is None or leader.runtime is None or world.wishes or world.lost_nodes:
        return
    voters = [
        node.node_id for node in leader.core.membership.current.voters if node.node_id != leader.node_id
    ]
    if len(voters) < 4 or not leader.core.guard.acting:
        return
    core, due = leader.core, leader.runtime.now() + 3.0
    world.bites["two_changes_asked"] += 1
    gone = world.chance.sample(voters, 2)
    friend = world.chance.choice([node_id for node_id in voters if node_id not in gone])

    def ask() -> None:
        for node_id in gone:
            core.control("remove", node_id.encode(), due, lambda *_: None)

    leader.deliver(ask)
    for other in sorted(world.processes):
        if other not in (leader.node_id, friend):
            world.network.cut_both(leader.node_id, other)
            world.network.cut_both(friend, other)
    world.clock.later(world.chance.uniform(2.0, 5.0), world.network.heal)


def change_then_restart(world: World) -> None:
    """The leader and a friend lose power while a change is in their logs and nowhere else."""
    leader = world.leader()
    if leader is None or leader.core is None or leader.runtime is None or world.wishes or world.lost_nodes:
        return
    voters = [
        node.node_id for node in leader.core.membership.current.voters if node.node_id != leader.node_id
    ]
    if len(voters) not in (3, 4) or not leader.core.guard.acting:
        return
    core, due = leader.core, leader.runtime.now() + 3.0
    world.bites["change_then_restart"] += 1
    gone, friend = world.chance.sample(voters, 2)
    leader.deliver(lambda: core.control("remove", gone.encode(), due, lambda *_: None))
    down = [world.processes[node_id] for node_id in (leader.node_id, friend) if node_id in world.processes]

    def lose() -> None:
        for process in down:
            world.lose_power(process)
            _restart_later(world, process)

    world.clock.later(world.chance.uniform(0.002, 0.05), lose)


def kill_after_vote(world: World) -> None:
    """A voter loses power just after its vote has arrived, and the one it voted for is cut off: whom will it vote for
    when it is back?"""
    leader = world.leader()
    if leader is None or "vote" in world.watching:
        return

    def voted(voter: str, candidate: str, message: Message) -> None:
        if not isinstance(message, Vote):
            return
        del world.watching["vote"]
        process = world.processes.get(voter)
        if process is None or not process.up:
            return
        world.bites["power_lost_after_vote"] += 1
        for other in sorted(world.processes):
            if other != candidate:
                world.network.cut_one_way(candidate, other)
        world.clock.later(0.0, lambda: world.lose_power(process))
        world.clock.later(0.05, lambda: world.restart(process))
        world.clock.later(world.chance.uniform(2.5, 3.5), world.network.heal)

    world.watching["vote"] = voted
    world.kill(leader)
    world.clock.later(0.05, lambda: world.restart(leader))


def transfer(world: World) -> None:
    process = _some(world)
    if process is not None and process.core is not None and process.runtime is not None:
        core, due = process.core, process.runtime.now() + 2.0
        world.bites["transfer_asked"] += 1
        process.deliver(lambda: core.control("transfer", b"", due, lambda outcome, _: _count(world, outcome)))


def transfer_then_cut(world: World, at_the_word: float = 0.5) -> None:
    """The node that is to take over is cut off just then, or (with that chance) at the very word: it comes back with a
    term of its own."""
    leader, follower = world.leader(), _follower(world)
    if leader is None or leader.core is None or leader.runtime is None or follower is None:
        return
    world.watching.pop("handover", None)
    core, due = leader.core, leader.runtime.now() + 2.0
    leader.deliver(
        lambda: core.control("transfer", follower.encode(), due, lambda outcome, _: _count(world, outcome))
    )
    world.bites["transfer_cut"] += 1

    def cut() -> None:
        for other in sorted(world.processes):
            if other != follower:
                world.network.cut_both(other, follower)

    def arrived(sender: str, receiver: str, message: Message) -> None:
        if isinstance(message, TimeoutNow) and receiver == follower:
            del world.watching["handover"]
            world.bites["cut_at_handover"] += 1
            world.clock.later(0.0, cut)

    if world.chance.random() < at_the_word:
        world.watching["handover"] = arrived
    else:
        world.clock.later(world.chance.uniform(0.001, 0.01), cut)
    world.clock.later(world.chance.uniform(2.0, 3.5), world.network.heal)


def _count(world: World, outcome: str) -> None:
    world.bites[f"transfer_{outcome}"] += 1


Fault = Callable[[World], None]
WEATHER: Mapping[str, Mapping[Fault, int]] = {
    "storm": {
        cut_pair: 6, cut_one_way: 3, isolate: 4, slow_links: 4, lossy: 2, reset_connection: 3, kill: 4, power: 3,
        end_at_step: 4, end_at_snapshot: 2, pause: 3, slow_disk: 2, transfer: 1, disk_full: 1,
    },
    "power": {power: 6, end_at_step: 6, end_at_snapshot: 8, kill_after_vote: 3, kill: 3, power_everywhere: 1, slow_disk: 4, reset_connection: 1, cut_pair: 1},
    "disk": {disk_full: 5, failed_sync: 3, slow_disk: 3, end_at_step: 3, end_while_receiving: 2, damaged: 4, kill: 1, power: 1},
    "members": {
        change_members: 6, two_changes_at_once: 5, change_then_restart: 2, transfer: 4, transfer_then_cut: 3, kill: 3, power: 1, cut_pair: 2, isolate: 2, pause: 1,
        end_at_step: 1,
    },
    "isolation": {isolate: 12, transfer_then_cut: 2, pause: 3, slow_links: 2, kill: 1, cut_one_way: 2},
    "lag": {slow_links: 8, cut_pair: 4, reset_connection: 3, lossy: 3, kill: 1, isolate: 6},
}  # fmt: skip
PACES: Mapping[str, tuple[float, ...]] = {"isolation": (0.8, 3.0)}
"""Mean seconds between faults, where it matters that something can happen in between."""
QUIET = ("lonely", "absence", "handover", "receiving")
ABSENCE: dict[str, Any] = dict(
    SMALL, segment_bytes=1_000, log_bytes_before_snapshot=6_000, keep_tail_bytes=120_000
)
RECEIVING: dict[str, Any] = dict(SMALL, snapshot_chunk_bytes=200)
KINDS = (*WEATHER, *QUIET)


def tuning(kind: str) -> dict[str, Any]:
    return dict({"absence": ABSENCE, "lag": ROOMY, "receiving": RECEIVING}.get(kind, SMALL))


def begin(world: World, kind: str, pace_seconds: float) -> None:
    """Let it come, until `world.faults_over`."""
    if kind == "lonely":
        _lonely(world)
    elif kind == "handover":
        _handover(world)
    elif kind == "receiving":
        _receiving(world)
    elif kind == "absence":
        world.no_snapshot_needed = True
        _absence(world)
    else:
        faults = WEATHER[kind]
        choices, weights = list(faults), list(faults.values())

        def turn() -> None:
            if world.faults_over:
                return
            fault = world.chance.choices(choices, weights)[0]
            world.log(fault.__name__)
            fault(world)
            world.clock.later(world.chance.expovariate(1 / pace_seconds), turn)

        world.clock.later(1.5, turn)
        if kind == "disk":
            world.clock.later(5.0, lambda: _damage(world))


def _damage(world: World) -> None:
    """However the dice fall, a disk that is bad is among them now and then."""
    if not world.faults_over:
        damaged(world)
        world.clock.later(world.chance.uniform(2.0, 6.0), lambda: _damage(world))


def _follower(world: World) -> str | None:
    leader = world.leader()
    if leader is None or leader.core is None or not leader.core.guard.acting:
        return None
    others = sorted(node_id for node_id in world.processes if node_id != leader.node_id)
    return world.chance.choice(others)


def _lonely(world: World) -> None:
    """One follower hears nothing, or is heard by nobody, and comes back: the leader leads on."""

    def cut() -> None:
        if world.faults_over:
            return
        leader, follower = world.leader(), _follower(world)
        if leader is None or leader.core is None or follower is None:
            world.clock.later(0.5, cut)
            return
        world.steady_term = leader.core.guard.term
        world.bites["follower_cut"] += 1
        for other in sorted(world.processes):
            if other != follower:
                style = world.chance.random()
                if style < 0.4:
                    world.network.cut_one_way(other, follower)
                elif style < 0.6:
                    world.network.cut_one_way(follower, other)
                else:
                    world.network.cut_both(other, follower)
        world.clock.later(world.chance.uniform(1.0, 4.0), back)

    def back() -> None:
        world.network.heal()
        world.clock.later(world.chance.uniform(0.5, 2.0), cut)

    world.clock.later(2.5, cut)


def _absence(world: World) -> None:
    """A follower is away for a moment while writes go on: what it missed is still in the log."""

    def cut() -> None:
        if world.faults_over:
            return
        follower = _follower(world)
        if follower is not None:
            world.bites["follower_absent"] += 1
            for other in sorted(world.processes):
                if other != follower:
                    world.network.cut_both(other, follower)
        world.clock.later(world.chance.uniform(0.2, 1.0), back)

    def back() -> None:
        world.network.heal()
        world.clock.later(world.chance.uniform(1.0, 2.0), cut)

    world.clock.later(2.5, cut)


def _handover(world: World) -> None:
    """Leadership is handed to a node that is cut off just then. Once it is back it follows, in whatever term."""

    def turn() -> None:
        if not world.faults_over:
            transfer_then_cut(world, at_the_word=0.8)
            world.clock.later(world.chance.uniform(3.6, 5.0), turn)

    world.clock.later(2.0, turn)


def _receiving(world: World) -> None:
    """One follower after the other needs a snapshot, and ends while it receives it."""

    def turn() -> None:
        if not world.faults_over:
            end_while_receiving(world)
            world.clock.later(world.chance.uniform(2.5, 4.0), turn)

    world.clock.later(2.0, turn)


def clear_up(world: World) -> None:
    """The faults end: links heal, disks have room, whoever is down comes back."""
    world.faults_over = True
    world.steady_term = None
    world.watching.clear()
    world.network.heal()
    for process in list(world.processes.values()):
        process.disk.room_bytes = None
        process.disk.disarm()
        process.disk.fail_next_sync = False
        if process.syncer is not None:
            process.syncer.slow_until = 0.0
        if not process.up:
            world.clock.later(world.chance.uniform(0.05, 0.5), lambda process=process: world.restart(process))  # type: ignore[misc]
