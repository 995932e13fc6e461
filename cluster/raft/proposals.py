"""Proposals: many become one entry, and each has exactly one end before its deadline.

Owned here: gathering, forwarding to the leader, and the proof of each end. Left to others: the log (`guard.py`),
what a command means (the replica).

A batch is known by (origin, sequence); its results are taken from this node's own apply, wherever it was appended.
Why an end is certain:

* A batch is forwarded to the leader of one term, which takes it in that term or not at all. So when an entry of a
  later term is applied here, every entry of the batch's term has been applied before it: a batch that was not
  among them never will be. It is proposed anew, without anybody noticing (a rolling restart costs no request).
* A snapshot that was installed may hold the batch: unknown.
* The deadline passes: unknown if the batch has left, else it certainly did not happen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from cluster.consensus import Applied, ProposalEnd, Refusal, Rejected, Unknown
from cluster.raft.disk import DiskFullError
from cluster.raft.entries import Group, encode_groups
from cluster.raft.guard import Guard
from cluster.raft.messages import Forward, ForwardRefused, Message

Done: TypeAlias = Callable[[ProposalEnd], None]
Waiting: TypeAlias = tuple[bytes, float, Done]
"""(command, when its answer is due, who is told)"""

NO_LEADER = Rejected(
    Refusal.NO_LEADER, "No leader took the request before its deadline. Nothing happened; try again."
)
OVERLOADED = Rejected(Refusal.OVERLOADED, "Too many requests are waiting. Nothing happened; try again later.")
STOPPING = Rejected(Refusal.STOPPING, "This node is stopping. Nothing happened; ask another node.")
DISK_FULL = Rejected(
    Refusal.DISK_FULL, "No room left on the disk. Nothing happened; make room, or ask another node."
)
MAJORITY_FULL = Rejected(
    Refusal.DISK_FULL, "No room left on the disks of a majority. Nothing happened; make room there."
)
NOT_A_MEMBER = Rejected(
    Refusal.NOT_A_MEMBER, "This node was removed from the cluster. Nothing happened; ask another."
)
LATE = Unknown("The deadline passed before the outcome was known. It may still take effect.")
SKIPPED = Unknown("This node was brought up to date by a snapshot, which may hold the request's effect.")
ENDED = Unknown("This node stopped before the outcome was known. It may still take effect.")


class ProposalsHost(Protocol):
    def send(self, node_id: str, message: Message) -> bool: ...

    @property
    def paused(self) -> bool:
        """Leadership is being handed over: gather, and propose nothing."""


class _Batch:
    __slots__ = ("due", "forwarded_to", "sequence", "term", "waiting")

    def __init__(
        self, sequence: int, term: int, waiting: list[Waiting | None], forwarded_to: str | None
    ) -> None:
        self.sequence = sequence
        self.term = term
        self.waiting = waiting
        self.forwarded_to = forwarded_to
        self.due = min(item[1] for item in waiting if item is not None)

    def commands(self) -> list[bytes]:
        return [b"" if item is None else item[0] for item in self.waiting]


class Proposals:
    def __init__(self, guard: Guard, host: ProposalsHost, origin: int) -> None:
        self._guard = guard
        self._host = host
        self._runtime = guard.runtime
        self._settings = guard.settings
        self._corrections = guard.corrections
        self._origin = origin
        self._sequence = 0
        self._queue: deque[Waiting] = deque()
        self._queue_bytes = 0
        self._queue_due = float("inf")
        self._under_way: dict[int, _Batch] = {}
        self._forwards = 0
        self._from_others: deque[tuple[str, int, Group]] = deque()  # (node, term, batch)
        self._from_others_bytes = 0
        self._taken: dict[int, int] = {}  # as leader: origin -> highest sequence taken in this term
        self._taken_term = -1
        self._gate = 0  # the journal position of the entry appended last
        self._pump_due = False
        self._answers: list[tuple[Done, ProposalEnd]] = []
        self._closed: Rejected | None = None
        self.applied_term = 0

    # -- in

    def submit(self, command: bytes, due: float, done: Done) -> None:
        """`done` is called exactly once, never before this returns."""
        refusal = self._refusal(len(command))
        if refusal is not None:
            self._runtime.call_soon(lambda: done(refusal))
            return
        self._queue.append((command, due, done))
        self._queue_bytes += len(command)
        if due < self._queue_due:
            self._queue_due = due
        if not self._pump_due:
            self._pump_due = True
            self._runtime.call_soon(self._pump_turn)

    def _refusal(self, size_bytes: int) -> Rejected | None:
        settings = self._settings
        if self._closed is not None:
            return self._closed
        if size_bytes > settings.command_bytes_max:
            return Rejected(
                Refusal.TOO_LARGE,
                f"A request has at most {settings.command_bytes_max} bytes. Nothing happened.",
            )
        if self._guard.disk_full:
            return DISK_FULL
        if (
            len(self._queue) >= settings.queue_commands_max
            or self._queue_bytes + size_bytes > settings.queue_bytes_max
        ):
            return OVERLOADED
        return None

    def _pump_turn(self) -> None:
        self._pump_due = False
        self.pump()

    def pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._runtime.call_soon(self._pump_turn)

    # -- out

    def pump(self) -> None:
        """Put what is gathered into the log, or on its way to the leader, as far as that is possible now."""
        guard = self._guard
        if guard.stopped:
            return
        if guard.leading:
            self._append()
        else:
            self._refuse_others(NO_LEADER)
            self._forward()

    def _append(self) -> None:
        guard = self._guard
        journal = guard.journal
        if guard.majority_full():
            self._refuse_for_room()
            return
        while (self._queue or self._from_others) and not self._host.paused:
            if guard.disk_full:
                return
            if self._gate > journal.synced and self._corrections.wait_for_sync:
                # The last entry is still being synced: gather. `_synced` pumps again.
                return
            if guard.last_index - guard.commit_index >= self._settings.unacknowledged_entries_max:
                return  # the majority is far behind: the queue's bound holds, and the deadlines
            term = guard.term
            if self._taken_term != term:
                self._taken_term = term
                self._taken.clear()
            groups, room = self._take_from_others(self._settings.batch_bytes)
            batch = self._take(term, None, room) if self._queue and room > 0 else None
            if batch is not None:
                groups.append((self._origin, batch.sequence, batch.commands()))
            if not groups:
                return
            try:
                guard.append(encode_groups(groups))
            except DiskFullError:
                if batch is not None:
                    del self._under_way[batch.sequence]
                    self._end_all(batch.waiting, DISK_FULL)
                guard.disk_filled()
                guard.report()
                return
            self._gate = journal.written
            journal.when_synced(self._gate, self._synced)

    def _refuse_for_room(self) -> None:
        """Nothing of it was begun: better a clear no at once than "unknown" after a deadline."""
        self.refuse_queued(MAJORITY_FULL)
        self._refuse_others(MAJORITY_FULL)

    def _synced(self) -> None:
        if self._queue or self._from_others:
            self.pump()

    def _take(self, term: int, forwarded_to: str | None, room: int) -> _Batch | None:
        queue = self._queue
        waiting: list[Waiting | None] = []
        now = self._runtime.now() if self._corrections.deadlines else float("-inf")
        commands_max = self._settings.batch_commands
        taken = 0
        while queue and len(waiting) < commands_max:
            item = queue[0]
            size_bytes = len(item[0])
            if waiting and taken + size_bytes > room:
                break
            queue.popleft()
            self._queue_bytes -= size_bytes
            if item[1] <= now:
                self._end(item, NO_LEADER)
                continue
            taken += size_bytes
            waiting.append(item)
        if not queue:
            self._queue_due = float("inf")
        if not waiting:
            return None
        self._sequence += 1
        batch = _Batch(self._sequence, term, waiting, forwarded_to)
        self._under_way[self._sequence] = batch
        return batch

    def _take_from_others(self, room: int) -> tuple[list[Group], int]:
        groups: list[Group] = []
        while self._from_others and room > 0:
            node_id, term, group = self._from_others.popleft()
            size_bytes = sum(map(len, group[2]))
            self._from_others_bytes -= size_bytes
            if term != self._guard.term:  # leadership was lost and won again meanwhile
                self._refuse(node_id, group[0], group[1], NO_LEADER)
                continue
            if group[1] <= self._taken.get(group[0], 0):
                continue  # sent again after a connection broke, and already taken
            self._taken[group[0]] = group[1]
            groups.append(group)
            room -= size_bytes
        return groups, room

    def _forward(self) -> None:
        guard = self._guard
        leader = guard.leader_id
        if leader is None:
            return
        while self._queue and self._forwards < self._settings.forwards_in_flight:
            batch = self._take(guard.term, leader, self._settings.batch_bytes)
            if batch is None:
                return
            self._forwards += 1
            if not self._host.send(leader, self._as_forward(batch)):
                self._take_back(batch)
                return

    def _as_forward(self, batch: _Batch) -> Forward:
        return Forward(batch.term, self._origin, batch.sequence, batch.commands())

    def node_connected(self, node_id: str) -> None:
        """What was under way to the leader may be lost: send it again, in order; it takes each batch once."""
        guard = self._guard
        if node_id != guard.leader_id or guard.leading:
            return
        for sequence in sorted(self._under_way):
            batch = self._under_way[sequence]
            if batch.forwarded_to == node_id and batch.term == guard.term:
                self._host.send(node_id, self._as_forward(batch))
        self.pump_soon()

    # -- as leader, for others

    def on_forward(self, node_id: str, m: Forward) -> None:
        guard = self._guard
        if not guard.leading or m.term != guard.term:
            self._refuse(node_id, m.origin, m.sequence, NO_LEADER)
        elif guard.disk_full:
            self._refuse(node_id, m.origin, m.sequence, DISK_FULL)
        elif self._from_others_bytes > self._settings.queue_bytes_max:
            self._refuse(node_id, m.origin, m.sequence, OVERLOADED)
        else:
            self._from_others.append((node_id, m.term, (m.origin, m.sequence, m.commands)))
            self._from_others_bytes += sum(map(len, m.commands))
            self.pump_soon()

    def _refuse_others(self, refusal: Rejected) -> None:
        """What was never appended: that is certain."""
        while self._from_others:
            node_id, _, (origin, sequence, _) = self._from_others.popleft()
            if sequence > self._taken.get(origin, 0):
                self._refuse(node_id, origin, sequence, refusal)
        self._from_others_bytes = 0

    def _refuse(self, node_id: str, origin: int, sequence: int, refusal: Rejected) -> None:
        self._host.send(node_id, ForwardRefused(origin, sequence, refusal.refusal.value, refusal.message))

    def on_forward_refused(self, m: ForwardRefused) -> None:
        batch = self._under_way.get(m.sequence) if m.origin == self._origin else None
        if batch is None:
            return
        if m.refusal == Refusal.NO_LEADER:
            self._take_back(batch)
        else:
            self._forget(batch)
            self._end_all(batch.waiting, Rejected(Refusal(m.refusal), m.message))

    # -- ends

    def applied(self, index: int, term: int, origin: int, sequence: int, results: Sequence[Any]) -> None:
        """The results of one group; told to the callers by `answer`."""
        if origin != self._origin:
            return
        batch = self._under_way.get(sequence)
        if batch is None:
            return
        self._forget(batch)
        answers = self._answers
        for item, result in zip(batch.waiting, results, strict=True):
            if item is not None:
                answers.append((item[2], Applied(index, term, result)))

    def term_applied(self, term: int) -> None:
        """An entry of `term` was applied: batches of earlier terms that were not applied by now never will be."""
        if term <= self.applied_term:
            return
        self.applied_term = term
        for sequence in sorted(self._under_way, reverse=True):
            batch = self._under_way[sequence]
            if batch.term < term:
                self._take_back(batch)
                self.pump_soon()

    def answer(self) -> None:
        answers, self._answers = self._answers, []
        for done, end in answers:
            if self._corrections.apply_before_answer:
                with suppress(Exception):  # 21: what a caller does with its answer is no matter of the log
                    done(end)
            else:
                done(end)
        if self._queue:
            self.pump_soon()

    def skipped_by_snapshot(self, term: int) -> None:
        """A snapshot brought this node here without the entries between: they may be in it."""
        for batch in list(self._under_way.values()):
            self._forget(batch)
            self._end_all(batch.waiting, SKIPPED)
        self.applied_term = max(self.applied_term, term)

    def sweep(self, now: float) -> None:
        if not self._corrections.deadlines:
            return  # 15: the engine's callers wait for ever when a message is lost
        for batch in list(self._under_way.values()):
            if batch.due > now:
                continue
            waiting = batch.waiting
            left = [item[1] for item in waiting if item is not None and item[1] > now]
            for place, item in enumerate(waiting):
                if item is not None and item[1] <= now:
                    waiting[place] = None
                    self._end(item, LATE)
            batch.due = min(left, default=float("inf"))
            if not left:
                self._forget(batch)
        if self._queue_due <= now:
            kept: deque[Waiting] = deque()
            for item in self._queue:
                if item[1] <= now:
                    self._queue_bytes -= len(item[0])
                    self._end(item, NO_LEADER)
                else:
                    kept.append(item)
            self._queue = kept
            self._queue_due = min((item[1] for item in kept), default=float("inf"))

    def refuse_queued(self, refusal: Rejected) -> None:
        queue, self._queue = self._queue, deque()
        self._queue_bytes, self._queue_due = 0, float("inf")
        for item in queue:
            self._end(item, refusal)

    def close(self, refusal: Rejected) -> None:
        """Take nothing new."""
        self._closed = refusal

    @property
    def idle(self) -> bool:
        return not self._queue and not self._under_way

    def abandon(self) -> None:
        """The node ends: nobody may be left waiting."""
        self.close(self._closed or STOPPING)
        self.refuse_queued(STOPPING)
        for batch in list(self._under_way.values()):
            self._forget(batch)
            self._end_all(batch.waiting, ENDED)
        self.answer()

    def _forget(self, batch: _Batch) -> None:
        del self._under_way[batch.sequence]
        if batch.forwarded_to is not None:
            self._forwards -= 1

    def _take_back(self, batch: _Batch) -> None:
        """It certainly did not happen: back to the head of the queue."""
        self._forget(batch)
        for item in reversed(batch.waiting):
            if item is not None:
                self._queue.appendleft(item)
                self._queue_bytes += len(item[0])
                self._queue_due = min(self._queue_due, item[1])
        # Not pumped at once: whoever refused would refuse again. The next tick, or the next leader, does.
        if self._guard.disk_full:
            self.refuse_queued(DISK_FULL)

    def _end_all(self, waiting: Sequence[Waiting | None], end: ProposalEnd) -> None:
        for item in waiting:
            if item is not None:
                self._end(item, end)

    def _end(self, item: Waiting, end: ProposalEnd) -> None:
        done = item[2]
        self._runtime.call_soon(lambda: done(end))
