"""The piece server: what other peers may ask of this one (`docs/peer-protocol.md`).

Owned here: the routes, the order of checks (token, then existence: a stranger learns nothing about what exists),
upload slots over HTTP, and ending every transfer whose right was withdrawn. Left to others: the decision about a
token (`access.py`), the choice of a piece and the queue (`sender.py`), moving bytes (`sending.py`), links (`links.py`),
manifests (`manifest_sending.py`), how many connections there may be (`door.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import ssl
import weakref
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
from .bitmap import BitmapError, from_wire
from .content import OpenFiles, SourceGoneError
from .door import Door, Server
from .manifest_sending import ManifestsBusyError, ManifestSender
from .pacer import Pacer
from .recent import RecentPieces
from .sender import Busy, UploadQueue
from .sending import CutError, PieceSender, Sending
from .swarm import Swarm, Swarms

BODY_BYTES_MAX: Final = 1 << 20
QUEUE_SECONDS_MAX: Final = 8.0
SILENT_SECONDS_MAX: Final = 30.0  # a connection's first request must be whole by then
BODY_SECONDS_MAX: Final = 10.0
LOOKED_AT_FIRST_MAX: Final = 4  # files
KEPT_SECONDS: Final = 90.0  # a connection that asks for nothing more
_PATH: Final = re.compile(r"/v1/swarms/([0-9a-f]{64})/([a-z]+)(?:/([0-9]{1,8}))?")
_RANGE: Final = re.compile(r"bytes=(\d{1,12})-(\d{1,12})?")


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
        up: Pacer,
    ) -> None:
        self.queue = UploadQueue()
        self._peer_id = peer_id
        self._swarms = swarms
        self._access = access
        self._manifest_file = manifest_file
        self._withdraw = withdraw
        self._link = link
        self._up = up
        self._recent = recent
        self._sender = PieceSender(files, executor, up, self.queue.moved)
        self._manifests = ManifestSender(up, access.seconds_left)
        self._sendings: set[Sending] = set()
        self._tickets = itertools.count(1)
        self._granted: dict[int, asyncio.Future[None]] = {}
        self._callers: weakref.WeakKeyDictionary[asyncio.BaseTransport, str] = weakref.WeakKeyDictionary()
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self._tls = False
        # What may be asked of a swarm: by method, what it is, and whether a piece's index follows.
        self.routes: dict[tuple[str, str, bool], _Route] = {
            ("GET", "manifest", False): self._manifest,
            ("GET", "pieces", True): self._piece,
            ("POST", "next", False): self._next,
            ("GET", "link", False): self._open_link,
        }
        self._runner: web.ServerRunner | None = None
        self._door: Door | None = None

    # --- life -----------------------------------------------------------------------------------

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen; returns the address in use. Raises OSError."""
        # aiohttp's server without its application: the routes are few, and a request is a piece (decision 505).
        server = Server(
            self._answer,
            lost=lambda connection: door.left(connection),
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=KEPT_SECONDS,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=0.5)
        await self._runner.setup()
        self._tls = tls is not None
        loop = asyncio.get_running_loop()

        def opened() -> web.RequestHandler:
            connection = server()
            self._silent[connection] = loop.call_later(SILENT_SECONDS_MAX, self._end_silent, connection)
            return connection

        self._door = door = Door(opened, self._ended)
        return await door.open(host, port, tls)

    async def stop(self) -> None:
        if self._door is not None:
            await self._door.close()
        for sending in list(self._sendings):
            sending.cut("this peer is stopping")
        for timer in self._silent.values():
            timer.cancel()
        self._silent.clear()
        if self._runner is not None:
            await self._runner.cleanup()

    def _ended(self, connection: web.RequestHandler) -> None:
        if (timer := self._silent.pop(connection, None)) is not None:
            timer.cancel()

    def _end_silent(self, connection: web.RequestHandler) -> None:
        """It asked for nothing: there are only so many connections, and each costs a descriptor."""
        self._silent.pop(connection, None)
        connection.force_close()

    def recheck(self) -> None:
        """Something was withdrawn: end every transfer whose right is gone."""
        for sending in list(self._sendings):
            if not self._allowed(sending.claims, sending.manifest_id):
                sending.cut("the right was withdrawn")
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
        return len(self._sendings)

    # --- who asks -------------------------------------------------------------------------------

    def _caller(self, request: web.BaseRequest) -> str | None:
        """The peer that TLS proved; None without TLS."""
        if not self._tls:
            return None
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        known = self._callers.get(transport)
        if known is None:
            known = peer_id_of(transport.get_extra_info("ssl_object"))
            if known is None:
                raise _Refusal(403, "not-a-peer", "The certificate is not a peer's.")
            self._callers[transport] = known
        return known

    def _admit(self, request: web.BaseRequest, manifest_id: str) -> tuple[Claims, Swarm]:
        header = request.headers.get("Authorization", "")
        token = header[7:] if header.startswith("Bearer ") else None
        try:
            claims = self._access.check(token, self._caller(request))
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
            raise _Refusal(
                410, "withdrawn-source", "This share was withdrawn: its source changed or is gone."
            )
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
                self._caller(request),
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
        if index >= swarm.manifest.pieces or not swarm.has(index):
            raise _Refusal(404, "piece-not-held", "This peer does not have that piece.")
        start, length, status = _range(request, swarm.manifest.layout.piece_length(index))
        ticket = await self._slot(claims)
        try:
            claims, swarm = self._admit(request, manifest_id)  # it may have waited
            if not swarm.has(index):
                raise _Refusal(404, "piece-not-held", "This peer does not have that piece.")
            return await self._send(request, claims, swarm, index, start, length, status)
        finally:
            self._free(ticket)

    async def _next(self, request: web.BaseRequest, manifest_id: str, _: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                data = await request.read()
            body = msgspec.msgpack.decode(data, type=NextBody)
            want = from_wire(body.want, swarm.manifest.pieces)
        except (msgspec.DecodeError, BitmapError) as error:
            raise _Refusal(400, "bad-body", f"The body is not what it must be: {error}.") from error
        ticket = await self._slot(claims)
        try:
            claims, swarm = self._admit(request, manifest_id)  # it may have waited
            now = asyncio.get_running_loop().time()
            index = swarm.choice.choose(claims.peer_id, want, now)
            if index is None:
                return web.Response(status=204)
            length = swarm.manifest.layout.piece_length(index)
            return await self._send(request, claims, swarm, index, 0, length, 200)
        finally:
            self._free(ticket)

    async def _open_link(self, request: web.BaseRequest, manifest_id: str, _: int) -> web.StreamResponse:
        claims, swarm = self._admit(request, manifest_id)
        return await self._link(request, swarm, claims)

    # --- sending --------------------------------------------------------------------------------

    async def _slot(self, claims: Claims) -> int:
        """A ticket that may send now. Raises 429."""
        loop = asyncio.get_running_loop()
        ticket = next(self._tickets)
        said = self.queue.ask(claims.peer_id, ticket, loop.time())
        if isinstance(said, Busy):
            raise self._busy(said)
        if said:
            return ticket
        granted = self._granted[ticket] = loop.create_future()
        try:
            async with asyncio.timeout(QUEUE_SECONDS_MAX):
                await granted
        except TimeoutError:
            self._free(ticket)
            raise self._busy(Busy(self.queue.retry_after_seconds(), 0)) from None
        except asyncio.CancelledError:
            self._free(ticket)
            raise
        finally:
            self._granted.pop(ticket, None)
        return ticket

    def _busy(self, busy: Busy) -> _Refusal:
        refusal = _Refusal(429, "busy", "All upload slots are taken.", busy.retry_after_seconds)
        refusal.queue = busy.queue
        return refusal

    def _free(self, ticket: int) -> None:
        for granted in self.queue.finished(ticket, asyncio.get_running_loop().time()):
            waiting = self._granted.get(granted)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
            else:
                self._free(granted)

    async def _send(
        self,
        request: web.BaseRequest,
        claims: Claims,
        swarm: Swarm,
        index: int,
        start: int,
        length: int,
        status: int,
    ) -> web.StreamResponse:
        transport = request.transport
        if not isinstance(transport, asyncio.Transport) or transport.is_closing():
            raise ConnectionResetError("the reader went away")
        loop = asyncio.get_running_loop()
        layout = swarm.manifest.layout
        spans = layout.spans_of(index * layout.piece_bytes + start, length)
        sending = Sending(transport, claims, swarm.manifest_id)
        rate = self._up.bytes_per_second or self.queue.declared(loop.time()).bytes_per_second or 1e6
        swarm.choice.started(claims.peer_id, index, loop.time(), length / rate)
        self._sendings.add(sending)
        # A token can end between two looks at all rights: nothing is sent beyond its end.
        ending = loop.call_later(self._access.seconds_left(claims), sending.cut, "the token has expired")
        whole = False
        try:
            with self._recent.use(swarm.manifest_id, index, loop.time()) as piece:
                if piece is None:
                    self._check_first(swarm, spans)
                memory = None if piece is None else piece[start : start + length]
                if self._tls:
                    response = web.StreamResponse(
                        status=status,
                        headers={"Trimaran-Piece": str(index), "Content-Type": "application/octet-stream"},
                    )
                    response.content_length = length
                    writer = await response.prepare(request)
                    assert writer is not None
                    await self._sender.send_tls(sending, writer, swarm.content, spans, memory)
                    await response.write_eof()
                else:
                    response = _Sent(status, keep_alive=request.keep_alive)
                    head = _head(status, index, length, keep_alive=request.keep_alive)
                    await self._sender.send(sending, head, swarm.content, spans, memory)
            whole = True
            return response
        except SourceGoneError as gone:
            self._withdraw(swarm, str(gone))
            transport.abort()
            raise
        finally:
            ending.cancel()
            self._sendings.discard(sending)
            swarm.uploaded_bytes += sending.sent_bytes
            if not whole:
                swarm.choice.failed(claims.peer_id, index)

    def _check_first(self, swarm: Swarm, spans: list[tuple[int, int, int]]) -> None:
        """Look at the source before the head promises anything: then the answer can still be 410. Of a piece of many
        files, the first few: what is wrong with the others ends the connection when their turn comes."""
        try:
            self._sender.look(swarm.content, spans[:LOOKED_AT_FIRST_MAX])
        except SourceGoneError as gone:
            self._withdraw(swarm, str(gone))
            raise _Refusal(
                410, "withdrawn-source", "This share was withdrawn: its source changed or is gone."
            ) from gone

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if (timer := self._silent.pop(request.protocol, None)) is not None:
            timer.cancel()
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
