"""Another node's snapshot, received over several lives of the process: gone on with, or dropped; never installed torn."""

from __future__ import annotations

import random
import re

import pytest
from fake_disk import Crash, FakeDisk, FakeRuntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.raft.snapshot_format import Header, SnapshotMeta, snapshot_name
from cluster.raft.snapshots import SnapshotReceiver, SnapshotStore

PIECE_BYTES, SIZE_BYTES, CHUNK_BYTES = 64, 1000, 45
PAYLOAD = random.Random(9).randbytes(SIZE_BYTES)
Outcomes = list[Exception | None]


def open_store(
    disk: FakeDisk, cluster_id: str = "c1", piece_bytes: int = PIECE_BYTES
) -> tuple[SnapshotStore, FakeRuntime]:
    runtime = FakeRuntime()
    return SnapshotStore.open(disk, runtime, cluster_id=cluster_id, piece_bytes=piece_bytes), runtime


def announced(index: int = 9, payload: bytes = PAYLOAD) -> SnapshotMeta:
    """As a node that has it would name it."""
    store, runtime = open_store(FakeDisk())
    writer = store.writer(index, 2, b"config")
    writer.feed(payload)
    writer.finish(lambda outcome: None)
    runtime.syncer.drain()
    meta = store.latest()
    assert meta is not None
    return meta


META = announced()
HEADER_BYTES = len(Header("c1", 9, 2, b"config", SIZE_BYTES, META.digest, PIECE_BYTES).encode())


def feed(receiver: SnapshotReceiver, runtime: FakeRuntime, until: int = SIZE_BYTES) -> None:
    while receiver.offset < until:
        offset = receiver.offset
        assert receiver.feed(offset, PAYLOAD[offset : min(offset + CHUNK_BYTES, until)])
        runtime.syncer.step()


def finish(receiver: SnapshotReceiver, runtime: FakeRuntime) -> Exception | None:
    outcomes: Outcomes = []
    receiver.finish(outcomes.append)
    runtime.syncer.drain()
    (outcome,) = outcomes
    return outcome


def check_installed(store: SnapshotStore, disk: FakeDisk) -> None:
    assert store.latest() == META
    assert b"".join(store.read(at, 50) for at in range(0, SIZE_BYTES, 50)) == PAYLOAD
    assert disk.list() == [snapshot_name(9, 2)], "nothing else is left"


def partly_received(until: int = 700) -> dict[str, bytes]:
    """The files of a node that was killed half-way."""
    disk = FakeDisk()
    store, runtime = open_store(disk)
    feed(store.receive(META), runtime, until)
    runtime.syncer.drain()
    return disk.files()


def test_it_goes_on_where_it_was_synced() -> None:
    disk = FakeDisk(partly_received())
    store, runtime = open_store(disk)
    assert store.latest() is None
    assert store.receiving() == META
    receiver = store.receive(META)
    assert receiver.resumed
    # Ten pieces of 64 were whole. The tenth may not have been synced, for all that its length says.
    assert receiver.offset == 9 * PIECE_BYTES
    feed(receiver, runtime)
    assert finish(receiver, runtime) is None
    check_installed(store, disk)
    check_installed(open_store(FakeDisk(disk.files()))[0], disk)


def test_one_whole_but_for_its_name_needs_no_byte_more() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    receiver = store.receive(META)
    feed(receiver, runtime)
    receiver.finish(lambda outcome: None)
    while not any(len(content) > SIZE_BYTES + 250 for content in disk.files().values()):
        assert runtime.syncer.step()
        if snapshot_name(9, 2) in disk.list():
            break
    (content,) = disk.files().values()
    disk = FakeDisk({snapshot_name(9, 2).removesuffix(".snap") + "-1.part": content})
    store, runtime = open_store(disk)
    receiver = store.receive(META)
    assert receiver.offset == SIZE_BYTES
    assert finish(receiver, runtime) is None
    check_installed(store, disk)


def test_a_graceful_stop_leaves_it_too() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    feed(store.receive(META), runtime, 700)
    store.close()
    runtime.syncer.drain()
    store, runtime = open_store(FakeDisk(disk.files()))
    assert store.receive(META).offset >= 8 * PIECE_BYTES


@given(st.lists(st.integers(0, 70), max_size=6), st.integers(0, 2**32), st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_crashes_at_any_steps_of_any_lives_cost_one_piece_each_and_no_byte_is_wrong(
    lives: list[int], seed: int, power: bool
) -> None:
    rng = random.Random(seed)
    disk = FakeDisk()
    synced = 0  # bytes of the payload
    for steps in lives:
        disk.steps_left = steps
        try:
            store, runtime = open_store(disk)
            if store.latest() is not None:
                break
            receiver = store.receive(META)
            assert receiver.offset % PIECE_BYTES == 0 or receiver.offset == SIZE_BYTES
            assert receiver.offset >= synced - PIECE_BYTES
            feed(receiver, runtime)
            runtime.syncer.drain()
            assert finish(receiver, runtime) is None, "what is gone on with is what was sent"
        except Crash:
            parts = [inode for name, inode in disk.names.items() if name.endswith(".part")]
            assert len(parts) <= 1
            synced = sum(min(len(inode.content), len(inode.synced)) for inode in parts) - HEADER_BYTES
            synced -= synced % PIECE_BYTES
            disk = disk.crash(rng, power=power)
    disk.steps_left = None
    store, runtime = open_store(disk)
    if store.latest() is None:
        receiver = store.receive(META)
        feed(receiver, runtime)
        assert finish(receiver, runtime) is None
    check_installed(store, disk)


def test_one_that_rotted_is_never_installed_and_is_begun_anew() -> None:
    ((name, content),) = partly_received().items()
    refused = 0
    for bit in random.Random(1).sample(range(len(content) * 8), 600):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        disk = FakeDisk({name: bytes(damaged)})
        store, runtime = open_store(disk)
        receiver = store.receive(META)
        resumed = receiver.resumed
        feed(receiver, runtime)
        outcome = finish(receiver, runtime)
        if outcome is not None:
            refused += 1
            assert isinstance(outcome, ValueError) and resumed
            assert store.latest() is None
            assert disk.list() == [], "it is not tried a second time"
            receiver = store.receive(META)
            assert receiver.offset == 0
            feed(receiver, runtime)
            assert finish(receiver, runtime) is None
        check_installed(store, disk)
    assert refused > 300, "most of the file is payload"


def test_one_that_cannot_be_read_any_more_is_begun_anew() -> None:
    disk = FakeDisk(partly_received())
    store, runtime = open_store(disk)
    (inode,) = disk.names.values()
    del inode.content[300:]
    receiver = store.receive(META)
    runtime.syncer.drain()
    with pytest.raises(ValueError, match="cannot be read"):
        receiver.feed(receiver.offset, b"x")
    store.give_up_receiving()
    receiver = store.receive(META)
    assert receiver.offset == 0
    feed(receiver, runtime)
    assert finish(receiver, runtime) is None
    check_installed(store, disk)


@pytest.mark.parametrize(
    "other",
    [announced(10), announced(9, bytes(SIZE_BYTES)), announced(9, PAYLOAD[:-1])],
    ids=["index", "digest", "size"],
)
def test_another_snapshot_does_not_go_on_with_it(other: SnapshotMeta) -> None:
    disk = FakeDisk(partly_received())
    store, runtime = open_store(disk)
    receiver = store.receive(other)
    assert receiver.offset == 0 and not receiver.resumed
    runtime.syncer.drain()
    assert len(disk.list()) == 1, "the old part is gone"
    assert store.receiving() == other


def test_what_is_of_no_use_is_removed_at_the_start() -> None:
    files = partly_received()
    ((name, content),) = files.items()
    for disk, cluster_id, piece_bytes in (
        (FakeDisk(files), "c2", PIECE_BYTES),
        (FakeDisk(files), "c1", PIECE_BYTES * 2),
        (FakeDisk({name.replace("9-", "8-", 1): content}), "c1", PIECE_BYTES),
        (FakeDisk({name: content[:8] + b"\x05" + content[9:]}), "c1", PIECE_BYTES),
        (FakeDisk({name: content[:40]}), "c1", PIECE_BYTES),
        (FakeDisk({name: b""}), "c1", PIECE_BYTES),
        (FakeDisk(partly_received(60)), "c1", PIECE_BYTES),
    ):
        store, _ = open_store(disk, cluster_id, piece_bytes)
        assert store.receiving() is None
        assert disk.list() == []


def test_of_many_parts_only_the_newest_is_kept_and_none_that_a_snapshot_covers() -> None:
    parts = {}
    for number, index in enumerate((8, 10, 9), 3):
        disk = FakeDisk()
        store, runtime = open_store(disk)
        receiver = store.receive(announced(index))
        feed(receiver, runtime, 300 + 100 * number)
        runtime.syncer.drain()
        (content,) = disk.files().values()
        parts[snapshot_name(index, 2).removesuffix(".snap") + f"-{number}.part"] = content
    disk = FakeDisk(parts)
    store, runtime = open_store(disk)
    assert store.receiving() == announced(10)
    (kept,) = disk.list()
    assert re.search(r"10-0*2-4\.part$", kept)
    writer = store.writer(12, 2, b"config")
    assert disk.list() == [kept], "a new name for each"
    writer.feed(PAYLOAD)
    writer.finish(lambda outcome: None)
    runtime.syncer.drain()
    store, _ = open_store(disk)
    assert store.receiving() is None
    assert disk.list() == [snapshot_name(12, 2)]


def test_giving_it_up_removes_it() -> None:
    disk = FakeDisk(partly_received())
    store, runtime = open_store(disk)
    store.give_up_receiving()
    runtime.syncer.drain()
    assert store.receiving() is None
    assert disk.list() == []
    feed(store.receive(META), runtime, 300)
    store.give_up_receiving()
    runtime.syncer.drain()
    assert store.receiving() is None
    assert disk.list() == []
