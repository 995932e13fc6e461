"""When a node stands for election: never in a hurry that costs a live leader its place.

Owned here: the election timer, pre-vote (Raft thesis 9.6; finding 20), the early hint a broken connection gives.
Left to others: voting and counting votes (`guard.py`), handing leadership over (`membership.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.raft.messages import PreVote, RequestPreVote, TimeoutNow

if TYPE_CHECKING:
    from cluster.raft.guard import Guard


class Elections:
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._settings = guard.settings
        self._random = guard.runtime.random
        self._heard_at = float("-inf")  # when a leader was last heard on a connection that still stands
        self._deadline = 0.0
        self._round = 0
        self._granted: set[str] = set()
        self.postpone()

    def postpone(self) -> None:
        seconds = self._random.uniform(
            self._settings.election_seconds_min, self._settings.election_seconds_max
        )
        self._deadline = self._guard.runtime.now() + seconds

    def heard_leader(self) -> None:
        self._heard_at = self._guard.runtime.now()
        self.postpone()

    def lost_leader(self) -> None:
        """The connection to the leader broke: ask the others soon. If they still hear it, they say no, and nothing
        has happened; if it was killed, everybody lost it at once."""
        self._heard_at = float("-inf")
        soon = self._guard.runtime.now() + self._random.uniform(0.01, self._settings.lost_leader_seconds_max)
        self._deadline = min(self._deadline, soon)

    def tick(self, now: float) -> None:
        if now < self._deadline:
            return
        self.postpone()
        guard = self._guard
        if not guard.is_voter or guard.disk_full:
            return
        if not guard.corrections.pre_vote:
            guard.become_candidate()
            return
        # 20: ask first. A node that was cut off would otherwise come back with a term nobody can ignore.
        self._round += 1
        self._granted = set()
        if not guard.voter_peers:
            guard.become_candidate()
            return
        guard.broadcast_to_voters(
            RequestPreVote(guard.term + 1, guard.last_index, guard.last_term, self._round)
        )

    def on_request_pre_vote(self, node_id: str, m: RequestPreVote) -> None:
        guard = self._guard
        up_to_date = (m.last_log_term, m.last_log_index) >= (guard.last_term, guard.last_index)
        content = guard.leading or (
            guard.leader_id not in (None, node_id)
            and guard.runtime.now() - self._heard_at < self._settings.election_seconds_min
        )
        granted = m.term > guard.term and up_to_date and not content and not guard.disk_full
        guard.host.send(node_id, PreVote(guard.term, m.round, granted))

    def on_pre_vote(self, node_id: str, m: PreVote) -> None:
        guard = self._guard
        if m.term > guard.term:
            guard.step_down(m.term)
            return
        if not m.granted or m.round != self._round or guard.leading or node_id in self._granted:
            return
        if guard.named(node_id) not in guard.voter_peers:
            return
        self._granted.add(node_id)
        if len(self._granted) + 1 > (len(guard.voter_peers) + 1) / 2:
            self._round += 1
            self.postpone()
            guard.become_candidate()

    def on_timeout_now(self, node_id: str, m: TimeoutNow) -> None:
        """Only from the leader of this term, which has stopped taking proposals meanwhile; it asked for the
        election itself, so nobody is asked first."""
        guard = self._guard
        if m.term == guard.term and node_id == guard.leader_id and guard.is_voter and not guard.disk_full:
            self.postpone()
            guard.become_candidate()
