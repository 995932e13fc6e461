"""Snapshots as a node's work: writing its own, sending it to a node that is too far behind, installing one.

Owned here: when, in which slices, and in which order with the log. Left to others: files and checksums
(`snapshots.py`), the encoding (the replica). No fork (17), no step longer than a few milliseconds.

The order that matters: a snapshot is safe on disk before the log lets go of what it covers (2, 3, 6); an installed
one is safe and loaded before the commit index moves (1); the log keeps a tail, so that a node a moment behind
needs none (23).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

from cluster.consensus import Replica, StateLoader
from cluster.raft.disk import DiskFullError
from cluster.raft.entries import Configuration
from cluster.raft.guard import Guard
from cluster.raft.messages import Message, SnapshotAck, SnapshotChunk
from cluster.raft.snapshot_format import SnapshotDamagedError, SnapshotMeta
from cluster.raft.snapshots import SnapshotReceiver, SnapshotStore, SnapshotWriter

_RESEND_SECONDS = 1.0
_GIVEN_UP_SECONDS = 15.0
_PENDING_BYTES_MAX = 8 << 20
_configuration = msgspec.msgpack.Decoder(Configuration)
encode_configuration = msgspec.msgpack.Encoder().encode


def decode_configuration(data: bytes) -> Configuration:
    return _configuration.decode(data)


class SnapshottingHost(Protocol):
    def send(self, node_id: str, message: Message) -> bool: ...

    def configuration_at(self, index: int) -> Configuration: ...

    def snapshot_installed(self, index: int, term: int, configuration: Configuration) -> None: ...

    def impossible(self, reason: str) -> None: ...


class _Sending:
    __slots__ = ("acknowledged", "furthest", "gained_at", "meta", "moved_at", "next_offset", "sent_at")

    def __init__(self, meta: SnapshotMeta, now: float) -> None:
        self.meta = meta
        self.acknowledged = 0
        self.furthest = 0  # of what was acknowledged, also if that is lost again
        self.next_offset = 0
        self.sent_at = now
        self.moved_at = now
        self.gained_at = now


class _Writing:
    __slots__ = ("index", "slices", "writer")

    def __init__(self, index: int, slices: Iterator[bytes], writer: SnapshotWriter) -> None:
        self.index = index
        self.slices = slices
        self.writer = writer


class Snapshotting:
    def __init__(self, guard: Guard, host: SnapshottingHost, store: SnapshotStore, replica: Replica) -> None:
        self._guard = guard
        self._host = host
        self._runtime = guard.runtime
        self._settings = guard.settings
        self._corrections = guard.corrections
        self._store = store
        self._replica = replica
        self._writing: _Writing | None = None
        self._sending: dict[str, _Sending] = {}
        self._receiver: SnapshotReceiver | None = None
        self._installing: SnapshotMeta | None = None
        self._installing_from = ""
        self._installing_sent_at = 0.0
        self._loader: StateLoader | None = None
        self._load_offset = 0
        self._size_after = guard.journal.size_bytes
        self.written = 0
        self.installed = 0
        self.resumed = 0  # of those installed: begun by an earlier run of this node
        self.sent = 0

    # -- writing our own

    def tick(self, now: float) -> None:
        begun = self._store.receiving()
        if begun is not None and (begun.index <= self._guard.commit_index or self._guard.disk_full):
            # The log was quicker; or it needs the room more than a snapshot that can be sent again.
            self._give_up_receiving()
        for node_id, sending in list(self._sending.items()):
            if now - max(sending.sent_at, sending.moved_at) > _RESEND_SECONDS:
                sending.next_offset = sending.acknowledged
                sending.sent_at = now
                self._send(node_id, sending)
        grown = self._guard.journal.size_bytes - self._size_after
        latest = self._store.latest()
        bound = self._settings.log_bytes_before_snapshot
        if latest is not None and self._corrections.keep_tail:
            bound = max(bound, latest.size_bytes)
        if grown > bound:
            self.begin()

    def begin(self) -> None:
        """Start writing a snapshot of what is applied, unless something stands against it now."""
        guard = self._guard
        index = guard.applied_index
        latest = self._store.latest()
        if (
            self._writing is not None
            or self._installing is not None
            or guard.stopped
            or guard.disk_full
            or self._helping()  # a newer one would make them start over
            or index <= guard.first_index
            or (latest is not None and index <= latest.index)
        ):
            return
        configuration = encode_configuration(self._host.configuration_at(index))
        try:
            writer = self._store.writer(index, guard.term_at(index), configuration)
        except DiskFullError:
            return
        self._writing = _Writing(index, self._replica.freeze().slices(), writer)
        if not self._corrections.compact_behind_snapshot_only:
            guard.journal.compact_to(index, 0)
        self._runtime.call_soon(self._write_slice)

    def _helping(self) -> bool:
        now = self._runtime.now()
        return any(now - sending.gained_at < _GIVEN_UP_SECONDS for sending in self._sending.values())

    def _write_slice(self) -> None:
        writing = self._writing
        if writing is None or self._guard.stopped:
            return
        if writing.writer.pending_bytes > _PENDING_BYTES_MAX:
            self._runtime.call_later(0.005, self._write_slice)  # the disk is slower than the encoding
            return
        until = self._runtime.now() + self._settings.snapshot_slice_seconds
        try:
            for data in writing.slices:
                writing.writer.feed(data)
                if self._runtime.now() >= until:
                    self._runtime.call_later(0.001, self._write_slice)
                    return
        except DiskFullError:
            self._give_up_writing(writing)
            return
        writing.writer.finish(lambda outcome: self._written(writing, outcome))

    def _give_up_writing(self, writing: _Writing) -> None:
        """No room for a snapshot: the log goes on, and it is tried again when that has grown further."""
        self._writing = None
        writing.writer.abort()
        self._size_after = self._guard.journal.size_bytes

    def _written(self, writing: _Writing, outcome: OSError | None) -> None:
        if self._guard.stopped:
            return
        if isinstance(outcome, DiskFullError):
            self._give_up_writing(writing)
            return
        if outcome is not None:
            self._host.impossible(f"The disk failed under a snapshot: {outcome.strerror or outcome}.")
            return
        self._writing = None
        self.written += 1
        keep = self._settings.keep_tail_bytes if self._corrections.keep_tail else 0
        self._guard.journal.compact_to(writing.index, keep)
        self._size_after = self._guard.journal.size_bytes

    # -- sending it

    def needed_by(self, node_id: str) -> None:
        meta = self._store.latest()
        if meta is None:
            self._host.impossible(
                f"Node {node_id} needs entries that are neither in the log nor in a snapshot of this node."
            )
            return
        sending = self._sending.get(node_id)
        if sending is None or sending.meta.index != meta.index:
            self._sending[node_id] = sending = _Sending(meta, self._runtime.now())
            self.sent += 1
            self._send(node_id, sending)

    def _send(self, node_id: str, sending: _Sending) -> None:
        guard, meta = self._guard, sending.meta
        if not guard.leading:
            return
        if meta != self._store.latest():
            # A newer one has taken its place: what is left of this one is nowhere any more.
            del self._sending[node_id]
            self.needed_by(node_id)
            return
        window = self._settings.snapshot_chunk_bytes * self._settings.snapshot_chunks_in_flight
        while True:
            try:
                data = self._store.read(sending.next_offset, self._settings.snapshot_chunk_bytes)
            except SnapshotDamagedError as error:
                self._host.impossible(str(error))  # 9: what is damaged is neither sent nor lived with
                return
            chunk = SnapshotChunk(
                guard.term, meta.index, meta.term, meta.config, meta.size_bytes, meta.digest,
                sending.next_offset, data, guard.commit_index, self._runtime.now(),
            )  # fmt: skip
            if not self._host.send(node_id, chunk):
                return
            sending.next_offset += len(data)
            if sending.next_offset >= meta.size_bytes or sending.next_offset - sending.acknowledged >= window:
                return

    def on_ack(self, node_id: str, m: SnapshotAck) -> None:
        guard = self._guard
        if m.term > guard.term:
            guard.step_down(m.term)
            return
        sending = self._sending.get(node_id)
        if not guard.leading or m.term < guard.term:
            return
        progress = guard.progress.get(node_id)
        if progress is not None:
            progress.heard(m.sent_at, self._runtime.now())
        if sending is None or sending.meta.index != m.index:
            return
        if m.offset > sending.acknowledged:
            sending.acknowledged = m.offset
            sending.next_offset = max(sending.next_offset, m.offset)
            sending.moved_at = self._runtime.now()
            if m.offset > sending.furthest:
                sending.furthest, sending.gained_at = m.offset, sending.moved_at
            if m.offset < sending.meta.size_bytes:
                self._send(node_id, sending)
        elif m.offset < sending.acknowledged and m.sent_at >= sending.moved_at:
            # It had more when what it answers was not yet sent: it began anew, and so does this.
            sending.acknowledged = sending.next_offset = m.offset
            sending.moved_at = self._runtime.now()
            self._send(node_id, sending)

    def progressed(self, node_id: str) -> None:
        """The node answers from the log again: nothing more to send it."""
        guard = self._guard
        if node_id in self._sending and guard.match_index(node_id) >= guard.first_index:
            del self._sending[node_id]

    def node_connected(self, node_id: str) -> None:
        sending = self._sending.get(node_id)
        if sending is not None:
            sending.next_offset = sending.acknowledged
            self._send(node_id, sending)

    def changed(self) -> None:
        if not self._guard.leading:
            self._sending.clear()
        else:
            for node_id in [node_id for node_id in self._sending if node_id not in self._guard.progress]:
                del self._sending[node_id]

    # -- installing another's

    def on_chunk(self, node_id: str, m: SnapshotChunk) -> None:
        guard = self._guard
        if not guard.recognise_leader(node_id, m.term):
            guard.refuse_past_leader(node_id, m.sent_at)
            return
        if not self._corrections.snapshot_never_commits:
            guard.commit_on_chunk(m.commit_index)
        if guard.disk_full:
            return
        if m.index <= guard.commit_index:
            # 1: a stale snapshot. Everything in it is here; the log may go on from what is committed.
            guard.ask_from_commit(node_id, m.sent_at)
            return
        if self._installing is not None:
            size_bytes = m.size_bytes if self._installing.index == m.index else 0
            self._host.send(node_id, SnapshotAck(guard.term, m.index, size_bytes, False, m.sent_at))
            self._installing_from, self._installing_sent_at = node_id, m.sent_at
            return
        meta = SnapshotMeta(
            index=m.index, term=m.index_term, config=m.config, size_bytes=m.size_bytes, digest=m.digest
        )
        receiver = self._receiver
        if receiver is None or receiver.meta != meta:
            self._receiver = receiver = self._store.receive(meta)
        try:
            if m.offset == receiver.offset and m.data:
                receiver.feed(m.offset, m.data)
        except (DiskFullError, ValueError):
            self._give_up_receiving()  # the leader tries again in a while, and then it is begun anew
            return
        self._host.send(node_id, SnapshotAck(guard.term, m.index, receiver.offset, False, m.sent_at))
        if receiver.offset >= m.size_bytes:
            if self._writing is not None:
                self._give_up_writing(self._writing)
            self._installing, self._receiver = meta, None
            self._installing_from, self._installing_sent_at = node_id, m.sent_at
            receiver.finish(lambda outcome: self._received(receiver, outcome))

    def _give_up_receiving(self) -> None:
        self._receiver = None
        self._store.give_up_receiving()

    def _received(self, receiver: SnapshotReceiver, outcome: Exception | None) -> None:
        if self._guard.stopped:
            return
        if outcome is not None:
            self._installing = None
            if not isinstance(outcome, DiskFullError | ValueError):
                self._host.impossible(f"The disk failed under a snapshot: {outcome}.")
            return
        self.resumed += receiver.resumed
        self._loader = self._replica.loader()
        self._load_offset = 0
        self._load_slice()

    def _load_slice(self) -> None:
        meta, loader = self._installing, self._loader
        if meta is None or loader is None or self._guard.stopped:
            return
        until = self._runtime.now() + self._settings.snapshot_slice_seconds
        try:
            while self._runtime.now() < until or self._load_offset == 0:
                if loader.work():
                    continue
                if self._load_offset >= meta.size_bytes:
                    self._loaded(meta, loader)
                    return
                data = self._store.read(self._load_offset, self._settings.snapshot_chunk_bytes)
                self._load_offset += len(data)
                loader.feed(data)
        except ValueError as error:
            self._host.impossible(f"The leader's snapshot up to entry {meta.index} is no state: {error}")
            return
        self._runtime.call_later(0.001, self._load_slice)

    def _loaded(self, meta: SnapshotMeta, loader: StateLoader) -> None:
        guard = self._guard
        self._installing, self._loader = None, None
        if meta.index <= guard.applied_index:
            return  # the log was quicker
        loader.finish()
        self.installed += 1
        guard.installed(meta.index, meta.term)
        self._size_after = guard.journal.size_bytes
        self._host.snapshot_installed(meta.index, meta.term, decode_configuration(meta.config))
        guard.acknowledge_snapshot(self._installing_from, meta.index, self._installing_sent_at)
        guard.apply_committed()
