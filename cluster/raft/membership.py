"""Who belongs to the cluster, how that changes, and the handing over of leadership (finding 22).

Owned here: the configurations in the log and the one in force, the steps of a change, the removed who come back,
the steps of a transfer. Left to others: replication and votes (`guard.py`), who may ask for a change (the service).

The rules (Raft thesis, chapter 4): a configuration is in force from the moment it is in the log, whether or not it
is committed, and a restart finds it there; one change at a time, and none before this term's first entry is
committed; a new node is a learner, counted in nothing, until it has caught up; a removed node is told, and stops.
A learner is always on its way to being a voter: whichever leader sees it caught up makes it one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from cluster.consensus import NodeInfo
from cluster.raft.disk import DiskFullError
from cluster.raft.entries import (
    CONFIGURATION,
    REMOVED_KEPT,
    Configuration,
    decode_configuration,
    encode_configuration,
)
from cluster.raft.guard import Guard
from cluster.raft.messages import Introduction, Message, Removed, TimeoutNow

Ended = Callable[[str, str], None]
"""(outcome, message): `done`, `refused` (definitely nothing happened) or `unknown`."""

LOST = "Leadership changed meanwhile: the change may or may not have happened. Look at the status."
LATE = "The deadline passed: the change may or may not happen yet. Look at the status."


class MembershipHost(Protocol):
    def send(self, node_id: str, message: Message) -> bool: ...

    def connected(self, node_id: str) -> bool: ...

    def dial(self, node: NodeInfo) -> None:
        """Keep a connection to this node from now on."""

    def hang_up(self, node_id: str) -> None: ...

    def removed(self, message: str) -> None:
        """This node is no longer of the cluster."""


class _Change(NamedTuple):
    verb: str  # "add" or "remove"
    node_id: str
    due: float
    ended: Ended


class _Transfer(NamedTuple):
    target: str
    due: float
    ended: Ended


class Membership:
    def __init__(self, guard: Guard, host: MembershipHost, base: Configuration, base_index: int) -> None:
        self._guard = guard
        self._host = host
        self._runtime = guard.runtime
        self._configurations: list[tuple[int, Configuration]] = [(base_index, base)]
        self._changes: list[_Change] = []
        self._transfer: _Transfer | None = None
        self._transfer_told = False
        self._linked: dict[str, NodeInfo] = {}  # whom a connection is kept to
        self._leaving: set[str] = set()  # of these, who is hung up on in a moment
        self._told: set[str] = set()
        self._introduced: tuple[int, Configuration] = (0, Configuration(()))
        self.is_removed = False

    # -- what is in force

    @property
    def current(self) -> Configuration:
        return self._configurations[-1][1]

    @property
    def current_index(self) -> int:
        return self._configurations[-1][0]

    def at(self, index: int) -> Configuration:
        """The configuration in force at `index`, for a snapshot up to there."""
        for at, configuration in reversed(self._configurations):
            if at <= index:
                return configuration
        return self._configurations[0][1]

    def recover(self) -> None:
        """After a restart: what the log says, committed or not (22)."""
        log = self._guard.journal
        if self._guard.corrections.membership_from_log:
            for command, index, _ in log[:]:
                if command[:1] == CONFIGURATION and index > self.current_index:
                    self._configurations.append((index, decode_configuration(command)))
        self._enforce()

    def appended(self, index: int, command: bytes) -> None:
        if self._guard.corrections.membership_from_log:
            self._configurations.append((index, decode_configuration(command)))
            self._enforce()

    def applied(self, index: int, command: bytes) -> None:
        if not self._guard.corrections.membership_from_log and command[:1] == CONFIGURATION:
            self._configurations.append((index, decode_configuration(command)))
            self._enforce()

    def truncated(self, index: int) -> None:
        before = self.current_index
        while len(self._configurations) > 1 and self._configurations[-1][0] >= index:
            self._configurations.pop()
        if self.current_index != before:
            self._enforce()

    def installed(self, index: int, configuration: Configuration) -> None:
        """A snapshot up to `index` replaced what was before; what the log kept after it stays in force."""
        self._configurations = [(index, configuration)] + [
            item for item in self._configurations if item[0] > index and item[0] <= self._guard.last_index
        ]
        self._enforce()

    def _enforce(self) -> None:
        configuration = self.current
        self._guard.set_peers(configuration.voters, configuration.learners)
        me = self._guard.node_id
        wanted = {node.node_id: node for node in (*configuration.voters, *configuration.learners)}
        wanted.pop(me, None)
        for node_id in sorted(wanted):
            node, before = wanted[node_id], self._linked.get(node_id)
            if before is not None and before != node:
                self._host.hang_up(node_id)  # at the other end is whoever bore this name before
            if before != node or node_id in self._leaving:
                self._host.dial(node)
            self._linked[node_id] = node
            self._leaving.discard(node_id)
        for node_id in sorted(set(self._linked) - set(wanted) - self._leaving):
            self._leaving.add(node_id)
            # A moment's grace, so that it can still be told.
            self._runtime.call_later(1.0, lambda node_id=node_id: self._hang_up(node_id))  # type: ignore[misc]

    def _hang_up(self, node_id: str) -> None:
        if node_id in self._leaving:
            self._leaving.discard(node_id)
            del self._linked[node_id]
            self._host.hang_up(node_id)

    def introduction(self) -> Introduction:
        return Introduction(self.current_index, encode_configuration(self.current))

    def on_introduction(self, node_id: str, m: Introduction) -> None:
        """A node that was away while the members changed would let none of the new ones in, its leader included."""
        if self.current.find(node_id) is not None and m.index > max(self.current_index, self._introduced[0]):
            self._introduced = (m.index, decode_configuration(m.configuration))

    def _who_may_connect(self) -> Iterator[NodeInfo]:
        """Members, those removed, who may connect to be told so, and those this node was told of."""
        current = self.current
        yield from (*current.voters, *current.learners, *current.removed)
        if self._introduced[0] > self.current_index:
            yield from (*self._introduced[1].voters, *self._introduced[1].learners)

    def knows(self, node_id: str) -> NodeInfo | None:
        return next((node for node in self._who_may_connect() if node.node_id == node_id), None)

    def by_fingerprint(self, fingerprint: str) -> str | None:
        return next(
            (node.node_id for node in self._who_may_connect() if node.key_fingerprint == fingerprint), None
        )

    # -- changing it, as leader

    def _not_now(self) -> str | None:
        """Why no change may begin now; None when one may."""
        guard = self._guard
        if not guard.leading:
            return "This node is not the leader."
        if guard.disk_full:
            return "No room left on the leader's disk."
        if not guard.noop_committed:
            return "The leader was only just elected; try again in a moment."
        if guard.corrections.one_change_at_a_time:
            if self.current_index > guard.commit_index:
                return "Another change of the membership is under way; try again when it is done."
            if self._transfer is not None:
                return "Leadership is being handed over; try again in a moment."
        return None

    def add(self, node: NodeInfo, due: float, ended: Ended) -> None:
        current = self.current
        refusal = self._not_now()
        found = current.find(node.node_id)
        if found is not None and found != node:
            refusal = f"A node {node.node_id} with other addresses or another key is a member already; remove it first."
        elif any(
            gone.node_id == node.node_id
            and gone.key_fingerprint == node.key_fingerprint
            and gone.key_fingerprint
            for gone in current.removed
        ):
            refusal = f"Node {node.node_id} was removed. It can come back as a new node: empty its data folder first."
        elif (
            refusal is None
            and current.learners
            and found is None
            and self._guard.corrections.one_change_at_a_time
        ):
            refusal = "Another node is being added; try again when it counts."
        if refusal is not None:
            ended("refused", refusal)
            return
        if found is None:
            removed = tuple(gone for gone in current.removed if gone.node_id != node.node_id)
            if self._guard.corrections.learner_first:
                changed = Configuration(current.voters, (*current.learners, node), removed)
            else:
                changed = Configuration((*current.voters, node), current.learners, removed)
            if not self._append(changed, ended):
                return
        self._changes.append(_Change("add", node.node_id, due, ended))
        self.progressed()

    def remove(self, node_id: str, due: float, ended: Ended) -> None:
        current = self.current
        refusal = self._not_now()
        found = current.find(node_id)
        if refusal is None and node_id == self._guard.node_id:
            refusal = "The leader cannot remove itself; hand leadership over first."
        elif refusal is None and found is not None and found in current.voters:
            rest = [node.node_id for node in current.voters if node.node_id != node_id]
            reached = sum(i == self._guard.node_id or self._reachable(i) for i in rest)
            if self._guard.corrections.one_change_at_a_time and reached <= len(rest) / 2:
                refusal = f"Without {node_id} too few nodes would be left in touch to agree on anything."
        if refusal is not None:
            ended("refused", refusal)
            return
        if found is None:
            if not current.is_removed(node_id):
                ended("refused", f"There is no node {node_id}.")
                return
        else:
            changed = Configuration(
                tuple(node for node in current.voters if node.node_id != node_id),
                tuple(node for node in current.learners if node.node_id != node_id),
                (*current.removed, found)[-REMOVED_KEPT:],
            )
            if not self._append(changed, ended):
                return
        self._changes.append(_Change("remove", node_id, due, ended))
        self.progressed()

    def _append(self, configuration: Configuration, ended: Ended | None) -> bool:
        try:
            self._guard.append(encode_configuration(configuration))
        except DiskFullError:
            self._guard.disk_filled()
            if ended is not None:
                ended("refused", "No room left on the leader's disk. Nothing happened.")
            return False
        return True

    def _reachable(self, node_id: str) -> bool:
        progress = self._guard.progress.get(node_id)
        if progress is None or not self._host.connected(node_id):
            return False
        return self._runtime.now() - progress.contact_at < self._guard.settings.leader_fallback_seconds

    def progressed(self) -> None:
        """Something was committed or acknowledged: take the next step of whatever is under way."""
        guard = self._guard
        if guard.leading and self.current.learners and self._not_now() is None:
            for node in self.current.learners:
                caught_up = (
                    guard.match_index(node.node_id) + guard.settings.learner_lag_entries > guard.last_index
                )
                if caught_up and guard.match_index(node.node_id) > 0 and self._reachable(node.node_id):
                    current = self.current
                    self._append(
                        Configuration(
                            (*current.voters, node),
                            tuple(learner for learner in current.learners if learner != node),
                            current.removed,
                        ),
                        None,
                    )
                    break
        if self.current_index <= guard.commit_index:
            self._committed()
        self._transfer_step()

    def _committed(self) -> None:
        current = self.current
        voters = current.voter_ids()
        kept = []
        for change in self._changes:
            happened = (
                change.node_id in voters if change.verb == "add" else current.find(change.node_id) is None
            )
            if happened:
                change.ended("done", "")
            else:
                kept.append(change)
        self._changes = kept
        if self._guard.leading:
            self._told.intersection_update(node.node_id for node in current.removed)
            for node in current.removed:
                if node.node_id not in self._told:
                    self.tell_if_removed(node.node_id)

    @property
    def busy(self) -> bool:
        """Whether `progressed` may have something to do."""
        return bool(
            self._transfer is not None
            or self._changes
            or self.current.learners
            or self.current_index > self._guard.applied_index
        )

    def tell_if_removed(self, node_id: str) -> bool:
        """22: a removed node that is in touch learns that it is none of us any more."""
        if not self.current.is_removed(node_id):
            return False
        if self.current_index <= self._guard.commit_index and self._guard.corrections.removed_is_told:
            self._told.add(node_id)
            self._host.send(node_id, Removed(self.current_index))
        return True

    def on_removed(self, node_id: str, m: Removed) -> None:
        """Believed of a member only, and not when this node's own log knows of a later addition."""
        if self.current.find(node_id) is None or (
            self.current_index > m.index and self.current.find(self._guard.node_id) is not None
        ):
            return
        if not self.is_removed:
            self.is_removed = True
            self._host.removed(
                f"This node was removed from the cluster (told by {node_id}). To take part again it must be added "
                "as a new node: empty its data folder, and have it invited."
            )

    # -- handing leadership over

    @property
    def transferring(self) -> bool:
        return self._transfer is not None

    def transfer(self, target: str | None, due: float, ended: Ended) -> None:
        guard = self._guard
        if not guard.leading:
            ended("refused", "This node is not the leader.")
            return
        if self._transfer is not None:
            ended("refused", "Leadership is being handed over already.")
            return
        if target == guard.node_id:
            ended("done", guard.node_id)
            return
        if target is None:
            candidates = [
                (guard.match_index(str(node.id)), str(node.id))
                for node in sorted(guard.voter_peers, key=lambda node: str(node.id))
                if self._reachable(str(node.id)) and not guard.progress[str(node.id)].disk_full
            ]
            if not candidates:
                ended("refused", "No other node is in touch that could lead.")
                return
            target = max(candidates)[1]
        elif guard.named(target) not in guard.voter_peers:
            ended("refused", f"There is no node {target} that could lead.")
            return
        elif not self._reachable(target):
            ended("refused", f"Node {target} is not in touch.")
            return
        due = min(due, self._runtime.now() + guard.settings.transfer_seconds_max)
        self._transfer = _Transfer(target, due, ended)
        self._transfer_told = False
        self._transfer_step()

    def _transfer_step(self) -> None:
        """20: proposals rest meanwhile, so the target does catch up; then it is told to stand at once."""
        guard, transfer = self._guard, self._transfer
        if transfer is None or self._transfer_told or not guard.leading:
            return
        if guard.match_index(transfer.target) == guard.last_index:
            self._transfer_told = self._host.send(transfer.target, TimeoutNow(guard.term))

    def changed(self) -> None:
        """Another role, term or leader."""
        guard = self._guard
        if self._transfer is not None and not guard.leading and guard.leader_id is not None:
            transfer, self._transfer = self._transfer, None
            transfer.ended("done", guard.leader_id)
        if not guard.leading and self._changes:
            changes, self._changes = self._changes, []
            for change in changes:
                change.ended("unknown", LOST)
        self._told.clear()

    def tick(self, now: float) -> None:
        if self._transfer is not None and self._transfer.due <= now:
            transfer, self._transfer = self._transfer, None
            transfer.ended(
                "unknown", f"Node {transfer.target} did not take over in time. Look at the status."
            )
        for change in [change for change in self._changes if change.due <= now]:
            self._changes.remove(change)
            change.ended("unknown", LATE)
        if self._guard.leading:
            self.progressed()

    def abandon(self) -> None:
        changes, self._changes = self._changes, []
        for change in changes:
            change.ended("unknown", "The node stopped. " + LATE)
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            transfer.ended("unknown", "The node stopped. Look at the status.")
