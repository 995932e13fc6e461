"""One life of a process with a journal and snapshots, as `test_disk.py` starts and kills it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import msgspec

from cluster.raft.disk import FolderDisk, ThreadSyncer
from cluster.raft.journal import Journal
from cluster.raft.journal_format import Identity
from cluster.raft.kill_points import VARIABLE
from cluster.raft.runtime import AsyncioRuntime
from cluster.raft.snapshot_format import SnapshotMeta
from cluster.raft.snapshots import SnapshotStore

PIECE_BYTES = 8 * 1024


def run(folder: Path, output: Path, point: str, rounds: int) -> None:
    os.environ[VARIABLE] = point
    with output.open("w", buffering=1) as report:
        asyncio.run(live(folder, rounds, lambda *words: print(*words, file=report)))


def command(index: int) -> bytes:
    return b"%120d" % index


def state(index: int) -> bytes:
    return b"%20d" % index * 2000


async def live(folder: Path, rounds: int, say: object) -> None:
    assert callable(say)
    disk = FolderDisk(folder)
    loop = asyncio.get_running_loop()
    syncer = ThreadSyncer(loop.call_soon_threadsafe)
    runtime = AsyncioRuntime(syncer)
    journal = Journal.open(
        disk,
        runtime,
        identity=Identity("n1", "c1"),
        create=not Journal.exists(disk),
        segment_bytes=4000,
        on_fatal=lambda reason: say("fatal", reason),
    )
    store = SnapshotStore.open(disk, runtime, cluster_id="c1", piece_bytes=PIECE_BYTES)
    covered = check_found(journal, store)
    say("found", max(journal.last_index, covered), journal.getCurrentTerm())
    begun = store.receiving()
    if begun is not None:
        say("resumed", begun.index)
        await receive(store, begun)
        check_found(journal, store)

    term = journal.getCurrentTerm() + 1
    journal.setCurrentTerm(term, "n1")
    for number in range(rounds):
        for _ in range(4):
            index = journal.last_index + 1
            journal.add(command(index), index, term)
        journal.flush()
        synced: asyncio.Future[None] = loop.create_future()
        journal.when_synced(journal.written, lambda synced=synced: synced.set_result(None))
        await synced
        say("synced", journal.synced_index, term)
        journal.onOneSecondTimer()
        if number % 4 == 3:
            index = journal.synced_index
            written: asyncio.Future[object] = loop.create_future()
            writer = store.writer(index, term, b"")
            writer.feed(state(index))
            writer.finish(written.set_result)
            assert await written is None
            journal.compact_to(index)
            await install(store, index + 3, term)
            journal.reset_to(index + 3, term)
            journal.flush()
    journal.close()
    store.close()
    await loop.run_in_executor(None, syncer.close)
    disk.close()


def check_found(journal: Journal, store: SnapshotStore) -> int:
    """What an earlier life left is whole; the index its snapshot covers."""
    meta = store.latest()
    covered = 0
    if meta is not None:
        covered = meta.index
        assert b"".join(store.read(at, 5000) for at in range(0, meta.size_bytes, 5000)) == state(covered)
        if journal.last_index < covered:
            journal.reset_to(covered, meta.term)
    assert not len(journal) or journal.first_index <= covered + 1, "a gap between snapshot and journal"
    for found, index, _ in journal[:]:
        assert found in (command(index), b""), "another entry"
    return covered


async def install(store: SnapshotStore, index: int, term: int) -> None:
    """Another node's snapshot, a little ahead, after one that was given up."""
    data = state(index)
    digest = hashlib.sha256(msgspec.msgpack.encode((index, term, b"")) + data).digest()
    store.receive(SnapshotMeta(index + 1, term, b"", 10, bytes(32))).feed(0, bytes(10))
    await receive(store, SnapshotMeta(index, term, b"", len(data), digest))


async def receive(store: SnapshotStore, meta: SnapshotMeta) -> None:
    """The whole of it, or the rest of what an earlier life had."""
    receiver = store.receive(meta)
    assert receiver.feed(receiver.offset, state(meta.index)[receiver.offset :])
    written: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    receiver.finish(written.set_result)
    assert await written is None
