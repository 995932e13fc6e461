"""Snapshots: whole or not there, with crashes at every step, a full disk, damage, and broken-off installations."""

from __future__ import annotations

import random

import pytest
from fake_disk import Crash, FakeDisk, FakeRuntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.consensus import ConsensusStartError
from cluster.raft import snapshot_format, snapshots
from cluster.raft.disk import DiskFullError
from cluster.raft.snapshot_format import SnapshotDamagedError, SnapshotMeta, snapshot_name
from cluster.raft.snapshots import SnapshotStore

PIECE_BYTES, CHECKED_BYTES = 64, 16
Outcomes = list[Exception | None]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot_format, "CHECKED_BYTES", CHECKED_BYTES)
        yield


def open_store(disk: FakeDisk, cluster_id: str = "c1") -> tuple[SnapshotStore, FakeRuntime]:
    runtime = FakeRuntime()
    return SnapshotStore.open(disk, runtime, cluster_id=cluster_id, piece_bytes=PIECE_BYTES), runtime


def payload_of(index: int, size: int = 300) -> bytes:
    return random.Random(index).randbytes(size)


def write(store: SnapshotStore, runtime: FakeRuntime, index: int, size: int = 300) -> Outcomes:
    outcomes: Outcomes = []
    rng = random.Random(index)
    data = payload_of(index, size)
    writer = store.writer(index, 2, b"config %d" % index)
    try:
        while data:
            cut = rng.randint(1, 100)
            writer.feed(data[:cut])
            data = data[cut:]
            runtime.syncer.step()
        writer.finish(outcomes.append)
    except DiskFullError as error:
        writer.abort()
        outcomes.append(error)
    runtime.syncer.drain()
    return outcomes


def read_all(store: SnapshotStore, step: int = 50) -> bytes:
    parts = []
    while part := store.read(sum(map(len, parts)), step):
        parts.append(part)
    return b"".join(parts)


def check_latest(store: SnapshotStore, index: int, size: int = 300) -> None:
    meta = store.latest()
    assert meta is not None
    assert (meta.index, meta.term, meta.config, meta.size_bytes) == (index, 2, b"config %d" % index, size)
    assert read_all(store) == payload_of(index, size)


@given(st.integers(0, 500), st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_what_was_written_is_read_back(size: int, step: int) -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    assert store.latest() is None
    assert write(store, runtime, 7, size) == [None]
    for found in (store, open_store(FakeDisk(disk.files()))[0]):
        check_latest(found, 7, size)
        assert read_all(found, step) == payload_of(7, size)
        assert found.read(size, 10) == b""
        for offset in range(0, size, 37):
            assert found.read(offset, step) == payload_of(7, size)[offset : offset + step]


@given(st.integers(0, 120), st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_crash_at_any_step_leaves_a_whole_one(steps: int, seed: int, power: bool, receiving: bool) -> None:
    rng = random.Random(seed)
    disk = FakeDisk()
    store, runtime = open_store(disk)
    assert write(store, runtime, 7) == [None]
    source, source_runtime = open_store(FakeDisk())
    write(source, source_runtime, 9)
    safe = 7
    disk.steps_left = steps
    try:
        outcomes = install(source, store, runtime) if receiving else write(store, runtime, 9)
        assert outcomes == [None]
        safe = 9
    except Crash:
        pass
    found, runtime = open_store(disk.crash(rng, power=power))
    meta = found.latest()
    assert meta is not None
    assert meta.index in (safe, 9)
    check_latest(found, meta.index)
    assert write(found, runtime, 11) == [None]
    check_latest(found, 11)


def install(source: SnapshotStore, target: SnapshotStore, runtime: FakeRuntime) -> Outcomes:
    meta = source.latest()
    assert meta is not None
    receiver = target.receive(meta)
    outcomes: Outcomes = []
    while receiver.offset < meta.size_bytes:
        assert receiver.feed(receiver.offset, source.read(receiver.offset, 45))
        runtime.syncer.step()
    receiver.finish(outcomes.append)
    runtime.syncer.drain()
    return outcomes


def test_an_installation_goes_on_where_it_stopped() -> None:
    source, source_runtime = open_store(FakeDisk())
    write(source, source_runtime, 9)
    meta = source.latest()
    assert meta is not None
    disk = FakeDisk()
    store, runtime = open_store(disk)
    receiver = store.receive(meta)
    assert receiver.feed(0, source.read(0, 100))
    assert not receiver.feed(0, source.read(0, 100)), "a repeated chunk"
    assert not receiver.feed(150, source.read(150, 50)), "a chunk from beyond"
    assert not receiver.feed(100, bytes(201)), "more than was announced"
    assert receiver.offset == 100
    # Another leader, another connection, the same digest: the rest is enough.
    assert receiver.feed(100, source.read(100, 200))
    outcomes: Outcomes = []
    receiver.finish(outcomes.append)
    assert store.latest() is None, "not before it is safe"
    runtime.syncer.drain()
    assert outcomes == [None]
    check_latest(store, 9)
    assert store.latest() == meta


def test_bytes_other_than_announced_are_refused_and_removed() -> None:
    source, source_runtime = open_store(FakeDisk())
    write(source, source_runtime, 9)
    meta = source.latest()
    assert meta is not None
    wrong = SnapshotMeta(meta.index, meta.term, b"another configuration", meta.size_bytes, meta.digest)
    for announced, data in ((meta, bytes(300)), (wrong, payload_of(9))):
        disk = FakeDisk()
        store, runtime = open_store(disk)
        write(store, runtime, 7)
        receiver = store.receive(announced)
        assert receiver.feed(0, data)
        outcomes: Outcomes = []
        receiver.finish(outcomes.append)
        runtime.syncer.drain()
        assert isinstance(outcomes[0], ValueError)
        check_latest(store, 7)
        assert len(disk.list()) == 1


def test_a_slow_disk_bounds_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "PENDING_BYTES_MAX", 100)
    store, runtime = open_store(FakeDisk())
    receiver = store.receive(SnapshotMeta(9, 2, b"", 10_000, bytes(32)))
    assert receiver.feed(0, bytes(80))
    assert receiver.feed(80, bytes(80))
    assert not receiver.feed(160, bytes(80))
    runtime.syncer.drain()
    assert receiver.feed(160, bytes(80))


@pytest.mark.parametrize("receiving", [False, True])
def test_a_disk_full_at_any_byte_keeps_the_older_one(receiving: bool) -> None:
    source, source_runtime = open_store(FakeDisk())
    write(source, source_runtime, 9)
    fitted = 0
    for room in range(0, 620, 5):
        disk = FakeDisk()
        store, runtime = open_store(disk)
        write(store, runtime, 7)
        disk.room_bytes = disk.used() + room
        if receiving:
            try:
                outcomes = install(source, store, runtime)
            except DiskFullError as error:
                outcomes = [error]
                assert store._receiver is not None
                store._receiver.abort()
                runtime.syncer.drain()
        else:
            outcomes = write(store, runtime, 9)
        if outcomes == [None]:
            fitted += 1
            check_latest(store, 9)
            continue
        assert isinstance(outcomes[0], DiskFullError)
        check_latest(store, 7)
        assert len(disk.list()) == 1, "nothing is left of the attempt"
        disk.room_bytes = None
        assert write(store, runtime, 9) == [None]
        check_latest(store, 9)
    assert fitted


def test_a_failed_sync_is_reported() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    disk.fail_sync = True
    outcomes = write(store, runtime, 9)
    assert len(outcomes) == 1
    assert isinstance(outcomes[0], OSError)
    assert not isinstance(outcomes[0], DiskFullError)
    assert store.latest() is None


def test_every_flipped_bit_is_noticed() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 9, 100)
    ((name, content),) = disk.files().items()
    for bit in range(len(content) * 8):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ConsensusStartError) as caught:
            read_all(open_store(FakeDisk({name: bytes(damaged)}))[0])
        assert "snapshot" in str(caught.value)
        assert name in str(caught.value)


def test_every_cut_is_noticed() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 9, 100)
    ((name, content),) = disk.files().items()
    for length in range(len(content)):
        with pytest.raises(SnapshotDamagedError):
            open_store(FakeDisk({name: content[:length]}))


def test_damage_while_running_is_noticed_too() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 9)
    inode = next(iter(disk.names.values()))
    inode.content[150] ^= 1
    with pytest.raises(ValueError, match="add it again as a new node"):
        read_all(store)


def test_a_newer_format_and_another_cluster_are_refused() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 9)
    ((name, content),) = disk.files().items()
    newer = bytearray(content)
    newer[8] = 5
    with pytest.raises(ConsensusStartError, match="newer version"):
        open_store(FakeDisk({name: bytes(newer)}))
    with pytest.raises(ConsensusStartError, match="belongs to cluster 'c1'"):
        open_store(FakeDisk({name: content}), "c2")
    other = snapshot_name(10, 2)
    with pytest.raises(SnapshotDamagedError, match="written as another"):
        open_store(FakeDisk({other: content}))


def test_unfinished_work_is_given_up() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 7)
    first = store.writer(8, 2, b"")
    first.feed(bytes(200))
    second = store.writer(8, 2, b"config 8")
    second.feed(payload_of(8))
    outcomes: Outcomes = []
    second.finish(outcomes.append)
    runtime.syncer.drain()
    assert outcomes == [None]
    check_latest(store, 8)
    assert disk.list() == [snapshot_name(8, 2)]
    store.receive(SnapshotMeta(20, 2, b"", 1000, bytes(32))).feed(0, bytes(200))
    other = store.receive(SnapshotMeta(21, 2, b"", 1000, bytes(32)))
    other.feed(0, bytes(200))
    store.give_up_receiving()
    store.writer(9, 2, b"").feed(bytes(200))
    store.close()
    runtime.syncer.drain()
    assert disk.list() == [snapshot_name(8, 2)]


def test_one_overtaken_while_written_does_not_come_back() -> None:
    source, source_runtime = open_store(FakeDisk())
    write(source, source_runtime, 9)
    disk = FakeDisk()
    store, runtime = open_store(disk)
    writer = store.writer(8, 2, b"config 8")
    writer.feed(payload_of(8))
    assert install(source, store, runtime) == [None]
    outcomes: Outcomes = []
    writer.finish(outcomes.append)
    runtime.syncer.drain()
    assert outcomes == [None]
    check_latest(store, 9)
    check_latest(open_store(FakeDisk(disk.files()))[0], 9)


def test_leftovers_are_removed_at_the_start() -> None:
    disk = FakeDisk()
    store, runtime = open_store(disk)
    write(store, runtime, 9)
    files = disk.files() | {"snapshot-1-1-1.tmp": b"x", "snapshot-1-1-2.part": b"y", "lock": b""}
    disk = FakeDisk(files)
    check_latest(open_store(disk)[0], 9)
    assert disk.list() == ["lock", snapshot_name(9, 2)]
