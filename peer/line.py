"""One connection to a peer, as its client: requests out, strictly read answers in.

Owned here: reading a bounded subset of RFC 9112 responses whose bodies land in the caller's own buffer, and how often
the loop is woken for them. Left to others: which connection, and what becomes of an answer (`fetch.py`).

Strict means: HTTP/1.1, a status, at most `HEAD_BYTES_MAX` of headers, exactly one `Content-Length` of plain
digits, no transfer coding, no byte that was not asked for. Anything else ends the connection.

**Wake-ups.** A limited link delivers a body in dozens of small packets, and a turn of the loop for each of them costs more
than the bytes. So the kernel is asked to wake us for as much as comes in `WAKE_SECONDS` at the rate of the last body
(`SO_RCVLOWAT`), and never for more than what is left of this one, part of which may have been read already over TLS.
Whoever watches for silence says `look` first: what waits in the kernel is no silence.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from .pacer import Pacer, take_all

HEAD_BYTES_MAX: Final = 8 * 1024
ANSWER_BYTES_MAX: Final = 8 * 1024  # of a body that is not what was asked for: an error's explanation
HEAD_SECONDS: Final = 15.0  # a busy sender queues a request for less, then says 429
STALL_SECONDS: Final = 6.0  # without one byte of a body that has begun
LIMITED_READ_BYTES: Final = 64 * 1024  # small reads keep a limited rate smooth
WAKE_SECONDS: Final = 0.05
WAKE_BYTES_MAX: Final = 256 * 1024  # more would only grow cold in the kernel
WAKE_BYTES_MIN: Final = 8 * 1024
TLS_RECORD_BYTES: Final = 16 * 1024  # of content, at most: the part that has come waits for its rest

_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*?)[ \t]*\r\n")
_DIGITS: Final = re.compile(rb"[0-9]{1,15}")
_STATUS: Final = re.compile(rb"HTTP/1\.1 [1-5][0-9][0-9]( [^\r\n\x00]*)?")
# The head as peers of this version write it for a piece: read in one step.
_PIECE_HEAD: Final = re.compile(
    rb"HTTP/1\.1 200 OK\r\nTrimaran-Piece: ([0-9]{1,15})\r\nContent-Type: application/octet-stream\r\n"
    rb"Content-Length: ([0-9]{1,15})\r\n\r\n"
)


class FetchFault(Exception):
    """A request to a peer that did not end in an answer. `kind` says whose trouble it is."""

    def __init__(
        self, kind: Literal["unreachable", "stalled", "broken", "protocol", "wrong_peer"], message: str
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Head(Struct, frozen=True):
    status: int
    length: int
    piece: int | None
    retry_after_seconds: float | None
    close: bool


class Reply(Struct, frozen=True):
    """`body` is filled for answers other than 200 and 206 (at most `ANSWER_BYTES_MAX`), else empty."""

    head: Head
    body: bytes


# Returns where the body goes: exactly `head.length` bytes. Raises FetchFault to refuse it.
Landing: TypeAlias = Callable[[Head], memoryview]
# How a request ended.
Ended: TypeAlias = Callable[[Reply | FetchFault], None]


def parse_head(data: bytes) -> Head:
    """Parse a response's head, the empty line included. Raises FetchFault(`protocol`)."""
    if (plain := _PIECE_HEAD.fullmatch(data)) is not None:
        return Head(200, int(plain[2]), int(plain[1]), None, False)
    line, _, rest = data.partition(b"\r\n")
    if not _STATUS.fullmatch(line):
        raise FetchFault("protocol", "not an HTTP/1.1 answer")
    status = int(line[9:12])
    length: int | None = None
    piece: int | None = None
    retry: float | None = None
    close = False
    at = 0
    while rest[at : at + 2] != b"\r\n":
        match = _HEADER.match(rest, at)
        if match is None:
            raise FetchFault("protocol", "a malformed header")
        at = match.end()
        name, value = match[1].lower(), match[2]
        if name == b"content-length":
            if length is not None or not _DIGITS.fullmatch(value):
                raise FetchFault("protocol", "a malformed Content-Length")
            length = int(value)
        elif name == b"transfer-encoding" or (name == b"content-encoding" and value.lower() != b"identity"):
            raise FetchFault("protocol", "a coded body")
        elif name == b"trimaran-piece":
            if not _DIGITS.fullmatch(value):
                raise FetchFault("protocol", "a malformed Trimaran-Piece")
            piece = int(value)
        elif name == b"retry-after":
            retry = min(float(value), 3600.0) if _DIGITS.fullmatch(value) else None
        elif name == b"connection":
            close = value.lower() == b"close"
    if status == 204 or status < 200:
        length = 0
    if length is None:
        raise FetchFault("protocol", "no Content-Length")
    return Head(status, length, piece, retry, close)


class Line(asyncio.BufferedProtocol):
    """One connection to a peer, carrying one request at a time."""

    def __init__(self) -> None:
        self.pacers: list[Pacer] = []
        self._loop = asyncio.get_running_loop()
        self._headbuf = bytearray(HEAD_BYTES_MAX)
        self._headview = memoryview(self._headbuf)
        self._filled = 0
        self._head: Head | None = None
        self._landing: Landing | None = None
        self._body: memoryview = self._headview[:0]
        self._at = 0
        self._answer: bytearray | None = None
        self._ended: Ended | None = None
        self._asked_at = 0.0
        self._head_at = 0.0
        self._socket: socket.socket | None = None  # where the kernel may be asked to wait for more
        self._read_ahead_bytes = 0  # at most so much of what is to come was read from the kernel already
        self._wake_bytes = 1  # what the kernel wakes us for now
        self._chunk_bytes = 1  # what is worth a wake-up, by the rate of the last body
        self.progress_at = 0.0
        self.transport: asyncio.Transport | None = None
        self.open = False
        self.on_bytes: Callable[[int], None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.open = True
        if sys.platform == "linux":
            self._socket = transport.get_extra_info("socket")
            if transport.get_extra_info("ssl_object") is not None:
                self._read_ahead_bytes = TLS_RECORD_BYTES

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._head is None:
            return self._headview[self._filled :]
        rest = self._body[self._at :]
        return rest[:LIMITED_READ_BYTES] if self._limited() else rest

    def buffer_updated(self, count: int) -> None:
        self.progress_at = self._loop.time()
        limited = bool(self.pacers) and self._limited()
        try:
            if self._head is None:
                self._filled += count
                self._read_head()
            else:
                self._at += count
            if self._head is not None:
                if self._at == len(self._body):
                    self._finish()
                else:
                    if self.on_bytes is not None:
                        self.on_bytes(count)
                    if not limited:
                        self._wake_for(min(len(self._body) - self._at, self._chunk_bytes))
        except FetchFault as fault:
            self.fail(fault)
            return
        if (
            limited
            and (seconds := take_all(self.pacers, count, self.progress_at)) > 0
            and self.transport is not None
        ):
            self.transport.pause_reading()
            self._loop.call_later(seconds, self._resume)

    def _limited(self) -> bool:
        return any(pacer.bytes_per_second for pacer in self.pacers)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self.fail(FetchFault("broken", "the connection was closed in the middle of an answer"))

    # the caller's side

    def begin(self, request: bytes, landing: Landing, ended: Ended) -> None:
        """Send a request; `ended` is told of its end, once, in a later turn of the loop. `abandon` it, or wait for that."""
        assert self._ended is None and self.transport is not None
        self._ended = ended
        self._landing = landing
        self._asked_at = self.progress_at = self._loop.time()
        self._wake_for(1)
        self.transport.write(request)

    def abandon(self) -> None:
        """Nobody wants the answer: the rest of it would be in the way of the next."""
        self._ended = None
        self.abort()

    @property
    def answered(self) -> bool:
        """Whether any byte came since the last request."""
        return self.progress_at > self._asked_at

    @property
    def overdue(self) -> bool:
        if self._ended is None:
            return False
        allowed = HEAD_SECONDS if self._head is None else STALL_SECONDS
        return self._loop.time() - self.progress_at > allowed

    def look(self) -> None:
        """Have what waits in the kernel read, however little it is."""
        self._wake_for(1)

    def fail(self, fault: FetchFault) -> None:
        ended, self._ended = self._ended, None
        self.abort()
        if ended is not None:
            ended(fault)

    def abort(self) -> None:
        self.open = False
        self._body = self._headview[:0]  # the buffer is its owner's again
        self._head = None
        self._filled = 0
        if self.transport is not None:
            self.transport.abort()

    def _resume(self) -> None:
        if self.open and self.transport is not None:
            self.progress_at = self._loop.time()
            self.transport.resume_reading()

    def _read_head(self) -> None:
        end = self._headbuf.find(b"\r\n\r\n", 0, self._filled)
        if end < 0:
            if self._filled == HEAD_BYTES_MAX:
                raise FetchFault("protocol", "headers too long")
            return
        if self._landing is None or self._ended is None:
            raise FetchFault("protocol", "an answer that nobody asked for")
        head = parse_head(bytes(self._headview[: end + 4]))
        self._head_at = self.progress_at
        if head.status in (200, 206):
            body = self._landing(head)
            if len(body) != head.length:
                raise FetchFault("protocol", f"{head.length} bytes where {len(body)} were asked for")
        else:
            if head.length > ANSWER_BYTES_MAX:
                raise FetchFault("protocol", "an error that is too long")
            self._answer = bytearray(head.length)
            body = memoryview(self._answer)
        early = self._filled - end - 4
        if early > len(body):
            raise FetchFault("protocol", "more bytes than the answer has")
        body[:early] = self._headview[end + 4 : self._filled]
        self._head, self._body, self._at, self._filled = head, body, early, 0

    def _finish(self) -> None:
        head, answer, ended = self._head, self._answer, self._ended
        assert head is not None and ended is not None
        self._head = self._answer = self._landing = self._ended = None
        self._body = self._headview[:0]
        if head.close:
            self.open = False
        seconds = self.progress_at - self._head_at
        if seconds > 0 and head.length >= WAKE_BYTES_MIN:
            worth = int(head.length / seconds * WAKE_SECONDS)
            self._chunk_bytes = max(WAKE_BYTES_MIN, min(worth, WAKE_BYTES_MAX))
        ended(Reply(head, b"" if answer is None else bytes(answer)))

    def _wake_for(self, count: int) -> None:
        count = max(1, count - self._read_ahead_bytes)
        if count != self._wake_bytes and self._socket is not None:
            self._wake_bytes = count
            with suppress(OSError):  # the connection is gone, as we shall be told
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
