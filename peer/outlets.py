"""Where the bytes of a send go: a plain socket, or a TLS connection.

Owned here: what differs between the two. Over plain TCP the bytes go to the socket itself, past asyncio: from memory in
one call with the head, or from a file by sendfile, without touching them. Over TLS they are written, 256 KiB at a time,
and the connection says when it has room again. Left to others: what is sent, and when (`sending.py`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

TLS_WRITE_BYTES: Final = 256 << 10
PLAIN_STRETCH_BYTES: Final = 1 << 20
DUPLICATES_MAX: Final = 128
_MORE_COMES: Final = getattr(socket, "MSG_MORE", 0)
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time


class Outlet(Protocol):
    """All three sends return how many bytes went, and raise BlockingIOError when there is no room for one."""

    transport: asyncio.Transport
    stretch_bytes: int

    def send_head(self, head: bytes) -> int:
        """It need not leave before what is sent next."""

    def send_memory(self, head: bytes, data: memoryview) -> int:
        """`data` is not looked at any more once this returns."""

    def send_file(self, descriptor: int, offset: int, count: int) -> int:
        """0: the file ends here."""

    def watch(self, room: Callable[[], None]) -> None:
        """Call `room` whenever there is room again, until `unwatch`."""

    def unwatch(self) -> None: ...

    def rest(self) -> None:
        """A send has ended."""

    def close(self) -> None:
        """Before the transport closes its socket."""


class PlainOutlet:
    """Holds a duplicate of the transport's socket: asyncio keeps its own descriptor to itself. It is made for the
    first send and kept for the next, unless many are: each costs a descriptor."""

    kept = 0  # in this process

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.stretch_bytes = PLAIN_STRETCH_BYTES
        self._socket: socket.socket | None = None
        self._watched = False

    def _own(self) -> socket.socket:
        if self._socket is None:
            own = self.transport.get_extra_info("socket")
            self._socket = socket.socket(own.family, own.type, own.proto, fileno=os.dup(own.fileno()))
            PlainOutlet.kept += 1
        return self._socket

    def _after_earlier(self) -> socket.socket:
        """The socket, once an earlier answer has left asyncio's buffer."""
        if self.transport.get_write_buffer_size():
            raise BlockingIOError
        return self._own()

    def send_head(self, head: bytes) -> int:
        # Held back by the kernel until the first bytes of the piece go with it.
        return self._after_earlier().send(head, _MORE_COMES)

    def send_memory(self, head: bytes, data: memoryview) -> int:
        if head:
            return self._after_earlier().sendmsg((head, data))
        return self._own().send(data)

    def send_file(self, descriptor: int, offset: int, count: int) -> int:
        return os.sendfile(self._own().fileno(), descriptor, offset, count)

    def watch(self, room: Callable[[], None]) -> None:
        asyncio.get_running_loop().add_writer(self._own().fileno(), room)
        self._watched = True

    def unwatch(self) -> None:
        if self._watched and self._socket is not None:
            asyncio.get_running_loop().remove_writer(self._socket.fileno())
        self._watched = False

    def rest(self) -> None:
        if PlainOutlet.kept > DUPLICATES_MAX:
            self.close()

    def close(self) -> None:
        self.unwatch()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            PlainOutlet.kept -= 1


class TlsOutlet:
    """`blocked` says whether the connection has asked to be written to no more; it calls `resumed` when it may be."""

    def __init__(self, transport: asyncio.Transport, blocked: Callable[[], bool]) -> None:
        self.transport = transport
        self.stretch_bytes = TLS_WRITE_BYTES
        self._blocked = blocked
        self._head = b""
        self._room: Callable[[], None] | None = None
        self._telling = False

    def send_head(self, head: bytes) -> int:
        self._head += head
        return len(head)

    def send_memory(self, head: bytes, data: memoryview) -> int:
        # A copy: what TLS cannot send at once it keeps, and this memory will hold another piece by then.
        return self._write(head, data)

    def send_file(self, descriptor: int, offset: int, count: int) -> int:
        if self._blocked():
            raise BlockingIOError
        data = os.pread(descriptor, min(count, TLS_WRITE_BYTES), offset)
        return self._write(b"", data) if data else 0

    def _write(self, head: bytes, data: bytes | memoryview) -> int:
        if self._blocked():
            raise BlockingIOError
        self.transport.write(b"".join((self._head, head, data)))
        self._head = b""
        return len(head) + len(data)

    def resumed(self) -> None:
        if self._room is not None and not self._telling:
            self._telling = True
            asyncio.get_running_loop().call_soon(self._tell)  # not from within TLS's own work

    def _tell(self) -> None:
        self._telling = False
        if self._room is not None:
            self._room()

    def watch(self, room: Callable[[], None]) -> None:
        self._room = room

    def unwatch(self) -> None:
        self._room = None

    def rest(self) -> None:
        self._head = b""

    def close(self) -> None:
        self._room = None


def reset(transport: asyncio.Transport) -> None:
    """End a connection, and with it what the kernel has of it and did not send yet."""
    own = transport.get_extra_info("socket")
    if own is not None:  # it is None once a TLS connection is lost
        with suppress(OSError):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
