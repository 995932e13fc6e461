"""A follower that is sent a snapshot: over a restart of its own, with a log that is quicker, with no room."""

import hashlib

import msgspec
import pytest

from chaos_tests.simulation.replica import SimulatedReplica, encode_command
from cluster.raft.entries import Configuration
from cluster.raft.messages import SnapshotAck, SnapshotChunk
from cluster.raft.snapshotting import encode_configuration
from tests.cluster.raft.lone_node import LoneNode, entry, info

CHUNK_BYTES = 100
CONFIG = encode_configuration(Configuration(tuple(info(number) for number in (1, 2, 3))))


class Sender:
    """Node 2, which leads, and has a snapshot of 40 writes up to `index`."""

    def __init__(self, node: LoneNode, index: int = 50, term: int = 1) -> None:
        replica = SimulatedReplica(lambda *_: None, lambda _: None)
        for number in range(40):
            replica.apply([encode_command(("put", f"r{number}", f"key {number}", "value"))])
        self.node, self.index, self.term = node, index, term
        self.payload = b"".join(replica.freeze().slices())
        digest = hashlib.sha256(msgspec.msgpack.encode((index, 1, CONFIG)))
        digest.update(self.payload)
        self.digest = digest.digest()

    def send(self, offset: int) -> int | None:
        """One chunk; the offset that is asked for then, None when there is no answer."""
        self.node.sent.clear()
        chunk = SnapshotChunk(
            self.term, self.index, 1, CONFIG, len(self.payload), self.digest, offset,
            self.payload[offset : offset + CHUNK_BYTES], self.index, self.node.runtime.now(),
        )  # fmt: skip
        self.node.hear("n2", chunk)
        self.node.pass_seconds(0.05)
        answers: list[SnapshotAck] = self.node.of(SnapshotAck)
        return answers[-1].offset if answers else None

    def send_until(self, until: int, offset: int = 0) -> int:
        while offset < until:
            answered = self.send(offset)
            assert answered is not None and answered > offset
            offset = answered
        return offset


@pytest.fixture
def node() -> LoneNode:
    return LoneNode(snapshot_chunk_bytes=CHUNK_BYTES)


def test_a_restart_in_the_middle_goes_on_and_installs(node: LoneNode) -> None:
    sender = Sender(node)
    before = sender.send_until(len(sender.payload) // 2)
    node.power_cycle()
    assert node.disk.parts()
    resumed = sender.send(before)
    assert resumed is not None
    assert before - 2 * CHUNK_BYTES <= resumed <= before
    sender.send_until(len(sender.payload), resumed)
    node.pass_seconds(1.0)
    assert node.core.snapshotting.installed == node.core.snapshotting.resumed == 1
    assert node.core.guard.commit_index == 50
    assert node.replica.state.revision == 40
    assert node.disk.parts() == []
    assert not node.fatal


def test_a_part_that_rotted_meanwhile_is_not_installed(node: LoneNode) -> None:
    sender = Sender(node)
    before = sender.send_until(len(sender.payload) // 2)
    node.power_cycle()
    (part,) = node.disk.parts()
    node.disk.names[part].seen[-3 * CHUNK_BYTES] ^= 1
    resumed = sender.send(before)
    assert resumed
    sender.send_until(len(sender.payload), resumed)
    node.pass_seconds(1.0)
    assert node.core.snapshotting.installed == 0
    assert node.replica.state.revision == 0
    assert sender.send(len(sender.payload)) == 0, "from the beginning"
    sender.send_until(len(sender.payload))
    node.pass_seconds(1.0)
    assert node.core.snapshotting.installed == 1
    assert node.core.snapshotting.resumed == 0
    assert not node.fatal


def test_a_snapshot_of_another_leader_takes_its_place(node: LoneNode) -> None:
    sender = Sender(node)
    before = sender.send_until(len(sender.payload) // 2)
    node.power_cycle()
    newer = Sender(node, index=60, term=2)
    assert newer.send(before) == 0
    newer.send_until(len(newer.payload))
    node.pass_seconds(1.0)
    assert node.core.guard.commit_index == 60
    assert node.core.snapshotting.resumed == 0
    assert node.disk.parts() == []


@pytest.mark.parametrize("restarted", [True, False])
def test_a_log_that_is_quicker_makes_it_useless(node: LoneNode, restarted: bool) -> None:
    sender = Sender(node, index=6)
    sender.send_until(len(sender.payload) // 2)
    if restarted:
        node.power_cycle()
    node.pass_seconds()
    assert len(node.disk.parts()) == 1
    node.append([entry(index, 1) for index in range(2, 8)], commit=7)
    node.pass_seconds(0.5)
    assert node.core.guard.commit_index == 7
    assert node.disk.parts() == []


@pytest.mark.parametrize("restarted", [True, False])
def test_a_log_without_room_comes_first(node: LoneNode, restarted: bool) -> None:
    sender = Sender(node)
    sender.send_until(len(sender.payload) // 2)
    if restarted:
        node.power_cycle()
    node.disk.room_bytes = node.disk.used_bytes()
    node.append([entry(2, 1)])
    node.pass_seconds(0.5)
    assert node.disk.parts() == [], "it can be sent again, and what was acknowledged cannot"
    node.pass_seconds(2.0)
    assert not node.core.guard.disk_full, "its own room was enough"


def test_once_there_is_room_again_the_same_snapshot_is_received(node: LoneNode) -> None:
    sender = Sender(node)
    offset: int | None = sender.send_until(5 * CHUNK_BYTES)
    node.disk.room_bytes = node.disk.used_bytes()
    for _ in range(4):
        if offset:
            offset = sender.send(offset)
    assert not offset, "no room for more of it"
    node.disk.room_bytes = None
    for _ in range(100):
        node.pass_seconds(1.0)
        offset = sender.send(offset or 0)
        if offset is not None and offset >= len(sender.payload):
            break
    node.pass_seconds(1.0)
    assert node.core.snapshotting.installed == 1
    assert node.core.guard.commit_index == 50
    assert not node.fatal
