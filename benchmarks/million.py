"""What a million replicated facts cost a real node: start-up, memory, and the pauses of a snapshot.

    python -m benchmarks.million [--facts 1000000] [--seconds 20]

The facts (users, memberships, files, seeders, a quarter each) are laid into two of three data folders as a
snapshot, by the state machine and the snapshot store that a node uses. Then real nodes run on them under a
light load. The third folder has none: its node comes late, and has the snapshot sent and installed. After that
the leader, then a follower, write one of their own. Measured on the nodes, by a timer in their event loops:
the longest time a loop was held, and the processor time its thread used meanwhile. The first is what a user
feels, and on a machine busy with other things it holds their share, too; the second is the node's own work.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import results
from benchmarks.clusters import ask, request_id
from benchmarks.processes import Process, free_ports, wait_until
from benchmarks.state_machine import facts
from cluster.config import NodeConfig
from cluster.consensus import NodeInfo
from cluster.local import prepare
from cluster.raft.disk import FolderDisk, ThreadSyncer
from cluster.raft.entries import Configuration
from cluster.raft.runtime import AsyncioRuntime
from cluster.raft.snapshots import SnapshotStore
from state_machine.machine import StateMachine

LEASE_SECONDS = 300.0  # nobody sends heartbeats for the peers of this state; a scan comes every 30 s
APART_SECONDS = 0.02  # between the light load's writes
START_SECONDS_MAX = 300.0


class Node:
    """One real node, and what it tells of itself."""

    def __init__(self, config: NodeConfig, folder: Path) -> None:
        self.config = config
        self.report = folder / f"{config.node_id}.jsonl"
        self._log = folder / f"{config.node_id}.log"
        self.process: Process | None = None
        self.start_seconds = 0.0

    @property
    def url(self) -> str:
        return self.config.http

    def launch(self) -> None:
        command = [sys.executable, "-m", "benchmarks.node_entry", str(self.config.data_dir), str(self.report)]
        environment = {"TRIMARAN_SERVICE_LEASE_SECONDS": str(LEASE_SECONDS)}
        self.process = Process(command, self._log, environment=environment)
        self._launched = time.monotonic()

    def until_answers(self) -> float:
        assert self.process is not None
        wait_until(
            lambda: ask(f"{self.url}/v1/status", seconds=1)[0] == 200,
            START_SECONDS_MAX,
            f"{self.config.node_id} answers",
            [self.process],
        )
        self.start_seconds = time.monotonic() - self._launched
        return self.start_seconds

    def start(self) -> None:
        self.launch()
        self.until_answers()

    def status(self) -> dict[str, Any]:
        return ask(f"{self.url}/v1/status", seconds=2)[1]

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop(30)
            self.process = None

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def memory_mib(self) -> dict[str, float]:
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {
            line.split(":")[0]: int(line.split()[1]) / 1024 for line in text.splitlines() if "kB" in line
        }
        return {"memory_mib": round(found["VmRSS"]), "peak_mib": round(found["VmHWM"])}

    def events(self) -> list[dict[str, Any]]:
        if not self.report.exists():
            return []
        return [json.loads(line) for line in self.report.read_text().splitlines() if line.endswith("}")]

    def moment(self, what: str, begins: bool, since: float) -> float | None:
        """When that happened first after `since`."""
        for event in self.events():
            if event["at"] >= since and event.get("what") == what and event["begins"] is begins:
                return float(event["at"])
        return None

    def holds(self, since: float, until: float) -> dict[str, float]:
        """The longest hold of its loop that began or ended between the two, and the processor time in it."""
        events = self.events()
        inside = [e for e in events if "held" in e and since <= e["at"] and e["at"] - e["held"] <= until]
        worst = max(inside, key=lambda event: float(event["held"]), default={"held": 0.0, "used": 0.0})
        collected = [float(e["collected"]) for e in events if "collected" in e and since <= e["at"] <= until]
        return {
            "pause_ms_max": round(worst["held"] * 1e3, 1),
            "of_it_cpu_ms": round(worst["used"] * 1e3, 1),
            "cpu_ms_max": round(max((float(e["used"]) for e in inside), default=0.0) * 1e3, 1),
            "collection_ms_max": round(max(collected, default=0.0) * 1e3, 1),
        }


@dataclass
class LightLoad:
    """Writes at a steady, small rate through one connection; each is timed."""

    url: str
    session: str
    apart_seconds: float = APART_SECONDS
    took: list[tuple[float, float]] = field(default_factory=list)  # (ended, seconds)
    failed: int = 0

    def __post_init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=10)
        number = 0
        while not self._end.wait(self.apart_seconds):
            number += 1
            begun = time.monotonic()
            try:
                connection.request(
                    "PUT",
                    f"/v1/groups/bench/files/light-{number % 100}",
                    _file(number),
                    self._headers(number),
                )
                response = connection.getresponse()
                response.read()
                self.failed += response.status != 200
            except (OSError, http.client.HTTPException):
                self.failed += 1
                connection.close()
            self.took.append((time.monotonic(), time.monotonic() - begun))

    def _headers(self, number: int) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.session}",
            "Idempotency-Key": request_id(number),
            "Content-Type": "application/json",
        }

    def between(self, since: float, until: float) -> dict[str, float]:
        seconds = sorted(took for at, took in self.took if since <= at <= until + 0.5)
        return {
            "writes": len(seconds),
            "write_p50_ms": round(seconds[len(seconds) // 2] * 1e3, 1) if seconds else 0.0,
            "write_max_ms": round(seconds[-1] * 1e3, 1) if seconds else 0.0,
        }

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def _file(number: int) -> str:
    document = {
        "kind": "file", "size_bytes": 1 << 20, "pieces": 4, "piece_bytes": 1 << 18, "algorithm": "sha256",
        "manifest_id": f"{number:064x}", "replace": True,
    }  # fmt: skip
    return json.dumps(document)


def sign_in(url: str) -> str:
    """A user with a group of its own; the session."""
    user = {"user": "bench", "password": "a long enough password"}
    status, answer = ask(f"{url}/v1/users", "POST", user, {"Idempotency-Key": request_id(1)}, 20)
    assert status == 200, (status, answer)
    status, answer = ask(f"{url}/v1/sessions", "POST", user, seconds=20)
    assert status == 200, (status, answer)
    session = str(answer["session"])
    headers = {"Idempotency-Key": request_id(2), "Authorization": f"Bearer {session}"}
    status, answer = ask(f"{url}/v1/groups", "POST", {"name": "bench"}, headers, 20)
    assert status == 200, (status, answer)
    return session


def state_bytes(count: int, file: Path | None) -> bytes:
    """The encoded state; from the file, which is made when missing."""
    if file is not None and file.exists():
        return file.read_bytes()
    machine = StateMachine()
    gc.disable()
    for data in facts(count):
        machine.apply([data])
    encoded = b"".join(machine.freeze().slices())
    gc.enable()
    if file is not None:
        file.write_bytes(encoded)
    return encoded


def lay(configs: list[NodeConfig], cluster_id: str, index: int, term: int, state: bytes) -> None:
    """Write the state as snapshot (index, term) into the first two of the folders; no node runs on them."""
    voters = tuple(NodeInfo(c.node_id, str(c.raft), c.http, "") for c in configs)
    encoded = msgspec.msgpack.encode(Configuration(voters))

    async def write(config: NodeConfig) -> None:
        disk = FolderDisk(config.folder.raft)
        loop = asyncio.get_running_loop()
        syncer = ThreadSyncer(loop.call_soon_threadsafe)
        store = SnapshotStore.open(disk, AsyncioRuntime(syncer), cluster_id=cluster_id)
        writer = store.writer(index, term, encoded)
        for at in range(0, len(state), 1 << 20):
            writer.feed(state[at : at + (1 << 20)])
        done: asyncio.Future[OSError | None] = loop.create_future()
        writer.finish(done.set_result)
        assert await done is None
        store.close()
        syncer.close()
        disk.close()

    for config in configs[:2]:
        asyncio.run(write(config))


def _settled(nodes: list[Node]) -> tuple[Node, Node]:
    """(leader, another) once they agree."""

    def agree() -> bool:
        seen = [node.status() for node in nodes]
        leaders = {status.get("leader") for status in seen}
        return len(leaders) == 1 and leaders != {None} and all(status.get("ready") for status in seen)

    wait_until(agree, 120, "the nodes agree on a leader")
    leader_id = nodes[0].status()["leader"]
    leader = next((node for node in nodes if node.config.node_id == leader_id), None)
    assert leader is not None
    return leader, next(node for node in nodes if node is not leader)


def measure(folder: Path, count: int, seconds: float, file: Path | None) -> list[dict[str, Any]]:
    base = free_ports(1)[0]
    configs = prepare(folder / "nodes", 3, base, insecure=True)
    nodes = [Node(config, folder) for config in configs]
    rows: list[dict[str, Any]] = []

    def keep(what: str, **values: Any) -> None:
        rows.append({"what": what, **values})
        print(rows[-1], flush=True)

    load: LightLoad | None = None
    try:
        for node in nodes:
            node.launch()
        for node in nodes:
            node.until_answers()
        _settled(nodes)
        status = nodes[0].status()
        term, index = int(status["term"]), 1_000_000
        for node in nodes:
            node.stop()
        state = state_bytes(count, file)
        lay(configs, str(status["cluster_id"]), index, term, state)
        laid = {"snapshot_mib": round(len(state) / 2**20, 1)}
        del state

        for node in nodes[:2]:  # one after the other: a start has the machine to itself
            node.start()
        keep(
            "start", facts=count, start_seconds=round(min(n.start_seconds for n in nodes[:2]), 2),
            start_seconds_max=round(max(n.start_seconds for n in nodes[:2]), 2), **nodes[0].memory_mib(), **laid,
        )  # fmt: skip
        leader, follower = _settled(nodes[:2])
        load = LightLoad(leader.url, sign_in(leader.url))
        since = time.monotonic()
        term = int(leader.status()["term"])
        time.sleep(seconds)
        keep(
            "light load alone",
            **leader.holds(since, time.monotonic()),
            **load.between(since, time.monotonic()),
        )

        late = nodes[2]
        since = time.monotonic()
        late.start()
        wait_until(lambda: late.moment("installing", False, since) is not None, 300, "the late node installs")
        ended = late.moment("installing", False, since)
        assert ended is not None
        time.sleep(0.5)
        begun_at = late.moment("receiving", True, since) or since
        keep(
            "install", node="the one that installs", seconds=round(ended - begun_at, 2), **late.holds(begun_at, ended),
            **load.between(begun_at, ended), **late.memory_mib(),
        )  # fmt: skip
        keep("install", node="the leader, sending", seconds=round(ended - begun_at, 2), **leader.holds(begun_at, ended), **load.between(begun_at, ended), **leader.memory_mib())  # fmt: skip
        wait_until(lambda: bool(late.status().get("ready")), 60, "the late node is ready")

        for node, name in (
            (leader, "the leader"),
            (follower, "a follower"),
            (late, "the one that installed"),
        ):
            keep("write a snapshot", node=name, **_snapshot(node, load))
        changed = int(leader.status()["term"]) - term
        keep("elections meanwhile", terms=changed, failed_writes=load.failed, writes=len(load.took))
    finally:
        if load is not None:
            load.stop()
        for node in nodes:
            node.stop()
    return rows


def _snapshot(node: Node, load: LightLoad) -> dict[str, Any]:
    since = time.monotonic()

    def begun() -> bool:
        node.signal(signal.SIGUSR1)
        time.sleep(0.2)
        return node.moment("writing", True, since) is not None

    wait_until(begun, 60, f"{node.config.node_id} begins a snapshot")
    wait_until(lambda: node.moment("writing", False, since) is not None, 120, "the snapshot is written")
    first, last = node.moment("writing", True, since), node.moment("writing", False, since)
    assert first is not None
    assert last is not None
    time.sleep(0.5)
    return {
        "seconds": round(last - first, 2),
        **node.holds(first, last),
        **load.between(first, last),
        **node.memory_mib(),
    }


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then, too
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the light load alone")
    parser.add_argument(
        "--state", type=Path, help="the encoded state; written when missing, to be used again"
    )
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    before = os.getloadavg()
    folder = Path(tempfile.mkdtemp(prefix="trimaran-million-"))
    try:
        rows = measure(folder, options.facts, options.seconds, options.state)
    finally:
        shutil.rmtree(folder)
    note = f"load average before {before[0]:.1f}, after {os.getloadavg()[0]:.1f}, of other work on the machine, too"
    if options.no_keep:
        print(results.table(rows))
    else:
        results.keep("million", rows, note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
