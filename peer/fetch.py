"""Fetching from peers: a small HTTP/1.1 client whose bodies land in the caller's own buffer.

`BufferedProtocol` lets the kernel (or TLS) write straight into the buffer in which the piece is hashed and
from which it is written to disk; aiohttp's client copies it twice on the way. Measured by
`benchmarks/fetch_roads.py`: decision 501 has the numbers that earn this module its keep.

Owned here: connections to peers (kept open, one request at a time on each), reading a strict and bounded
subset of RFC 9112 responses, timeouts, the download rate. Left to others: what to ask of whom
(`download.py`), checking and keeping a piece (`store.py`), the live link (`links.py`).

Strict means: HTTP/1.1, a status, at most `HEAD_BYTES_MAX` of headers, exactly one `Content-Length` of plain
digits, no transfer coding, no byte that was not asked for. Anything else ends the connection.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections import deque
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

from msgspec import Struct

from cluster.api.certificates import SSLInfo

from .direct import aligned_buffer
from .pacer import Pacer, take_all

HEAD_BYTES_MAX = 8 * 1024
ANSWER_BYTES_MAX = 8 * 1024  # of a body that is not what was asked for: an error's explanation
CONNECT_SECONDS = 5.0
HEAD_SECONDS = 15.0  # a busy sender queues a request for less, then says 429
STALL_SECONDS = 6.0  # without one byte of a body that has begun
IDLE_SECONDS = 60.0
LIMITED_READ_BYTES = 64 * 1024  # small reads keep a limited rate smooth

_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*?)[ \t]*\r\n")
_DIGITS = re.compile(rb"[0-9]{1,15}")


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
    seconds: float  # from the request's last byte to the body's last byte
    wait_seconds: float  # from the request's last byte to the answer's first


class Endpoint(Struct, frozen=True):
    """Where a peer is reached: whole URLs, tried in order."""

    peer_id: str
    addresses: tuple[str, ...]


# Returns where the body goes: exactly `head.length` bytes. Raises FetchFault to refuse it.
Landing = Callable[[Head], memoryview]
# The peer_id that a verified TLS connection proves; None: no peer's certificate.
Identify = Callable[[SSLInfo | None], str | None]


def parse_head(data: bytes) -> Head:
    """Parse a response's head, the empty line included. Raises FetchFault(`protocol`)."""
    line, _, rest = data.partition(b"\r\n")
    if not re.fullmatch(rb"HTTP/1\.1 [1-5][0-9][0-9]( [^\r\n\x00]*)?", line):
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
        self._done: asyncio.Future[Reply] | None = None
        self._asked_at = 0.0
        self._head_at = 0.0
        self.progress_at = 0.0
        self.transport: asyncio.Transport | None = None
        self.open = False
        self.on_bytes: Callable[[int], None] | None = None

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.open = True

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._head is None:
            return self._headview[self._filled :]
        rest = self._body[self._at :]
        return rest[:LIMITED_READ_BYTES] if self._limited() else rest

    def buffer_updated(self, count: int) -> None:
        self.progress_at = self._loop.time()
        try:
            if self._head is None:
                self._filled += count
                self._read_head()
            else:
                self._at += count
            if self._head is not None and self._at == len(self._body):
                self._finish()
        except FetchFault as fault:
            self.fail(fault)
            return
        if self.on_bytes is not None:
            self.on_bytes(count)
        if (
            self._limited()
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

    async def ask(self, request: bytes, landing: Landing) -> Reply:
        """Send a request, return its answer. Cancelling it closes the line."""
        assert self._done is None and self.transport is not None
        self._done = self._loop.create_future()
        self._landing = landing
        self._asked_at = self.progress_at = self._loop.time()
        self.transport.write(request)
        try:
            return await self._done
        finally:
            if self._done is not None:  # cancelled, or failed: the rest of the answer would be in the way
                self._done = None
                self.abort()

    @property
    def answered(self) -> bool:
        """Whether any byte came since the last request."""
        return self.progress_at > self._asked_at

    @property
    def overdue(self) -> bool:
        if self._done is None:
            return False
        allowed = HEAD_SECONDS if self._head is None else STALL_SECONDS
        return self._loop.time() - self.progress_at > allowed

    def fail(self, fault: FetchFault) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(fault)
        self.abort()

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
        if self._landing is None or self._done is None:
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
        head, answer, done = self._head, self._answer, self._done
        assert head is not None and done is not None
        self._head = self._answer = self._landing = self._done = None
        self._body = self._headview[:0]
        if head.close:
            self.open = False
        now = self._loop.time()
        if not done.done():
            done.set_result(
                Reply(head, bytes(answer or b""), now - self._asked_at, self._head_at - self._asked_at)
            )


class Fetcher:
    """Connections to all peers."""

    def __init__(
        self,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        identify: Identify | None = None,
    ) -> None:
        self._tls = tls
        self._identify = identify
        self._idle: dict[str, list[tuple[float, Line]]] = {}
        self._busy: set[Line] = set()
        self._good: dict[str, str] = {}  # peer_id -> the address that answered last
        self._sweeper: asyncio.Task[None] | None = None
        self._closed = False

    async def ask(
        self,
        endpoint: Endpoint,
        request: bytes,
        landing: Landing,
        *,
        on_bytes: Callable[[int], None] | None = None,
        pacers: list[Pacer] | None = None,
    ) -> Reply:
        """One request to a peer, on a kept connection if there is one, read no faster than the pacers allow.
        Raises FetchFault.

        A kept connection may have been closed by the peer meanwhile: then, and only if not one byte of
        an answer came, the request is made again on a new one (all requests here are free of effect).
        """
        while True:
            line = self._kept(endpoint.peer_id)
            fresh = line is None
            if line is None:
                line = await self._connect(endpoint)
            self._busy.add(line)
            line.on_bytes = on_bytes
            line.pacers = pacers or []
            try:
                reply = await line.ask(request, landing)
            except FetchFault as fault:
                if fresh or fault.kind != "broken" or line.answered:
                    raise
                continue
            except BaseException:
                line.abort()  # cancelled: nobody will use it again
                raise
            finally:
                line.on_bytes = None
                self._busy.discard(line)
            if line.open and not self._closed:
                self._idle.setdefault(endpoint.peer_id, []).append((asyncio.get_running_loop().time(), line))
            else:
                line.abort()
            return reply

    def drop(self, peer_id: str) -> None:
        """Close the kept connections to a peer."""
        for _, line in self._idle.pop(peer_id, []):
            line.abort()

    async def close(self) -> None:
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for line in self._busy:
            line.fail(FetchFault("broken", "this peer is stopping"))
        for peer_id in list(self._idle):
            self.drop(peer_id)
        await asyncio.sleep(0)

    def _kept(self, peer_id: str) -> Line | None:
        lines = self._idle.get(peer_id, [])
        while lines:
            since, line = lines.pop()
            if line.open and asyncio.get_running_loop().time() - since < IDLE_SECONDS:
                return line
            line.abort()
        return None

    async def _connect(self, endpoint: Endpoint) -> Line:
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep())
        addresses = list(endpoint.addresses)
        good = self._good.get(endpoint.peer_id)
        if good in addresses:
            addresses.remove(good)
            addresses.insert(0, good)
        trouble = "it told no address"
        for address in addresses:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    line = await self._dial(address)
            except (OSError, ValueError, TimeoutError, ssl.SSLError) as error:
                trouble = f"{address}: {str(error) or type(error).__name__}"
                continue
            if not self._proves(line, endpoint.peer_id):
                line.abort()
                trouble = f"{address}: another peer answers there"
                continue
            self._good[endpoint.peer_id] = address
            return line
        raise FetchFault("unreachable", trouble)

    async def _dial(self, address: str) -> Line:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or parts.hostname is None or parts.port is None:
            raise ValueError("not a whole URL with a port")
        secure = parts.scheme == "https"
        if secure is not (self._tls is not None):
            raise ValueError("TLS on one side only")
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(
            Line,
            parts.hostname,
            parts.port,
            ssl=self._tls() if self._tls is not None else None,
            server_hostname=parts.hostname if secure else None,
        )
        return line

    def _proves(self, line: Line, peer_id: str) -> bool:
        """Whether the peer at the other end is the one that was meant. Without TLS there is no telling."""
        if self._identify is None or line.transport is None:
            return True
        return self._identify(line.transport.get_extra_info("ssl_object")) == peer_id

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.5)
            for line in [each for each in self._busy if each.overdue]:
                line.fail(FetchFault("stalled", "the peer sends nothing"))
            for lines in self._idle.values():
                for since, line in lines:
                    if loop.time() - since >= IDLE_SECONDS:
                        line.abort()
            self._idle = {
                peer_id: kept
                for peer_id, lines in self._idle.items()
                if (kept := [each for each in lines if each[1].open])
            }


class BufferPool:
    """Buffers for pieces on their way, bounded together however many downloads and peers there are.

    Buffers are reused (touching fresh memory costs more than a piece's hash), and begin on a page. One that is larger than
    the whole bound is granted when nothing else is out, so that any piece can be fetched by any peer.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.out_bytes = 0
        self._free: dict[int, list[memoryview]] = {}
        self._free_bytes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        # Called when there is no room: has a buffer given back that can be spared, and says whether there was one.
        self.reclaim: Callable[[], bool] = lambda: False

    async def acquire(self, size: int) -> memoryview:
        """`take`, waiting for room in the order of asking."""
        buffer = None if self._waiting else self.take(size)
        while buffer is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()
                raise
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
            buffer = self.take(size)
        if self._waiting:
            self._wake()  # there may be room for one more
        return buffer

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
                return

    def take(self, size: int) -> memoryview | None:
        """A buffer of exactly `size` bytes, or None while there is no room."""
        while self.out_bytes and self.out_bytes + size > self.limit_bytes:
            if not self.reclaim():
                return None
        self.out_bytes += size
        same = self._free.get(size)
        if same:
            self._free_bytes -= size
            buffer = same.pop()
            if not same:
                del self._free[size]
            return buffer
        while self._free and self.out_bytes + self._free_bytes > self.limit_bytes:
            other = next(iter(self._free))
            self._free_bytes -= len(self._free[other].pop())
            if not self._free[other]:
                del self._free[other]
        return aligned_buffer(size)

    def clear(self) -> None:
        """Let go of the buffers that nobody uses now."""
        self._free.clear()
        self._free_bytes = 0

    def give(self, buffer: memoryview) -> None:
        self.out_bytes -= len(buffer)
        self._free.setdefault(len(buffer), []).append(buffer)
        self._free_bytes += len(buffer)
        self._wake()
