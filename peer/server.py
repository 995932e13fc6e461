"""The piece server: what other peers may ask of this one (`docs/peer-protocol.md`).

Owned here: the routes, the order of checks (token, then existence: a stranger learns nothing about what exists),
upload slots over HTTP, and ending every transfer whose right was withdrawn. Left to others: the decision about a
token (`access.py`), the choice of a piece and the queue (`sender.py`), which requests need no aiohttp (`short_way.py`),
moving bytes (`sending.py`), links (`links.py`), manifests (`manifest_sending.py`), how many connections there may be
(`door.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final

import msgspec
import orjson
from aiohttp import web
from msgspec import Struct

from cluster.api.certificates import peer_id_of
from cluster.api.tokens import Claims

from .access import Access, AccessRefusedError
from .bitmap import BitmapError, Mask, from_wire
from .content import OpenFiles, SourceGoneError
from .deadlines import Deadlines
from .door import Door
from .manifest_sending import ManifestsBusyError, ManifestSender
from .recent import RecentPieces
from .sender import Busy, UploadQueue
from .sending import CutError, Sending
from .short_way import Asked, Connection, ShortWay
from .swarm import Swarm, Swarms
from .upload_rates import UploadRates
from .uploads import Uploads

BODY_BYTES_MAX: Final = 1 << 20
QUEUE_SECONDS_MAX: Final = 8.0
SILENT_SECONDS_MAX: Final = 30.0  # a connection's first request must be whole by then
BODY_SECONDS_MAX: Final = 10.0
KEPT_SECONDS: Final = 90.0  # a connection that asks for nothing more
SWEEP_SECONDS: Final = 5.0
_PATH: Final = re.compile(r"/v1/swarms/([0-9a-f]{64})/([a-z]+)(?:/([0-9]{1,8}))?")
_RANGE: Final = re.compile(r"bytes=(\d{1,12})-(\d{1,12})?")


_NOTHING_TO_CHOOSE: Final = b"HTTP/1.1 204 No Content\r\n\r\n"
_NEVER_SECONDS: Final = 1e9

_Route = Callable[[web.BaseRequest, str, int], Awaitable[web.StreamResponse]]


class NextBody(Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `POST .../next`."""

    want: bytes


class _Refusal(Exception):
    def __init__(
        self, status: int, code: str, message: str, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.queue = 0


class PieceServer:
    """Serves the swarms of a peer. `start`, then `address`; `stop`."""

    def __init__(
        self,
        *,
        peer_id: str,
        swarms: Swarms,
        access: Access,
        files: OpenFiles,
        recent: RecentPieces,
        executor: Executor,
        manifest_file: Callable[[str], Path],
        withdraw: Callable[[Swarm, str], None],
        link: Callable[[web.BaseRequest, Swarm, Claims], Awaitable[web.StreamResponse]],
    ) -> None:
        self.queue = UploadQueue()
        self.rates = UploadRates()
        self.uploads = Uploads(
            seconds_left=access.seconds_left, files=files, recent=recent, executor=executor, withdraw=withdraw,
            rates=self.rates, queue=self.queue, held=self._held,
        )  # fmt: skip
        self._peer_id = peer_id
        self._swarms = swarms
        self._access = access
        self._manifest_file = manifest_file
        self._link = link
        self._manifests = ManifestSender(self.rates, access.seconds_left)
        self._loop = asyncio.get_running_loop()
        self._tickets = itertools.count(1)
        # Who waits for a slot, by ticket: what is called when it comes, and says whether it is still wanted.
        self._granted: dict[int, Callable[[], bool]] = {}
        self._waiting: Deadlines[Asked] = Deadlines(lambda: QUEUE_SECONDS_MAX, self._waited_in_vain)
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls = False
        # What may be asked of a swarm: by method, what it is, and whether a piece's index follows.
        self.routes: dict[tuple[str, str, bool], _Route] = {
            ("GET", "manifest", False): self._manifest,
            ("GET", "pieces", True): self._piece,
            ("POST", "next", False): self._next,
            ("GET", "link", False): self._open_link,
        }
        self._way: ShortWay | None = None
        self._runner: web.ServerRunner | None = None
        self._door: Door | None = None

    # --- life -----------------------------------------------------------------------------------

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen; returns the address in use. Raises OSError."""
        # aiohttp's server without its application: the routes are few, and a request is a piece (decision 505). Its
        # own timer does not see the requests of the short way, so one sweep closes idle connections of both ways.
        self._way = way = ShortWay(
            self,
            self._answer,
            lost=self._lost,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=_NEVER_SECONDS,
        )
        self._runner = web.ServerRunner(way, shutdown_timeout=0.5)
        await self._runner.setup()
        self._tls = tls is not None
        loop = self._loop

        def opened() -> web.RequestHandler:
            connection = way()
            self._silent[connection] = loop.call_later(SILENT_SECONDS_MAX, self._end_silent, connection)
            if self._sweeper is None:
                self._sweeper = loop.call_later(SWEEP_SECONDS, self._sweep)
            return connection

        self._door = Door(opened, self._ended)
        return await self._door.open(host, port, tls)

    async def stop(self) -> None:
        if self._door is not None:
            await self._door.close()
        for asked in self._waiting:  # first: what is cut now leaves them its slots
            asked.connection.force_close()
        self._waiting.stop()
        self.uploads.stop()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        if self._runner is not None:
            await self._runner.cleanup()

    def _lost(self, connection: web.RequestHandler) -> None:
        assert self._door is not None
        self._door.left(connection)

    def _ended(self, connection: web.RequestHandler) -> None:
        if (timer := self._silent.pop(connection, None)) is not None:
            timer.cancel()

    def _end_silent(self, connection: web.RequestHandler) -> None:
        """It asked for nothing: there are only so many connections, and each costs a descriptor."""
        self._silent.pop(connection, None)
        connection.force_close()

    def _sweep(self) -> None:
        """The same for those that ask for nothing any more."""
        assert self._way is not None
        before = self._loop.time() - KEPT_SECONDS
        connections = self._way.connections
        for connection in connections:
            assert isinstance(connection, Connection)
            if not connection.answering and connection.asked_at < before:
                connection.force_close()
        self._sweeper = self._loop.call_later(SWEEP_SECONDS, self._sweep) if connections else None

    def _touched(self, connection: Connection, more: int) -> None:
        """It asks for something (1), or was answered (-1)."""
        connection.answering += more
        connection.asked_at = self._loop.time()
        if self._silent and (timer := self._silent.pop(connection, None)) is not None:
            timer.cancel()

    def recheck(self) -> None:
        """Something was withdrawn: end every transfer whose right is gone."""
        self.uploads.recheck(self._allowed)
        self._manifests.recheck(self._allowed)

    def _allowed(self, claims: Claims, manifest_id: str) -> bool:
        """Whether what was allowed at its beginning still is."""
        swarm = self._swarms.get(manifest_id)
        return (
            swarm is not None
            and swarm.offered_to(claims.group)
            and claims.peer_id not in swarm.banned
            and self._access.allows(claims, manifest_id)
        )

    @property
    def sendings(self) -> int:
        return len(self.uploads)

    # --- who asks -------------------------------------------------------------------------------

    def _caller(self, connection: Connection) -> str | None:
        """The peer that TLS proved; None without TLS."""
        if not self._tls:
            return None
        if connection.peer_id is None:
            if connection.transport is None:
                raise ConnectionResetError
            connection.peer_id = peer_id_of(connection.transport.get_extra_info("ssl_object"))
            if connection.peer_id is None:
                raise _Refusal(403, "not-a-peer", "The certificate is not a peer's.")
        return connection.peer_id

    def _admit(self, request: web.BaseRequest, manifest_id: str) -> tuple[Claims, Swarm]:
        header = request.headers.get("Authorization", "")
        token = header[7:] if header.startswith("Bearer ") else None
        return self._check(_connection(request), token, manifest_id)

    def _check(self, connection: Connection, token: str | None, manifest_id: str) -> tuple[Claims, Swarm]:
        """Who asks, and what of, on both ways. Raises _Refusal."""
        try:
            claims = self._access.check(token, self._caller(connection))
        except AccessRefusedError as refused:
            raise _Refusal(refused.status, refused.code, refused.message) from refused
        swarm = self._swarms.get(manifest_id)
        if swarm is None or not swarm.offered_to(claims.group):
            raise _Refusal(404, "not-held", "This peer does not hold that for this group.")
        if not self._access.allows(claims, manifest_id):
            raise _Refusal(403, "withdrawn", "The right was withdrawn.")
        if claims.peer_id in swarm.banned:
            raise _Refusal(403, "banned", "This peer sent wrong pieces.")
        if swarm.gone_reason:
            raise _gone()
        return claims, swarm

    # --- routes ---------------------------------------------------------------------------------

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        found = _PATH.fullmatch(request.raw_path)
        if found is None:
            if (request.method, request.raw_path) == ("GET", "/v1/hello"):
                return _json(200, {"peer_id": self._peer_id})
            return await self._unknown(request)
        manifest_id, what, index = found.groups()
        route = self.routes.get((request.method, what, index is not None))
        if route is None:
            return await self._unknown(request)
        return await route(request, manifest_id, int(index or 0))

    async def _unknown(self, request: web.BaseRequest) -> web.Response:
        try:
            self._access.check(
                request.headers.get("Authorization", "").removeprefix("Bearer ") or None,
                self._caller(_connection(request)),
            )
        except AccessRefusedError as refused:
            raise _Refusal(refused.status, refused.code, refused.message) from refused
        raise _Refusal(404, "no-such-path", "There is nothing here.")

    async def _manifest(self, request: web.BaseRequest, manifest_id: str, index: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        file = self._manifest_file(swarm.manifest_id)
        if not file.is_file():
            raise _Refusal(404, "not-held", "This peer does not hold that for this group.")
        try:
            return await self._manifests.send(request, claims, manifest_id, file)
        except ManifestsBusyError:
            raise _Refusal(429, "busy", "Too many manifests are being sent.", 1.0) from None

    async def _piece(self, request: web.BaseRequest, manifest_id: str, index: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        _check_held(swarm, index)
        start, length, status = _range(request, swarm.manifest.layout.piece_length(index))
        ticket = await self._slot(claims, _connection(request))
        try:
            claims, swarm = self._admit(request, manifest_id)  # it may have waited
            _check_held(swarm, index)
            return await self._send(request, ticket, claims, swarm, index, (start, length), status)
        finally:
            self._free(ticket)

    async def _next(self, request: web.BaseRequest, manifest_id: str, _: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        async with asyncio.timeout(BODY_SECONDS_MAX):
            data = await request.read()
        want = _wanted(data, swarm)
        ticket = await self._slot(claims, _connection(request))
        try:
            claims, swarm = self._admit(request, manifest_id)  # it may have waited
            index = swarm.choice.choose(claims.peer_id, want, self._loop.time())
            if index is None:
                return web.Response(status=204)
            length = swarm.manifest.layout.piece_length(index)
            return await self._send(request, ticket, claims, swarm, index, (0, length), 200)
        finally:
            self._free(ticket)

    async def _open_link(self, request: web.BaseRequest, manifest_id: str, _: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        return await self._link(request, swarm, claims)

    # --- slots ----------------------------------------------------------------------------------

    async def _slot(self, claims: Claims, connection: Connection) -> int:
        """A ticket that may send now. Raises 429."""
        if connection.waited:
            raise self._busy_for(claims.peer_id)
        ticket = next(self._tickets)
        said = self.queue.ask(claims.peer_id, ticket, self._loop.time())
        if isinstance(said, Busy):
            raise _busy(said)
        if said:
            return ticket
        turn: asyncio.Future[None] = self._loop.create_future()

        def granted() -> bool:
            if turn.done():
                return False
            turn.set_result(None)
            return True

        self._granted[ticket] = granted
        try:
            async with asyncio.timeout(QUEUE_SECONDS_MAX):
                await turn
        except TimeoutError:
            self._free(ticket)
            raise self._busy_for(claims.peer_id) from None
        except asyncio.CancelledError:
            self._free(ticket)
            raise
        finally:
            self._granted.pop(ticket, None)
        return ticket

    def _busy_for(self, downloader: str) -> _Refusal:
        """It has waited in vain."""
        return _busy(Busy(self.queue.retry_after_seconds(downloader, self._loop.time()), 0))

    def set_limits(self, total: float, each: float = 0.0, slots: int = 0) -> None:
        """Bytes per second in all and to each downloader, and how many sends at once; 0: no limit, and as many as the
        link needs."""
        now = self._loop.time()
        self.rates.set_rates(total, each, now)
        self._grant(self.queue.set_slots(slots, total, now))

    def _held(self, ticket: int) -> None:
        self._grant(self.queue.held(ticket, self._loop.time()))

    def _free(self, ticket: int) -> None:
        self._grant(self.queue.finished(ticket, self._loop.time()))

    def _grant(self, tickets: list[int]) -> None:
        for granted in tickets:
            wanted = self._granted.pop(granted, None)
            if wanted is None or not wanted():
                self._free(granted)

    # --- sending --------------------------------------------------------------------------------

    async def _send(
        self,
        request: web.BaseRequest,
        ticket: int,
        claims: Claims,
        swarm: Swarm,
        index: int,
        part: tuple[int, int],
        status: int,
    ) -> web.StreamResponse:
        outlet = _connection(request).outlet
        if request.transport is None or outlet is None:
            raise ConnectionResetError("the reader went away")
        head = _head(status, index, part[1], keep_alive=request.keep_alive)
        done: asyncio.Future[Exception | None] = self._loop.create_future()

        def ended(sending: Sending, error: Exception | None) -> None:
            if not done.done():
                done.set_result(error)

        try:
            sending = self.uploads.begin(ticket, outlet, claims, swarm, index, part, head, ended)
        except SourceGoneError as gone:
            raise _gone() from gone
        try:
            error = await done
        finally:
            sending.cut("nobody waits for it")  # unless it has ended
        if isinstance(error, SourceGoneError) and not sending.begun:
            raise _gone() from error
        if error is not None:
            raise error
        return _Sent(status, keep_alive=request.keep_alive)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = _connection(request)
        self._touched(connection, 1)
        try:
            return await self._route(request)
        except _Refusal as refusal:
            body: dict[str, object] = {"code": refusal.code, "detail": refusal.message}
            response = _json(refusal.status, body)
            if refusal.retry_after_seconds is not None:
                body |= {"retry_after_seconds": refusal.retry_after_seconds, "queue": refusal.queue}
                response = _json(refusal.status, body)
                response.headers["Retry-After"] = str(max(1, round(refusal.retry_after_seconds)))
            return response
        except (CutError, SourceGoneError, TimeoutError, OSError):
            # Bytes were promised that will not come: only the end of the connection can say so.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=503)
        finally:
            self._touched(connection, -1)
            connection.waited = False
            connection.answered_by_aiohttp()

    # --- the short way --------------------------------------------------------------------------

    def begin(self, asked: Asked) -> bool:
        """`short_way.Serving`."""
        try:
            claims, swarm = self._checked(asked)
        except (_Refusal, ConnectionResetError):
            return False
        ticket, now = next(self._tickets), self._loop.time()
        said = self.queue.ask(claims.peer_id, ticket, now)
        if isinstance(said, Busy):
            return False
        asked.ticket = ticket
        self._touched(asked.connection, 1)
        if said:
            self._send_short(asked, claims, swarm)
        else:
            self._granted[ticket] = lambda: self._turn_of(asked)
            self._waiting.add(asked, now)
        return True

    def _checked(self, asked: Asked) -> tuple[Claims, Swarm]:
        """All that can be refused, in the order of the long way. Raises _Refusal."""
        claims, swarm = self._check(asked.connection, asked.token, asked.manifest_id)
        if asked.body is None:
            _check_held(swarm, asked.index)
        elif asked.want is None:
            asked.want = _wanted(asked.body, swarm)
        return claims, swarm

    def _turn_of(self, asked: Asked) -> bool:
        self._waiting.remove(asked)
        self._loop.call_soon(self._go_on, asked)  # not from within the end of another send
        return True

    def _go_on(self, asked: Asked) -> None:
        """It has waited, and has a slot now."""
        if asked.over:
            return
        try:
            claims, swarm = self._checked(asked)
        except (_Refusal, ConnectionResetError):
            self._refuse(asked)
        else:
            self._send_short(asked, claims, swarm)

    def _send_short(self, asked: Asked, claims: Claims, swarm: Swarm) -> None:
        connection, index = asked.connection, asked.index
        assert connection.outlet is not None
        if asked.want is not None:
            chosen = swarm.choice.choose(claims.peer_id, asked.want, self._loop.time())
            if chosen is None:
                self._end(asked)
                connection.answered(_NOTHING_TO_CHOOSE)
                return
            index = chosen
        length = swarm.manifest.layout.piece_length(index)
        head = _head(200, index, length, keep_alive=True)

        def ended(sending: Sending, error: Exception | None) -> None:
            if isinstance(error, SourceGoneError) and not sending.begun:
                self._refuse(asked)
                return
            self._end(asked)
            if error is None:
                connection.answered()

        try:
            asked.sending = self.uploads.begin(
                asked.ticket, connection.outlet, claims, swarm, index, (0, length), head, ended
            )
        except SourceGoneError:
            self._refuse(asked)

    def _end(self, asked: Asked) -> None:
        asked.over = True
        self._touched(asked.connection, -1)
        self._free(asked.ticket)

    def _refuse(self, asked: Asked) -> None:
        self._end(asked)
        asked.connection.refused()

    def _waited_in_vain(self, asked: Asked) -> None:
        self._granted.pop(asked.ticket, None)
        asked.connection.waited = True
        self._refuse(asked)

    def left(self, asked: Asked) -> None:
        """`short_way.Serving`."""
        if asked.over:
            return
        if asked.sending is not None:
            asked.sending.lost()
            return
        self._granted.pop(asked.ticket, None)
        self._waiting.remove(asked)
        self._end(asked)


class _Sent(web.StreamResponse):
    """A response whose bytes have left already: aiohttp need not write it."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._kept = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._kept

    async def prepare(self, request: web.BaseRequest) -> None:
        return

    async def write_eof(self, data: bytes = b"") -> None:
        return


def _connection(request: web.BaseRequest) -> Connection:
    connection = request.protocol
    assert isinstance(connection, Connection)
    return connection


def _busy(busy: Busy) -> _Refusal:
    refusal = _Refusal(429, "busy", "All upload slots are taken.", busy.retry_after_seconds)
    refusal.queue = busy.queue
    return refusal


def _gone() -> _Refusal:
    return _Refusal(410, "withdrawn-source", "This share was withdrawn: its source changed or is gone.")


def _check_held(swarm: Swarm, index: int) -> None:
    if index >= swarm.manifest.pieces or not swarm.has(index):
        raise _Refusal(404, "piece-not-held", "This peer does not have that piece.")


def _wanted(body: bytes, swarm: Swarm) -> Mask:
    """What the body of `POST .../next` asks for."""
    try:
        return from_wire(msgspec.msgpack.decode(body, type=NextBody).want, swarm.manifest.pieces)
    except (msgspec.DecodeError, BitmapError) as error:
        raise _Refusal(400, "bad-body", f"The body is not what it must be: {error}.") from error


def _head(status: int, index: int, length: int, *, keep_alive: bool) -> bytes:
    reason = "OK" if status == 200 else "Partial Content"
    close = "" if keep_alive else "Connection: close\r\n"
    return (
        f"HTTP/1.1 {status} {reason}\r\nTrimaran-Piece: {index}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {length}\r\n{close}\r\n"
    ).encode()


def _json(status: int, body: object) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(body), content_type="application/json")


def _range(request: web.BaseRequest, length: int) -> tuple[int, int, int]:
    """(start, bytes, status) of what is asked of a piece (RFC 9110, 14: one range, within it)."""
    header = request.headers.get("Range")
    if header is None:
        return 0, length, 200
    match = _RANGE.fullmatch(header)
    if match is None:
        return 0, length, 200  # not a range that is understood here: the whole is a right answer
    start = int(match[1])
    end = min(int(match[2]) + 1 if match[2] else length, length)
    if start >= end:
        raise _Refusal(416, "bad-range", f"The piece has {length} bytes.")
    return start, end - start, 206
