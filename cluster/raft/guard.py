"""PySyncObj's engine with its faults put right from outside (`raft.md`; each correction carries its number).

Owned here: what a node answers to the others' messages, candidacy, applying, a full disk. Left to others: the engine's names
(`engine.py`), leading (`replication.py`), when to stand for election (`elections.py`), what commands mean and who waits for
them (`proposals.py`, `reads.py`), who belongs (`membership.py`), snapshots (`snapshotting.py`), disk and sockets.

How it hangs together. Messages come in as the types of `messages.py`. Those the engine handles well are handed to
it as the dictionaries it knows, rewritten first so that it does the right thing; what it wants to send comes back
through `_Outbox` and is held until it may leave. Three promises wait for the disk, each for its own position in
the journal: a vote, an acknowledgement, and the leader counting itself. Nothing else waits.
"""

from __future__ import annotations

from typing import Any

from pysyncobj.node import Node

from cluster.raft.disk import DiskFullError
from cluster.raft.engine import CANDIDATE, FOLLOWER, GuardHost, PeerNode
from cluster.raft.entries import CONFIGURATION
from cluster.raft.messages import Ack, AppendEntries, Entry, RequestVote, Vote
from cluster.raft.replication import Replication

__all__ = ["CANDIDATE", "FOLLOWER", "Guard", "GuardHost"]


class Guard(Replication):
    """The engine with all corrections in place."""

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

    def engine_sends(self, node: Node, message: dict[str, Any]) -> bool:
        """The engine answers with votes alone; all else that it would send is overridden below."""
        assert message["type"] == "response_vote", message["type"]
        term = message["term"]
        self.elections.postpone()
        self.when_durable(lambda: self.host.send(node.id, Vote(term)))
        return True

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

    def apply_committed(self) -> None:
        """Apply what is committed, a few milliseconds at a time."""
        if self._applying or self.stopped:
            return
        log = self._SyncObj__raftLog
        until = self.runtime.now() + self.settings.apply_slice_seconds
        self._applying = True
        try:
            while self.applied_index < self.commit_index and self.runtime.now() <= until:
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
                    if self.runtime.now() > until:
                        break
                self.host.answer_applied()
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
