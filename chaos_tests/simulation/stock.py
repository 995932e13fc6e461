"""Canaries: PySyncObj 0.3.17 as it comes, under the same kind of trouble, must fail.

Owned here: a virtual clock, network and poller around the stock `SyncObj`, and one small scenario for each finding that the
issue names. Each returns what went wrong; nothing wrong means that this simulation, or the engine underneath, is not
what the corrections were made for, and fails the build.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pysyncobj.pickle as engine_pickle
import pysyncobj.syncobj as engine
from pysyncobj import SyncObj, SyncObjConf, replicated
from pysyncobj.transport import Transport

from cluster.raft.guard import PeerNode


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 3e-5  # time passes inside a tick, else the engine's send loop never ends
        return self.now


class _NoPoller:
    def subscribe(self, *_: Any) -> None: ...

    def unsubscribe(self, *_: Any) -> None: ...

    def poll(self, _: float) -> None: ...


class _Links(Transport):  # type: ignore[misc]
    ready = True

    def __init__(self, cluster: StockCluster, me: str) -> None:
        super().__init__(None, None, [])
        self._cluster, self._me = cluster, me

    def send(self, node: Any, message: Any) -> bool:
        return self._cluster.send(self._me, node.id, message)

    def addNode(self, node: Any) -> None: ...

    def dropNode(self, node: Any) -> None: ...

    def destroy(self) -> None: ...


class StockNode(SyncObj):  # type: ignore[misc]
    def __init__(self, cluster: StockCluster, me: str, others: list[str], conf: SyncObjConf) -> None:
        self.links = _Links(cluster, me)
        super().__init__(PeerNode(me), [PeerNode(other) for other in others], conf, transport=self.links)
        self.values: dict[str, Any] = {}
        self.applied: list[str] = []
        self.errors: list[str] = []

    @replicated  # type: ignore[misc]
    def put(self, key: str, value: Any) -> int:
        self.values[key] = value
        self.applied.append(key)
        return len(self.applied)

    @property
    def log(self) -> list[Any]:
        entries: list[Any] = self._SyncObj__raftLog[:]
        return entries


class StockCluster:
    """Stock nodes in virtual time. FIFO links; files as the engine writes them."""

    def __init__(self, size: int, seed: int, folder: str, **conf: Any) -> None:
        self.random = random.Random(seed)
        self.clock = _Clock()
        self.folder = folder
        self.conf = conf
        self.ids = [f"n{number}:1" for number in range(size)]
        self.nodes: dict[str, StockNode] = {}
        self.cut_links: set[tuple[str, str]] = set()
        self.delay: dict[tuple[str, str], float] = {}
        self._queue: list[tuple[float, int, str, str, bytes]] = []
        self._count = 0
        self._last: dict[tuple[str, str], float] = {}

    def path(self, node_id: str) -> str:
        return os.path.join(self.folder, node_id.replace(":", "_"))

    def start(self, node_id: str) -> StockNode:
        options: dict[str, Any] = {
            "autoTick": False, "journalFile": self.path(node_id) + ".journal", "useFork": False,
            "fullDumpFile": self.path(node_id) + ".dump", **self.conf,
        }  # fmt: skip
        others = [other for other in self.ids if other != node_id]
        node = self.nodes[node_id] = StockNode(self, node_id, others, SyncObjConf(**options))
        for other_id, other in self.nodes.items():
            if other_id != node_id and (node_id, other_id) not in self.cut_links:
                other.links._onNodeConnected(PeerNode(node_id))
                node.links._onNodeConnected(PeerNode(other_id))
        return node

    def kill(self, node_id: str) -> None:
        node = self.nodes.pop(node_id)
        node._SyncObj__raftLog._destroy()
        self._queue = [item for item in self._queue if node_id not in item[2:4]]
        heapq.heapify(self._queue)
        for other in self.nodes.values():
            other.links._onNodeDisconnected(PeerNode(node_id))

    def cut(self, a: str, b: str) -> None:
        self.cut_links |= {(a, b), (b, a)}
        self._queue = [item for item in self._queue if {item[2], item[3]} != {a, b}]
        heapq.heapify(self._queue)
        for one, other in ((a, b), (b, a)):
            if one in self.nodes:
                self.nodes[one].links._onNodeDisconnected(PeerNode(other))

    def heal(self, only: set[tuple[str, str]] | None = None) -> None:
        for a, b in sorted(self.cut_links if only is None else only):
            self.cut_links.discard((a, b))
            if a in self.nodes and b in self.nodes:
                self.nodes[a].links._onNodeConnected(PeerNode(b))

    def send(self, sender: str, receiver: str, message: Any) -> bool:
        if sender not in self.nodes or receiver not in self.nodes or (sender, receiver) in self.cut_links:
            return False
        link = (sender, receiver)
        arrival = self.clock.now + self.delay.get(link, self.random.uniform(0.005, 0.02))
        arrival = max(arrival, self._last.get(link, 0.0) + 0.004)
        self._last[link] = arrival
        self._count += 1
        heapq.heappush(self._queue, (arrival, self._count, sender, receiver, engine_pickle.dumps(message)))
        return True

    def step(self) -> None:
        self.clock.now += 0.01
        while self._queue and self._queue[0][0] <= self.clock.now:
            _, _, sender, receiver, data = heapq.heappop(self._queue)
            if receiver in self.nodes:
                node = self.nodes[receiver]
                self._guarded(node, lambda node=node, s=sender, d=data: node.links._onMessageReceived(PeerNode(s), engine_pickle.loads(d)))  # type: ignore[misc]  # fmt: skip
        for node in list(self.nodes.values()):
            self._guarded(node, lambda node=node: node._onTick(0))  # type: ignore[misc]

    def _guarded(self, node: StockNode, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # as the engine's own thread does: log, and go on
            node.errors.append(repr(error))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.step()
            if until():
                return True
        return False

    def leader(self) -> str:
        def settled() -> bool:
            return any(
                node._isLeader() and node.raftCommitIndex >= node._SyncObj__noopIDx
                for node in self.nodes.values()
            )

        assert self.run(30, settled), "no leader"
        leading = [
            (node.raftCurrentTerm, node_id) for node_id, node in self.nodes.items() if node._isLeader()
        ]
        return max(leading)[1]


@contextmanager
def stock_cluster(size: int, seed: int, **conf: Any) -> Iterator[StockCluster]:
    """The engine's clock and poller are replaced while the cluster lives."""
    kept = engine.monotonicTime, engine.createPoller, engine.random.random
    level = engine.logger.level
    with tempfile.TemporaryDirectory(prefix="stock-") as folder:
        cluster = StockCluster(size, seed, folder, **conf)
        engine.monotonicTime = cluster.clock.monotonic
        engine.createPoller = lambda _: _NoPoller()
        engine.random.random = cluster.random.random
        engine.logger.setLevel(logging.CRITICAL + 1)
        try:
            for node_id in cluster.ids:
                cluster.start(node_id)
            yield cluster
        finally:
            engine.monotonicTime, engine.createPoller, engine.random.random = kept
            engine.logger.setLevel(level)


def _put(node: StockNode, key: str, value: Any, ends: dict[str, int]) -> None:
    node.put(key, value, callback=lambda _, error: ends.__setitem__(key, error))


def snapshot_commits(seed: int) -> str | None:
    """1: a deposed leader is sent a snapshot, applies its never-replicated tail, and answers SUCCESS."""
    sizes = {"logCompactionMinEntries": 50, "logCompactionMinTime": 5, "logCompactionBatchSize": 4096}
    with stock_cluster(3, seed, appendEntriesBatchSizeBytes=4096, **sizes) as cluster:
        old_id = cluster.leader()
        old = cluster.nodes[old_id]
        ends: dict[str, int] = {}
        for other in cluster.ids:
            if other != old_id:
                cluster.cut(old_id, other)
        _put(old, "ghost", "never replicated", ends)
        cluster.run(4)
        rest = [node_id for node_id in cluster.ids if node_id != old_id]
        cluster.run(10, lambda: any(cluster.nodes[node_id]._isLeader() for node_id in rest))
        new = next(cluster.nodes[node_id] for node_id in rest if cluster.nodes[node_id]._isLeader())
        for number in range(400):
            new.put(f"k{number}", "x" * 300)
            if number % 10 == 0:
                cluster.step()
        cluster.run(3)
        for node_id in rest:
            cluster.nodes[node_id].forceLogCompaction()
        cluster.run(2)
        cluster.heal()
        cluster.run(5)
        return "a write that reached no other node was acknowledged" if ends.get("ghost") == 0 else None


def dump_clears_journal(seed: int) -> str | None:
    """2: killed after a dump was written and before the journal was trimmed: the start throws the rest away."""
    with stock_cluster(1, seed, logCompactionMinEntries=10**9, logCompactionMinTime=10**9) as cluster:
        node_id = cluster.leader()
        node = cluster.nodes[node_id]
        ends: dict[str, int] = {}
        for number in range(50):
            _put(node, f"a{number}", number, ends)
            cluster.step()
        cluster.run(1)
        node.forceLogCompaction()
        node._onTick(
            0
        )  # the dump is in place; as with the forked writer, the journal is trimmed a tick later
        node._SyncObj__serializer.checkSerializing = lambda: (1, None)
        for number in range(50):
            _put(node, f"b{number}", number, ends)
            cluster.step()
        cluster.run(1)
        cluster.kill(node_id)
        node = cluster.start(node_id)
        cluster.run(5)
        lost = [key for key, error in ends.items() if error == 0 and key not in node.values]
        return f"{len(lost)} acknowledged writes are gone" if lost else None


class _Killed(BaseException):
    pass


def compaction_loses_tail(seed: int) -> str | None:
    """3: compaction is "clear, then add again"; a kill in between loses what was not added yet."""
    with stock_cluster(1, seed, logCompactionMinEntries=10**9, logCompactionMinTime=10**9) as cluster:
        node_id = cluster.leader()
        node = cluster.nodes[node_id]
        ends: dict[str, int] = {}
        for number in range(100):
            _put(node, f"a{number}", number, ends)
            cluster.step()
        cluster.run(1)
        log = node._SyncObj__raftLog
        add, count = log.add, [0]

        def add_until_killed(*entry: Any) -> None:
            count[0] += 1
            if count[0] == 30:
                raise _Killed
            add(*entry)

        log.add = add_until_killed
        with suppress(_Killed):
            log.deleteEntriesTo(20)
        del log.add
        cluster.kill(node_id)
        node = cluster.start(node_id)
        kept = len(node.log)
        return f"{kept} entries of 82 are left" if kept < 80 else None


def truncates_acknowledged(seed: int) -> str | None:
    """5: a late AppendEntries with fewer entries cuts off what the follower has acknowledged and applied."""
    with stock_cluster(3, seed) as cluster:
        follower = cluster.nodes["n1:1"]
        sent: list[Any] = []
        follower.links.send = lambda _, message: sent.append(message) or True
        command = b"\x00" + engine_pickle.dumps((follower._methodToID["put_v0"], ("k", 1)))
        entries = [(command, index, 1) for index in range(2, 12)]

        def append(entries: list[Any]) -> None:
            message = {
                "type": "append_entries", "term": 1, "commit_index": 11, "entries": entries,
                "prevLogIdx": 1, "prevLogTerm": 0,
            }  # fmt: skip
            follower.links._onMessageReceived(PeerNode("n0:1"), message)

        append(entries)
        follower._onTick(0)
        acknowledged = (
            max(m["next_node_idx"] for m in sent if m["type"] == "next_node_idx" and m["success"]) - 1
        )
        append(entries[:3])
        end = follower.log[-1][1]
        return f"{acknowledged} acknowledged, the log ends at {end}" if end < acknowledged else None


def stale_acknowledgement(seed: int) -> str | None:
    """8: an acknowledgement of an earlier term counts in a later one: committed with one of five."""
    with stock_cluster(5, seed) as cluster:
        leader_id = cluster.leader()
        leader = cluster.nodes[leader_id]
        base, term = leader.log[-1][1], leader.raftCurrentTerm
        leader._SyncObj__setCurrentTerm(term + 2, leader_id)
        others = [node_id for node_id in cluster.ids if node_id != leader_id]
        for other in others:
            cluster.cut(leader_id, other)
        for number in range(10):
            leader.put(f"k{number}", 1)
        leader._onTick(0)
        stale = {"type": "next_node_idx", "next_node_idx": base + 11, "reset": False, "success": True}
        for other in others[:2]:
            leader._SyncObj__onMessageReceived(PeerNode(other), stale)
        leader._onTick(0)
        return "committed with one of five" if leader.raftCommitIndex > base else None


def retry_applies_twice(seed: int) -> str | None:
    """14: a caller told LEADER_CHANGED asks again, as it must, and its command is applied twice."""
    with stock_cluster(3, seed) as cluster:
        leader_id = cluster.leader()
        follower_id, other_id = (node_id for node_id in cluster.ids if node_id != leader_id)
        ends: dict[str, int] = {}
        _put(cluster.nodes[follower_id], "once", 1, ends)
        # The answer to the follower is lost with its connection; the write goes on to the third node.
        cluster.step()
        cluster.run(0.05, lambda: any(entry[1] > 2 for entry in cluster.nodes[leader_id].log))
        cluster.cut(follower_id, leader_id)
        cluster.cut(follower_id, other_id)
        cluster.run(3)
        cluster.heal()
        cluster.run(5)
        if ends.get("once") == 0:
            return None
        _put(cluster.nodes[follower_id], "once", 1, ends)
        cluster.run(5)
        count = cluster.nodes[other_id].applied.count("once")
        return f"applied {count} times" if count > 1 else None


def callback_applies_twice(seed: int) -> str | None:
    """21: a callback that raises leaves the applied index where it was: this node alone applies the entry again."""
    with stock_cluster(3, seed) as cluster:
        leader_id = cluster.leader()

        def gone(_: Any, error: int) -> None:
            raise RuntimeError("the caller's future is gone")

        cluster.nodes[leader_id].put("once", 1, callback=gone)
        cluster.run(3)
        counts = {node_id: node.applied.count("once") for node_id, node in cluster.nodes.items()}
        return f"applied {counts}" if len(set(counts.values())) > 1 else None


def two_changes_at_once(seed: int) -> str | None:
    """22: two membership changes are accepted in one tick."""
    with stock_cluster(5, seed, dynamicMembershipChange=True) as cluster:
        leader_id = cluster.leader()
        leader = cluster.nodes[leader_id]
        cluster.run(1)
        ends: dict[str, int] = {}
        others = [node_id for node_id in cluster.ids if node_id != leader_id]
        before = len(leader.otherNodes)
        for other in others[:2]:
            leader.removeNodeFromCluster(PeerNode(other), callback=lambda _, error, other=other: ends.__setitem__(other, error))  # fmt: skip
        leader._onTick(0)
        changed = before - len(leader.otherNodes)
        return f"{changed} changes in force at once" if changed > 1 else None


CANARIES: dict[str, Callable[[int], str | None]] = {
    "1": snapshot_commits,
    "2": dump_clears_journal,
    "3": compaction_loses_tail,
    "5": truncates_acknowledged,
    "8": stale_acknowledgement,
    "14": retry_applies_twice,
    "21": callback_applies_twice,
    "22": two_changes_at_once,
}
