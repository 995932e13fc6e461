"""What the journal, the snapshots and the transport of a node cost by themselves, on this machine.

    python benchmarks/raft_io.py [--folder DIR] [--seconds 2] [--json]

Journal: microseconds per entry added, group commit against one sync per entry, reading back. Snapshots: writing and
reading, and the longest time the event loop stood still meanwhile. Transport: two processes on loopback with mutual
TLS: microseconds per small message, round trip, megabytes per second. Nothing is compared here; the comparison with
etcd is `benchmarks/consensus.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster import tls
from cluster.api import certificates
from cluster.consensus import NodeInfo
from cluster.raft.disk import FolderDisk, ThreadSyncer
from cluster.raft.frames import decode_message, encode
from cluster.raft.journal import Journal
from cluster.raft.journal_format import Identity
from cluster.raft.messages import AppendEntries, Message, Probe, ProbeAck
from cluster.raft.runtime import AsyncioRuntime
from cluster.raft.snapshots import SnapshotStore
from cluster.raft.transport import Transport

COMMAND = bytes(range(250))
Results = dict[str, float]


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


class OpenJournal:
    def __init__(self, folder: Path, *, create: bool) -> None:
        self.disk = FolderDisk(folder)
        self.syncer = ThreadSyncer(asyncio.get_running_loop().call_soon_threadsafe)
        self.runtime = AsyncioRuntime(self.syncer)
        self.journal = Journal.open(
            self.disk, self.runtime, identity=Identity("n1", "c1"), create=create, on_fatal=sys.exit
        )

    async def close(self) -> None:
        self.journal.close()
        await asyncio.get_running_loop().run_in_executor(None, self.syncer.close)
        self.disk.close()

    async def synced(self) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.journal.when_synced(self.journal.written, lambda: waiting.set_result(None))
        self.journal.flush()
        await waiting


async def measure_journal(folder: Path, seconds: float) -> Results:
    results: Results = {}
    opened = OpenJournal(folder, create=True)
    journal = opened.journal
    journal.setCurrentTerm(1, "n1")

    count, adding, flushing = 0, 0.0, 0.0
    while adding + flushing < seconds:
        begun = time.perf_counter()
        for index in range(journal.last_index + 1, journal.last_index + 1001):
            journal.add(COMMAND, index, 1)
        between = time.perf_counter()
        await opened.synced()
        adding += between - begun
        flushing += time.perf_counter() - between
        count += 1000
    results["journal_add_us_per_entry"] = adding / count * 1e6
    results["journal_flush_mb_per_second"] = count * len(COMMAND) / 1e6 / flushing

    latencies = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        journal.add(COMMAND, journal.last_index + 1, 1)
        await opened.synced()
        latencies.append(time.perf_counter() - begun)
    results["journal_single_sync_ms_p50"] = statistics.median(latencies) * 1e3
    results["journal_single_sync_ms_p99"] = percentile(latencies, 0.99) * 1e3

    async def writer(stop_at: float) -> int:
        written = 0
        while time.perf_counter() < stop_at:
            journal.add(COMMAND, journal.last_index + 1, 1)
            await opened.synced()
            written += 1
        return written

    cpu = time.process_time()
    total = sum(await asyncio.gather(*(writer(time.perf_counter() + seconds) for _ in range(64))))
    results["journal_group_commit_64_writers_per_second"] = total / seconds
    results["journal_group_commit_cpu_us_per_entry"] = (time.process_time() - cpu) / total * 1e6
    size = journal.size_bytes
    entries = len(journal)
    await opened.close()

    begun = time.perf_counter()
    opened = OpenJournal(folder, create=False)
    spent = time.perf_counter() - begun
    assert len(opened.journal) == entries
    results["journal_open_mb_per_second"] = size / 1e6 / spent
    results["journal_open_us_per_entry"] = spent / entries * 1e6
    await opened.close()
    return results


async def measure_snapshots(folder: Path) -> Results:
    """100 MB as the state machine gives it, in slices, with the journal syncing beside it."""
    opened = OpenJournal(folder, create=True)
    journal = opened.journal
    store = SnapshotStore.open(opened.disk, opened.runtime, cluster_id="c1")
    journal.setCurrentTerm(1, "n1")
    pauses: list[float] = []
    syncs: list[float] = []
    running = True

    async def watch() -> None:
        while running:
            begun = time.perf_counter()
            await asyncio.sleep(0.001)
            pauses.append(time.perf_counter() - begun)

    async def keep_writing() -> None:
        while running:
            begun = time.perf_counter()
            journal.add(COMMAND, journal.last_index + 1, 1)
            await opened.synced()
            syncs.append(time.perf_counter() - begun)
            await asyncio.sleep(0.002)

    watchers = [asyncio.create_task(watch()), asyncio.create_task(keep_writing())]
    data = COMMAND * 1000
    begun = time.perf_counter()
    writer = store.writer(1, 1, b"")
    for _ in range(400):
        writer.feed(data)
        await asyncio.sleep(0)
        while writer.pending_bytes > 16 << 20:
            await asyncio.sleep(0.002)
    written: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    writer.finish(written.set_result)
    assert await written is None
    spent = time.perf_counter() - begun
    running = False
    await asyncio.gather(*watchers)
    results: Results = {
        "snapshot_write_mb_per_second": 100 / spent,
        "snapshot_write_loop_pause_ms_max": max(pauses) * 1e3,
        "snapshot_write_journal_sync_ms_p50": statistics.median(syncs) * 1e3,
        "snapshot_write_journal_sync_ms_max": max(syncs) * 1e3,
    }
    meta = store.latest()
    assert meta is not None
    begun = time.perf_counter()
    for offset in range(0, meta.size_bytes, 256 << 10):
        store.read(offset, 256 << 10)
    results["snapshot_read_mb_per_second"] = 100 / (time.perf_counter() - begun)
    store.close()
    await opened.close()
    return results


def measure_codec() -> Results:
    results: Results = {}
    heartbeat = AppendEntries(7, 1000, 1000, 7, [], 12345.678, 0.05)
    loaded = AppendEntries(7, 1000, 1000, 7, [(COMMAND, index, 7) for index in range(64)], 12345.678, 0.05)
    for name, message in (("heartbeat", heartbeat), ("append_64_entries", loaded)):
        body = encode(message)[4:]
        count = 20_000
        begun = time.perf_counter()
        for _ in range(count):
            encode(message)
        between = time.perf_counter()
        for _ in range(count):
            decode_message(body)
        results[f"codec_encode_{name}_us"] = (between - begun) / count * 1e6
        results[f"codec_decode_{name}_us"] = (time.perf_counter() - between) / count * 1e6
    return results


class End:
    """One node of the transport's measurement: counts, and answers probes."""

    def __init__(self, members: dict[str, str]) -> None:
        self.members = members
        self.received = 0
        self.received_bytes = 0
        self.up = asyncio.Event()
        self.answer: asyncio.Future[None] | None = None
        self.transport: Transport

    def on_connected(self, node_id: str) -> None:
        self.up.set()

    def on_disconnected(self, node_id: str) -> None:
        self.up.clear()

    def on_message(self, node_id: str, message: Message) -> None:
        self.received += 1
        if isinstance(message, Probe):
            self.transport.send(node_id, ProbeAck(self.received, message.round, message.sent_at))
        elif isinstance(message, ProbeAck) and self.answer is not None:
            self.answer.set_result(None)

    def authorize(self, fingerprint: str) -> str | None:
        return self.members.get(fingerprint)

    async def open(self, folder: Path, node_id: str) -> None:
        files = [folder / name for name in ("ca.pem", f"{node_id}.pem", f"{node_id}.key")]
        self.transport = Transport(
            self,
            node_id=node_id,
            cluster_id="c1",
            listen_host="127.0.0.1",
            listen_port=0,
            server_tls=tls.raft_server_context(*files),
            client_tls=tls.raft_client_context(*files),
        )
        await self.transport.open()

    async def round_trip(self, node_id: str) -> float:
        self.answer = asyncio.get_running_loop().create_future()
        begun = time.perf_counter()
        self.transport.send(node_id, Probe(1, 0, 0.0))
        await self.answer
        return time.perf_counter() - begun


def make_credentials(folder: Path) -> dict[str, str]:
    authority = tls.ClusterAuthority.make("c1")
    (folder / "ca.pem").write_text(authority.pem)
    members = {}
    for node_id in ("n1", "n2"):
        key = certificates.new_key()
        (folder / f"{node_id}.key").write_bytes(certificates.key_pem(key))
        request = certificates.make_request(key, node_id)
        (folder / f"{node_id}.pem").write_text(authority.issue_node(request, node_id, ["127.0.0.1"]))
        members[certificates.key_fingerprint(key.public_key())] = node_id
    return members


def other_process(folder: Path, members: dict[str, str], pipe: Connection) -> None:
    async def main() -> None:
        end = End(members)
        await end.open(folder, "n2")
        pipe.send(end.transport.port)
        loop = asyncio.get_running_loop()
        while True:
            await loop.run_in_executor(None, pipe.recv)
            pipe.send((end.received, time.process_time()))

    asyncio.run(main())


async def measure_transport(folder: Path, seconds: float) -> Results:
    members = make_credentials(folder)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=other_process, args=(folder, members, there), daemon=True
    )
    process.start()
    loop = asyncio.get_running_loop()

    async def ask() -> tuple[int, float]:
        here.send(None)
        answer: tuple[int, float] = await loop.run_in_executor(None, here.recv)
        return answer

    end = End(members)
    try:
        port = await loop.run_in_executor(None, here.recv)
        await end.open(folder, "n1")
        fingerprint = next(key for key, node_id in members.items() if node_id == "n2")
        begun = time.perf_counter()
        end.transport.dial(NodeInfo("n2", f"127.0.0.1:{port}", "", fingerprint))
        await end.up.wait()
        results: Results = {"transport_connect_ms": (time.perf_counter() - begun) * 1e3}

        trips = [await end.round_trip("n2") for _ in range(2000)]
        results["transport_round_trip_us_p50"] = statistics.median(trips) * 1e6
        results["transport_round_trip_us_p99"] = percentile(trips, 0.99) * 1e6

        async def flood(message: Message, per_turn: int, outstanding_max: int) -> tuple[float, float, float]:
            """Messages per second, CPU microseconds per message here and there."""
            received, other_cpu = await ask()
            sent, cpu, begun = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() - begun < seconds:
                for _ in range(per_turn):
                    end.transport.send("n2", message)
                sent += per_turn
                if sent % outstanding_max < per_turn:
                    await end.round_trip("n2")
                else:
                    await asyncio.sleep(0)
            await end.round_trip("n2")
            spent = time.perf_counter() - begun
            now_received, now_cpu = await ask()
            assert now_received - received >= sent
            return sent / spent, (time.process_time() - cpu) / sent * 1e6, (now_cpu - other_cpu) / sent * 1e6

        heartbeat = AppendEntries(7, 1000, 1000, 7, [], 12345.678, 0.05)
        for name, per_turn in (("one_per_turn", 1), ("32_per_turn", 32)):
            rate, sender, receiver = await flood(heartbeat, per_turn, 2048)
            results[f"transport_small_{name}_per_second"] = rate
            results[f"transport_small_{name}_sender_cpu_us"] = sender
            results[f"transport_small_{name}_receiver_cpu_us"] = receiver
        large = AppendEntries(7, 1000, 1000, 7, [(bytes(1 << 20), 1, 7)], 12345.678, 0.05)
        rate, sender, receiver = await flood(large, 1, 16)
        results["transport_mb_per_second"] = rate * (1 << 20) / 1e6
        results["transport_cpu_ms_per_mb"] = (sender + receiver) / 1e3 / ((1 << 20) / 1e6)
        await end.transport.close()
        return results
    finally:
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; the disk that matters (default: the temporary folder)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each timed part")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="raft-io-", dir=options.folder))
    results: Results = {}
    parts: list[Callable[[], Awaitable[Results]]] = [
        lambda: measure_journal(folder / "journal", options.seconds),
        lambda: measure_snapshots(folder / "snapshots"),
        lambda: measure_transport(folder, options.seconds),
    ]
    try:
        results |= measure_codec()
        for part in parts:
            results |= asyncio.run(part())  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:48} {value:12,.2f}")


if __name__ == "__main__":
    main()
