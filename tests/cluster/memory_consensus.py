"""A cluster in memory: the same contract as Raft's, without network, disk or elections of its own.

`MemoryCluster` holds the one log; each `MemoryConsensus` is a node that applies it to its own machine.
Tests pull the strings: lag a node, cut it off, move the leader, fill the disk, lose answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cluster.consensus import (
    Applied,
    BarrierError,
    ConsensusStatus,
    MembershipError,
    NodeInfo,
    NodeStatus,
    ProposalEnd,
    Refusal,
    Rejected,
    Replica,
    Role,
    Unknown,
)


class MemoryCluster:
    def __init__(self) -> None:
        self.log: list[list[bytes]] = []
        self.term = 1
        self.nodes: dict[str, MemoryConsensus] = {}
        self.leader: str | None = None
        self.disk_full = False
        self.overloaded = False
        self._waiting: list[tuple[bytes, MemoryConsensus, asyncio.Future[ProposalEnd]]] = []
        self._scheduled = False

    def add(self, node_id: str, replica: Replica) -> MemoryConsensus:
        node = MemoryConsensus(self, node_id, replica)
        self.nodes[node_id] = node
        if self.leader is None:
            self.leader = node_id
        node.catch_up()
        return node

    def elect(self, node_id: str | None) -> None:
        before = self.leader
        self.term += 1
        self.leader = node_id
        if before is not None and before != node_id:
            self.nodes[before].tell_leadership(False)
        if node_id is not None:
            self.nodes[node_id].catch_up()
            self.nodes[node_id].tell_leadership(True)

    def gather(self, command: bytes, node: MemoryConsensus, future: asyncio.Future[ProposalEnd]) -> None:
        """Many proposals, one entry: those of one turn of the loop."""
        self._waiting.append((command, node, future))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._commit)

    def _commit(self) -> None:
        self._scheduled = False
        batch, self._waiting = self._waiting, []
        self.log.append([command for command, _, _ in batch])
        index = len(self.log)
        for node in self.nodes.values():
            node.catch_up()
        for position, (_, node, future) in enumerate(batch):
            node.when_applied(index, position, future, self.term)


class MemoryConsensus:
    def __init__(self, cluster: MemoryCluster, node_id: str, replica: Replica) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._replica = replica
        self.applied = 0
        self.cut_off = False
        self.lagging = False
        self.lose_answers = False
        self.stopped = False
        self.membership_error: MembershipError | None = None
        self.changes: list[tuple[str, Any]] = []
        self._results: dict[int, list[Any]] = {}
        self._waiters: list[tuple[int, int, asyncio.Future[ProposalEnd], int]] = []
        self._barriers: list[tuple[int, asyncio.Future[None]]] = []
        self._leadership: list[Callable[[bool], None]] = []
        self._fatal: list[Callable[[str], None]] = []

    @property
    def node_id(self) -> str:
        return self._node_id

    async def start(self) -> None:
        self.catch_up()
        if self.is_leader():
            self.tell_leadership(True)

    async def stop(self) -> None:
        self.stopped = True

    def catch_up(self) -> None:
        if self.lagging or self.cut_off:
            return
        while self.applied < len(self._cluster.log):
            results = self._replica.apply(self._cluster.log[self.applied])
            self.applied += 1
            self._results = {self.applied: results}  # only the latest can still be waited for
            for index, position, future, term in self._waiters:
                if index == self.applied and not future.done():
                    future.set_result(Applied(index, term, results[position]))
        self._waiters = [waiter for waiter in self._waiters if waiter[0] > self.applied]
        for index, barrier in self._barriers:
            if index <= self.applied and not barrier.done():
                barrier.set_result(None)
        self._barriers = [waiter for waiter in self._barriers if waiter[0] > self.applied]

    def when_applied(self, index: int, position: int, future: asyncio.Future[ProposalEnd], term: int) -> None:
        if self.lose_answers or future.done():
            return
        if index in self._results:
            future.set_result(Applied(index, term, self._results[index][position]))
        else:
            self._waiters.append((index, position, future, term))

    async def propose(self, command: bytes, *, deadline_seconds: float) -> ProposalEnd:
        cluster = self._cluster
        if self.stopped:
            return Rejected(Refusal.STOPPING)
        if self.cut_off or cluster.leader is None:
            return Rejected(Refusal.NO_LEADER)
        if cluster.disk_full:
            return Rejected(Refusal.DISK_FULL)
        if cluster.overloaded:
            return Rejected(Refusal.OVERLOADED)
        future: asyncio.Future[ProposalEnd] = asyncio.get_running_loop().create_future()
        cluster.gather(command, self, future)
        handle = asyncio.get_running_loop().call_later(deadline_seconds, _give_up, future)
        try:
            return await future
        finally:
            handle.cancel()

    async def read_barrier(self, *, deadline_seconds: float) -> None:
        if self.cut_off or self.stopped or self._cluster.leader is None:
            raise BarrierError("no quorum")
        index = len(self._cluster.log)
        if self.applied >= index:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append((index, future))
        try:
            async with asyncio.timeout(deadline_seconds):
                await future
        except TimeoutError:
            raise BarrierError("not in time") from None

    def status(self) -> ConsensusStatus:
        cluster = self._cluster
        return ConsensusStatus(
            node_id=self._node_id,
            role=self._role(self._node_id),
            term=cluster.term,
            leader=None if self.cut_off else cluster.leader,
            quorum=not self.cut_off and cluster.leader is not None,
            committed=len(cluster.log),
            applied=self.applied,
            disk_full=cluster.disk_full,
            nodes=[
                NodeStatus(
                    NodeInfo(node_id, f"{node_id}:7100", f"https://{node_id}:7000", ""),
                    self._role(node_id),
                    not node.cut_off,
                    node.applied,
                    len(cluster.log),
                )
                for node_id, node in cluster.nodes.items()
            ],
        )

    def _role(self, node_id: str) -> Role:
        return Role.LEADER if self._cluster.leader == node_id else Role.FOLLOWER

    def quorum_age_seconds(self) -> float:
        return float("inf") if self.cut_off or self._cluster.leader is None else 0.0

    def is_leader(self) -> bool:
        return self._cluster.leader == self._node_id and not self.cut_off

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        self._leadership.append(callback)

    def tell_leadership(self, leads: bool) -> None:
        for callback in self._leadership:
            callback(leads)

    def on_fatal(self, callback: Callable[[str], None]) -> None:
        self._fatal.append(callback)

    async def add_node(self, node: NodeInfo, *, deadline_seconds: float) -> None:
        self._change("add", node)

    async def remove_node(self, node_id: str, *, deadline_seconds: float) -> None:
        self._change("remove", node_id)

    async def transfer_leadership(self, node_id: str | None, *, deadline_seconds: float) -> str:
        self._change("transfer", node_id)
        return node_id or self._node_id

    def _change(self, kind: str, what: Any) -> None:
        if self.membership_error is not None:
            raise self.membership_error
        self.changes.append((kind, what))


def _give_up(future: asyncio.Future[ProposalEnd]) -> None:
    if not future.done():
        future.set_result(Unknown("the deadline passed"))
