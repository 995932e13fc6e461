"""The short way of an announce call: from bytes to an answer without a request in between.

Peers announce every few seconds, so this is what a tracker is asked most, and what it costs decides how many
peers a node carries. On aiohttp's way a request is parsed into headers, a reader, a writer, two tasks and their
wake-ups before anything of ours runs; without them an announce call costs a third less.

Owned here: connections that recognise a plain announce call when it arrives in one piece, and answer it from the
same turn of the loop that applied it. Everything else goes aiohttp's way, byte for byte: other routes, heads with a
field that is not in a short list, parts of requests, several at once, and every call that is going to be refused,
so that refusals are made in one place. Nothing is begun before that is decided. Left to others: what an
announcement means (`announcing.py`), the way of all other requests (`http.py`).

A call may only be recognised where a request begins (`cluster/api/framing.py`): after a head whose end, or whose body's
end, is not certain, the connection is aiohttp's for good.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from cluster.announcing import End
from cluster.api.framing import Framing, length_of
from cluster.api.types import AnnounceBody, Answer
from cluster.handlers.swarms import announce_answer, announcement_of, not_yours
from cluster.problems import ProblemError
from cluster.written import QUEUED_BYTES, Written

if TYPE_CHECKING:
    from cluster.service import Service

JSON: Final = "application/json"
_BEGINS: Final = b"POST /v1/peers/"
_HEAD: Final = re.compile(
    rb"POST /v1/peers/([a-z2-7]{52})/announce HTTP/1\.1\r\n((?:[A-Za-z-]+:[\t\x20-\x7e]*\r\n)+)\r\n"
)
_KNOWN: Final = frozenset(
    b"host accept accept-encoding user-agent connection idempotency-key content-type content-length"
    b" authorization".split()
)


class Calls(Protocol):
    """What the short way needs of the way of all requests."""

    def opened(self, connection: web.RequestHandler) -> None: ...

    def touched(self, connection: web.RequestHandler) -> None:
        """It asks for something."""

    def closed(self, connection: web.RequestHandler) -> None: ...

    def answer(self, answer: Answer) -> Written: ...

    def problem(self, problem: ProblemError) -> Written: ...


class Connection(web.RequestHandler):
    """aiohttp's, which is shown what arrives only if it is not for the short way."""

    __slots__ = ("_framing", "_held", "_under_way", "_way")

    def __init__(self, way: ShortWay, **settings: Any) -> None:
        super().__init__(way, **settings)
        self._way = way
        self._framing = Framing()
        self._under_way = False  # a call of the short way
        self._held = b""  # what came after it

    def data_received(self, data: bytes) -> None:
        if self._under_way:
            self._held += data
            assert self.transport is not None
            self.transport.pause_reading()
        elif not self._framing.certain or not data:
            super().data_received(data)
        elif not (data.startswith(_BEGINS) and self._idle() and self._way.take(self, data)):
            self._framing.follow(data)
            super().data_received(data)

    def _idle(self) -> bool:
        transport = self.transport
        return (
            self._framing.idle
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() <= QUEUED_BYTES
        )

    def answered_by_aiohttp(self) -> None:
        self._framing.answered()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """What is no HTTP is the caller's fault, and no news: ports are scanned."""
        if isinstance(kw.get("exc_info"), HttpProcessingError | ConnectionError):
            self.logger.debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)

    def begin(self) -> None:
        self._under_way = True

    def withdraw(self) -> None:
        self._under_way = False

    def answer(self, data: bytes) -> None:
        self._under_way = False
        held, self._held = self._held, b""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        transport.write(data)
        if held:
            transport.resume_reading()
            self.data_received(held)


class ShortWay(web.Server):
    """aiohttp's server, with connections of ours, and no more of them than may be."""

    def __init__(self, service: Service, calls: Calls, handler: Any, **settings: Any) -> None:
        super().__init__(handler, **settings)
        self._service = service
        self._calls = calls
        self._under_way = 0
        self._plain_of: tuple[object, ...] = ()
        self._plain = Written(200, JSON, b"")  # the answer to all that were told nothing else in one revision
        self.taken = 0

    def __call__(self) -> web.RequestHandler:
        connection = Connection(self, loop=self._loop, **self._kwargs)
        self._calls.opened(connection)
        return connection

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._service.settings.connections_max:
            transport.abort()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self._calls.closed(handler)
        super().connection_lost(handler, exc)

    def take(self, connection: Connection, data: bytes) -> bool:
        """Begin the call, or leave it alone and say False."""
        head = _HEAD.match(data)
        if head is None:
            return False
        service = self._service
        settings = service.settings
        fields: dict[bytes, bytes] = {}
        for line in head[2].split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name in fields or name not in _KNOWN:
                return False
            fields[name] = value.strip(b" \t")
        body_bytes = len(data) - head.end()
        if (
            b"host" not in fields
            or fields.get(b"content-type") != b"application/json"
            or fields.get(b"connection", b"keep-alive").lower() != b"keep-alive"
            or length_of(fields.get(b"content-length", b"")) != body_bytes
            or body_bytes > settings.announce_body_bytes_max
            or self._under_way >= settings.requests_max
        ):
            return False
        started = service.monotonic()
        try:
            session = service.sessions.check(fields[b"authorization"].decode())
            body = msgspec.convert(orjson.loads(memoryview(data)[head.end() :]), AnnounceBody)
        except (KeyError, ProblemError, ValueError):
            return False
        peer_id = head[1].decode()

        def done(end: End) -> None:
            answer = self._answer(peer_id, end)
            service.metrics.request("announce", answer.status, service.monotonic() - started)
            self._under_way -= 1
            connection.answer(answer.whole())

        self._under_way += 1
        connection.begin()
        self._calls.touched(connection)
        if not service.announcer.begin(announcement_of(peer_id, session.user, body), done):
            self._under_way -= 1
            connection.withdraw()
            return False
        self.taken += 1
        return True

    def _answer(self, peer_id: str, end: End) -> Written:
        if isinstance(end, ProblemError):
            return self._calls.problem(end)
        if not end.known:
            return self._calls.problem(not_yours(peer_id))
        settings = self._service.settings
        if end.dropped:
            return self._calls.answer(announce_answer(settings, end))
        said = (end.whole_wanted, *self._service.envelope().values())
        if said != self._plain_of:
            self._plain_of, self._plain = said, self._calls.answer(announce_answer(settings, end))
        return self._plain

    async def shutdown(self, timeout: float | None = None) -> None:
        """Those under way are answered first: what they wait for has its own deadline."""
        loop = asyncio.get_running_loop()
        until = loop.time() + (timeout or 0.0)
        while self._under_way and loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await super().shutdown(timeout)
