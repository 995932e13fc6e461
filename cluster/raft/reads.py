"""Read barriers: everything acknowledged before the call is applied here when it returns (finding 13).

Owned here: rounds of probes on the leader, the forwarding of a follower's wish, and who waits for which index.
One round serves all who wait when it starts; whoever comes later waits for the next (an older round's answers say
nothing about a newer read). Raft thesis 6.4. The disk and the log are not touched.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from cluster.raft.guard import Guard
from cluster.raft.messages import Message, Probe, ProbeAck, ReadIndex, ReadIndexAck

Confirmed: TypeAlias = Callable[[int | None], None]
"""Called with the index to wait for, or with None when it could not be confirmed."""


class ReadsHost(Protocol):
    def send(self, node_id: str, message: Message) -> bool: ...


class _Waiting(NamedTuple):
    due: float
    confirmed: Confirmed


class ReadBarriers:
    def __init__(self, guard: Guard, host: ReadsHost) -> None:
        self._guard = guard
        self._host = host
        self._runtime = guard.runtime
        self._waiting: list[_Waiting] = []
        self._asked: list[_Waiting] = []  # those the round, or the question to the leader, under way is for
        self._round = 0
        self._round_index = 0
        self._round_term = 0
        self._round_sent_at = 0.0
        self._answered: set[str] | None = None  # None: no round under way
        self._question: int | None = None  # as follower: the ReadIndex under way
        self._applying: list[tuple[int, int, float, Callable[[bool], None]]] = []
        self._order = itertools.count()
        self._pump_due = False

    def barrier(self, due: float, done: Callable[[bool], None]) -> None:
        """`done(True)` once it is safe to read here; `done(False)` when that could not be confirmed."""
        if not self._guard.corrections.read_barrier:
            self._runtime.call_soon(lambda: done(True))
            return

        def confirmed(index: int | None) -> None:
            if index is None:
                done(False)
            elif self._guard.applied_index >= index:
                done(True)
            else:
                heapq.heappush(self._applying, (index, next(self._order), due, done))

        self._enqueue(due, confirmed)

    def _enqueue(self, due: float, confirmed: Confirmed) -> None:
        self._waiting.append(_Waiting(due, confirmed))
        self.pump_soon()

    def pump_soon(self) -> None:
        """All reads that arrive within one turn of the loop share a round."""
        if self._waiting and not self._pump_due:
            self._pump_due = True
            self._runtime.call_soon(self._pump_turn)

    def _pump_turn(self) -> None:
        self._pump_due = False
        guard = self._guard
        if guard.stopped or not self._waiting or self._asked:
            return
        if guard.leading:
            if not guard.noop_committed:
                return  # the commit index may be behind what the last leader acknowledged
            self._asked, self._waiting = self._waiting, []
            self._round += 1
            self._round_index = guard.commit_index
            self._round_term = guard.term
            self._answered = set()
            self._probe()
            self._count()
        elif guard.leader_id is not None:
            self._round += 1
            if self._host.send(guard.leader_id, ReadIndex(guard.term, self._round)):
                self._asked, self._waiting = self._waiting, []
                self._question = self._round

    def _probe(self) -> None:
        guard = self._guard
        now = self._runtime.now()
        self._round_sent_at = now
        for node in sorted(guard.voter_peers, key=lambda node: str(node.id)):
            if self._answered is not None and node.id not in self._answered:
                self._host.send(node.id, Probe(guard.term, self._round, now))

    def on_probe(self, node_id: str, m: Probe) -> None:
        if self._guard.recognise_leader(node_id, m.term):
            self._host.send(node_id, ProbeAck(self._guard.term, m.round, m.sent_at))
        else:
            self._host.send(node_id, ProbeAck(self._guard.term, 0, m.sent_at))

    def on_probe_ack(self, node_id: str, m: ProbeAck) -> None:
        guard = self._guard
        if m.term > guard.term:
            guard.step_down(m.term)
            return
        if not guard.leading or m.term != guard.term:
            return
        progress = guard.progress.get(node_id)
        if progress is not None:
            progress.heard(m.sent_at, self._runtime.now())
        if self._answered is None or m.round != self._round or m.term != self._round_term:
            return
        if guard.named(node_id) in guard.voter_peers:
            self._answered.add(node_id)
            self._count()

    def _count(self) -> None:
        guard = self._guard
        if self._answered is None:
            return
        voters = len(guard.voter_peers) + (1 if guard.is_voter else 0)
        if len(self._answered) + (1 if guard.is_voter else 0) > voters / 2:
            self._answered = None
            self._finish(self._round_index)

    def _finish(self, index: int | None) -> None:
        asked, self._asked = self._asked, []
        self._question = None
        for waiting in asked:
            waiting.confirmed(index)
        if self._waiting:
            self.pump_soon()

    def on_read_index(self, node_id: str, m: ReadIndex) -> None:
        guard = self._guard
        if not guard.leading or m.term != guard.term:
            self._host.send(node_id, ReadIndexAck(m.request, 0, False))
            return

        def confirmed(index: int | None) -> None:
            self._host.send(node_id, ReadIndexAck(m.request, index or 0, index is not None))

        self._enqueue(self._runtime.now() + guard.settings.leader_fallback_seconds, confirmed)

    def on_read_index_ack(self, m: ReadIndexAck) -> None:
        if m.request != self._question:
            return
        if m.ok:
            self._finish(m.index)
        else:
            self._ask_again()

    def _ask_again(self) -> None:
        """Nothing was confirmed, and reading has no effect: the next leader may be asked."""
        self._waiting = self._asked + self._waiting
        self._asked = []
        self._question = None
        self._answered = None

    # -- events

    def applied(self) -> None:
        applied = self._guard.applied_index
        while self._applying and self._applying[0][0] <= applied:
            done = heapq.heappop(self._applying)[3]
            done(True)

    def changed(self) -> None:
        """Another role, term or leader."""
        if self._asked:
            self._ask_again()
        if self._waiting:
            self.pump_soon()

    def fail_waiting(self) -> None:
        """Cut off from the majority: those who wait are told now, instead of at their deadline."""
        self._ask_again()
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            item.confirmed(None)

    def node_connected(self, node_id: str) -> None:
        if node_id == self._guard.leader_id and not self._guard.leading and self._asked:
            self._ask_again()
        self.pump_soon()

    def tick(self, now: float) -> None:
        guard = self._guard
        if self._answered is not None and now - self._round_sent_at >= guard.settings.heartbeat_seconds:
            self._probe()  # the first may be lost; the round, and so its meaning, stays
        if self._waiting and not self._asked:
            self.pump_soon()
        for items in (self._waiting, self._asked):
            for item in [item for item in items if item.due <= now]:
                items.remove(item)
                item.confirmed(None)
        if not self._asked:
            self._answered = None
            self._question = None
        if any(entry[2] <= now for entry in self._applying):
            late = [entry for entry in self._applying if entry[2] <= now]
            self._applying = [entry for entry in self._applying if entry[2] > now]
            heapq.heapify(self._applying)
            for entry in late:
                entry[3](False)

    def abandon(self) -> None:
        self.fail_waiting()
        applying, self._applying = self._applying, []
        for entry in applying:
            entry[3](False)
