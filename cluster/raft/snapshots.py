"""Snapshots of the state on disk: written beside, checksummed, synced, renamed; read back only when whole.

Owned here: the order of a file's steps, when an older one may go, and what becomes of one that was not finished. Left to
others: the bytes of the file (`snapshot_format.py`), what the payload means (the replica), when to write, send and install
(`snapshotting.py`).

All disk work is done on the sync thread, in pieces of 256 KiB that are synced one by one, and never more than one
of them is handed over at a time: a batch of the journal waits for one piece at most, whatever a snapshot weighs.

Another node's snapshot that is received in part outlives the process: the next run finds it by its header, reads again
what was synced of it, and goes on from there if the same is sent again. Until all of it matches the digest it is a
`.part`, which nothing ever loads. At most one is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cluster.raft.checked import WHAT_TO_DO, refuse
from cluster.raft.disk import Disk, DiskFullError, File
from cluster.raft.runtime import Runtime
from cluster.raft.snapshot_format import (
    RECEIVING,
    WRITING,
    Begun,
    Header,
    SnapshotDamagedError,
    SnapshotMeta,
    Stored,
    Sums,
    find_begun,
    is_snapshot,
    is_unfinished,
    open_stored,
    snapshot_name,
    temporary_name,
)

PIECE_BYTES = 256 * 1024
PENDING_BYTES_MAX = 64 * 1024 * 1024


class _Output:
    """A file that grows piece by piece on the sync thread, until it is whole or given up.

    `error` and everything about the file belong to the sync thread; the loop reads `failed`, which its reports set.
    """

    def __init__(self, store: SnapshotStore, name: str, header: Header, begun: Begun | None = None) -> None:
        self.store = store
        self.name = name
        self.header = header
        self._piece_bytes = store.piece_bytes
        self.failed: OSError | None = None
        self.closed = False
        self.taken_bytes = 0
        self.pending_bytes = 0
        self._gathered = bytearray()
        self._works: deque[tuple[Callable[[], None], Callable[[OSError | None], None]]] = deque()
        self._busy = False
        self._error: OSError | None = None
        self._file: File | None = None
        self._sums = Sums(header)
        self._start = 0
        if begun is None:
            self._submit(self._create, 0)
        else:
            self._resume(begun)

    def _resume(self, begun: Begun) -> None:
        """What is there has to be read again, for the digest; what comes meanwhile waits behind it."""
        self.taken_bytes = begun.kept_bytes
        self._submit(lambda: self._reopen(begun), 0)
        for at in range(0, begun.kept_bytes, self._piece_bytes):
            length = min(self._piece_bytes, begun.kept_bytes - at)
            self._submit(lambda at=at, length=length: self._reread(at, length), 0)  # type: ignore[misc]

    def take(self, data: bytes) -> None:
        self.taken_bytes += len(data)
        self.pending_bytes += len(data)
        self._gathered += data
        if len(self._gathered) >= self._piece_bytes:
            self._flush()

    def _flush(self) -> None:
        """Hand on what is gathered, in whole pieces but for the last."""
        gathered, self._gathered = self._gathered, bytearray()
        view = memoryview(gathered)
        for at in range(0, len(gathered), self._piece_bytes):
            piece = view[at : at + self._piece_bytes]
            if len(piece) < self._piece_bytes and not self.closed:
                self._gathered += piece  # how long a file is tells what of it was synced: pieces are whole
                return
            data = bytes(piece)
            self._submit(lambda data=data: self._append(data), len(data))  # type: ignore[misc]

    def finish(self, digest: bytes | None, callback: Callable[[OSError | ValueError | None], None]) -> None:
        self.closed = True
        self._flush()
        stored: list[Stored] = []

        def work() -> None:
            if self._error is None:
                stored.append(self._complete(digest))

        def done(outcome: OSError | None) -> None:
            wrong = outcome if outcome is not None else self.failed
            if wrong is None:
                self.store._adopt(stored[0])
                callback(None)
                return
            self._discard()
            other = isinstance(wrong, _OtherBytesError)
            callback(ValueError("the bytes received are not the snapshot's") if other else wrong)

        self._queue(work, done)

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self._gathered.clear()
            self._works.clear()
            self._discard()

    def leave(self) -> None:
        """Let go of it, and leave what is on the disk to the next run."""
        if self.failed is not None:
            self.abort()
        elif not self.closed:
            self.closed = True
            self._gathered.clear()
            self._works.clear()
            self.store.syncer.submit(self._close, lambda _outcome: None)

    def _submit(self, work: Callable[[], None], size: int) -> None:
        def guarded() -> None:
            if self._error is None:
                try:
                    work()
                except OSError as error:
                    self._error = error
                    raise

        def done(outcome: OSError | None) -> None:
            self.pending_bytes -= size
            if outcome is not None:
                self.failed = outcome

        self._queue(guarded, done)

    def _queue(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        self._works.append((work, done))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        work, done = self._works.popleft()
        self._busy = True

        def reported(outcome: OSError | None) -> None:
            self._busy = False
            done(outcome)
            if self._works and not self._busy:
                self._next()

        self.store.syncer.submit(work, reported)

    # On the sync thread.

    def _create(self) -> None:
        self._file = file = self.store.disk.open_append(self.name)
        file.truncate(0)
        header = self.header.encode()
        file.append(header)
        self._start = len(header)
        if self.header.piece_bytes:  # to be found again, if the process ends before it is whole
            file.sync()
            self.store.disk.sync_folder()

    def _reopen(self, begun: Begun) -> None:
        try:
            self._file = file = self.store.disk.open_append(begun.name)
            self._start = begun.start
            file.truncate(begun.start + begun.kept_bytes)
        except OSError as error:
            raise _OtherBytesError from error

    def _reread(self, offset: int, length: int) -> None:
        assert self._file is not None
        try:
            data = self._file.read_at(self._start + offset, length)
        except OSError as error:
            raise _OtherBytesError from error
        if len(data) != length:
            raise _OtherBytesError
        self._sums.update(data)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._sums.update(data)
        self._file.append(data)
        self._file.sync()

    def _complete(self, digest: bytes | None) -> Stored:
        file, header, disk = self._file, self.header, self.store.disk
        assert file is not None
        found = self._sums.digest()
        if digest is not None and found != digest:
            raise _OtherBytesError
        file.append(self._sums.encode_footer())
        file.sync()
        name = snapshot_name(header.index, header.term)
        disk.rename(self.name, name)
        disk.sync_folder()
        # Only now that this one is safe may the older ones go.
        older = [other for other in disk.list() if is_snapshot(other) and other < name]
        for other in older:
            disk.remove(other)
        if older:
            disk.sync_folder()
        meta = SnapshotMeta(header.index, header.term, header.config, self.taken_bytes, found)
        return Stored(name, meta, file, self._start, self._sums.checksums())

    def _discard(self) -> None:
        def work() -> None:
            self._close()
            if self.name in self.store.disk.list():
                self.store.disk.remove(self.name)

        self.store.syncer.submit(work, lambda _outcome: None)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class _OtherBytesError(OSError):
    """The payload received is not the one announced, or what an earlier run had of it cannot be read."""


class SnapshotWriter:
    """Takes this node's own state. Made by `SnapshotStore.writer`."""

    def __init__(self, output: _Output) -> None:
        self._output = output

    @property
    def pending_bytes(self) -> int:
        """Fed, but not on the disk yet. Feed more slowly when it grows."""
        return self._output.pending_bytes

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises `DiskFullError` when an earlier write found no room; then `abort`."""
        if isinstance(self._output.failed, DiskFullError):
            raise self._output.failed
        self._output.take(data)

    def finish(self, callback: Callable[[OSError | None], None]) -> None:
        """Make it whole and `latest`; call back on the event loop with None, or with what went wrong: no room
        (`DiskFullError`; nothing is left behind), or a disk that failed, which ends the node."""

        def finished(outcome: OSError | ValueError | None) -> None:
            assert not isinstance(outcome, ValueError), "nothing was announced that could differ"
            callback(outcome)

        self._output.finish(None, finished)

    def abort(self) -> None:
        self._output.abort()


class SnapshotReceiver:
    """Takes another node's snapshot, in order, with pauses of any length. Made by `SnapshotStore.receive`."""

    def __init__(self, output: _Output, meta: SnapshotMeta) -> None:
        self._output = output
        self.meta = meta
        self.resumed = output.taken_bytes > 0
        """Whether an earlier run of this node received a part of it."""

    @property
    def offset(self) -> int:
        """The next byte wanted."""
        return self._output.taken_bytes

    def feed(self, offset: int, data: bytes) -> bool:
        """Take the bytes at `offset`; False when they are not the next, are too many, or the disk is far behind (try
        again later). Raises `DiskFullError` when an earlier write found no room, `ValueError` when what an earlier
        run had received cannot be read; then `abort`, and start over."""
        output = self._output
        if isinstance(output.failed, DiskFullError):
            raise output.failed
        if isinstance(output.failed, _OtherBytesError):
            raise ValueError("what was received earlier cannot be read")
        if offset != self.offset or offset + len(data) > self.meta.size_bytes:
            return False
        if output.pending_bytes > PENDING_BYTES_MAX:
            return False
        output.take(data)
        return True

    def finish(self, callback: Callable[[OSError | ValueError | None], None]) -> None:
        """Check it, make it `latest`, call back on the event loop with None, or with what went wrong: `ValueError` when
        the bytes are not those announced (start over), else as `SnapshotWriter.finish`."""
        self._output.finish(self.meta.digest, callback)

    def abort(self) -> None:
        self._output.abort()


class SnapshotStore:
    """The snapshots in one data folder. Everything here is called on the event loop's thread."""

    def __init__(
        self, disk: Disk, runtime: Runtime, cluster_id: str, piece_bytes: int, begun: Begun | None
    ) -> None:
        self.disk = disk
        self.syncer = runtime.syncer
        self.cluster_id = cluster_id
        self.piece_bytes = piece_bytes
        self._begun = begun
        self._latest: Stored | None = None
        self._writer: _Output | None = None
        self._receiver: _Output | None = None
        self._count = begun.number if begun is not None else 0

    @classmethod
    def open(
        cls, disk: Disk, runtime: Runtime, *, cluster_id: str, piece_bytes: int = PIECE_BYTES
    ) -> SnapshotStore:
        """Find the latest snapshot, and a newer one that was received in part; remove what is of no more use. Blocks.

        `piece_bytes`: what is synced, and read again, in one go. Raises `ConsensusStartError` for a snapshot that is
        damaged, another cluster's, or of a newer format; damage within the payload shows when it is read.
        """
        try:
            names = disk.list()
            whole = sorted(name for name in names if is_snapshot(name))
            latest = open_stored(disk, whole[-1], cluster_id) if whole else None
            unfinished = [name for name in names if is_unfinished(name)]
            found = [find_begun(disk, name, cluster_id, piece_bytes) for name in unfinished]
            newer = [
                begun
                for begun in found
                if begun is not None and (latest is None or begun.meta.index > latest.meta.index)
            ]
            begun = max(newer, key=lambda one: (one.meta.index, one.meta.term, one.kept_bytes), default=None)
            for name in whole[:-1] + unfinished:
                if begun is None or name != begun.name:
                    disk.remove(name)
        except OSError as error:
            raise refuse(
                f"The disk failed: {error.strerror or error}",
                str(error.filename or "data folder"),
                todo="Look at the disk and the system's log. When the disk is well, start the node again.",
            ) from error
        store = cls(disk, runtime, cluster_id, piece_bytes, begun)
        store._latest = latest
        return store

    def latest(self) -> SnapshotMeta | None:
        return self._latest.meta if self._latest is not None else None

    def read(self, offset: int, length: int) -> bytes:
        """Part of the latest snapshot's payload, checked; shorter or empty at its end.

        Raises `SnapshotDamagedError`, which is both a `ConsensusStartError` and a `ValueError`.
        """
        assert self._latest is not None, "there is no snapshot to read"
        try:
            return self._latest.read(offset, length)
        except OSError as error:
            raise SnapshotDamagedError(
                f"The snapshot cannot be read: {error.strerror or error} ({self._latest.name}). {WHAT_TO_DO}"
            ) from error

    def writer(self, index: int, term: int, config: bytes) -> SnapshotWriter:
        """Begin a snapshot of this node's state up to (index, term). One at a time: another is given up."""
        if self._writer is not None:
            self._writer.abort()
        header = Header(self.cluster_id, index, term, config)
        self._writer = _Output(self, self._temporary(index, term, WRITING), header)
        return SnapshotWriter(self._writer)

    def receive(self, meta: SnapshotMeta) -> SnapshotReceiver:
        """Begin to take another node's snapshot, or go on with it. One at a time: another is given up."""
        begun = self._begun
        if begun is not None and begun.meta == meta:
            self._begun = None
        else:
            begun = None
        self.give_up_receiving()
        name = begun.name if begun is not None else self._temporary(meta.index, meta.term, RECEIVING)
        header = Header(
            self.cluster_id,
            meta.index,
            meta.term,
            meta.config,
            meta.size_bytes,
            meta.digest,
            self.piece_bytes,
        )
        self._receiver = _Output(self, name, header, begun)
        return SnapshotReceiver(self._receiver, meta)

    def receiving(self) -> SnapshotMeta | None:
        """What another node began to send, in this run or an earlier one, and did not finish."""
        if self._receiver is not None and not self._receiver.closed:
            return self._receiver.header.announced
        return self._begun.meta if self._begun is not None else None

    def give_up_receiving(self) -> None:
        """Remove what is there of it. What is whole and only to be made `latest` still will be."""
        if self._receiver is not None:
            self._receiver.abort()
            self._receiver = None
        if self._begun is not None:
            name, self._begun = self._begun.name, None
            self.syncer.submit(lambda: self.disk.remove(name), lambda _outcome: None)

    def close(self) -> None:
        """Give up what is being written, leave what is being received, and close. `Syncer.close` waits for it."""
        if self._writer is not None:
            self._writer.abort()
        if self._receiver is not None:
            self._receiver.leave()
        if self._latest is not None:
            self.syncer.submit(self._latest.file.close, lambda _outcome: None)
            self._latest = None

    def _temporary(self, index: int, term: int, suffix: str) -> str:
        # Numbered: removing one that was given up must not hit its successor.
        self._count += 1
        return temporary_name(index, term, self._count, suffix)

    def _adopt(self, stored: Stored) -> None:
        latest = self._latest
        if latest is not None and latest.meta.index > stored.meta.index:
            # Overtaken by an installed one while it was written; opening will remove it, or the next snapshot.
            self.syncer.submit(stored.file.close, lambda _outcome: None)
            return
        self._latest = stored
        if latest is not None:
            self.syncer.submit(latest.file.close, lambda _outcome: None)
