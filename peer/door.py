"""Who is let in: the connections of other peers, from the kernel's hands to the server's, within bounds.

Owned here: listening, the TLS handshake, and how many connections there may be: in all, from one address (those that
shake hands among them), and of one peer that TLS has proved. Past a bound the newcomer is closed at once, and those
inside keep what they have: one address takes half of the room at most, one peer an eighth. Left to others: what is
asked on a connection, and ending those that ask for nothing (`server.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web
from msgspec import Struct

from cluster.api.certificates import peer_id_of

log = logging.getLogger("trimaran.peer.door")

CONNECTIONS_MAX: Final = 1024
PER_ADDRESS_MAX: Final = CONNECTIONS_MAX // 2  # many peers may stand behind one
PER_PEER_MAX: Final = CONNECTIONS_MAX // 8  # more than a pipeline of the deepest, and its links
HANDSHAKE_SECONDS: Final = 10.0
BACKLOG: Final = 512
ACCEPTED_AT_ONCE: Final = 32  # then the loop gets a turn
NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NO_RESOURCES_SECONDS: Final = 1.0


class Server(web.Server):
    """aiohttp's server, which says when a connection has ended."""

    def __init__(self, handler: Any, *, lost: Callable[[web.RequestHandler], None], **options: Any) -> None:
        super().__init__(handler, **options)
        self._lost = lost

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._lost(handler)


class _Place(Struct):
    """Where an open connection comes from."""

    address: str
    peer_id: str = ""  # "" until TLS has proved it, and without TLS


class Door:
    """`opened` makes the protocol of a connection, `ended` is told of its end, whether it ever spoke or not; the server
    tells `left`. Belongs to the event loop."""

    def __init__(
        self, opened: Callable[[], web.RequestHandler], ended: Callable[[web.RequestHandler], None]
    ) -> None:
        self._opened = opened
        self._ended = ended
        self._tls: ssl.SSLContext | None = None
        self._inside: dict[web.RequestHandler, _Place] = {}
        self._of_address: Counter[str] = Counter()
        self._of_peer: Counter[str] = Counter()
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._greeting: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen; returns the address in use. Raises OSError."""
        self._tls = tls
        self._socket = await asyncio.to_thread(_listening, host, port)
        self._accepting = asyncio.create_task(self._accept(self._socket))
        found = self._socket.getsockname()
        return str(found[0]), int(found[1])

    async def close(self) -> None:
        """Let nobody in any more. Those inside are the server's to end."""
        if self._accepting is None or self._socket is None:
            return
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        await asyncio.sleep(0)  # each handshake has begun: its connection is asyncio's to close
        for greeting in self._greeting:
            greeting.cancel()
        await asyncio.gather(*self._greeting, return_exceptions=True)

    def left(self, connection: web.RequestHandler) -> None:
        """It has ended."""
        place = self._inside.pop(connection, None)
        if place is None:
            return
        _less(self._of_address, place.address)
        _less(self._of_peer, place.peer_id)
        self._ended(connection)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        accepted = 0
        while True:
            try:
                opened, address = await loop.sock_accept(listening)
            except OSError as error:
                scarce = error.errno in NO_RESOURCES
                if scarce:
                    log.warning("new connections must wait: %s", error.strerror)
                await asyncio.sleep(NO_RESOURCES_SECONDS if scarce else 0)
                continue
            self._let_in(opened, str(address[0]))
            accepted += 1
            if accepted % ACCEPTED_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _let_in(self, opened: socket.socket, address: str) -> None:
        if len(self._inside) >= CONNECTIONS_MAX or self._of_address[address] >= PER_ADDRESS_MAX:
            opened.close()
            return
        connection = self._opened()
        self._inside[connection] = _Place(address)
        self._of_address[address] += 1
        greeting = asyncio.create_task(self._greet(opened, connection))
        self._greeting.add(greeting)
        greeting.add_done_callback(self._greeting.discard)

    async def _greet(self, opened: socket.socket, connection: web.RequestHandler) -> None:
        """The handshake, and whose it is."""
        seconds = HANDSHAKE_SECONDS if self._tls is not None else None
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, opened, ssl=self._tls, ssl_handshake_timeout=seconds
            )
        except (OSError, asyncio.CancelledError):
            self.left(connection)  # no TLS, no certificate of this cluster, or not in time
            return
        place = self._inside.get(connection)
        if self._tls is None or place is None:
            return
        peer_id = peer_id_of(transport.get_extra_info("ssl_object")) or ""
        if peer_id and self._of_peer[peer_id] >= PER_PEER_MAX:
            transport.abort()
            return
        place.peer_id = peer_id
        self._of_peer[peer_id] += 1


def _listening(host: str, port: int) -> socket.socket:
    everywhere = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host or everywhere else socket.AF_INET
    made = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=everywhere)
    made.setblocking(False)
    return made


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
