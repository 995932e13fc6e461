"""PySyncObj's engine, held by its private names: the one module that knows them, with the guard built on it.

Owned here: which private names are reached into, and the version they belong to; who is known, what is in force;
what waits for the disk (`when_durable`). Left to others: replication (`replication.py`), messages (`guard.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast
from zlib import crc32

from pysyncobj.config import SyncObjConf
from pysyncobj.node import Node
from pysyncobj.syncobj import SyncObj
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from cluster.consensus import NodeInfo
from cluster.raft.corrections import Corrections
from cluster.raft.disk import DiskFullError
from cluster.raft.elections import Elections
from cluster.raft.messages import AppendEntries, Message, TimeoutNow
from cluster.raft.progress import Progress
from cluster.raft.runtime import Runtime
from cluster.raft.settings import RaftSettings

if TYPE_CHECKING:
    from cluster.raft.guard import Guard
    from cluster.raft.journal import Journal

PYSYNCOBJ_VERSION = "0.3.17"
if VERSION != PYSYNCOBJ_VERSION:
    # The corrections reach into private names: with another version they may correct nothing, silently.
    raise ImportError(f"Trimaran corrects PySyncObj {PYSYNCOBJ_VERSION} from outside; found {VERSION}")

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2


class PeerNode(Node):
    """A node as the engine keeps it in sets. Its hash does not change from process to process, so that the order
    in which the engine walks its sets, and with it a simulated run, is fixed by the seed alone."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)  # type: ignore[no-untyped-call]
        self._hash = crc32(node_id.encode())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and bool(self.id == other.id)


class GuardHost(Protocol):
    """What the guard needs of the node around it (`core.py`)."""

    def send(self, node_id: str, message: Message) -> bool: ...

    def connected(self, node_id: str) -> bool: ...

    def apply(self, command: bytes, index: int, term: int) -> None: ...

    def answer_applied(self) -> None:
        """Answer the callers whose commands `apply` has just executed."""

    def changed(self) -> None:
        """Role, term or leader are other than they were."""

    def committed(self) -> None: ...

    def configuration_appended(self, index: int, command: bytes) -> None: ...

    def log_truncated(self, index: int) -> None: ...

    def needs_snapshot(self, node_id: str) -> None: ...

    def progressed(self, node_id: str) -> None: ...

    def cut_off(self) -> None:
        """This leader stepped down because no majority answers it."""

    def impossible(self, reason: str) -> None: ...


class _Outbox(Transport):
    """Stands where the engine expects a transport, and hands what it sends to the guard."""

    ready = True

    def __init__(self) -> None:
        super().__init__(None, None, [])  # type: ignore[no-untyped-call]
        self.guard: Engine | None = None

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        assert self.guard is not None
        return self.guard.engine_sends(node, message)

    def addNode(self, node: Node) -> None: ...

    def dropNode(self, node: Node) -> None: ...

    def destroy(self) -> None: ...


class Engine(SyncObj, ABC):
    """One node's engine. It holds no replicated method at all (18): an entry is bytes, decoded by `entries.py`."""

    # What of the engine is reached into. Verified by the version check above and by the simulation.
    _SyncObj__raftLog: Journal
    _SyncObj__raftState: int
    _SyncObj__raftCurrentTerm: int
    _SyncObj__votedForNodeId: str | None
    _SyncObj__votesCount: int
    _SyncObj__raftLeader: Node | None
    _SyncObj__raftCommitIndex: int
    _SyncObj__raftLastApplied: int
    _SyncObj__raftNextIndex: dict[Node, int]
    _SyncObj__raftMatchIndex: dict[Node, int]
    _SyncObj__otherNodes: set[Node]
    _SyncObj__readonlyNodes: set[Node]
    _SyncObj__noopIDx: int | None
    _SyncObj__selfNode: Node

    if TYPE_CHECKING:

        def _SyncObj__onMessageReceived(self, node: Node, message: dict[str, Any]) -> None: ...

        def _SyncObj__setState(self, state: int) -> None: ...

    def __init__(
        self,
        host: GuardHost,
        journal: Journal,
        settings: RaftSettings,
        runtime: Runtime,
        corrections: Corrections,
    ) -> None:
        self.host = host
        self.settings = settings
        self.runtime = runtime
        self.corrections = corrections
        self.stopped = False
        self.disk_full = False
        self.progress: dict[str, Progress] = {}
        self.quorum_contact_at = float("-inf")  # as told by the leader, on this node's clock
        self.last_heartbeat_at = float("-inf")
        self._votes: set[str] = set()
        self._answering: AppendEntries | None = None
        self._verified_index = 0
        self._reported: tuple[int, int, str | None] = (FOLLOWER, -1, None)
        self._applying = False
        self._notice_due = False
        self._one_second_at = 0.0
        self._names: dict[str, PeerNode] = {}
        outbox = _Outbox()
        outbox.guard = self
        conf = SyncObjConf(autoTick=False, dynamicMembershipChange=False, useFork=False)  # type: ignore[no-untyped-call]
        super().__init__(self.named(settings.node.node_id), [], conf, transport=outbox)  # type: ignore[no-untyped-call]
        # The engine would open its own journal, unsynced and without checksums (3, 4, 10, 11): it is given ours.
        self._SyncObj__raftLog = journal
        self._SyncObj__raftCurrentTerm = max(journal.getCurrentTerm(), journal[-1][2])
        self._SyncObj__votedForNodeId = journal.getVotedForNodeId()
        self._SyncObj__raftCommitIndex = min(max(journal.getRaftCommitIndex(), journal[0][1]), journal[-1][1])
        self._SyncObj__raftLastApplied = journal[0][1]
        self.elections = Elections(cast("Guard", self))

    def named(self, node_id: str) -> PeerNode:
        node = self._names.get(node_id)
        if node is None:
            node = self._names[node_id] = PeerNode(node_id)
        return node

    @property
    def node_id(self) -> str:
        return self.settings.node.node_id

    @property
    def journal(self) -> Journal:
        return self._SyncObj__raftLog

    @property
    def term(self) -> int:
        return self._SyncObj__raftCurrentTerm

    @property
    def state(self) -> int:
        return self._SyncObj__raftState

    @property
    def leading(self) -> bool:
        return self._SyncObj__raftState == LEADER

    @property
    def leader_id(self) -> str | None:
        leader = self._SyncObj__raftLeader
        return None if leader is None else str(leader.id)

    @property
    def commit_index(self) -> int:
        return self._SyncObj__raftCommitIndex

    @property
    def applied_index(self) -> int:
        return self._SyncObj__raftLastApplied

    @property
    def last_index(self) -> int:
        return int(self._SyncObj__raftLog[-1][1])

    @property
    def last_term(self) -> int:
        return int(self._SyncObj__raftLog[-1][2])

    @property
    def first_index(self) -> int:
        return int(self._SyncObj__raftLog[0][1])

    @property
    def noop_committed(self) -> bool:
        """Leader, and an entry of its own term is committed: its commit index is the cluster's (Raft 8)."""
        noop = self._SyncObj__noopIDx
        return self.leading and noop is not None and self.commit_index >= noop

    @property
    def acting(self) -> bool:
        noop = self._SyncObj__noopIDx
        return self.leading and noop is not None and self.applied_index >= noop

    @property
    def voter_peers(self) -> set[Node]:
        return self._SyncObj__otherNodes

    @property
    def is_voter(self) -> bool:
        return self._is_voter

    _is_voter = False

    def match_index(self, node_id: str) -> int:
        return self._SyncObj__raftMatchIndex.get(self.named(node_id), 0)

    def term_at(self, index: int) -> int:
        log = self._SyncObj__raftLog
        return int(log[index - log[0][1]][2])

    def quorum_heard_at(self) -> float:
        """Leader: the latest moment at which a majority, itself included, was certainly in touch."""
        others = self._SyncObj__otherNodes
        needed = (len(others) + 1) // 2 + 1 - (1 if self._is_voter else 0)
        if needed <= 0:
            return self.runtime.now()
        heard = sorted((self.progress[node.id].contact_at for node in others), reverse=True)
        return heard[needed - 1] if len(heard) >= needed else float("-inf")

    def quorum_age_seconds(self) -> float:
        if self.leading:
            return max(0.0, self.runtime.now() - self.quorum_heard_at())
        return self.runtime.now() - self.quorum_contact_at

    def set_peers(self, voters: Iterable[NodeInfo], learners: Iterable[NodeInfo]) -> None:
        """Put a configuration in force. Learners are replicated to, and counted in nothing."""
        me = self.node_id
        voter_ids = sorted(node.node_id for node in voters)
        learner_ids = sorted(node.node_id for node in learners)
        self._is_voter = me in voter_ids
        known = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        self._SyncObj__otherNodes = {self.named(i) for i in voter_ids if i != me}
        self._SyncObj__readonlyNodes = {self.named(i) for i in learner_ids if i != me}
        now = self.runtime.now()
        for node in self.replicas():
            if node not in known or node not in self._SyncObj__raftNextIndex:
                self._SyncObj__raftNextIndex[node] = self.last_index + 1
                self._SyncObj__raftMatchIndex[node] = 0
                self.progress[node.id] = Progress(now)
        for node in known - set(self.replicas()):
            self._SyncObj__raftNextIndex.pop(node, None)
            self._SyncObj__raftMatchIndex.pop(node, None)
            self.progress.pop(node.id, None)

    def replicas(self) -> list[Node]:
        return sorted(self._SyncObj__otherNodes | self._SyncObj__readonlyNodes, key=node_order)

    def broadcast_to_voters(self, message: Message) -> None:
        for node in sorted(self._SyncObj__otherNodes, key=node_order):
            self.host.send(node.id, message)

    def report(self) -> None:
        """Tell the host once for each change, whatever brought it about."""
        now = (self.state, self.term, self.leader_id)
        if now != self._reported:
            self._reported = now
            self.host.changed()

    def _engine_receives(self, node: Node, message: dict[str, Any]) -> None:
        self._SyncObj__onMessageReceived(node, message)

    def when_durable(self, promise: Callable[[], object]) -> None:
        """4: make a promise once everything written so far is on disk, unless the term has moved on by then."""
        if not self.corrections.wait_for_sync:
            promise()
            return
        journal, term = self._SyncObj__raftLog, self.term
        journal.flush()

        def synced() -> None:
            if not self.stopped and self.term == term:
                promise()
                self.report()

        journal.when_synced(journal.written, synced)

    def step_down(self, term: int | None = None) -> None:
        """Follow nobody for now; with `term`, in that newer term."""
        self._SyncObj__setState(FOLLOWER)
        self._SyncObj__raftLeader = None
        if term is not None and term > self.term:
            try:
                self._SyncObj__setCurrentTerm(term, None)
            except DiskFullError:
                self.disk_filled()
        self.report()

    def _SyncObj__setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        self._SyncObj__raftCurrentTerm = term
        self._SyncObj__votedForNodeId = votedForNodeId
        self._SyncObj__raftLog.setCurrentTerm(term, votedForNodeId)

    def _SyncObj__deleteEntriesFrom(self, fromIDx: int) -> None:
        SyncObj._SyncObj__deleteEntriesFrom(self, fromIDx)  # type: ignore[attr-defined]
        self.host.log_truncated(fromIDx)

    def disk_filled(self) -> None:
        """19: no room. Nothing acknowledged is touched; lead no more, promise nothing, until the journal has room."""
        if not self.corrections.disk_full_survived:
            raise DiskFullError("no room left")
        self.disk_full = True
        if self.leading:
            # The node that is furthest may stand at once, instead of waiting until it misses this one.
            behind = [(self.match_index(str(node.id)), str(node.id)) for node in self.voter_peers]
            if behind:
                self.host.send(max(behind)[1], TimeoutNow(self.term))
        if self.state != FOLLOWER:
            self.step_down()

    def disk_has_room(self) -> None:
        self.disk_full = False

    def majority_full(self) -> bool:
        """19, on the leader: so many others have no room that nothing more can be agreed on for now."""
        if not self.corrections.disk_full_survived:
            return False
        others = self._SyncObj__otherNodes
        full = sum(self.progress[node.id].disk_full for node in others)
        return full > 0 and full > (len(others) + self._is_voter - 1) // 2

    @abstractmethod
    def engine_sends(self, node: Node, message: dict[str, Any]) -> bool:
        """What the engine sends by itself."""


def node_order(node: Node) -> str:
    return str(node.id)
