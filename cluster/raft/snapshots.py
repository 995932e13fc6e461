"""Snapshots of the state on disk: written beside, checksummed, synced, renamed; read back only when whole.

Owned here: the file's layout, the order of its steps, and when an older one may go. Left to others: what the
payload means (the replica), when to write, send and install (`snapshotting.py`).

A snapshot is one file, `snapshot-<index>-<term>.snap`:

    header   checked block: cluster, index, term, configuration
    payload  the state's encoding
    footer   checked block: payload's length, digest, a CRC-32 for each 64 KiB of it
    u32      length of the footer

The digest is a SHA-256 over index, term, configuration and payload: two nodes that name the same digest mean the
same bytes, so an installation that was cut off goes on where it stopped, from whichever leader.

All disk work is done on the sync thread, in pieces of 256 KiB that are synced one by one, and never more than one
of them is handed over at a time: a batch of the journal waits for one piece at most, whatever a snapshot weighs.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import deque
from collections.abc import Callable
from zlib import crc32

import msgspec

from cluster.consensus import ConsensusStartError
from cluster.raft.checked import (
    BODY_BYTES_MAX,
    PREFIX_BYTES,
    WHAT_TO_DO,
    BlockInvalidError,
    BlockNewerError,
    decode_block,
    encode_block,
    refuse,
    refuse_newer,
)
from cluster.raft.disk import Disk, DiskFullError, File
from cluster.raft.runtime import Runtime

FORMAT = 1
HEADER_MAGIC = b"TRIMSNAP"
FOOTER_MAGIC = b"TRIMSNPF"
PIECE_BYTES = 256 * 1024
CHECKED_BYTES = 64 * 1024
PENDING_BYTES_MAX = 64 * 1024 * 1024
DIGEST_BYTES = 32

_PREFIX, _SUFFIX, _WRITING, _RECEIVING = "snapshot-", ".snap", ".tmp", ".part"
_LENGTH = struct.Struct("<I")


class SnapshotDamagedError(ConsensusStartError, ValueError):
    """A snapshot is not what was written. The node stops: it cannot know its state any more."""


class SnapshotMeta(msgspec.Struct, frozen=True):
    """`size_bytes` is that of the payload."""

    index: int
    term: int
    config: bytes
    size_bytes: int
    digest: bytes


class _Header(msgspec.Struct, frozen=True, array_like=True):
    cluster_id: str
    index: int
    term: int
    config: bytes


class _Footer(msgspec.Struct, frozen=True, array_like=True):
    size_bytes: int
    digest: bytes
    checksums: bytes  # u32 for each CHECKED_BYTES of payload


def _begin_digest(index: int, term: int, config: bytes) -> hashlib._Hash:
    return hashlib.sha256(msgspec.msgpack.encode((index, term, config)))


def snapshot_name(index: int, term: int) -> str:
    return f"{_PREFIX}{index:020d}-{term:020d}{_SUFFIX}"


class _Stored:
    """A whole snapshot and its open file."""

    def __init__(self, name: str, meta: SnapshotMeta, file: File, start: int, checksums: bytes) -> None:
        self.name = name
        self.meta = meta
        self.file = file
        self._start = start
        self._checksums = checksums

    def read(self, offset: int, length: int) -> bytes:
        """That part of the payload, checked; shorter at its end."""
        size = self.meta.size_bytes
        end = min(offset + length, size)
        if offset >= end:
            return b""
        first = offset - offset % CHECKED_BYTES
        last = min(end + -end % CHECKED_BYTES, size)
        data = self.file.read_at(self._start + first, last - first)
        view = memoryview(data)
        for at in range(first, last, CHECKED_BYTES):
            (expected,) = _LENGTH.unpack_from(self._checksums, at // CHECKED_BYTES * _LENGTH.size)
            if crc32(view[at - first : at - first + CHECKED_BYTES]) != expected or len(data) != last - first:
                raise SnapshotDamagedError(
                    f"The snapshot is damaged: its checksum does not match ({self.name}, byte {self._start + at}). "
                    f"{WHAT_TO_DO}"
                )
        return data if (first, last) == (offset, end) else data[offset - first : end - first]


class _Output:
    """A file that grows piece by piece on the sync thread, until it is whole or given up.

    `error` and everything about the file belong to the sync thread; the loop reads `failed`, which its reports set.
    """

    def __init__(self, store: SnapshotStore, name: str, index: int, term: int, config: bytes) -> None:
        self.store = store
        self.name = name
        self.header = _Header(store.cluster_id, index, term, config)
        self.failed: OSError | None = None
        self.closed = False
        self.taken_bytes = 0
        self.pending_bytes = 0
        self._gathered = bytearray()
        self._works: deque[tuple[Callable[[], None], Callable[[OSError | None], None]]] = deque()
        self._busy = False
        self._error: OSError | None = None
        self._file: File | None = None
        self._digest = _begin_digest(index, term, config)
        self._checksums = bytearray()
        self._start = 0
        self._submit(self._create, 0)

    def take(self, data: bytes) -> None:
        self.taken_bytes += len(data)
        self.pending_bytes += len(data)
        self._gathered += data
        if len(self._gathered) >= PIECE_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Hand on what is gathered, in whole pieces but for the last."""
        gathered, self._gathered = self._gathered, bytearray()
        view = memoryview(gathered)
        for at in range(0, len(gathered), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            if len(piece) < PIECE_BYTES and not self.closed:
                self._gathered += piece  # checksums are of whole pieces
                return
            data = bytes(piece)
            self._submit(lambda data=data: self._append(data), len(data))  # type: ignore[misc]

    def finish(self, digest: bytes | None, callback: Callable[[OSError | ValueError | None], None]) -> None:
        self.closed = True
        self._flush()
        stored: list[_Stored] = []

        def work() -> None:
            if self._error is None:
                stored.append(self._complete(digest))

        def done(outcome: OSError | None) -> None:
            if outcome is None and stored:
                self.store._adopt(stored[0])
                callback(None)
            elif stored or outcome is None or isinstance(outcome, _DigestError):
                self._discard()
                failed = self.failed
                callback(
                    failed if failed is not None else ValueError("the bytes received are not the snapshot's")
                )
            else:
                self._discard()
                callback(outcome)

        self._queue(work, done)

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            self._gathered.clear()
            self._works.clear()
            self._discard()

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
        header = encode_block(HEADER_MAGIC, FORMAT, msgspec.msgpack.encode(self.header))
        file.append(header)
        self._start = len(header)

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._digest.update(data)
        view = memoryview(data)
        for at in range(0, len(data), CHECKED_BYTES):
            self._checksums += _LENGTH.pack(crc32(view[at : at + CHECKED_BYTES]))
        self._file.append(data)
        self._file.sync()

    def _complete(self, digest: bytes | None) -> _Stored:
        file, header, disk = self._file, self.header, self.store.disk
        assert file is not None
        found = self._digest.digest()
        if digest is not None and found != digest:
            raise _DigestError
        checksums = bytes(self._checksums)
        footer = _Footer(self.taken_bytes, found, checksums)
        block = encode_block(FOOTER_MAGIC, FORMAT, msgspec.msgpack.encode(footer))
        file.append(block + _LENGTH.pack(len(block)))
        file.sync()
        name = snapshot_name(header.index, header.term)
        disk.rename(self.name, name)
        disk.sync_folder()
        # Only now that this one is safe may the older ones go.
        older = [other for other in disk.list() if _is_snapshot(other) and other < name]
        for other in older:
            disk.remove(other)
        if older:
            disk.sync_folder()
        meta = SnapshotMeta(header.index, header.term, header.config, self.taken_bytes, found)
        return _Stored(name, meta, file, self._start, checksums)

    def _discard(self) -> None:
        def work() -> None:
            if self._file is not None:
                self._file.close()
            if self.name in self.store.disk.list():
                self.store.disk.remove(self.name)

        self.store.syncer.submit(work, lambda _outcome: None)


class _DigestError(OSError):
    """The payload received is not the one announced."""


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

    @property
    def offset(self) -> int:
        """The next byte wanted."""
        return self._output.taken_bytes

    def feed(self, offset: int, data: bytes) -> bool:
        """Take the bytes at `offset`; False when they are not the next, are too many, or the disk is far behind (try
        again later). Raises `DiskFullError` when an earlier write found no room."""
        output = self._output
        if isinstance(output.failed, DiskFullError):
            raise output.failed
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

    def __init__(self, disk: Disk, runtime: Runtime, cluster_id: str) -> None:
        self.disk = disk
        self.syncer = runtime.syncer
        self.cluster_id = cluster_id
        self._latest: _Stored | None = None
        self._writer: _Output | None = None
        self._receiver: _Output | None = None
        self._count = itertools.count(1)

    @classmethod
    def open(cls, disk: Disk, runtime: Runtime, *, cluster_id: str) -> SnapshotStore:
        """Find the latest snapshot and remove what was left unfinished. Blocks.

        Raises `ConsensusStartError` for a snapshot that is damaged, another cluster's, or of a newer format; damage
        within the payload shows when it is read.
        """
        store = cls(disk, runtime, cluster_id)
        try:
            names = disk.list()
            for name in names:
                if name.startswith(_PREFIX) and name.endswith((_WRITING, _RECEIVING)):
                    disk.remove(name)
            whole = sorted(name for name in names if _is_snapshot(name))
            if whole:
                store._latest = _open_stored(disk, whole[-1], cluster_id)
            for name in whole[:-1]:
                disk.remove(name)
        except OSError as error:
            raise refuse(
                f"The disk failed: {error.strerror or error}",
                str(error.filename or "data folder"),
                todo="Look at the disk and the system's log. When the disk is well, start the node again.",
            ) from error
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
        self._writer = _Output(self, self._temporary(index, term, _WRITING), index, term, config)
        return SnapshotWriter(self._writer)

    def receive(self, meta: SnapshotMeta) -> SnapshotReceiver:
        """Begin to take another node's snapshot. One at a time: another is given up."""
        if self._receiver is not None:
            self._receiver.abort()
        name = self._temporary(meta.index, meta.term, _RECEIVING)
        self._receiver = _Output(self, name, meta.index, meta.term, meta.config)
        return SnapshotReceiver(self._receiver, meta)

    def close(self) -> None:
        """Give up what is unfinished and close. `Syncer.close` waits for it."""
        for output in (self._writer, self._receiver):
            if output is not None:
                output.abort()
        if self._latest is not None:
            self.syncer.submit(self._latest.file.close, lambda _outcome: None)
            self._latest = None

    def _temporary(self, index: int, term: int, suffix: str) -> str:
        # Numbered: removing one that was given up must not hit its successor.
        return snapshot_name(index, term).removesuffix(_SUFFIX) + f"-{next(self._count)}{suffix}"

    def _adopt(self, stored: _Stored) -> None:
        latest = self._latest
        if latest is not None and latest.meta.index > stored.meta.index:
            # Overtaken by an installed one while it was written; opening will remove it, or the next snapshot.
            self.syncer.submit(stored.file.close, lambda _outcome: None)
            return
        self._latest = stored
        if latest is not None:
            self.syncer.submit(latest.file.close, lambda _outcome: None)


def _is_snapshot(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _open_stored(disk: Disk, name: str, cluster_id: str) -> _Stored:
    file = disk.open_read(name)
    try:
        size = file.size()
        prefix = file.read_at(0, PREFIX_BYTES + BODY_BYTES_MAX)
        body, start = decode_block(HEADER_MAGIC, FORMAT, prefix)
        header = msgspec.msgpack.decode(body, type=_Header)
        if size < start + _LENGTH.size:
            raise BlockInvalidError("it is cut short")
        (length,) = _LENGTH.unpack(file.read_at(size - _LENGTH.size, _LENGTH.size))
        if not 0 < length <= size - _LENGTH.size - start:
            raise BlockInvalidError("its end is not where it should be")
        footer_at = size - _LENGTH.size - length
        block = file.read_at(footer_at, length)
        body, end = decode_block(FOOTER_MAGIC, FORMAT, block)
        footer = msgspec.msgpack.decode(body, type=_Footer)
        chunks = -(-footer.size_bytes // CHECKED_BYTES)
        if (
            footer.size_bytes != footer_at - start
            or end != length
            or len(footer.checksums) != chunks * _LENGTH.size
        ):
            raise BlockInvalidError("its length does not match")
    except BlockNewerError as error:
        file.close()
        raise refuse_newer("The snapshot", name, error) from error
    except (BlockInvalidError, msgspec.DecodeError) as error:
        file.close()
        raise SnapshotDamagedError(f"The snapshot is damaged: {error} ({name}). {WHAT_TO_DO}") from error
    except OSError:
        file.close()
        raise
    if header.cluster_id != cluster_id:
        file.close()
        raise refuse(
            f"The snapshot belongs to cluster {header.cluster_id!r}, and this node to cluster {cluster_id!r}",
            name,
            todo="Give each node the data folder that is its own. Nothing has been changed.",
        )
    if name != snapshot_name(header.index, header.term):
        file.close()
        raise SnapshotDamagedError(
            f"The snapshot is damaged: it was written as another ({name}). {WHAT_TO_DO}"
        )
    meta = SnapshotMeta(header.index, header.term, header.config, footer.size_bytes, footer.digest)
    return _Stored(name, meta, file, start, footer.checksums)
