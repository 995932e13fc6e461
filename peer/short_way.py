"""The short way of a request for a piece: from bytes to bytes without a request in between.

In a swarm a peer is asked for a piece many times a second, in exactly one form: the one in which our own fetcher asks
(`driver.py`). On aiohttp's way each costs a parsed request, a reader, a writer, two tasks and their wake-ups, which is
more than sending the piece.

Owned here: connections that recognise a plain request for a piece when it arrives in one read and whole, and hand it to
the server at once. Everything else goes aiohttp's way, byte for byte: other routes, any other head, parts of requests,
several at once, and every request that is going to be refused, so that refusals are made in one place. A request that
is refused after it has waited goes aiohttp's way then: nothing of its answer was sent. Left to others: what is checked,
slots, sending (`server.py`, `sending.py`).

A request may only be recognised where one begins (`cluster/api/framing.py`): after a head whose end, or whose body's end,
is not certain, the connection is aiohttp's for good.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final, Protocol

from aiohttp import web

from cluster.api.framing import Framing

from .bitmap import Mask
from .door import Server
from .outlets import Outlet, PlainOutlet, TlsOutlet
from .sending import Sending

_REQUEST: Final = re.compile(
    rb"(?:GET /v1/swarms/([0-9a-f]{64})/pieces/([0-9]{1,8})|POST /v1/swarms/([0-9a-f]{64})/next) HTTP/1\.1\r\n"
    rb"Host: peer\r\nAuthorization: Bearer ([A-Za-z0-9._-]{1,4096})\r\n(?:Content-Length: ([0-9]{1,6})\r\n)?\r\n"
)


class Asked:
    """A request of the short way, from its arrival until its answer has left: for the piece `index`, or, with a
    `body`, for any of those it names."""

    __slots__ = (
        "body",
        "connection",
        "data",
        "index",
        "manifest_id",
        "over",
        "sending",
        "ticket",
        "token",
        "want",
    )

    def __init__(
        self,
        connection: Connection,
        data: bytes,
        manifest_id: str,
        token: str,
        index: int,
        body: bytes | None,
    ) -> None:
        self.connection = connection
        self.data = data
        self.manifest_id = manifest_id
        self.token = token
        self.index = index
        self.body = body
        self.want: Mask | None = None  # what the body says
        self.ticket = 0
        self.sending: Sending | None = None
        self.over = False


class Serving(Protocol):
    """What the short way needs of the server."""

    def begin(self, asked: Asked) -> bool:
        """Begin to answer. False: it is refused, and nothing was begun."""

    def left(self, asked: Asked) -> None:
        """Who asked has gone."""


class Connection(web.RequestHandler):
    """aiohttp's, which is shown what arrives only if it is not for the short way."""

    __slots__ = (
        "_asked", "_framing", "_held", "_way", "answering", "asked_at", "outlet", "peer_id",
        "waited",
    )  # fmt: skip

    def __init__(self, way: ShortWay, **settings: Any) -> None:
        super().__init__(way, **settings)
        self._way = way
        self._framing = Framing()
        self._asked: Asked | None = None  # the request of the short way
        self._held = b""  # what came after it
        self.answering = 0  # requests that the server works on
        self.asked_at = self._loop.time()  # something was asked or answered last
        self.outlet: Outlet | None = None
        self.peer_id: str | None = None  # what TLS proved, once it was looked at
        self.waited = False  # what aiohttp is given next has waited for a slot in vain

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        plain = transport.get_extra_info("ssl_object") is None
        self.outlet = PlainOutlet(transport) if plain else TlsOutlet(transport, lambda: self.writing_paused)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._asked is not None:
            self._way.serving.left(self._asked)
            self._asked = None
        super().connection_lost(exc)
        if self.outlet is not None:
            self.outlet.close()

    def resume_writing(self) -> None:
        super().resume_writing()
        if isinstance(self.outlet, TlsOutlet):
            self.outlet.resumed()

    def data_received(self, data: bytes) -> None:
        if self._asked is not None:
            self._held += data
            assert self.transport is not None
            self.transport.pause_reading()
        elif not self._framing.certain or not data:
            super().data_received(data)
        elif not self._framing.idle or not self._take(data):
            self._give(data)

    def _take(self, data: bytes) -> bool:
        head = _REQUEST.match(data)
        if head is None:
            return False
        manifest_id, index, chooses, token, length = head.groups()
        body_bytes = len(data) - head.end()
        transport = self.transport
        if (
            (chooses is None) != (length is None)
            or int(length or 0) != body_bytes
            or transport is None
            or transport.is_closing()
        ):
            return False
        self._asked = asked = Asked(
            self,
            data,
            (chooses or manifest_id).decode(),
            token.decode(),
            int(index or 0),
            None if chooses is None else data[head.end() :],
        )
        if self._way.serving.begin(asked):
            return True
        self._asked = None
        return False

    def _give(self, data: bytes) -> None:
        self._framing.follow(data)
        super().data_received(data)

    def answered_by_aiohttp(self) -> None:
        self._framing.answered()

    def answered(self, data: bytes = b"") -> None:
        """The answer has left, but for `data`."""
        self._asked = None
        self._way.taken += 1
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if data:
            transport.write(data)
        self._go_on()

    def refused(self) -> None:
        """It is refused after all, and not a byte of an answer has left: aiohttp's way says why."""
        asked, self._asked = self._asked, None
        assert asked is not None
        if self.transport is not None and not self.transport.is_closing():
            self._give(asked.data)
            self._go_on()

    def _go_on(self) -> None:
        if self._held:
            held, self._held = self._held, b""
            assert self.transport is not None
            self.transport.resume_reading()
            self.data_received(held)


class ShortWay(Server):
    """The server, with connections of ours."""

    def __init__(self, serving: Serving, handler: Any, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self.serving = serving
        self.taken = 0

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)
