"""The live link: one WebSocket for each pair of peers in each swarm, over which they tell each other what they have.

Owned here: opening and accepting links, who may (both sides show a token for the group), one link for each pair,
frames written without waiting for slow readers, peer exchange within the group, renewed tokens, and closing links
that are silent or whose right is gone. Left to others: when which news is told (`news.py`), what follows from it
(`download.py`, `sender.py`).
"""

from __future__ import annotations

import asyncio
import random
import ssl
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Final, Protocol

import aiohttp
from aiohttp import web

from cluster.api.certificates import peer_id_of
from cluster.api.tokens import Claims

from .access import Access, AccessRefusedError
from .bitmap import BitmapError, Mask, from_wire, to_wire, without
from .fetch import Endpoint
from .frames import (
    PEX_PEERS_MAX,
    Frame,
    FrameError,
    GoneFrame,
    HaveFrame,
    Hello,
    LoadFrame,
    PexFrame,
    PexPeer,
    PingFrame,
    PongFrame,
    TokenFrame,
    decode,
    encode,
    frame_bytes_max,
    have_frame,
    have_mask,
)
from .swarm import Swarm, Swarms

LINKS_PER_SWARM_MAX: Final = 256
FRAMES_WAITING_MAX: Final = 512
OPEN_SECONDS: Final = 5.0
HELLO_SECONDS: Final = 5.0
FAREWELL_SECONDS: Final = 0.3
TALK_SECONDS: Final = 5.0  # between pings, and between declarations of load
SILENT_SECONDS_MAX: Final = 30.0  # both sides ping: who is not heard for so long is gone
PEX_SECONDS: Final = 0.5  # who comes within it is told of together
TOLD_OF_NEWCOMERS_MAX: Final = 8

WebSocket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


class LinkEvents(Protocol):
    """Who wants to know. Called on the event loop; must not block or raise."""

    def link_up(self, swarm: Swarm, link: Link) -> None: ...
    def link_down(self, swarm: Swarm, peer_id: str, *, reached: bool, leaving: bool) -> None: ...
    def link_have(self, swarm: Swarm, link: Link, new: Mask) -> None: ...
    def link_load(self, swarm: Swarm, link: Link, load: LoadFrame) -> None: ...
    def link_latency(self, swarm: Swarm, link: Link, seconds: float) -> None: ...
    def link_pex(self, swarm: Swarm, link: Link, peers: list[PexPeer]) -> None: ...


class LinkRefusedError(Exception):
    """The other side is not who it must be, or may not take part."""


class Link:
    """One side of a link. `have` is what the other side said it has."""

    def __init__(
        self, socket: WebSocket, claims: Claims, hello: Hello, have: Mask, *, opened_here: bool
    ) -> None:
        self.peer_id = hello.peer_id
        self.group = claims.group
        self.user = claims.user
        self.claims = claims
        self.addresses = tuple(hello.addresses)
        self.have = have
        self.opened_here = opened_here
        self.leaving = False
        self.heard_at = asyncio.get_running_loop().time()
        self._socket = socket
        self._waiting: deque[bytes] = deque()  # while the reader takes nothing
        self._writer: asyncio.Task[None] | None = None
        self._closed = False
        self._pings: dict[int, float] = {}
        self._ping = 0

    def send(self, data: bytes) -> None:
        """Write a frame now; queue it while the reader takes nothing. A reader that lets too many pile up is cut off:
        it would act on old news."""
        if self._closed:
            return
        if self._writer is not None:
            if len(self._waiting) >= FRAMES_WAITING_MAX:
                self.close()
            else:
                self._waiting.append(data)
            return
        # A frame leaves at once but where the socket's buffers are full, and a task for each would cost more than it.
        sending = self._socket.send_bytes(data)
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        except (ConnectionError, aiohttp.ClientError, RuntimeError):
            self.close()
            return
        self._writer = asyncio.create_task(self._write(sending, waits_for))

    def ping(self) -> None:
        self._ping += 1
        self._pings = {self._ping: asyncio.get_running_loop().time()}
        self.send(encode(PingFrame(self._ping)))

    def pong(self, number: int) -> float | None:
        sent = self._pings.pop(number, None)
        return None if sent is None else asyncio.get_running_loop().time() - sent

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._writer is not None:
            self._writer.cancel()
        closing = asyncio.create_task(_close(self._socket))
        _closings.add(closing)
        closing.add_done_callback(_closings.discard)

    async def _write(self, sending: Coroutine[Any, Any, None], waits_for: object) -> None:
        """The rest of a frame, and those that wait behind it."""
        try:
            await _rest(sending, waits_for)
            while self._waiting:
                await self._socket.send_bytes(self._waiting.popleft())
        except (ConnectionError, aiohttp.ClientError, RuntimeError):
            self.close()
        self._writer = None


@types.coroutine
def _rest(started: Coroutine[Any, Any, None], waits_for: object) -> Generator[Any, Any, None]:
    """Go on with a coroutine that was started outside of any task, and that waits for something now."""
    try:
        yield waits_for
    except BaseException as error:
        started.throw(error)
        raise
    yield from started


_closings: set[asyncio.Task[None]] = set()


async def _close(socket: WebSocket) -> None:
    try:
        async with asyncio.timeout(1.0):
            await socket.close()
    except (TimeoutError, ConnectionError, aiohttp.ClientError, RuntimeError):
        return


class Links:
    """All links of this peer."""

    def __init__(
        self,
        *,
        peer_id: str,
        swarms: Swarms,
        access: Access,
        events: LinkEvents,
        token: Callable[[str], str | None],
        addresses: Callable[[], Iterable[str]],
        load: Callable[[], LoadFrame],
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._peer_id = peer_id
        self._swarms = swarms
        self._access = access
        self._events = events
        self._token = token
        self._addresses = addresses
        self._load = load
        self._tls = tls
        self._opening: dict[tuple[Swarm, str], asyncio.Task[None]] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._tellers: dict[Swarm, asyncio.TimerHandle] = {}
        self._newcomers: dict[Swarm, list[Link]] = {}
        self._http: aiohttp.ClientSession | None = None
        self._talker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, connect=OPEN_SECONDS, sock_connect=OPEN_SECONDS),
            trust_env=False,
        )
        self._talker = asyncio.create_task(self._talk())

    async def stop(self) -> None:
        if self._talker is not None:
            self._talker.cancel()
        for swarm in self._swarms:
            self.leave(swarm, "this peer is stopping")
        for opening in list(self._opening.values()):
            opening.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        if self._lives:
            await asyncio.wait(self._lives, timeout=FAREWELL_SECONDS)
        for life in self._lives:
            life.cancel()
        if self._http is not None:
            await self._http.close()

    # --- opening and accepting ------------------------------------------------------------------

    def open(self, swarm: Swarm, group: str, endpoint: Endpoint) -> None:
        """Open a link, unless there is one; answered by `link_up` or `link_down`."""
        key = (swarm, endpoint.peer_id)
        if key in self._opening or endpoint.peer_id == self._peer_id:
            return
        if (link := swarm.links.get(endpoint.peer_id)) is not None:
            self._events.link_up(swarm, link)
            return
        task = asyncio.create_task(self._open(swarm, group, endpoint))
        self._opening[key] = task
        task.add_done_callback(lambda _: self._opening.pop(key, None))

    async def _open(self, swarm: Swarm, group: str, endpoint: Endpoint) -> None:
        reached = False
        for address in endpoint.addresses:
            try:
                async with asyncio.timeout(OPEN_SECONDS + HELLO_SECONDS):
                    link = await self._dial(swarm, group, endpoint.peer_id, address)
            except LinkRefusedError:
                reached = True
                continue
            except aiohttp.WSServerHandshakeError:
                reached = True
                continue
            except (OSError, aiohttp.ClientError, TimeoutError, ValueError):
                continue
            life = asyncio.create_task(self._run(swarm, link))
            self._lives.add(life)
            life.add_done_callback(self._lives.discard)
            return
        if endpoint.peer_id not in swarm.links:
            self._events.link_down(swarm, endpoint.peer_id, reached=reached, leaving=False)

    async def _dial(self, swarm: Swarm, group: str, peer_id: str, address: str) -> Link:
        token = self._token(group)
        if token is None or self._http is None:
            raise LinkRefusedError("there is no token to show")
        socket = await self._http.ws_connect(
            f"{address}/v1/swarms/{swarm.manifest_id}/link",
            headers={"Authorization": f"Bearer {token}"},
            ssl=self._tls() if self._tls is not None else True,
            max_msg_size=frame_bytes_max(swarm.manifest.pieces),
            compress=0,  # no heartbeat of aiohttp's beside our own: it costs something for every frame
        )
        try:
            proved = peer_id if self._tls is None else peer_id_of(socket.get_extra_info("ssl_object"))
            if proved != peer_id:
                raise LinkRefusedError("another peer answers there")
            said = swarm.have
            await socket.send_bytes(encode(self._hello(swarm, token)))
            hello = await _first(socket)
            return self._greeted(swarm, socket, hello, peer_id, group, said, opened_here=True)
        except BaseException:
            await _close(socket)
            raise

    async def accept(self, request: web.BaseRequest, swarm: Swarm, claims: Claims) -> web.StreamResponse:
        """The server's side: the caller's token was checked."""
        if len(swarm.links) >= LINKS_PER_SWARM_MAX or not self._wins(
            swarm, claims.peer_id, opened_here=False
        ):
            return web.Response(status=409, text="there is a link already, or too many")
        token = self._token(claims.group)
        if token is None:
            return web.Response(status=503, text="this peer has no token of its own now")
        socket = web.WebSocketResponse(max_msg_size=frame_bytes_max(swarm.manifest.pieces), compress=False)
        await socket.prepare(request)
        try:
            said = swarm.have
            await socket.send_bytes(encode(self._hello(swarm, token)))
            async with asyncio.timeout(HELLO_SECONDS):
                hello = await _first(socket)
            link = self._greeted(swarm, socket, hello, claims.peer_id, claims.group, said, opened_here=False)
        except (LinkRefusedError, TimeoutError, ConnectionError):
            await _close(socket)
            return socket
        await self._run(swarm, link)
        return socket

    def _hello(self, swarm: Swarm, token: str) -> Hello:
        return Hello(
            self._peer_id, token, list(self._addresses()), to_wire(swarm.have, swarm.manifest.pieces)
        )

    def _wins(self, swarm: Swarm, peer_id: str, *, opened_here: bool) -> bool:
        """Whether a new link takes the place of an old one: when both sides dial at once, both keep the link that
        the lower peer_id opened."""
        old = swarm.links.get(peer_id)
        if old is None or old.opened_here is opened_here:
            return True
        return (self._peer_id < peer_id) is opened_here

    def _greeted(
        self,
        swarm: Swarm,
        socket: WebSocket,
        hello: Hello,
        peer_id: str,
        group: str,
        said: Mask,
        *,
        opened_here: bool,
    ) -> Link:
        """Check the other side's hello; `said` is what ours told. Raises LinkRefusedError."""
        if hello.peer_id != peer_id or peer_id in swarm.banned:
            raise LinkRefusedError("not the peer it was expected to be")
        try:
            claims = self._access.check(hello.token, peer_id, group)
            have = from_wire(hello.have, swarm.manifest.pieces)
        except (AccessRefusedError, BitmapError) as error:
            raise LinkRefusedError(str(error)) from error
        if not self._access.allows(claims, swarm.manifest_id):
            raise LinkRefusedError("the right was withdrawn")
        if not self._wins(swarm, peer_id, opened_here=opened_here):
            raise LinkRefusedError("there is a link already")
        old = swarm.links.get(peer_id)
        link = Link(socket, claims, hello, have, opened_here=opened_here)
        swarm.links[peer_id] = link
        if old is not None:
            old.close()
        swarm.choice.linked(peer_id, have)
        swarm.news.linked(peer_id, have, said, asyncio.get_running_loop().time())
        self._tell_in_time(swarm)
        self._events.link_up(swarm, link)
        link.send(encode(self._load()))
        link.ping()
        self._introduce(swarm, link)
        return link

    async def _run(self, swarm: Swarm, link: Link) -> None:
        """Read until the link ends."""
        try:
            loop = asyncio.get_running_loop()
            async for message in link._socket:
                if message.type is not aiohttp.WSMsgType.BINARY:
                    break
                link.heard_at = loop.time()
                self._take(swarm, link, decode(message.data))
        except (FrameError, AccessRefusedError, ConnectionError):
            pass
        finally:
            link.close()
            if swarm.links.get(link.peer_id) is link:
                del swarm.links[link.peer_id]
                swarm.choice.unlinked(link.peer_id)
                swarm.news.unlinked(link.peer_id)
                self._events.link_down(swarm, link.peer_id, reached=True, leaving=link.leaving)

    def _take(self, swarm: Swarm, link: Link, frame: Frame) -> None:
        if isinstance(frame, HaveFrame):
            new = without(have_mask(frame, swarm.manifest.pieces), link.have)
            if new:
                link.have |= new
                swarm.choice.has(link.peer_id, new)
                swarm.news.heard(link.peer_id, new, asyncio.get_running_loop().time())
                self._tell_in_time(swarm)
                self._events.link_have(swarm, link, new)
        elif isinstance(frame, LoadFrame):
            self._events.link_load(swarm, link, frame)
        elif isinstance(frame, PexFrame):
            self._events.link_pex(swarm, link, frame.peers)
        elif isinstance(frame, TokenFrame):
            link.claims = self._access.check(frame.token, link.peer_id, link.group)
        elif isinstance(frame, PingFrame):
            link.send(encode(PongFrame(frame.number)))
        elif isinstance(frame, PongFrame):
            if (seconds := link.pong(frame.number)) is not None:
                self._events.link_latency(swarm, link, seconds)
        elif isinstance(frame, GoneFrame):
            link.leaving = True
            link.close()
        else:
            raise FrameError("a second hello")

    # --- telling --------------------------------------------------------------------------------

    def push_have(self, swarm: Swarm, pieces: Mask) -> None:
        """These are here now: tell every linked peer, when it is worth it."""
        swarm.news.gained(pieces, asyncio.get_running_loop().time())
        self._tell_in_time(swarm)

    def _tell_in_time(self, swarm: Swarm) -> None:
        wake_at = swarm.news.wake_at
        teller = self._tellers.get(swarm)
        if wake_at is None or (teller is not None and teller.when() <= wake_at):
            return
        if teller is not None:
            teller.cancel()
        self._tellers[swarm] = asyncio.get_running_loop().call_at(wake_at, self._tell, swarm)

    def _tell(self, swarm: Swarm) -> None:
        del self._tellers[swarm]
        for pieces, peers in swarm.news.due(asyncio.get_running_loop().time()):
            data = encode(have_frame(pieces, swarm.manifest.pieces))
            for peer_id in peers:
                if (link := swarm.links.get(peer_id)) is not None:
                    link.send(data)
        self._tell_in_time(swarm)

    def push_token(self, group: str) -> None:
        """Our token for the group was renewed."""
        token = self._token(group)
        if token is None:
            return
        data = encode(TokenFrame(token))
        for swarm in self._swarms:
            for link in list(swarm.links.values()):
                if link.group == group:
                    link.send(data)

    def leave(self, swarm: Swarm, reason: str, group: str | None = None) -> None:
        """Say goodbye on the links of a swarm (of one group)."""
        data = encode(GoneFrame(reason[:200]))
        for link in list(swarm.links.values()):
            if group is None or link.group == group:
                link.send(data)
                asyncio.get_running_loop().call_later(FAREWELL_SECONDS / 3, link.close)

    def drop(self, swarm: Swarm, peer_id: str) -> None:
        link = swarm.links.get(peer_id)
        if link is not None:
            link.leaving = True
            link.close()

    def recheck(self) -> None:
        """Close every link whose right is gone, or that ended with its token."""
        for swarm in self._swarms:
            for link in list(swarm.links.values()):
                if (
                    not swarm.offered_to(link.group)
                    or link.peer_id in swarm.banned
                    or not self._access.allows(link.claims, swarm.manifest_id)
                ):
                    link.close()

    def _introduce(self, swarm: Swarm, link: Link) -> None:
        """Peer exchange, soon: a crowd comes all at once, and is introduced all at once."""
        newcomers = self._newcomers.setdefault(swarm, [])
        newcomers.append(link)
        if len(newcomers) == 1:
            asyncio.get_running_loop().call_later(PEX_SECONDS, self._exchange, swarm)

    def _exchange(self, swarm: Swarm) -> None:
        """Who is here, told to each newcomer; and the newcomers, told to some of the others."""
        newcomers = [link for link in self._newcomers.pop(swarm) if swarm.links.get(link.peer_id) is link]
        for group in {link.group for link in newcomers}:
            here = [link for link in swarm.links.values() if link.group == group]
            new = [link for link in newcomers if link.group == group]
            old = [link for link in here if link not in new]
            for link in new:
                others = [other for other in here if other is not link]
                if others:
                    link.send(_pex(swarm, others))
            news = _pex(swarm, new)
            for link in random.sample(old, min(len(old), TOLD_OF_NEWCOMERS_MAX)):
                link.send(news)

    async def _talk(self) -> None:
        while True:
            await asyncio.sleep(TALK_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            self.recheck()
            load = encode(self._load())
            silent_since = asyncio.get_running_loop().time() - SILENT_SECONDS_MAX
            for swarm in self._swarms:
                for link in list(swarm.links.values()):
                    if link.heard_at < silent_since:
                        link.close()
                        continue
                    if link.have != swarm.all:
                        link.send(load)
                    link.ping()


def _pex(swarm: Swarm, links: list[Link]) -> bytes:
    chosen = random.sample(links, min(len(links), PEX_PEERS_MAX))
    return encode(PexFrame([_described(swarm, link) for link in chosen]))


def _described(swarm: Swarm, link: Link) -> PexPeer:
    return PexPeer(link.peer_id, list(link.addresses), link.have == swarm.all)


async def _first(socket: WebSocket) -> Hello:
    message = await socket.receive()
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise LinkRefusedError("no hello")
    try:
        frame = decode(message.data)
    except FrameError as error:
        raise LinkRefusedError(str(error)) from error
    if not isinstance(frame, Hello):
        raise LinkRefusedError("no hello")
    return frame
