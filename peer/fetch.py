"""Fetching from peers: a small HTTP/1.1 client whose bodies land in the caller's own buffer.

`BufferedProtocol` lets the kernel (or TLS) write straight into the buffer in which the piece is hashed and
from which it is written to disk; aiohttp's client copies it twice on the way. Measured by
`benchmarks/fetch_roads.py`: decision 501 has the numbers that earn this module its keep.

Owned here: connections to peers, kept open and used again, and what a broken one means for a request. Left to
others: one connection (`line.py`), what to ask of whom (`download.py`), checking and keeping a piece (`store.py`), the
live link (`links.py`).

A request on a kept connection begins in the same turn of the loop and tells of its end by a call (`begin`): pieces come
by the thousand, and a task for each costs as much as receiving it. `ask` is the same for those who would rather wait.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from msgspec import Struct

from cluster.api.certificates import SSLInfo

from .line import Ended, FetchFault, Landing, Line, Reply
from .pacer import Pacer

CONNECT_SECONDS: Final = 5.0
IDLE_SECONDS: Final = 60.0
SWEEP_SECONDS: Final = 0.5


class Endpoint(Struct, frozen=True):
    """Where a peer is reached: whole URLs, tried in order."""

    peer_id: str
    addresses: tuple[str, ...]


# The peer_id that a verified TLS connection proves; None: no peer's certificate.
Identify: TypeAlias = Callable[[SSLInfo | None], str | None]


class Asking:
    """One request under way. Its end is told once, unless it is cancelled before."""

    __slots__ = (
        "_cancelled",
        "_connecting",
        "_ended",
        "_fetcher",
        "_fresh",
        "_landing",
        "_line",
        "_on_bytes",
        "_pacers",
        "_request",
        "endpoint",
    )

    def __init__(
        self,
        fetcher: Fetcher,
        endpoint: Endpoint,
        request: bytes,
        landing: Landing,
        ended: Ended,
        on_bytes: Callable[[int], None] | None,
        pacers: list[Pacer],
    ) -> None:
        self.endpoint = endpoint
        self._fetcher = fetcher
        self._request = request
        self._landing = landing
        self._ended = ended
        self._on_bytes = on_bytes
        self._pacers = pacers
        self._line: Line | None = None
        self._fresh = False
        self._connecting: asyncio.Task[None] | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """It is wanted no more, and nothing lands any more."""
        self._cancelled = True
        if self._connecting is not None:
            self._connecting.cancel()
        if (line := self._line) is not None:
            self._line = None
            self._fetcher.left(line)
            line.abandon()

    def go(self) -> None:
        line = self._fetcher.kept(self.endpoint.peer_id)
        if line is not None:
            self._put_on(line, fresh=False)
        else:
            self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            line = await self._fetcher.connect(self.endpoint)
        except FetchFault as fault:
            self._connecting = None
            self._ended(fault)
            return
        except BaseException as error:  # whatever it is, nobody may be left waiting
            self._connecting = None
            if not self._cancelled:
                self._ended(FetchFault("unreachable", f"no connection ({type(error).__name__})"))
            raise
        self._connecting = None
        self._put_on(line, fresh=True)

    def _put_on(self, line: Line, *, fresh: bool) -> None:
        self._line, self._fresh = line, fresh
        self._fetcher.taken(line)
        line.on_bytes = self._on_bytes
        line.pacers = self._pacers
        line.begin(self._request, self._landing, self._answered)

    def _answered(self, end: Reply | FetchFault) -> None:
        line, self._line = self._line, None
        assert line is not None
        self._fetcher.left(line)
        if not isinstance(end, FetchFault):
            self._fetcher.keep(self.endpoint.peer_id, line)
        elif not self._fresh and end.kind == "broken" and not line.answered and not self._fetcher.closed:
            # A kept connection may have been closed by the peer meanwhile: then, and only if not one byte of an answer
            # came, the request is made again (all requests here are free of effect).
            self.go()
            return
        self._ended(end)


class Fetcher:
    """Connections to all peers."""

    def __init__(
        self,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        identify: Identify | None = None,
    ) -> None:
        self.closed = False
        self._tls = tls
        self._identify = identify
        self._idle: dict[str, list[tuple[float, Line]]] = {}
        self._busy: set[Line] = set()
        self._good: dict[str, str] = {}  # peer_id -> the address that answered last
        self._sweeper: asyncio.Task[None] | None = None

    def begin(
        self,
        endpoint: Endpoint,
        request: bytes,
        landing: Landing,
        ended: Ended,
        *,
        on_bytes: Callable[[int], None] | None = None,
        pacers: list[Pacer] | None = None,
    ) -> Asking:
        """One request to a peer, on a kept connection if there is one, read no faster than the pacers allow.
        `ended` is told of its end in a later turn of the loop."""
        asking = Asking(self, endpoint, request, landing, ended, on_bytes, pacers or [])
        asking.go()
        return asking

    async def ask(
        self,
        endpoint: Endpoint,
        request: bytes,
        landing: Landing,
        *,
        on_bytes: Callable[[int], None] | None = None,
        pacers: list[Pacer] | None = None,
    ) -> Reply:
        """`begin`, and wait for the answer. Raises FetchFault."""
        done: asyncio.Future[Reply | FetchFault] = asyncio.get_running_loop().create_future()

        def ended(end: Reply | FetchFault) -> None:
            if not done.done():
                done.set_result(end)

        asking = self.begin(endpoint, request, landing, ended, on_bytes=on_bytes, pacers=pacers)
        try:
            end = await done
        finally:
            asking.cancel()  # nothing, unless this was cancelled
        if isinstance(end, FetchFault):
            raise end
        return end

    def drop(self, peer_id: str) -> None:
        """Close the kept connections to a peer."""
        for _, line in self._idle.pop(peer_id, []):
            line.abort()

    async def close(self) -> None:
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for line in list(self._busy):
            line.fail(FetchFault("broken", "this peer is stopping"))
        for peer_id in list(self._idle):
            self.drop(peer_id)
        await asyncio.sleep(0)

    # what a request under way needs

    def taken(self, line: Line) -> None:
        self._busy.add(line)

    def left(self, line: Line) -> None:
        self._busy.discard(line)
        line.on_bytes = None

    def keep(self, peer_id: str, line: Line) -> None:
        """For the next request, if it may be used again."""
        if line.open and not self.closed:
            self._idle.setdefault(peer_id, []).append((line.progress_at, line))
        else:
            line.abort()

    def kept(self, peer_id: str) -> Line | None:
        lines = self._idle.get(peer_id, [])
        while lines:
            since, line = lines.pop()
            if line.open and asyncio.get_running_loop().time() - since < IDLE_SECONDS:
                return line
            line.abort()
        return None

    async def connect(self, endpoint: Endpoint) -> Line:
        """A new connection. Raises FetchFault."""
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
            if not line.open:
                trouble = f"{address}: the connection was closed at once"
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
            await asyncio.sleep(SWEEP_SECONDS)
            now = loop.time()
            for line in list(self._busy):
                if line.overdue:
                    # Not from within: what its owner makes of it must not keep us from watching the others.
                    loop.call_soon(_give_up, line)
                elif now - line.progress_at >= SWEEP_SECONDS:
                    line.look()
            for lines in self._idle.values():
                for since, line in lines:
                    if now - since >= IDLE_SECONDS:
                        line.abort()
            self._idle = {
                peer_id: kept
                for peer_id, lines in self._idle.items()
                if (kept := [each for each in lines if each[1].open])
            }


def _give_up(line: Line) -> None:
    if line.overdue:  # still
        line.fail(FetchFault("stalled", "the peer sends nothing"))
