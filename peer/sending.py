"""Moving a piece's bytes from files or memory to a connection.

Owned here: a send as a machine that goes on whenever what it waits for has come (room in the socket, pages from the
disk, its turn under the upload limits), the least rate a reader must take, and ending a send that lost its right. Left to
others: who is sent what (`sender.py`), requests (`server.py`, `short_way.py`), open files (`content.py`), what differs
between plain TCP and TLS (`outlets.py`).

A send has no task: most pieces go into the socket at once, within the call that began them. The event loop must not
wait for a disk: before each stretch is sent, its pages are probed (preadv with RWF_NOWAIT); those that are not in memory
are read ahead by the executor. Each stretch is preceded by one fstat, so a source that changes in the middle of a piece
is noticed before the piece's last bytes leave. All sends together move at most `TURN_BYTES` in a turn of the loop.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Final

from cluster.api.tokens import Claims

from .content import Content, FileInUse, OpenFiles, SourceGoneError
from .deadlines import Deadlines
from .outlets import Outlet, reset
from .sender import UploadQueue, too_slow
from .upload_rates import UploadRates

TURN_BYTES: Final = 4 << 20  # then the loop gets a turn
BLOCKED_SECONDS_MAX: Final = 10.0
READER_BYTES_PER_SECOND_MIN: Final = 4096.0

_Span = tuple[int, int, int]  # file index, offset, bytes


class CutError(Exception):
    """The send was ended on purpose: the right was withdrawn, the reader is too slow, or we stop."""


class Sending:
    """One send, from `go` until `ended` is called: with None, all went; else with what went wrong (SourceGoneError,
    CutError, OSError), and the connection is of no use any more unless nothing was `begun`. `ended` may be called by
    `go` itself."""

    __slots__ = (
        "_at", "_blocked_at", "_blocked_seconds", "_content", "_end", "_ended", "_file", "_file_index", "_handle",
        "_head_bytes", "_held", "_let_go", "_memory", "_paid", "_present", "_reading", "_sender", "_span", "_spans",
        "_until", "_watched", "claims", "head", "manifest_id", "outlet", "over", "sent_bytes", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        sender: PieceSender,
        ticket: int,
        outlet: Outlet,
        claims: Claims,
        manifest_id: str,
        head: bytes,
        content: Content,
        spans: Sequence[_Span],
        memory: memoryview | None,
        ended: Callable[[Sending, Exception | None], None],
    ) -> None:
        """A response: its head, then the spans of a share, or `memory` in their stead (which must stay as it is)."""
        self.ticket = ticket
        self.outlet = outlet
        self.claims = claims
        self.manifest_id = manifest_id
        self.sent_bytes = 0
        self.over = False
        self._sender = sender
        self.head = head  # what has not left
        self._head_bytes = len(head)
        self._content = content
        self._spans = spans if memory is None else ((-1, 0, len(memory)),)
        self._span = 0  # the next one
        self._memory = memory
        self._file: FileInUse | None = None
        self._file_index = -1
        self._at = self._until = self._end = 0  # in the span: next byte, end of the stretch, end of the span
        self._let_go = 0  # bytes of the next stretch, granted by the downloader's own limit
        self._held = False  # waits for that
        self._paid = 0  # bytes of the next stretch, granted by all limits
        self._present = False  # the next stretch was read ahead
        self._ended = ended
        self._handle: asyncio.Handle | None = None
        self._reading: asyncio.Future[None] | None = None
        self._watched = False
        self._blocked_at: float | None = None
        self._blocked_seconds = 0.0

    @property
    def begun(self) -> bool:
        """Whether any byte of the response went."""
        return len(self.head) < self._head_bytes

    def cut(self, reason: str) -> None:
        """End it now; not a byte follows."""
        self._finish(CutError(reason))

    def lost(self) -> None:
        self._finish(ConnectionResetError("the reader went away"))

    def go(self) -> None:
        """Begin, or go on: send until there is something to wait for, or an end."""
        if self.over:
            return
        sender, outlet = self._sender, self.outlet
        self._handle = None
        now = sender.loop.time()
        if self._held:
            self._held = False
            sender.queue.went_on(self.ticket)
        try:
            if self._blocked_at is not None:
                self._check_reader(now)
            if outlet.transport.is_closing():
                raise ConnectionResetError("the reader went away")
            while self._at < self._until or self._next_stretch(now):
                if not sender.has_turn():
                    self._wait_for(sender.loop.call_soon(self.go))
                    return
                count = self._send()
                self._at += count
                self.sent_bytes += count
                sender.sent(count, now)
                if self._at < self._until:  # the socket took what it had room for
                    self._wait_for_room(now)
                    return
        except BlockingIOError:
            self._wait_for_room(now)
        except (SourceGoneError, CutError, OSError) as error:
            self._finish(error)
        except Exception as error:  # a defect of ours must not keep the slot
            self._finish(error)
            raise

    def _send(self) -> int:
        """Bytes of the piece that went; the head goes before them."""
        if self._memory is not None:
            count = self.outlet.send_memory(self.head, self._memory[self._at : self._until])
            if not self.head:
                return count
            of_head = min(count, len(self.head))
            self.head = self.head[of_head:]
            return count - of_head
        if self.head:
            self.head = self.head[self.outlet.send_head(self.head) :]
            if self.head:
                return 0
        assert self._file is not None
        count = self.outlet.send_file(self._file.descriptor, self._at, self._until - self._at)
        if count == 0:
            raise SourceGoneError(f"{self._content.file(self._file_index)} is shorter than it was")
        return count

    def _next_stretch(self, now: float) -> bool:
        """Whether there is more to send now. If not, it has ended, or is waiting for something."""
        sender = self._sender
        if self._at == self._end:
            if self._span == len(self._spans):
                self._finish(None)
                return False
            self._file_index, self._at, length = self._spans[self._span]
            self._until, self._end = self._at, self._at + length
            self._span += 1
            if self._memory is None:
                self._leave_file()
                self._file = sender.files.hold(self._content, self._file_index)
        if not self._paid:
            if not sender.rates.limited:
                self._paid = min(self.outlet.stretch_bytes, self._end - self._at)
            elif not self._pay():
                return False
        if self._file is not None:
            self._content.check(self._file_index, self._file.descriptor)
            if not self._present and not sender.in_memory(self._file.descriptor, self._at, self._paid):
                self._read_ahead()
                return False
        self._until = self._at + self._paid
        self._paid, self._present = 0, False
        return True

    def _pay(self) -> bool:
        """Whether the limits let the next stretch go now. If not, it waits for one of them."""
        sender = self._sender
        rates, loop = sender.rates, sender.loop
        now = loop.time()
        if not self._let_go:
            downloader = self.claims.peer_id
            stretch = rates.stretch_of(sender.queue.sends_beside(downloader))
            self._let_go = min(self.outlet.stretch_bytes, self._end - self._at, stretch)
            seconds = rates.take_own(downloader, self._let_go, now)
            if seconds > 0:
                self._wait_for(loop.call_later(seconds, self.go))
                self._held = True
                sender.held(self.ticket)
                return False
        self._paid, self._let_go = self._let_go, 0
        seconds = rates.total.take(self._paid, now)
        if seconds > 0:
            self._wait_for(loop.call_later(seconds, self.go))
        return not seconds

    # --- waiting ----------------------------------------------------------------------------------

    def _wait_for(self, handle: asyncio.Handle | None) -> None:
        self._handle = handle
        if self._watched:
            self._watched = False
            self.outlet.unwatch()

    def _wait_for_room(self, now: float) -> None:
        self._blocked_at = now
        self._sender.blocked.add(self, now)
        if not self._watched:
            self._watched = True
            self.outlet.watch(self.go)

    def _check_reader(self, now: float) -> None:
        """There is room again. Raises CutError for a reader that takes too little."""
        assert self._blocked_at is not None
        self._blocked_seconds += now - self._blocked_at
        self._blocked_at = None
        self._sender.blocked.remove(self)
        if too_slow(self.sent_bytes, self._blocked_seconds, bytes_per_second_min=READER_BYTES_PER_SECOND_MIN):
            raise CutError("the reader takes too little")

    def _read_ahead(self) -> None:
        assert self._file is not None
        sender = self._sender
        self._wait_for(None)
        self._reading = sender.loop.run_in_executor(
            sender.executor, _read_ahead, self._file.descriptor, self._at, self._paid
        )
        self._reading.add_done_callback(self._was_read)

    def _was_read(self, reading: asyncio.Future[None]) -> None:
        self._reading = None
        error = CutError("this peer is stopping") if reading.cancelled() else reading.exception()
        if self.over:
            self._leave_file()
        elif error is not None:
            self._finish(error if isinstance(error, Exception) else CutError(str(error)))
        else:
            self._present = True
            self.go()

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self, error: Exception | None) -> None:
        if self.over:
            return
        self.over = True
        if self._handle is not None:
            self._handle.cancel()
        self._wait_for(None)
        if self._blocked_at is not None:
            self._sender.blocked.remove(self)
        if self._reading is None:  # else the file is in use until then
            self._leave_file()
        self._memory = None
        if error is None:
            self.outlet.rest()
        elif self.begun or not isinstance(error, SourceGoneError):
            # Bytes were promised that will not come: only the end of the connection can say so. What waits in the
            # kernel goes with it: a slow reader would get it for seconds yet, without a right to it.
            reset(self.outlet.transport)
        self._ended(self, error)

    def _leave_file(self) -> None:
        if self._file is not None:
            self._sender.files.release(self._file)
            self._file = None


class PieceSender:
    """What all sends of a peer share."""

    def __init__(
        self,
        files: OpenFiles,
        executor: Executor,
        rates: UploadRates,
        queue: UploadQueue,
        held: Callable[[int], None],
    ) -> None:
        """`held` is told of a ticket whose send waits for its downloader's own limit; the queue, when it goes on."""
        self.files = files
        self.executor = executor
        self.rates = rates
        self.queue = queue
        self.held = held
        self.loop = asyncio.get_running_loop()
        self.blocked: Deadlines[Sending] = Deadlines(
            lambda: BLOCKED_SECONDS_MAX, lambda sending: sending.cut("the reader takes too little")
        )
        self._turn_left = TURN_BYTES
        self._byte = bytearray(1)
        self._probes = hasattr(os, "RWF_NOWAIT")

    def start(self, sending: Sending) -> None:
        sending.go()

    def look(self, content: Content, spans: Sequence[_Span]) -> None:
        """Raises SourceGoneError if any file of the spans is not what it was."""
        for file_index, _, _ in spans:
            with self.files.use(content, file_index) as descriptor:
                content.check(file_index, descriptor)

    def has_turn(self) -> bool:
        """Whether more may be sent in this turn of the loop."""
        return self._turn_left > 0

    def sent(self, count: int, now: float) -> None:
        if self._turn_left == TURN_BYTES:
            self.loop.call_soon(self._new_turn)
        self._turn_left -= count
        self.queue.moved(count, now)

    def _new_turn(self) -> None:
        self._turn_left = TURN_BYTES

    def in_memory(self, descriptor: int, offset: int, length: int) -> bool:
        """Whether reading this stretch needs no disk, as far as its ends tell."""
        if not self._probes:
            return True
        try:
            for at in (offset, offset + length - 1):
                os.preadv(descriptor, [self._byte], at, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._probes = False  # this file system cannot say
        return True


def _read_ahead(descriptor: int, offset: int, length: int) -> None:
    buffer = bytearray(min(length, 256 << 10))
    end = offset + length
    while offset < end:
        count = os.preadv(descriptor, [memoryview(buffer)[: end - offset]], offset)
        if count == 0:
            return
        offset += count
