"""The journal: the log, the term and the vote of one node, on its disk.

Owned here: adding to it, group commit, and forgetting what a snapshot covers. Its bytes are described in
`journal_format.py`, opening it in `journal_recovery.py`. Left to others: what must wait for which position
(`guard.py`), and when to compact (`node.py`).

How it works. Every change is encoded at once into a buffer, and counted: the count so far is `written`. `flush`
hands the buffer, as one batch, to the sync thread, which writes it, syncs it, and reports back; then `synced`
reaches the batch's last position and those who wait for it are called. While a batch is under way the next
gathers, and follows by itself: group commit. The event loop never touches the disk.

No room: the batch is kept in memory, in order, and tried again every second; meanwhile `disk_full` is true and
`add` raises `DiskFullError`, having changed nothing. A sync that fails ends the node: `on_fatal` is called once,
and `synced` never moves again, for after a failed sync nobody knows what the disk holds (raft.md).

The log in memory is a list of (command, index, term), always with consecutive indexes. Its first entry is the
anchor of the log check; it stays until compaction or a reset moves it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import SupportsIndex, overload
from zlib import crc32

import pysyncobj.journal

from cluster.raft import journal_recovery
from cluster.raft.disk import Disk, DiskFullError, File
from cluster.raft.journal_format import (
    COMMAND_BYTES_MAX,
    ENTRY,
    ENTRY_REST,
    SALT_BYTES,
    Entry,
    Identity,
    Segment,
    SegmentHeader,
    encode_cut,
    encode_mark,
    encode_reset,
    encode_term,
    segment_name,
)
from cluster.raft.journal_recovery import Recovered
from cluster.raft.runtime import Runtime

SEGMENT_BYTES = 16 * 1024 * 1024

_ENTRY_BYTES = 16  # of the length field of an entry: index and term


class SyncFailedError(OSError):
    """fdatasync said no, or writing failed for another reason than want of room."""


class _Batch:
    """What one piece of work of the sync thread writes."""

    __slots__ = ("data", "file", "header", "last_index", "last_position", "number", "on_disk")

    def __init__(
        self,
        data: bytearray,
        last_position: int,
        last_index: int,
        number: int,
        file: File,
        header: SegmentHeader | None,
    ) -> None:
        self.data = data
        self.last_position = last_position
        self.last_index = last_index  # lowered when the log is cut below it before it is synced
        self.number = number  # of the segment
        self.file = file  # the segment to append to; the new one once `header` is written
        self.header = header  # when the batch begins a new segment
        self.on_disk = False  # set on the sync thread


class Journal(pysyncobj.journal.Journal):
    """One node's log. Everything runs on the event loop's thread.

    `on_fatal(reason)` is called at most once. `on_disk_full(full)` is called when room runs out and when it is back.
    """

    def __init__(
        self,
        disk: Disk,
        runtime: Runtime,
        identity: Identity,
        recovered: Recovered,
        *,
        segment_bytes: int,
        on_fatal: Callable[[str], None],
        on_disk_full: Callable[[bool], None],
    ) -> None:
        self._disk = disk
        self._syncer = runtime.syncer
        self._random = runtime.random
        self._identity = identity
        self._segment_bytes = segment_bytes
        self._on_fatal = on_fatal
        self._on_disk_full = on_disk_full

        replay = recovered.replay
        self._log = replay.log
        self._next_index = replay.next_index
        self._term = replay.term
        self._voted_for = replay.voted_for
        self._commit_hint = replay.commit_hint
        self._position = replay.position
        self._chain = replay.chain
        self._segments = recovered.segments
        self._salt = recovered.salt
        self._file = recovered.file
        self.dropped_bytes = recovered.dropped_bytes
        """Length of the torn tail that opening dropped. For the log, and for tests."""

        self._synced = replay.position
        self._synced_index = self.last_index
        self._buffer = bytearray()
        self._buffer_range = Segment(0, 0)
        self._buffer_start = self._start_of_buffer()
        self._batch: _Batch | None = None  # under way, or waiting for room
        self._under_way = False
        self._last_number = self._segments[-1].number  # of the segments that are on the disk
        self._last_cut = 0  # position of the last record that took entries out of the log
        self._doomed: deque[tuple[int, str]] = deque()  # segments to remove once that position is synced
        self._sealed = False  # whether a mark follows the last record
        self._waiting: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._disk_full = False
        self._failed = False
        self._closed = False

    @classmethod
    def open(
        cls,
        disk: Disk,
        runtime: Runtime,
        *,
        identity: Identity,
        create: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        on_fatal: Callable[[str], None],
        on_disk_full: Callable[[bool], None] = lambda _full: None,
    ) -> Journal:
        """Read the journal back, or make a new one where there is none (`create`). Blocks.

        Raises `ConsensusStartError` saying what is wrong, where, and what the operator can do. Without `create`
        a folder that holds no journal is refused: a node whose data vanished may not vote as its old self.
        """
        if create:
            salt = runtime.random.randbytes(SALT_BYTES)
            recovered = journal_recovery.create(disk, identity, salt)
        else:
            recovered = journal_recovery.recover(disk, identity)
        return cls(
            disk,
            runtime,
            identity,
            recovered,
            segment_bytes=segment_bytes,
            on_fatal=on_fatal,
            on_disk_full=on_disk_full,
        )

    @staticmethod
    def exists(disk: Disk) -> bool:
        """Whether the folder holds a journal that was ever used (whole or not)."""
        return journal_recovery.holds_journal(disk.list())

    # --- reading ----------------------------------------------------------------------------------------------

    @overload
    def __getitem__(self, item: SupportsIndex) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: SupportsIndex | slice) -> Entry | list[Entry]:
        """By place in the list, not by index."""
        return self._log[item]

    def __len__(self) -> int:
        return len(self._log)

    @property
    def first_index(self) -> int:
        """0 when the log is empty."""
        return self._log[0][1] if self._log else 0

    @property
    def last_index(self) -> int:
        """0 when the log is empty."""
        return self._log[-1][1] if self._log else 0

    @property
    def next_index(self) -> int:
        """The only index the next entry may have; 0 when any will do. A log that was emptied remembers it."""
        return self._next_index

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None when the log does not hold it."""
        if not self._log or not self._log[0][1] <= index <= self._log[-1][1]:
            return None
        return self._log[index - self._log[0][1]][2]

    @property
    def size_bytes(self) -> int:
        """Of all segments, with what is not written yet."""
        return sum(segment.size_bytes for segment in self._segments) + len(self._buffer)

    # --- writing ----------------------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry. Raises `DiskFullError`, with nothing changed, while there is no room."""
        if self._disk_full:
            raise DiskFullError("no room left for the log")
        assert (self._next_index or idx) == idx, f"entry {idx} cannot follow entry {self.last_index}"
        assert term <= self._term, (
            f"entry {idx} has term {term}, which is after the current term {self._term}"
        )
        length = len(command)
        if length > COMMAND_BYTES_MAX:
            raise ValueError(f"a command has at most {COMMAND_BYTES_MAX} bytes, not {length}")
        # This is encode_entry of journal_format.py, inline: the one hot path of the journal.
        rest = ENTRY_REST.pack(length + _ENTRY_BYTES, ENTRY, idx, term)
        self._chain = chain = crc32(command, crc32(rest, self._chain))
        buffer = self._buffer
        buffer += chain.to_bytes(4, "little")
        buffer += rest
        buffer += command
        self._log.append((command, idx, term))
        self._next_index = idx + 1
        self._position += 1
        gathered = self._buffer_range
        gathered.first = gathered.first or idx
        gathered.last = idx

    def clear(self) -> None:
        """Forget all entries; the next may have any index."""
        self._record(encode_cut(0, self._chain))
        self._cut(0)
        self._log.clear()
        self._next_index = 0

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        """Cut the log before the entry at place `entryFrom`."""
        if entryFrom >= len(self._log):
            return
        index = self._log[entryFrom][1]
        self._record(encode_cut(index, self._chain))
        self._cut(index)
        del self._log[entryFrom:]
        self._next_index = index

    def deleteEntriesTo(self, entryTo: int) -> None:
        """Forget the entries before place `entryTo`, all of them committed. On disk, whole segments go."""
        del self._log[:entryTo]
        if self._log:
            self._drop_segments(self._log[0][1], 0)

    def compact_to(self, index: int, keep_tail_bytes: int = 0) -> None:
        """A snapshot covers `index`: drop the oldest segments whose entries all lie before it, as long as
        `keep_tail_bytes` of journal remain for nodes that lag. The entry at `index` stays."""
        self._drop_segments(index, keep_tail_bytes)
        for segment in self._segments:
            if segment.first:
                if self._log and self._log[0][1] < segment.first:
                    del self._log[: segment.first - self._log[0][1]]
                return

    def reset_to(self, index: int, term: int) -> None:
        """A snapshot up to (index, term) is safe on disk and becomes the beginning of the log.

        When the log holds that very entry, everything after it stays (finding 2); else the log becomes that entry
        alone, with an empty command.
        """
        if self.term_at(index) == term:
            self.deleteEntriesTo(index - self._log[0][1])
            return
        self._record(encode_reset(index, term, self._chain))
        self._cut(0)
        self._log[:] = [(b"", index, term)]
        self._next_index = index + 1
        self._buffer_range.hold(index, index)
        self.when_synced(self._position, lambda: self._drop_segments(index, 0))

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """A hint: how far to apply after a restart without asking anyone. Travels with the next batch."""
        self._commit_hint = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        return max(1, self._commit_hint)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        assert term >= self._term, f"term {term} cannot follow term {self._term}"
        self._term, self._voted_for = term, votedForNodeId
        self._record(encode_term(term, votedForNodeId, self._chain))

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> str | None:
        return self._voted_for

    # --- syncing ----------------------------------------------------------------------------------------------

    @property
    def written(self) -> int:
        """The position of the last change. Counts records over the life of the journal."""
        return self._position

    @property
    def synced(self) -> int:
        """Everything up to this position is on the disk."""
        return self._synced

    @property
    def synced_index(self) -> int:
        """The highest index up to which the log, as it is now, is on the disk; 0 for none."""
        return self._synced_index

    @property
    def disk_full(self) -> bool:
        return self._disk_full

    def flush(self) -> None:
        """Let what was written become durable: now, or together with whatever gathers while a batch is under way."""
        if self._buffer and self._batch is None:
            self._begin_batch()

    def when_synced(self, position: int, callback: Callable[[], None]) -> None:
        """Call back once `synced >= position`: at once, or on the event loop. Does not flush.

        Never called when the journal fails or is closed first.
        """
        if position <= self._synced:
            callback()
        else:
            heapq.heappush(self._waiting, (position, next(self._order), callback))

    def onOneSecondTimer(self) -> None:
        """Try again when the disk was full; seal what was synced, so that damage to it is never taken for a tear."""
        if self._failed or self._closed:
            return
        if self._batch is not None:
            if not self._under_way:
                self._submit(self._batch)
        elif self._buffer:
            self.flush()
        elif not self._sealed and self._synced:
            self._begin_batch()

    def close(self) -> None:
        """Write and sync what is left, on the sync thread, and close. `Syncer.close` waits for it."""
        if self._closed:
            return
        self._closed = True
        pending = self._batch
        last = None
        if pending is None and not self._failed and (self._buffer or not self._sealed):
            last = self._next_batch()
        rest = bytes(self._buffer)

        def finish() -> None:
            file = self._file if pending is None else pending.file
            if last is not None:
                self._write(last)
                file = last.file
            elif pending is not None and pending.on_disk and rest:
                # Without a mark of its own it counts as part of the batch before, which is on the disk.
                file.append(rest)
                file.sync()
            file.close()

        self._syncer.submit(finish, lambda _outcome: None)

    def _destroy(self) -> None:
        self.close()

    # --- inside -----------------------------------------------------------------------------------------------

    def _record(self, encoded: tuple[bytes, int]) -> None:
        record, self._chain = encoded
        self._buffer += record
        self._position += 1

    def _cut(self, index: int) -> None:
        """The entries at and after `index` are gone: nothing of them counts as synced."""
        self._last_cut = self._position
        below = max(index - 1, 0)
        for segment in self._segments:
            segment.cut(index)
        self._buffer_range.cut(index)
        self._synced_index = min(self._synced_index, below)
        if self._batch is not None:
            self._batch.last_index = min(self._batch.last_index, below)

    def _start_of_buffer(self) -> tuple[int, int, int, int, str | None]:
        """The state before the buffer's first record, for the header of the segment it may begin."""
        return self._position, self._chain, self._next_index, self._term, self._voted_for

    def _next_batch(self) -> _Batch:
        position, chain, next_index, term, voted_for = self._buffer_start
        # Only what is on the disk and still in the log: the hint must hold even if this batch is torn.
        commit_hint = min(self._commit_hint, self._synced_index)
        header = None
        segment = self._segments[-1]
        if segment.size_bytes >= self._segment_bytes:
            segment = Segment(segment.number + 1, 0)
            self._segments.append(segment)
            self._salt = self._random.randbytes(SALT_BYTES)
            header = SegmentHeader(
                segment.number,
                self._identity.node_id,
                self._identity.cluster_id,
                self._salt,
                position,
                chain,
                next_index,
                term,
                voted_for,
                commit_hint,
            )
        data = self._buffer
        data[:0] = encode_mark(self._salt, position + 1, commit_hint)
        self._sealed = self._position == position
        segment.size_bytes += len(data)
        segment.hold(self._buffer_range.first, self._buffer_range.last)
        self._buffer = bytearray()
        self._buffer_range = Segment(0, 0)
        self._buffer_start = self._start_of_buffer()
        return _Batch(data, self._position, self.last_index, segment.number, self._file, header)

    def _begin_batch(self) -> None:
        if not self._failed and not self._closed:
            self._batch = self._next_batch()
            self._submit(self._batch)

    def _submit(self, batch: _Batch) -> None:
        self._under_way = True
        self._syncer.submit(lambda: self._write(batch), lambda outcome: self._written(batch, outcome))

    def _write(self, batch: _Batch) -> None:
        """On the sync thread."""
        if batch.header is None:
            batch.file.append(batch.data)
            _sync(batch.file)
        else:
            old = batch.file
            batch.file = journal_recovery.create_segment(self._disk, batch.header, batch.data)
            old.close()
        batch.on_disk = True

    def _written(self, batch: _Batch, outcome: OSError | None) -> None:
        self._under_way = False
        if self._failed:
            return
        if isinstance(outcome, DiskFullError):
            if not self._disk_full:
                self._disk_full = True
                self._on_disk_full(True)
            return
        if outcome is not None:
            self._fail(outcome)
            return
        self._file = batch.file
        self._last_number = batch.number
        self._batch = None
        self._synced = batch.last_position
        self._synced_index = batch.last_index
        if self._disk_full:
            self._disk_full = False
            self._on_disk_full(False)
        if self._buffer:
            self._begin_batch()
        self._remove_doomed()
        while self._waiting and self._waiting[0][0] <= self._synced:
            heapq.heappop(self._waiting)[2]()

    def _fail(self, error: OSError) -> None:
        self._failed = True
        self._waiting.clear()
        self._on_fatal(
            f"The disk failed under the journal ({segment_name(self._segments[-1].number)}: "
            f"{error.strerror or error}). What was acknowledged is safe; nothing more can be promised."
        )

    def _drop_segments(self, index: int, keep_tail_bytes: int) -> None:
        """Remove the oldest segments whose entries all lie before `index`, once what emptied them is synced.

        The last segment on the disk stays, and nothing waits for records that found no room: dropping segments is
        what makes room.
        """
        remaining = sum(segment.size_bytes for segment in self._segments)
        count = 0
        for segment in self._segments:
            remaining -= segment.size_bytes
            if segment.number >= self._last_number or segment.last >= index or remaining < keep_tail_bytes:
                break
            count += 1
        if not count:
            return
        # In a queue, for they must go oldest first: what a crash leaves is then still a row without a gap.
        for segment in self._segments[:count]:
            self._doomed.append((self._last_cut, segment_name(segment.number)))
        del self._segments[:count]
        self._remove_doomed()

    def _remove_doomed(self) -> None:
        names = []
        while self._doomed and self._doomed[0][0] <= self._synced:
            names.append(self._doomed.popleft()[1])
        if not names:
            return

        def remove() -> None:
            for name in names:
                self._disk.remove(name)
            self._disk.sync_folder()

        def removed(outcome: OSError | None) -> None:
            if outcome is not None and not self._failed:
                self._fail(outcome)

        self._syncer.submit(remove, removed)


def _sync(file: File) -> None:
    try:
        file.sync()
    except OSError as error:
        # Even ENOSPC: delayed allocation may find the disk full only now, and what was in the cache is lost.
        raise SyncFailedError(error.errno, error.strerror or str(error)) from error
