"""The driver of one download: performs what the pure machine (`download.py`) asks for, and tells it what came of it.

Owned here: requests and their buffers, checking and writing in the executor, syncing now and then, who contributed
what. Left to others: the decisions (`download.py`), the disk (`store.py`), connections (`fetch.py`), links
(`links.py`), what trackers say (`engine.py` feeds it in).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

import msgspec
import orjson
from msgspec import Struct

from . import swarm_events as ev
from .bitmap import Mask, to_wire
from .download import Download
from .fetch import BufferPool, Endpoint, Fetcher, FetchFault, Head, Reply
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


class _Unexpected(FetchFault):
    """The answer's head is not one that this request can have."""

    def __init__(self, message: str) -> None:
        super().__init__("protocol", message)


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
        executor: Executor,
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
        self._executor = executor
        self._links = links
        self._token = token
        self.own_down = Pacer()  # of this download alone
        self._pacers = [down, self.own_down]
        self._find_peers = find_peers
        self._report = report
        self._held_changed = held_changed
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._jobs: set[asyncio.Task[None]] = set()
        self._checked = asyncio.Event()
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
        tasks = list(self._requests.values())
        if self._syncer is not None:
            tasks.append(self._syncer)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._jobs, return_exceptions=True)

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
                task = asyncio.create_task(self._request(action))
                self._requests[action.request] = task
                task.add_done_callback(lambda _: self._requests.pop(action.request, None))
            case ev.CancelRequest():
                if (request := self._requests.pop(action.request, None)) is not None:
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

    async def _request(self, action: ev.RequestPiece | ev.RequestNext) -> None:
        number = action.request
        while len(self._jobs) >= CHECKS_MAX:
            self._checked.clear()
            await self._checked.wait()
        buffer = await self._pool.acquire(self._piece_bytes)
        arrived = -1
        try:
            token = self._token(self.group)
            if token is None:
                self.feed(ev.PieceFailed(number, Failure.REFUSED))
                return
            arrived = await self._fetch(action, token, buffer)
        finally:
            if arrived < 0:
                self._pool.give(buffer)
        if arrived < 0:
            return
        # From here on the piece is ours whatever becomes of the request: a cancelled check would leave the buffer
        # in use by the executor.
        self.feed(ev.PieceArrived(number))
        job = asyncio.create_task(self._commit(number, action.peer, arrived, buffer))
        self._jobs.add(job)
        job.add_done_callback(self._job_ended)

    def _job_ended(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        self._checked.set()

    async def _fetch(self, action: ev.RequestPiece | ev.RequestNext, token: str, buffer: memoryview) -> int:
        """The index of the piece that is now in the buffer, or -1 after telling the machine why not."""
        number, peer = action.request, action.peer
        layout = self.swarm.manifest.layout
        index = -1
        told_at = 0.0
        untold = 0

        def landing(head: Head) -> memoryview:
            nonlocal index, told_at
            found = head.piece if head.piece is not None else -1
            if isinstance(action, ev.RequestPiece):
                if found != action.index:
                    raise _Unexpected("another piece than was asked for")
            elif found < 0 or found >= layout.pieces or not action.want >> found & 1:
                raise _Unexpected("a piece that was not wanted")
            if head.status != 200 or head.length != layout.piece_length(found):
                raise _Unexpected("not the length of that piece")
            index = found
            told_at = self._loop.time()
            self.feed(ev.PieceStarted(number, found))
            return buffer[: head.length]

        def on_bytes(count: int) -> None:
            nonlocal told_at, untold
            untold += count
            now = self._loop.time()
            if index >= 0 and now - told_at >= TELL_BYTES_SECONDS:
                told_at, untold, tell = now, 0, untold
                self.feed(ev.BytesArrived(number, tell))

        endpoint = Endpoint(peer, self._addresses.get(peer, ()))
        try:
            reply = await self._fetcher.ask(
                endpoint,
                _request_bytes(self.swarm.manifest_id, action, layout.pieces, token),
                landing,
                on_bytes=on_bytes,
                pacers=self._pacers,
            )
        except FetchFault as fault:
            self.feed(ev.PieceFailed(number, _FAILURE_OF[fault.kind]))
            return -1
        if reply.head.status == 200:
            return index
        self.feed(ev.PieceFailed(number, *_failure_of(reply)))
        return -1

    async def _commit(self, number: int, peer: str, index: int, buffer: memoryview) -> None:
        length = self.swarm.manifest.layout.piece_length(index)
        right = False
        try:
            right = await self._loop.run_in_executor(
                self._executor, self.store.check_and_write, index, buffer[:length]
            )
        except DiskTroubleError as trouble:
            self.trouble = trouble
            self.feed(ev.PieceFailed(number, Failure.LOCAL))
            if not self.done.done():
                self.done.set_exception(trouble)
            return
        finally:
            if right and self.swarm.wanted_by_others:
                self._recent.keep(self.swarm.manifest_id, index, buffer, length, self._loop.time())
            else:
                self._pool.give(buffer)
        if not right:
            log.warning("peer %s sent a wrong piece %d of %s", peer, index, self.swarm.manifest_id)
            self.feed(ev.PieceWrong(number))
            return
        self.received_bytes += length
        source = self._source(peer)
        source.bytes += length
        source.pieces += 1
        self.swarm.gained(1 << index)
        self.feed(ev.PieceVerified(number, index))

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


def _request_bytes(
    manifest_id: str, action: ev.RequestPiece | ev.RequestNext, pieces: int, token: str
) -> bytes:
    auth = f"Host: peer\r\nAuthorization: Bearer {token}\r\n"
    if isinstance(action, ev.RequestPiece):
        return f"GET /v1/swarms/{manifest_id}/pieces/{action.index} HTTP/1.1\r\n{auth}\r\n".encode()
    body = msgspec.msgpack.encode(NextBody(to_wire(action.want, pieces)))
    head = f"POST /v1/swarms/{manifest_id}/next HTTP/1.1\r\n{auth}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


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
