"""One node of the replicated log, without a loop of its own: callbacks in, callbacks out.

Owned here: the wiring of guard, proposals, reads, membership and snapshots; recovery from disk; the table that says
who handles which message; the one timer. `node.py` dresses it in coroutines for the service, the simulation drives it
under a clock of its own: the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from cluster.consensus import (
    ConsensusStartError,
    ConsensusStatus,
    NodeInfo,
    NodeStatus,
    ProposalEnd,
    Replica,
    Role,
)
from cluster.raft import messages
from cluster.raft.corrections import ALL, Corrections
from cluster.raft.disk import Disk
from cluster.raft.entries import (
    COMMANDS,
    CONFIGURATION,
    Configuration,
    decode_groups,
    encode_configuration,
)
from cluster.raft.guard import CANDIDATE, Guard
from cluster.raft.journal import Journal
from cluster.raft.journal_format import Identity
from cluster.raft.membership import Membership
from cluster.raft.messages import ControlAnswer, ControlRequest, Message
from cluster.raft.proposals import NOT_A_MEMBER, STOPPING, Proposals
from cluster.raft.reads import ReadBarriers
from cluster.raft.runtime import Handle, Runtime
from cluster.raft.settings import RaftSettings
from cluster.raft.snapshot_format import SnapshotDamagedError, SnapshotMeta
from cluster.raft.snapshots import SnapshotStore
from cluster.raft.snapshotting import Snapshotting, decode_configuration

Ended = Callable[[str, str], None]


class Links(Protocol):
    """Connections to the other nodes, one each. Reports through the `LinkEvents` it was made with."""

    def send(self, node_id: str, message: Message) -> bool:
        """Queue it; False when there is no connection. In order, at most once."""

    def dial(self, node: NodeInfo) -> None: ...

    def hang_up(self, node_id: str) -> None: ...


class LinkEvents(Protocol):
    """What links tell the node they serve."""

    def on_connected(self, node_id: str) -> None: ...

    def on_disconnected(self, node_id: str) -> None: ...

    def on_message(self, node_id: str, message: Message) -> None: ...

    def authorize(self, fingerprint: str) -> str | None:
        """The node a certificate's key belongs to, or None."""


class RaftCore:
    """Raises `ConsensusStartError` on construction when the folder must not be trusted."""

    def __init__(
        self,
        settings: RaftSettings,
        disk: Disk,
        runtime: Runtime,
        make_links: Callable[[LinkEvents], Links],
        replica: Replica,
        corrections: Corrections = ALL,
        open_journal: Callable[..., Journal] = Journal.open,
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.replica = replica
        self.corrections = corrections
        self._connected: set[str] = set()
        self._fatal: Callable[[str], None] | None = None
        self._fatal_reason: str | None = None
        self._leadership: list[Callable[[bool], None]] = []
        self._acting = False
        self._halted = False
        self._timer: Handle | None = None
        self._controls: dict[int, tuple[float, Ended]] = {}
        self._control = 0
        self.removed_message: str | None = None

        self.store = self._open_store(disk)
        meta = self.store.latest()
        journal = self._open_journal(disk, meta, open_journal)
        self.guard = Guard(self, journal, settings, runtime, corrections)
        base = Configuration(settings.founders)
        base_index = 0
        if meta is not None:
            self._load(meta)
            base, base_index = decode_configuration(meta.config), meta.index
            self.guard.recovered(meta.index)
        elif (
            journal[0][1] > 1
            and corrections.compact_behind_snapshot_only
            and corrections.corrupt_snapshot_stops
        ):
            raise ConsensusStartError(
                f"The log begins at entry {journal[0][1]}, but the snapshot of what came before is missing. Restore "
                "the data folder from a copy made while the node was stopped, or remove the node from the cluster, "
                "empty its data folder and add it again as a new node."
            )
        self.proposals = Proposals(self.guard, self, runtime.random.getrandbits(62))
        self.reads = ReadBarriers(self.guard, self)
        self.snapshotting = Snapshotting(self.guard, self, self.store, replica)
        self.membership = Membership(self.guard, self, base, base_index)
        self._handlers: dict[type, Callable[[str, Any], None]] = {
            messages.AppendEntries: self.guard.receive,
            messages.Ack: self.guard.receive,
            messages.RequestVote: self.guard.receive,
            messages.Vote: self.guard.receive,
            messages.RequestPreVote: self.guard.elections.on_request_pre_vote,
            messages.PreVote: self.guard.elections.on_pre_vote,
            messages.TimeoutNow: self.guard.elections.on_timeout_now,
            messages.Probe: self.reads.on_probe,
            messages.ProbeAck: self.reads.on_probe_ack,
            messages.ReadIndex: self.reads.on_read_index,
            messages.ReadIndexAck: lambda _, m: self.reads.on_read_index_ack(m),
            messages.Forward: self.proposals.on_forward,
            messages.ForwardRefused: lambda _, m: self.proposals.on_forward_refused(m),
            messages.SnapshotChunk: self.snapshotting.on_chunk,
            messages.SnapshotAck: self.snapshotting.on_ack,
            messages.ControlRequest: self._on_control_request,
            messages.ControlAnswer: lambda _, m: self._on_control_answer(m),
            messages.Removed: self.membership.on_removed,
            messages.Introduction: self.membership.on_introduction,
        }
        self._links = make_links(self)
        self.membership.recover()

    # -- recovery

    def _open_store(self, disk: Disk) -> SnapshotStore:
        def open_store() -> SnapshotStore:
            cluster_id, piece_bytes = self.settings.cluster_id, self.settings.snapshot_chunk_bytes
            return SnapshotStore.open(disk, self.runtime, cluster_id=cluster_id, piece_bytes=piece_bytes)

        try:
            return open_store()
        except ConsensusStartError:
            if self.corrections.corrupt_snapshot_stops:
                raise  # 9: an empty node would vote, and might lead
            for name in disk.list():
                if name.startswith("snapshot"):
                    disk.remove(name)
            return open_store()

    def _open_journal(
        self, disk: Disk, meta: SnapshotMeta | None, open_journal: Callable[..., Journal]
    ) -> Journal:
        settings = self.settings
        create = not Journal.exists(disk) and meta is None and settings.may_create
        journal = open_journal(
            disk,
            self.runtime,
            identity=Identity(settings.node.node_id, settings.cluster_id),
            create=create,
            segment_bytes=settings.segment_bytes,
            on_fatal=self.fatal,
            on_disk_full=self._on_disk_full,
        )
        if meta is not None:
            if not self.corrections.keep_suffix_after_snapshot and (
                not len(journal) or journal[0][1] != meta.index
            ):
                journal.clear()
                journal.add(b"", meta.index, meta.term)
            elif (
                not len(journal)
                or journal.last_index < meta.index
                or (journal.first_index <= meta.index and journal.term_at(meta.index) != meta.term)
            ):
                # 2: only a log that ends before the snapshot, or contradicts it, gives way; else its suffix stays.
                journal.reset_to(meta.index, meta.term)
            elif journal.first_index > meta.index:
                raise ConsensusStartError(
                    f"The log begins at entry {journal.first_index}, after the newest snapshot, which ends at entry "
                    f"{meta.index}: what lies between is missing. Restore the data folder from a copy made while the "
                    "node was stopped, or remove the node, empty its data folder and add it again as a new node."
                )
        if not len(journal):
            # The beginning is the same on every founding node: it needs no agreement.
            journal.add(encode_configuration(Configuration(settings.founders)), 1, 0)
        journal.flush()
        return journal

    def _load(self, meta: SnapshotMeta) -> None:
        loader = self.replica.loader()
        offset = 0
        try:
            while offset < meta.size_bytes:
                data = self.store.read(offset, self.settings.snapshot_chunk_bytes)
                offset += len(data)
                loader.feed(data)
                while loader.work():
                    pass
            loader.finish()
        except SnapshotDamagedError:
            raise
        except ValueError as error:
            raise ConsensusStartError(
                f"The snapshot up to entry {meta.index} cannot be read as a state: {error}. Start the version of "
                "Trimaran that wrote it, or a later one."
            ) from error

    # -- life

    def begin(self) -> None:
        """Take part. Call once, when the links may be used."""
        self.guard.apply_committed()
        self.guard.elections.postpone()
        self._tick()

    def halt(self) -> None:
        """Stop at once: every caller is answered, nothing is sent any more. The journal is closed by `close`."""
        if self._halted:
            return
        self._halted = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.membership.abandon()
        self.reads.abandon()
        self.proposals.abandon()
        controls, self._controls = self._controls, {}
        for _, ended in controls.values():
            ended("unknown", "The node stopped before the outcome was known. Look at the status.")
        self.guard.stopped = True
        self._lead(False)

    def close(self) -> None:
        self.store.close()
        self.guard.journal.close()

    def fatal(self, reason: str) -> None:
        if self._fatal_reason is not None:
            return
        self._fatal_reason = reason
        self.runtime.call_soon(self._end)

    def _end(self) -> None:
        self.halt()
        if self._fatal is not None and self._fatal_reason is not None:
            self._fatal(self._fatal_reason)

    def on_fatal(self, callback: Callable[[str], None]) -> None:
        self._fatal = callback

    def on_leadership(self, callback: Callable[[bool], None]) -> None:
        self._leadership.append(callback)

    def _tick(self) -> None:
        if self.guard.stopped:
            return
        self._timer = self.runtime.call_later(self.settings.tick_seconds, self._tick)
        now = self.runtime.now()
        self.guard.tick(now)
        self.proposals.sweep(now)
        self.reads.tick(now)
        self.membership.tick(now)
        self.snapshotting.tick(now)
        for request in [request for request, (due, _) in self._controls.items() if due <= now]:
            self._controls.pop(request)[1](
                "unknown", "The leader did not answer in time. Look at the status."
            )
        self.proposals.pump_soon()

    # -- what the service asks for

    def submit(self, command: bytes, due: float, done: Callable[[ProposalEnd], None]) -> None:
        self.proposals.submit(command, due, done)

    def barrier(self, due: float, done: Callable[[bool], None]) -> None:
        if self.guard.stopped:
            self.runtime.call_soon(lambda: done(False))
        else:
            self.reads.barrier(due, done)

    def control(self, verb: str, argument: bytes, due: float, ended: Ended) -> None:
        """`add` (an encoded `NodeInfo`), `remove` or `transfer` (a node's id), here or by the leader."""
        guard = self.guard
        if guard.stopped:
            ended("refused", "The node is stopping. Nothing happened.")
        elif guard.leading:
            self._control_here(verb, argument, due, ended)
        elif guard.leader_id is None:
            ended("refused", "There is no leader at the moment. Nothing happened; try again.")
        else:
            self._control += 1
            request = ControlRequest(self._control, verb, argument, max(0.0, due - self.runtime.now()))
            if self.send(guard.leader_id, request):
                self._controls[self._control] = (due, ended)
            else:
                ended("refused", "The leader cannot be reached. Nothing happened; try again.")

    def _control_here(self, verb: str, argument: bytes, due: float, ended: Ended) -> None:
        membership = self.membership
        if verb == "add":
            membership.add(msgspec.msgpack.decode(argument, type=NodeInfo), due, ended)
        elif verb == "remove":
            membership.remove(argument.decode(), due, ended)
        elif verb == "transfer":
            membership.transfer(argument.decode() or None, due, ended)
        else:
            ended("refused", f"Unknown wish {verb!r}: the nodes run different versions.")

    def _on_control_request(self, node_id: str, m: ControlRequest) -> None:
        def ended(outcome: str, message: str) -> None:
            self.send(node_id, ControlAnswer(m.request, outcome, message))

        if not self.guard.leading:
            ended("refused", "This node is not the leader any more. Nothing happened; try again.")
            return
        try:
            self._control_here(m.verb, m.argument, self.runtime.now() + m.deadline_seconds, ended)
        except (msgspec.DecodeError, UnicodeDecodeError):
            ended("refused", "The request could not be read. Nothing happened.")

    def _on_control_answer(self, m: ControlAnswer) -> None:
        waiting = self._controls.pop(m.request, None)
        if waiting is not None:
            waiting[1](m.outcome, m.message)

    def status(self) -> ConsensusStatus:
        guard, configuration = self.guard, self.membership.current
        me = guard.node_id
        nodes = []
        for info, learner in [(n, False) for n in configuration.voters] + [
            (n, True) for n in configuration.learners
        ]:
            role = (
                Role.LEARNER if learner else Role.LEADER if info.node_id == guard.leader_id else Role.FOLLOWER
            )
            progress = guard.progress.get(info.node_id)
            if info.node_id == me:
                applied, committed, reachable = guard.applied_index, guard.commit_index, True
            elif guard.leading and progress is not None:
                applied = progress.applied_index
                committed = min(guard.match_index(info.node_id), guard.commit_index)
                reachable = self.connected(info.node_id)
            else:
                applied, committed, reachable = 0, 0, self.connected(info.node_id)
            nodes.append(NodeStatus(info, role, reachable, applied, committed))
        return ConsensusStatus(
            node_id=me,
            role=self._role(),
            term=guard.term,
            leader=guard.leader_id,
            quorum=guard.quorum_age_seconds() <= self.settings.leader_fallback_seconds,
            committed=guard.commit_index,
            applied=guard.applied_index,
            disk_full=guard.disk_full,
            nodes=tuple(nodes),
        )

    def _role(self) -> Role:
        guard = self.guard
        if self.membership.is_removed:
            return Role.REMOVED
        if guard.leading:
            return Role.LEADER
        if not guard.is_voter:
            return Role.LEARNER
        return Role.CANDIDATE if guard.state == CANDIDATE else Role.FOLLOWER

    # -- what links tell

    def on_connected(self, node_id: str) -> None:
        if self.guard.stopped:
            return
        self._connected.add(node_id)
        if self.membership.tell_if_removed(node_id):
            return
        self.send(node_id, self.membership.introduction())
        self.guard.node_connected(node_id)
        self.proposals.node_connected(node_id)
        self.reads.node_connected(node_id)
        self.snapshotting.node_connected(node_id)

    def on_disconnected(self, node_id: str) -> None:
        self._connected.discard(node_id)
        if not self.guard.stopped:
            self.guard.node_disconnected(node_id)

    def on_message(self, node_id: str, message: Message) -> None:
        if self.guard.stopped or self.membership.is_removed:
            return
        if isinstance(
            message, messages.RequestVote | messages.RequestPreVote
        ) and self.membership.tell_if_removed(node_id):
            return
        try:
            self._handlers[type(message)](node_id, message)
        except Exception as error:
            # Not for the transport to handle: this node's state may be half-changed now. (The engine logs it and goes on,
            # which is what makes 21 possible.)
            if self.corrections.apply_before_answer:
                self.guard.stopped = True
                self.impossible(f"{type(message).__name__} from {node_id}: {type(error).__name__}: {error}.")
            raise

    def authorize(self, fingerprint: str) -> str | None:
        return self.membership.by_fingerprint(fingerprint)

    # -- what guard, proposals, reads, membership and snapshots ask for

    def send(self, node_id: str, message: Message) -> bool:
        return self._links.send(node_id, message)

    def connected(self, node_id: str) -> bool:
        return node_id in self._connected

    def dial(self, node: NodeInfo) -> None:
        self._links.dial(node)

    def hang_up(self, node_id: str) -> None:
        self._links.hang_up(node_id)

    @property
    def paused(self) -> bool:
        return self.membership.transferring

    def apply(self, command: bytes, index: int, term: int) -> None:
        kind = command[:1]
        if kind == COMMANDS:
            groups = decode_groups(command)
            commands = groups[0][2] if len(groups) == 1 else [one for group in groups for one in group[2]]
            try:
                results = self.replica.apply(commands)
            except Exception as error:
                # 12: a refusal is a value. What raises is an impossible state, and goes no further.
                self.guard.stopped = True
                self.impossible(f"entry {index} could not be applied: {type(error).__name__}: {error}")
                return
            done = 0
            for origin, sequence, group in groups:
                self.proposals.applied(index, term, origin, sequence, results[done : done + len(group)])
                done += len(group)
        elif kind == CONFIGURATION:
            self.membership.applied(index, command)
        self.proposals.term_applied(term)

    def answer_applied(self) -> None:
        self.proposals.answer()
        self.reads.applied()
        if self.guard.acting:
            self._lead(True)

    def committed(self) -> None:
        self.guard.apply_committed()
        if self.membership.busy:
            self.membership.progressed()
        if self.guard.leading:
            self.reads.pump_soon()

    def changed(self) -> None:
        if not self.guard.leading:
            self._lead(False)
        self.membership.changed()
        self.reads.changed()
        self.snapshotting.changed()
        self.proposals.pump_soon()

    def _lead(self, acting: bool) -> None:
        if acting != self._acting:
            self._acting = acting
            for callback in self._leadership:
                callback(acting)

    def cut_off(self) -> None:
        self.reads.fail_waiting()

    def configuration_appended(self, index: int, command: bytes) -> None:
        self.membership.appended(index, command)

    def log_truncated(self, index: int) -> None:
        self.membership.truncated(index)

    def needs_snapshot(self, node_id: str) -> None:
        self.snapshotting.needed_by(node_id)

    def progressed(self, node_id: str) -> None:
        self.snapshotting.progressed(node_id)
        if self.membership.busy:
            self.membership.progressed()

    def configuration_at(self, index: int) -> Configuration:
        return self.membership.at(index)

    def snapshot_installed(self, index: int, term: int, configuration: Configuration) -> None:
        self.membership.installed(index, configuration)
        self.proposals.skipped_by_snapshot(term)
        self.answer_applied()

    def removed(self, message: str) -> None:
        self.removed_message = message
        self.proposals.close(NOT_A_MEMBER)
        self.proposals.refuse_queued(NOT_A_MEMBER)
        self.fatal(message)

    def impossible(self, reason: str) -> None:
        self.fatal(f"This must not happen: {reason} The node stops, so that nothing worse does.")

    def _on_disk_full(self, full: bool) -> None:
        if full:
            self.guard.disk_filled()
            self.guard.report()
        else:
            self.guard.disk_has_room()

    def stop_taking(self) -> None:
        """Graceful stop begins: what is under way may end, nothing new is taken."""
        self.proposals.close(STOPPING)
