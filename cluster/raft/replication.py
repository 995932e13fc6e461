"""Leading: entries on their way to the others, their answers, and the commit index that follows from them.

Owned here: the pipeline to each node and its bounds, repair, the leader's count of itself, the news of a commit. Left to
others: what an answer must wait for on the other side (`guard.py`), snapshots for those too far behind.
"""

from __future__ import annotations

from pysyncobj.node import Node
from pysyncobj.syncobj import SyncObj

from cluster.raft.engine import Engine, PeerNode
from cluster.raft.entries import CONFIGURATION
from cluster.raft.messages import Ack, AppendEntries, Entry
from cluster.raft.progress import Progress


class Replication(Engine):
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
        if self.corrections.acks_carry_term and m.sent_at < progress.began_at:
            return  # 22: said by whoever bore this name before, and was removed
        progress.heard(m.sent_at, self.runtime.now())
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
        def one_more_turn() -> None:
            self.runtime.call_soon(notice)

        self.runtime.call_soon(one_more_turn)

    def _SyncObj__onBecomeLeader(self) -> None:
        now = self.runtime.now()
        for node in self.replicas():
            self.progress[node.id] = Progress(now)
        SyncObj._SyncObj__onBecomeLeader(self)  # type: ignore[attr-defined]
        self.last_heartbeat_at = now
        self._sync_own()
