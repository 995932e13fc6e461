"""PySyncObj's engine with its faults put right from outside (`raft.md`; each correction carries its number).

Owned here: everything that reaches into `SyncObj`'s private names: the log, the term, votes, replication, the
commit index. Left to others: when to stand for election (`elections.py`), what commands mean and who waits for
them (`proposals.py`, `reads.py`), who belongs (`membership.py`), snapshots (`snapshotting.py`), disk and sockets.

How it hangs together. Messages come in as the types of `messages.py`. Those the engine handles well are handed to
it as the dictionaries it knows, rewritten first so that it does the right thing; what it wants to send comes back
through `_Outbox` and is held until it may leave. Three promises wait for the disk, each for its own position in
the journal: a vote, an acknowledgement, and the leader counting itself. Nothing else waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from cluster.consensus import NodeInfo
from cluster.raft.corrections import Corrections
from cluster.raft.disk import DiskFullError
from cluster.raft.elections import Elections
from cluster.raft.entries import CONFIGURATION
from cluster.raft.messages import Ack, AppendEntries, Entry, Message, RequestVote, Vote
from cluster.raft.runtime import Runtime
from cluster.raft.settings import RaftSettings

if TYPE_CHECKING:
    from cluster.raft.journal import Journal

PYSYNCOBJ_VERSION = "0.3.17"
if VERSION != PYSYNCOBJ_VERSION:
    # The corrections reach into private names: with another version they may correct nothing, silently.
    raise ImportError(f"Trimaran corrects PySyncObj {PYSYNCOBJ_VERSION} from outside; found {VERSION}")

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2


class PeerNode(Node):  # type: ignore[misc]
    """A node as the engine keeps it in sets. Its hash does not change from process to process, so that the order
    in which the engine walks its sets, and with it a simulated run, is fixed by the seed alone."""

    def __init__(self, node_id: str) -> None:
        super().__init__(node_id)
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


class Progress:
    """What the leader knows of one node beyond the engine's next and match index."""

    __slots__ = (
        "applied_index",
        "commit_sent",
        "contact_at",
        "disk_full",
        "reset_at",
        "unacknowledged",
        "unacknowledged_bytes",
    )

    def __init__(self, contact_at: float) -> None:
        self.contact_at = contact_at  # when the latest message that it answered was sent
        self.reset_at = float("-inf")
        self.disk_full = False
        self.applied_index = 0
        self.commit_sent = 0
        self.unacknowledged: deque[tuple[int, int]] = deque()  # (last index, bytes) of messages under way
        self.unacknowledged_bytes = 0

    def sent(self, last_index: int, size_bytes: int) -> None:
        self.unacknowledged.append((last_index, size_bytes))
        self.unacknowledged_bytes += size_bytes

    def acknowledged(self, index: int) -> None:
        while self.unacknowledged and self.unacknowledged[0][0] <= index:
            self.unacknowledged_bytes -= self.unacknowledged.popleft()[1]

    def restart(self) -> None:
        self.unacknowledged.clear()
        self.unacknowledged_bytes = 0


class _Outbox(Transport):  # type: ignore[misc]
    """Stands where the engine expects a transport, and hands what it sends to the guard."""

    ready = True

    def __init__(self) -> None:
        super().__init__(None, None, [])
        self.guard: Guard | None = None

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        assert self.guard is not None
        return self.guard.engine_sends(node, message)

    def addNode(self, node: Node) -> None: ...

    def dropNode(self, node: Node) -> None: ...

    def destroy(self) -> None: ...


class Guard(SyncObj):  # type: ignore[misc]
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
        conf = SyncObjConf(autoTick=False, dynamicMembershipChange=False, useFork=False)
        super().__init__(self.named(settings.node.node_id), [], conf, transport=outbox)
        # The engine would open its own journal, unsynced and without checksums (3, 4, 10, 11): it is given ours.
        self._SyncObj__raftLog = journal
        self._SyncObj__raftCurrentTerm = max(journal.getCurrentTerm(), journal[-1][2])
        self._SyncObj__votedForNodeId = journal.getVotedForNodeId()
        self._SyncObj__raftCommitIndex = min(max(journal.getRaftCommitIndex(), journal[0][1]), journal[-1][1])
        self._SyncObj__raftLastApplied = journal[0][1]
        self.elections = Elections(self)

    # -- what others may know

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

    # -- membership, as decided elsewhere

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
        return sorted(self._SyncObj__otherNodes | self._SyncObj__readonlyNodes, key=_node_id)

    def broadcast_to_voters(self, message: Message) -> None:
        for node in sorted(self._SyncObj__otherNodes, key=_node_id):
            self.host.send(node.id, message)

    # -- messages in

    def receive(self, node_id: str, message: AppendEntries | Ack | RequestVote | Vote) -> None:
        if self.stopped:
            return
        node = self.named(node_id)
        try:
            if isinstance(message, AppendEntries):
                self._on_append_entries(node, message)
            elif isinstance(message, Ack):
                self._on_ack(node, message)
            elif isinstance(message, RequestVote):
                self._on_request_vote(node, message)
            else:
                self._on_vote(node, message)
        except DiskFullError:
            self.disk_filled()
        self.report()

    def report(self) -> None:
        """Tell the host once for each change, whatever brought it about."""
        now = (self.state, self.term, self.leader_id)
        if now != self._reported:
            self._reported = now
            self.host.changed()

    def _engine_receives(self, node: Node, message: dict[str, Any]) -> None:
        self._SyncObj__onMessageReceived(node, message)

    def _on_append_entries(self, node: PeerNode, m: AppendEntries) -> None:
        if m.term < self.term:
            if self.corrections.acks_carry_term:
                # 8: a deposed leader learns of the newer term from the answer, instead of never.
                self._send_ack(node, 0, m.sent_at, success=False, reset=False)
            return
        self.elections.heard_leader()
        if m.quorum_age_seconds >= 0:
            self.quorum_contact_at = max(self.quorum_contact_at, self.runtime.now() - m.quorum_age_seconds)
        log = self._SyncObj__raftLog
        entries: list[Entry] = m.entries
        previous, previous_term, commit = m.previous_index, m.previous_term, m.commit_index
        verified = previous + len(entries)
        if self.disk_full:
            # 19: nothing is appended before the disk takes writes again; the leader is told why.
            self._follow(node, m.term)
            self._send_ack(node, 0, m.sent_at, success=False, reset=False)
            return
        if self.corrections.truncate_only_conflicts:
            # 5: the engine cuts its log behind `previous` whether or not the entries agree. So it is shown only
            # what is new or in real conflict, and the acknowledgement says what this message verified.
            first, first_term = log[0][1], log[0][2]
            if previous < first:  # what lies below the log's first entry is committed, hence equal
                entries = [entry for entry in entries if entry[1] > first]
                previous, previous_term = first, first_term
                verified = first + len(entries)
            last = log[-1][1]
            if previous <= last and log[previous - first][2] == previous_term:
                agreeing = 0
                for _, index, term in entries:
                    if index > last or log[index - first][2] != term:
                        break
                    agreeing += 1
                commit = min(commit, verified)
                if agreeing == len(entries):
                    entries = []
                    previous, previous_term = last, log[-1][2]
                else:
                    entries = entries[agreeing:]
                    previous += agreeing
                    previous_term = log[previous - first][2]
                    if previous < self.commit_index and previous < last:
                        self.host.impossible(
                            f"the leader of term {m.term} contradicts the committed entry {previous + 1}"
                        )
                        return
        committed_before = self.commit_index
        self._answering, self._verified_index = m, verified
        try:
            self._engine_receives(
                node,
                {
                    "type": "append_entries",
                    "term": m.term,
                    "commit_index": commit,
                    "prevLogIdx": previous,
                    "prevLogTerm": previous_term,
                    "entries": entries,
                },
            )
        finally:
            self._answering = None
            # Also when the disk filled up half-way: what is in the log counts, configurations too (22).
            last = log[-1][1]
            for command, index, term in entries:
                if command[:1] == CONFIGURATION and index <= last and self.term_at(index) == term:
                    self.host.configuration_appended(index, command)
        if self.commit_index != committed_before:
            self.host.committed()

    def _follow(self, node: PeerNode, term: int) -> None:
        """Recognise the leader of `term`, and leave log and commit index as they are."""
        self._engine_receives(
            node,
            {"type": "append_entries", "term": term, "commit_index": self.commit_index, "serialized": None},
        )

    def recognise_leader(self, node_id: str, term: int) -> bool:
        """A message other than AppendEntries came from the leader of `term`; False when it is a past one."""
        if term < self.term:
            return False
        self.elections.heard_leader()
        try:
            self._follow(self.named(node_id), term)
        except DiskFullError:
            self.disk_filled()
        self.report()
        return True

    def _on_ack(self, node: PeerNode, m: Ack) -> None:
        if self.corrections.acks_carry_term:
            # 8: an acknowledgement counts in the term it was given in, and in no other.
            if m.term > self.term:
                self.step_down(m.term)
                return
            if m.term < self.term:
                return
        progress = self.progress.get(node.id)
        if not self.leading or progress is None:
            return
        progress.contact_at = max(progress.contact_at, m.sent_at)
        progress.disk_full = m.disk_full
        progress.applied_index = m.applied_index
        match = self._SyncObj__raftMatchIndex
        following = self._SyncObj__raftNextIndex
        if m.reset:
            if not self.corrections.stable_repair_hint:
                following[node] = m.next_index
                return
            # 16: of many refusals under way at once only the first says anything new.
            if m.sent_at < progress.reset_at:
                return
            progress.reset_at = self.runtime.now()
            following[node] = max(m.next_index, match[node] + 1)
            progress.restart()
            self.replicate(node, probe=following[node] > self.first_index)
        elif m.success:
            matched = m.next_index - 1
            if matched > match[node]:
                match[node] = matched
                # The engine would set `next` back to the acknowledged entry and send again all that is under way.
                following[node] = max(following[node], matched + 1)
                progress.acknowledged(matched)
                self.advance_commit()
                self.host.progressed(node.id)
            self.replicate(node)

    def _on_request_vote(self, node: PeerNode, m: RequestVote) -> None:
        if self.disk_full:
            return  # 19: it could not be written down
        if m.term == self.term and self.leader_id is not None:
            return  # this term has its leader; a node added again under its old name may have voted in it
        self._engine_receives(
            node,
            {
                "type": "request_vote",
                "term": m.term,
                "last_log_term": m.last_log_term,
                "last_log_index": m.last_log_index,
            },
        )

    def _on_vote(self, node: PeerNode, m: Vote) -> None:
        if m.term != self.term or node not in self._SyncObj__otherNodes or node.id in self._votes:
            return
        self._votes.add(node.id)
        self._engine_receives(node, {"type": "response_vote", "term": m.term})

    # -- messages out

    def engine_sends(self, node: Node, message: dict[str, Any]) -> bool:
        """The engine answers with votes alone; all else that it would send is overridden below."""
        assert message["type"] == "response_vote", message["type"]
        term = message["term"]
        self.elections.postpone()
        self.when_durable(lambda: self.host.send(node.id, Vote(term)))
        return True

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

    def _SyncObj__sendNextNodeIdx(
        self, node: Node, reset: bool = False, nextNodeIdx: int | None = None, success: bool = False
    ) -> None:
        """The engine's answer to AppendEntries: with the term (8), and not before it is true (4)."""
        m = self._answering
        if m is None:
            return
        if reset:
            if self.corrections.stable_repair_hint or nextNodeIdx is None:
                # 16: one hint, and one that always fits: whatever is committed here, the leader has.
                hint = max(self.commit_index, self.first_index) + 1
                if not self.corrections.stable_repair_hint:
                    hint = self.last_index + 1
            else:
                hint = nextNodeIdx
            self._send_ack(node, hint, m.sent_at, success=False, reset=True)
            return
        if not self.corrections.truncate_only_conflicts and nextNodeIdx is not None:
            verified = nextNodeIdx - 1
        else:
            verified = self._verified_index
        journal = self._SyncObj__raftLog
        if not self.corrections.wait_for_sync or journal.synced_index >= verified:
            self._send_ack(node, verified + 1, m.sent_at, success=True, reset=False)
            return
        if not m.entries:
            # A heartbeat: say at once that this node is alive, and what it holds when that is true.
            self._send_ack(node, 0, m.sent_at, success=False, reset=False)
        self.when_durable(lambda: self._send_ack(node, verified + 1, m.sent_at, success=True, reset=False))

    def _send_ack(self, node: Node, next_index: int, sent_at: float, *, success: bool, reset: bool) -> None:
        self.host.send(
            node.id, Ack(self.term, next_index, success, reset, sent_at, self.disk_full, self.applied_index)
        )

    def _SyncObj__sendAppendEntries(self) -> None:
        self.replicate_to_all()

    def replicate_to_all(self, *, probe: bool = False) -> None:
        for node in self.replicas():
            self.replicate(node, probe=probe)

    def replicate(self, node: Node, *, probe: bool = False) -> None:
        """Send what `node` lacks, without waiting for answers, up to a bound. `probe`: at least an empty message."""
        progress = self.progress.get(node.id)
        if progress is None or not self.leading or not self.host.connected(node.id):
            return
        log = self._SyncObj__raftLog
        first, last = log[0][1], log[-1][1]
        following = self._SyncObj__raftNextIndex[node]
        if following <= first:
            self.host.needs_snapshot(node.id)
            if probe:
                self._send_entries(node, progress, first, [])
            return
        settings = self.settings
        sent = False
        while (
            following <= last
            and len(progress.unacknowledged) < settings.unacknowledged_entries_max
            and progress.unacknowledged_bytes < 8 * settings.append_bytes
        ):
            entries, size_bytes = self._entries_from(following)
            if not self._send_entries(node, progress, following - 1, entries):
                return
            following = entries[-1][1] + 1
            progress.sent(following - 1, size_bytes)
            self._SyncObj__raftNextIndex[node] = following
            sent = True
        if probe and not sent:
            self._send_entries(node, progress, following - 1, [])

    def _entries_from(self, index: int) -> tuple[list[Entry], int]:
        log = self._SyncObj__raftLog
        start = index - log[0][1]
        entries: list[Entry] = log[start : start + self.settings.append_entries]
        total = 0
        for count, entry in enumerate(entries):
            total += len(entry[0])
            if total >= self.settings.append_bytes:
                return entries[: count + 1], total
        return entries, total

    def _send_entries(self, node: Node, progress: Progress, previous: int, entries: list[Entry]) -> bool:
        log = self._SyncObj__raftLog
        now = self.runtime.now()
        previous = min(previous, log[-1][1])
        age = now - self.quorum_heard_at()
        message = AppendEntries(
            self.term, self.commit_index, previous, log[previous - log[0][1]][2], entries, now,
            age if age < 1e9 else -1.0,
        )  # fmt: skip
        if not self.host.send(node.id, message):
            return False
        progress.commit_sent = self.commit_index
        return True

    # -- connections

    def node_connected(self, node_id: str) -> None:
        node = self.named(node_id)
        progress = self.progress.get(node_id)
        if self.leading and progress is not None:
            # What was under way on the old connection may be lost; what was acknowledged is not.
            match = self._SyncObj__raftMatchIndex[node]
            if match:
                self._SyncObj__raftNextIndex[node] = match + 1
            progress.restart()
            self.replicate(node, probe=True)

    def node_disconnected(self, node_id: str) -> None:
        progress = self.progress.get(node_id)
        if progress is not None:
            progress.restart()
        if node_id == self.leader_id and not self.leading:
            self.elections.lost_leader()

    # -- leading

    def append(self, command: bytes) -> int:
        """Leader: put one entry into the log and on its way. Raises `DiskFullError`; nothing is then in the log."""
        journal = self._SyncObj__raftLog
        index = journal[-1][1] + 1
        journal.add(command, index, self.term)
        if command[:1] == CONFIGURATION:
            self.host.configuration_appended(index, command)
        self._sync_own()
        self.replicate_to_all()
        return index

    def _sync_own(self) -> None:
        """The leader's AppendEntries leave before its own sync; it counts itself only after (4)."""
        journal = self._SyncObj__raftLog
        journal.flush()
        if self.corrections.wait_for_sync:
            journal.when_synced(journal.written, self.advance_commit)
        else:
            self.runtime.call_soon(self.advance_commit)

    def advance_commit(self) -> None:
        """The engine's rule (majority, and only by an entry of the current term), without its walk over every entry,
        and with the leader's own synced position in place of its word (4)."""
        if self.stopped or not self.leading:
            return
        match = self._SyncObj__raftMatchIndex
        positions = [match[node] for node in self._SyncObj__otherNodes]
        if self._is_voter:
            own = self._SyncObj__raftLog.synced_index if self.corrections.wait_for_sync else self.last_index
            positions.append(own)
        if not positions:
            return
        positions.sort()
        index = min(positions[(len(positions) - 1) // 2], self.last_index)
        if index > self.commit_index and self.term_at(index) == self.term:
            self._SyncObj__raftCommitIndex = index
            self._SyncObj__raftLog.setRaftCommitIndex(index)
            self.host.committed()
            self._notice_soon()

    def _notice_soon(self) -> None:
        """Followers have callers too: they learn of a commit with the next entries, or, if there are none, now."""
        if self._notice_due:
            return
        self._notice_due = True

        def notice() -> None:
            self._notice_due = False
            if self.stopped or not self.leading:
                return
            for node in self.replicas():
                if self.progress[node.id].commit_sent < self.commit_index:
                    self.replicate(node, probe=True)

        # Two turns on: proposals that waited for this commit get into the log first, and carry the news.
        self.runtime.call_soon(lambda: self.runtime.call_soon(notice))

    def _SyncObj__onBecomeLeader(self) -> None:
        now = self.runtime.now()
        for node in self.replicas():
            self.progress[node.id] = Progress(now)
        SyncObj._SyncObj__onBecomeLeader(self)  # type: ignore[attr-defined]
        self.last_heartbeat_at = now
        self._sync_own()

    def become_candidate(self) -> None:
        """Start an election: the own vote, like any other, is on disk before it counts."""
        self._votes = set()
        self._SyncObj__votesCount = 0
        self._SyncObj__raftLeader = None
        try:
            self._SyncObj__setState(CANDIDATE)
            self._SyncObj__setCurrentTerm(self.term + 1, self.node_id)
        except DiskFullError:
            self.disk_filled()
            self.report()
            return
        message = RequestVote(self.term, self.last_index, self.last_term)

        def stand() -> None:
            if self.state != CANDIDATE:
                return
            self._SyncObj__votesCount = 1
            if not self._SyncObj__otherNodes:
                try:
                    self._SyncObj__onBecomeLeader()
                except DiskFullError:
                    self.disk_filled()
            else:
                self.broadcast_to_voters(message)

        self.when_durable(stand)
        self.report()

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

    # -- applying

    def apply_committed(self) -> None:
        """Apply what is committed, a few milliseconds at a time."""
        if self._applying or self.stopped:
            return
        log = self._SyncObj__raftLog
        until = self.runtime.now() + self.settings.apply_slice_seconds
        self._applying = True
        try:
            while self.applied_index < self.commit_index:
                start = self.applied_index + 1 - log[0][1]
                for command, index, term in log[
                    start : start + min(64, self.commit_index - self.applied_index)
                ]:
                    self.host.apply(command, index, term)
                    if self.stopped:
                        return
                    if not self.corrections.apply_before_answer:
                        self.host.answer_applied()
                    # 21: the entry counts as applied before anybody is told of it, so that nothing a caller's
                    # callback does can make this node apply it again.
                    self._SyncObj__raftLastApplied = index
                self.host.answer_applied()
                if self.runtime.now() > until:
                    break
        finally:
            self._applying = False
        if self.applied_index < self.commit_index:
            self.runtime.call_soon(self.apply_committed)

    def installed(self, index: int, term: int) -> None:
        """A snapshot up to `index` is safe on disk and loaded: continue from there. 1: only now does the commit index
        move, and only to what the snapshot holds."""
        self._SyncObj__raftLog.reset_to(index, term)
        self._SyncObj__raftLog.flush()
        self._SyncObj__raftLastApplied = index
        if self.commit_index < index:
            self._SyncObj__raftCommitIndex = index

    def recovered(self, index: int) -> None:
        """After a restart: the state up to `index` was loaded from a snapshot."""
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = max(self.commit_index, index)

    def refuse_past_leader(self, node_id: str, sent_at: float) -> None:
        self._send_ack(self.named(node_id), 0, sent_at, success=False, reset=False)

    def ask_from_commit(self, node_id: str, sent_at: float) -> None:
        self._send_ack(self.named(node_id), self.commit_index + 1, sent_at, success=False, reset=True)

    def acknowledge_snapshot(self, node_id: str, index: int, sent_at: float) -> None:
        """The snapshot is on disk, and a restart begins with it: it counts as any synced entry does."""
        self._send_ack(self.named(node_id), index + 1, sent_at, success=True, reset=False)

    def commit_on_chunk(self, leader_commit: int) -> None:
        """The engine's own way with a snapshot chunk, for the simulation to show what it does (1)."""
        if leader_commit > self.commit_index:
            self._SyncObj__raftCommitIndex = min(leader_commit, self.last_index)
            self.host.committed()

    # -- the disk

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
        if self.state != FOLLOWER:
            self.step_down()

    def disk_has_room(self) -> None:
        self.disk_full = False

    def tick(self, now: float) -> None:
        if self.stopped:
            return
        if self.leading:
            if now - self.quorum_heard_at() > self.settings.leader_fallback_seconds:
                # 13: a leader that no majority answers stops being one, and its callers are told.
                self.step_down()
                self.host.cut_off()
            elif now - self.last_heartbeat_at >= self.settings.heartbeat_seconds:
                self.last_heartbeat_at = now
                self.replicate_to_all(probe=True)
        else:
            self.elections.tick(now)
        if now >= self._one_second_at:
            self._one_second_at = now + 1.0
            self._SyncObj__raftLog.onOneSecondTimer()  # a full disk is tried again here

    def _onTick(self, timeToWait: float = 0.0) -> None:
        """The engine's own tick sleeps, polls and commits in memory; this node is driven by events and `tick`."""
        self.tick(self.runtime.now())


def _node_id(node: Node) -> str:
    return str(node.id)
