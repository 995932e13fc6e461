"""One connection between two nodes: from its handshake, through the greeting, to its end.

Owned here: framing on a socket, the queue of what is to be sent and its bound, and what may be said in which order.
Left to others: which connections there are and who may have one (`transport.py`), bytes (`frames.py`).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cluster.consensus import NodeInfo
from cluster.raft.frames import (
    FRAME_BYTES_MAX,
    GREETING_BYTES_MAX,
    FrameError,
    FrameReader,
    Hello,
    Refused,
    Welcome,
    decode_greeting,
    decode_message,
    encode,
)
from cluster.raft.messages import Message

_WRITE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportLimits:
    queue_bytes_max: int = 64 * 1024 * 1024
    strangers_max: int = 64
    handshake_seconds: float = 3.0
    greeting_seconds: float = 2.0
    connect_seconds: float = 0.7
    backoff_seconds_min: float = 0.05
    backoff_seconds_max: float = 0.5
    silence_seconds: float = 2.0
    """Sent data that the other host's kernel has not confirmed for so long breaks the connection."""
    accept_pause_seconds: float = 0.1
    close_seconds: float = 0.5


class ConnectionOwner(Protocol):
    """What a connection asks of the transport that it belongs to."""

    limits: TransportLimits

    def check_dialled(self, node: NodeInfo, fingerprint: str) -> None:
        """Raises `FrameError` when whoever answered is not that node."""

    def hello(self, node: NodeInfo) -> Hello: ...

    def welcome(self) -> Welcome: ...

    def examine(self, hello: Hello, fingerprint: str) -> tuple[str, str]:
        """(reason to refuse or "", node id)."""

    def established(self, connection: Connection, held: list[int] | None) -> None:
        """`held`: the connections the other side still had when it dialled; None when this side dialled."""

    def ended(self, connection: Connection, reason: str) -> None: ...

    def deliver(self, node_id: str, message: Message) -> None: ...


class Connection(asyncio.Protocol):
    """One socket, from its handshake to its end."""

    def __init__(self, owner: ConnectionOwner, dialled: NodeInfo | None) -> None:
        self.owner = owner
        self.dialled = dialled
        self.node_id = ""  # once the greeting is done
        self.number = 0  # drawn by the side that dialled
        self.fingerprint = ""
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        """Done when messages may flow; failed when the greeting did."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when the socket is."""
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(GREETING_BYTES_MAX if dialled is None else FRAME_BYTES_MAX)
        self._queue: deque[bytes | bytearray] = deque()
        self._queued_bytes = 0
        self._paused = False
        self._scheduled = False
        self._over = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._over:
            transport.abort()
            return
        try:
            self.fingerprint = _fingerprint_of(transport)
            if self.dialled is not None:
                self.owner.check_dialled(self.dialled, self.fingerprint)
                hello = self.owner.hello(self.dialled)
                self.number = hello.connection
                self._write_now(hello)
        except FrameError as error:
            self.end(str(error))

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                if self._over:
                    return
                if self.node_id:
                    self.owner.deliver(self.node_id, decode_message(body))
                else:
                    self._greeting(body)
        except FrameError as error:
            self.end(str(error))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.end("the connection broke" if error is None else f"the connection broke: {error}")
        if not self.closed.done():
            self.closed.set_result(None)

    # What the transport calls.

    def send(self, frame: bytearray) -> None:
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        if self._queued_bytes > self.owner.limits.queue_bytes_max:
            self._loop.call_soon(self.end, "the node reads too slowly")
        elif not self._scheduled and not self._paused:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def end(self, reason: str, *, gently: bool = False) -> None:
        """Close, and tell whoever must know. `gently`: what is queued still goes out."""
        if self._over:
            return
        self._over = True
        if self._transport is None:
            if not self.closed.done():
                self.closed.set_result(None)
        elif gently:
            self._transport.write(b"".join(self._queue))
            self._transport.close()
        else:
            self._transport.abort()
        self._queue.clear()
        if not self.greeted.done():
            self.greeted.set_exception(FrameError(reason))
            self.greeted.exception()  # somebody may or may not be waiting
        self.owner.ended(self, reason)

    def abort(self) -> None:
        """Whatever state it is in, be done with it."""
        self.end("aborted")
        if self._transport is not None:
            self._transport.abort()

    # Inside.

    def _greeting(self, body: memoryview) -> None:
        greeting = decode_greeting(body)
        if self.dialled is not None:
            if isinstance(greeting, Refused):
                raise FrameError(f"refused: {greeting.reason[:200]}")
            if not isinstance(greeting, Welcome) or greeting.node_id != self.dialled.node_id:
                raise FrameError("the greeting was not answered")
            self._established(greeting.node_id, None)
            return
        if not isinstance(greeting, Hello):
            raise FrameError("the greeting is missing")
        reason, node_id = self.owner.examine(greeting, self.fingerprint)
        if reason:
            self._write_now(Refused(reason))
            self.end(reason, gently=True)
            return
        self._write_now(self.owner.welcome())
        self._reader.bytes_max = FRAME_BYTES_MAX
        self.number = greeting.connection
        self._established(node_id, greeting.held)

    def _established(self, node_id: str, held: list[int] | None) -> None:
        self.node_id = node_id
        if not self.greeted.done():
            self.greeted.set_result(None)
        self.owner.established(self, held)

    def _write_now(self, greeting: Hello | Welcome | Refused) -> None:
        assert self._transport is not None
        self._transport.write(encode(greeting))

    def _flush(self) -> None:
        self._scheduled = False
        queue, transport = self._queue, self._transport
        while queue and not self._paused and not self._over and transport is not None:
            first = queue.popleft()
            size = len(first)
            if queue:
                parts = [first]
                while queue and size < _WRITE_BYTES:
                    part = queue.popleft()
                    parts.append(part)
                    size += len(part)
                first = b"".join(parts)
            self._queued_bytes -= size
            transport.write(first)


async def connect(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A connected socket, from the first of the host's addresses that answers."""
    failure: OSError = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    found: Sequence[tuple[Any, ...]]
    try:
        numeric = ipaddress.ip_address(host)
    except ValueError:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    else:
        family = socket.AF_INET if numeric.version == 4 else socket.AF_INET6
        found = [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    for family, kind, protocol, _, address in found:
        descriptor = socket.socket(family, kind, protocol)
        try:
            descriptor.setblocking(False)
            await loop.sock_connect(descriptor, address)
        except OSError as error:
            descriptor.close()
            failure = error
        except BaseException:
            descriptor.close()
            raise
        else:
            return descriptor
    raise failure


def prepare(descriptor: socket.socket, limits: TransportLimits) -> None:
    """No waiting for full packets; a host that is gone is noticed, also while nothing is said."""
    descriptor.setblocking(False)
    descriptor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    descriptor.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", int(limits.silence_seconds * 1000)),
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", max(1, round(limits.silence_seconds))),
    ):
        option = getattr(socket, name, None)  # not everywhere
        if option is not None:
            descriptor.setsockopt(socket.IPPROTO_TCP, option, value)


def _fingerprint_of(transport: asyncio.Transport) -> str:
    """Hex SHA-256 of the SubjectPublicKeyInfo of the other side's certificate; "" without TLS."""
    connection = transport.get_extra_info("ssl_object")
    if connection is None:
        return ""
    der = connection.getpeercert(True)
    if not der:
        raise FrameError("no certificate was shown")
    key = x509.load_der_x509_certificate(der).public_key()
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
