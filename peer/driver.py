"""The driver of one download: performs what the pure machine (`download.py`) asks for, and tells it what came of it.

Owned here: requests and their buffers, syncing now and then, who contributed what. Left to others: the decisions
(`download.py`), the disk (`store.py`, in threads through `checking.py`), connections (`fetch.py`), links (`links.py`),
what trackers say (`engine.py` feeds it in).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
import orjson
from msgspec import Struct

from cluster.api import types as t

from . import swarm_events as ev
from .bitmap import Mask, to_wire
from .buffers import BufferPool
from .checking import Checks
from .download import Download
from .fetch import Asking, Endpoint, Fetcher
from .line import FetchFault, Head, Reply
from .links import Links
from .pacer import Pacer
from .recent import RecentPieces
from .server import NextBody
from .store import DiskTroubleError, PartStore
from .swarm import Swarm
from .swarm_events import Failure, Fault, WaitReason

log = logging.getLogger("trimaran.peer.download")

TELL_BYTES_SECONDS: Final = 0.1
SYNC_SECONDS: Final = 2.0
SYNC_BYTES: Final = 256 << 20  # early, so that little is left for the end, which waits for it
CHECKS_MAX: Final = (
    6  # pieces being hashed and written; more would only go cold in the caches, and hold memory
)

_FAILURE_OF: Final = {
    "unreachable": Failure.GONE,
    "broken": Failure.GONE,
    "stalled": Failure.STALLED,
    "protocol": Failure.GARBLED,
    "wrong_peer": Failure.GARBLED,
}


class Contribution:
    """What a peer gave to this run."""

    __slots__ = ("bytes", "pieces", "user")

    def __init__(self) -> None:
        self.bytes = 0
        self.pieces = 0
        self.user = ""


class RetryAfter(Struct):
    """The part of a 429's body that counts."""

    retry_after_seconds: float = 1.0


class DownloadDriver:
    """Drives one download until `done` or `stop`. Belongs to the event loop."""

    def __init__(
        self,
        *,
        peer_id: str,
        swarm: Swarm,
        store: PartStore,
        group: str,
        fetcher: Fetcher,
        pool: BufferPool,
        recent: RecentPieces,
        checks: Checks,
        links: Links,
        token: Callable[[str], str | None],
        down: Pacer,
        find_peers: Callable[[DownloadDriver], None],
        report: Callable[[DownloadDriver, str, Fault], None],
        held_changed: Callable[[DownloadDriver], None],
    ) -> None:
        layout = swarm.manifest.layout
        self.swarm = swarm
        self.store = store
        self.group = group
        self.machine = Download(
            peer_id=peer_id,
            pieces=layout.pieces,
            piece_bytes=layout.piece_bytes,
            size_bytes=layout.size_bytes,
            have=swarm.have,
            budget_pieces=max(2, pool.limit_bytes // layout.piece_bytes),
        )
        self.sources: dict[str, Contribution] = {}
        self.received_bytes = 0
        self.trouble: DiskTroubleError | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._piece_bytes = layout.piece_bytes
        self._fetcher = fetcher
        self._pool = pool
        self._recent = recent
        self._checks = checks
        self._links = links
        self._token = token
        self.own_down = Pacer()  # of this download alone
        self._pacers = [down, self.own_down]
        self._find_peers = find_peers
        self._report = report
        self._held_changed = held_changed
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._requests: dict[int, _Request] = {}
        self._held: deque[_Request] = deque()  # until fewer pieces are being checked
        self._checking = 0  # pieces that have arrived
        self._checked = asyncio.Event()
        self._authorized: tuple[str, str] = ("", "")  # a token, and the fields that show it
        self._loop = asyncio.get_running_loop()
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._syncer: asyncio.Task[None] | None = None
        self._stopped = False

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        self._syncer = asyncio.create_task(self._sync_now_and_then())
        for link in self.swarm.links.values():
            self.feed(ev.LinkUp(link.peer_id, link.have))
            self._addresses[link.peer_id] = link.addresses
        self._stir()

    async def stop(self) -> None:
        """End all requests; what was written stays. Waits for jobs that hold a buffer."""
        self._stopped = True
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()
        for request in list(self._requests.values()):
            request.cancel()
        if self._syncer is not None:
            self._syncer.cancel()
            await asyncio.gather(self._syncer, return_exceptions=True)
        while self._checking:
            self._checked.clear()
            await self._checked.wait()

    # --- in and out of the machine --------------------------------------------------------------

    def feed(self, event: ev.Event) -> None:
        if self._stopped:
            return
        if isinstance(event, ev.PeerJoined) and event.addresses:
            self._addresses[event.peer] = event.addresses
        self.machine.feed(event, self._loop.time())
        self._stir()

    def linked(self, peer_id: str, addresses: tuple[str, ...], have: Mask, user: str) -> None:
        if addresses:
            self._addresses[peer_id] = addresses
        self._source(peer_id).user = user
        self.feed(ev.LinkUp(peer_id, have))

    def begin_with(self, seeders: Iterable[t.SwarmPeer]) -> None:
        """These answered a moment ago, and have everything: the first pieces are asked of them while their links are
        opened."""
        for seeder in seeders:
            addresses = tuple(seeder.addresses)
            self.linked(seeder.peer_id, addresses, self.swarm.all, seeder.user)
            self._links.open(self.swarm, self.group, Endpoint(seeder.peer_id, addresses))

    @property
    def waiting(self) -> WaitReason | None:
        return self.machine.waiting

    def bytes_per_second(self) -> float:
        return self.machine.bytes_per_second(self._loop.time())

    def _source(self, peer_id: str) -> Contribution:
        return self.sources.setdefault(peer_id, Contribution())

    def _stir(self) -> None:
        if self._soon is None and not self._stopped:
            self._soon = self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._soon = None
        if self._stopped:
            return
        for action in self.machine.actions(self._loop.time()):
            self._perform(action)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.machine.wake_at is not None:
            self._timer = self._loop.call_at(self.machine.wake_at, self._step_by_time)

    def _step_by_time(self) -> None:
        self._timer = None
        self._stir()

    def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.RequestPiece() | ev.RequestNext():
                self._request(action)
            case ev.CancelRequest():
                if (request := self._requests.get(action.request)) is not None:
                    request.cancel()
            case ev.PushHave():
                self._links.push_have(self.swarm, action.pieces)
                self._held_changed(self)
            case ev.Connect():
                self._links.open(self.swarm, self.group, Endpoint(action.peer, action.addresses))
            case ev.DropPeer():
                if action.banned:
                    self.swarm.banned.add(action.peer)
                self._links.drop(self.swarm, action.peer)
                self._fetcher.drop(action.peer)
                log.info("left peer %s: %s", action.peer, action.reason)
            case ev.ReportPeer():
                self._report(self, action.peer, action.fault)
            case ev.FindPeers():
                self._find_peers(self)
            case ev.Done():
                if not self.done.done():
                    self.done.set_result(None)
            case ev.Waiting() | ev.Moving():
                pass  # `waiting` is read when somebody asks

    # --- one request ----------------------------------------------------------------------------

    def _request(self, action: ev.RequestPiece | ev.RequestNext) -> None:
        request = self._requests[action.request] = _Request(self, action)
        if self._checking < CHECKS_MAX:
            self._give_buffer(request)
        else:
            self._held.append(request)

    def _give_buffer(self, request: _Request) -> None:
        if (buffer := self._pool.take_now(self._piece_bytes)) is not None:
            request.ask(buffer)
        else:
            request.waiting = asyncio.create_task(self._when_there_is_room(request))

    async def _when_there_is_room(self, request: _Request) -> None:
        buffer = await self._pool.acquire(self._piece_bytes)
        request.waiting = None
        request.ask(buffer)

    def _arrived(self, number: int, peer: str, index: int, buffer: memoryview) -> None:
        """From here on the piece is ours, whatever becomes of the request."""
        self.feed(ev.PieceArrived(number))
        piece = buffer[: self.swarm.manifest.layout.piece_length(index)]

        def checked(end: bool | Exception) -> None:
            self._checking -= 1
            self._checked.set()
            while self._held and self._checking < CHECKS_MAX and not self._stopped:
                self._give_buffer(self._held.popleft())
            if end is True and self.swarm.wanted_by_others:
                self._recent.keep(self.swarm.manifest_id, index, buffer, len(piece), self._loop.time())
            else:
                self._pool.give(buffer)
            if end is True:
                self._gained(number, peer, index, len(piece))
            elif end is False:
                log.warning("peer %s sent a wrong piece %d of %s", peer, index, self.swarm.manifest_id)
                self.feed(ev.PieceWrong(number))
            else:
                self._not_written(number, end)

        self._checking += 1
        self._checks.add(self.store, index, piece, checked)

    def _gained(self, number: int, peer: str, index: int, length: int) -> None:
        self.received_bytes += length
        source = self._source(peer)
        source.bytes += length
        source.pieces += 1
        self.swarm.gained(1 << index)
        self.feed(ev.PieceVerified(number, index))

    def _not_written(self, number: int, error: Exception) -> None:
        if isinstance(error, DiskTroubleError):
            self.trouble = error
        self.feed(ev.PieceFailed(number, Failure.LOCAL))
        if not self.done.done():
            self.done.set_exception(error)

    def _request_bytes(self, action: ev.RequestPiece | ev.RequestNext, token: str) -> bytes:
        if self._authorized[0] != token:
            self._authorized = token, f"HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {token}\r\n"
        fields = self._authorized[1]
        swarm = self.swarm.manifest_id
        if isinstance(action, ev.RequestPiece):
            return f"GET /v1/swarms/{swarm}/pieces/{action.index} {fields}\r\n".encode()
        body = msgspec.msgpack.encode(NextBody(to_wire(action.want, self.swarm.manifest.layout.pieces)))
        head = f"POST /v1/swarms/{swarm}/next {fields}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def _sync_now_and_then(self) -> None:
        """Bound what a power failure costs. The end of the download syncs whatever is left."""
        synced_bytes = 0
        waited = 0.0
        while True:
            await asyncio.sleep(0.25)
            waited += 0.25
            new = self.received_bytes - synced_bytes
            if not new or (new < SYNC_BYTES and waited < SYNC_SECONDS):
                continue
            synced_bytes, waited = self.received_bytes, 0.0
            try:
                await asyncio.to_thread(self.store.sync)
            except OSError as error:
                trouble = DiskTroubleError(f"syncing failed: {error.strerror}", full=False)
                if not self.done.done():
                    self.done.set_exception(trouble)
                return


class _Request:
    """One request of the machine's, from its buffer to its answer. `cancel` ends it without a word."""

    __slots__ = ("_action", "_asking", "_buffer", "_driver", "_index", "_told_at", "_untold", "waiting")

    def __init__(self, driver: DownloadDriver, action: ev.RequestPiece | ev.RequestNext) -> None:
        self.waiting: asyncio.Task[None] | None = None  # for room
        self._driver = driver
        self._action = action
        self._asking: Asking | None = None
        self._buffer: memoryview | None = None
        self._index = -1  # of the piece that is coming
        self._told_at = 0.0
        self._untold = 0

    def ask(self, buffer: memoryview) -> None:
        driver, action = self._driver, self._action
        self._buffer = buffer
        token = driver._token(driver.group)
        if token is None:
            self._failed(Failure.REFUSED)
            return
        self._asking = driver._fetcher.begin(
            Endpoint(action.peer, driver._addresses.get(action.peer, ())),
            driver._request_bytes(action, token),
            self._landing,
            self._ended,
            on_bytes=self._on_bytes,
            pacers=driver._pacers,
        )

    def cancel(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
        if self in self._driver._held:
            self._driver._held.remove(self)
        if self._asking is not None:
            self._asking.cancel()
        self._over()

    def _over(self) -> None:
        driver = self._driver
        driver._requests.pop(self._action.request, None)
        if self._buffer is not None:
            driver._pool.give(self._buffer)
            self._buffer = None

    def _landing(self, head: Head) -> memoryview:
        driver, action = self._driver, self._action
        layout = driver.swarm.manifest.layout
        found = head.piece if head.piece is not None else -1
        if isinstance(action, ev.RequestPiece):
            if found != action.index:
                raise FetchFault("protocol", "another piece than was asked for")
        elif found < 0 or found >= layout.pieces or not action.want >> found & 1:
            raise FetchFault("protocol", "a piece that was not wanted")
        if head.status != 200 or head.length != layout.piece_length(found):
            raise FetchFault("protocol", "not the length of that piece")
        assert self._buffer is not None
        self._index = found
        self._told_at = driver._loop.time()
        driver.feed(ev.PieceStarted(action.request, found))
        return self._buffer[: head.length]

    def _on_bytes(self, count: int) -> None:
        self._untold += count
        now = self._driver._loop.time()
        if self._index >= 0 and now - self._told_at >= TELL_BYTES_SECONDS:
            self._told_at, self._untold, tell = now, 0, self._untold
            self._driver.feed(ev.BytesArrived(self._action.request, tell))

    def _ended(self, end: Reply | FetchFault) -> None:
        if isinstance(end, FetchFault):
            self._failed(_FAILURE_OF[end.kind])
        elif end.head.status != 200:
            self._failed(*_failure_of(end))
        else:
            buffer, self._buffer = self._buffer, None
            assert buffer is not None
            self._over()
            self._driver._arrived(self._action.request, self._action.peer, self._index, buffer)

    def _failed(self, failure: Failure, retry_after_seconds: float = 0.0) -> None:
        self._over()
        self._driver.feed(ev.PieceFailed(self._action.request, failure, retry_after_seconds))


def _failure_of(reply: Reply) -> tuple[Failure, float]:
    match reply.head.status:
        case 204:
            return Failure.NOTHING_TO_CHOOSE, 0.0
        case 401 | 403:
            return Failure.REFUSED, 0.0
        case 404:
            return Failure.NOT_HELD, 0.0
        case 410:
            return Failure.WITHDRAWN, 0.0
        case 429 | 503:
            try:
                said = msgspec.convert(orjson.loads(reply.body), RetryAfter)
                seconds = said.retry_after_seconds
            except (orjson.JSONDecodeError, msgspec.ValidationError):
                seconds = reply.head.retry_after_seconds or 1.0
            return Failure.BUSY, min(max(seconds, 0.01), 60.0)
        case _:
            return Failure.GARBLED, 0.0
