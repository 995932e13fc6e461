"""The engine: one peer's parts put together, and the news between them passed on.

Owned here: making and ending the parts, who hears what (links and trackers to downloads, downloads to trackers), and
rates. Left to others: sharing (`sharing.py`), downloads (`getting.py`), everything below.

All of it belongs to one event loop. Hashing and writing of pieces have an executor of their own, so that long jobs
(hashing a share, verifying, syncing) do not hold up pieces.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final
from urllib.parse import urlsplit

from msgspec import structs

from cluster.api import types as t
from cluster.api.certificates import peer_id_of
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError

from . import swarm_events as ev
from .access import Access
from .addresses import advertised
from .bitmap import Mask
from .buffers import BufferPool
from .checking import Checks
from .content import OpenFiles
from .driver import DownloadDriver
from .fetch import Fetcher
from .frames import LoadFrame, PexPeer
from .getting import Getting
from .holding import holding
from .home import Home
from .identity import Identity
from .links import Link, Links
from .pacer import Pacer
from .recent import RecentPieces
from .records import Records
from .reports import Exit, Limits, PeerSettings, TrimaranError
from .server import PieceServer
from .sharing import Sharing
from .swarm import Swarm, Swarms
from .swarm_events import Fault
from .tracker_agent import FactKey, TrackerAgent
from .trouble import not_signed_in

log = logging.getLogger("trimaran.peer")

EXPIRY_SECONDS: Final = 1.0  # between looks for pieces in memory that nobody wants any more
FIND_SECONDS_MIN: Final = 1.0
REPORT_SECONDS_MAX: Final = 2.0
OUTDATED_SECONDS: Final = 3.0  # a report that a peer cannot be reached says nothing of what comes after


class Engine:
    """A running peer. `start` once somebody is signed in; `stop` says goodbye and keeps everything."""

    def __init__(
        self, settings: PeerSettings, home: Home, records: Records, identity: Identity, client: TrackerClient
    ) -> None:
        if identity.sign_in is None:
            raise not_signed_in()
        self.settings = settings
        self.home = home
        self.records = records
        self.identity = identity
        self.user = identity.sign_in.user
        self.peer_id = identity.peer_id
        self.client = client.as_session(identity.sign_in.session)
        self.swarms = Swarms()
        self.files = OpenFiles()
        self.access = Access()
        cores = os.cpu_count() or 1
        self.cores = cores
        # Two more than processors: some wait for the disk.
        self.pieces = ThreadPoolExecutor(cores + 2, thread_name_prefix="pieces")
        self.checks = Checks(self.pieces, jobs_max=cores + 2)
        self.long = ThreadPoolExecutor(cores + 2, thread_name_prefix="long")
        self.pool = BufferPool(settings.memory_bytes)
        self.recent = RecentPieces(self.pool)
        self.down = Pacer()
        tls = None if identity.insecure else identity.client_context
        self.fetcher = Fetcher(tls=tls, identify=None if identity.insecure else peer_id_of)
        self.links = Links(
            peer_id=self.peer_id,
            swarms=self.swarms,
            access=self.access,
            events=self,
            token=lambda group: self.agent.token(group),
            addresses=lambda: self.agent.addresses,
            load=self._load,
            tls=tls,
        )
        self.sharing = Sharing(self)
        self.getting = Getting(self)
        self.server = PieceServer(
            peer_id=self.peer_id,
            swarms=self.swarms,
            access=self.access,
            files=self.files,
            recent=self.recent,
            executor=self.pieces,
            manifest_file=home.manifest_file,
            withdraw=self.sharing.withdraw,
            link=self.links.accept,
        )
        self.agent = TrackerAgent(
            client=self.client,
            identity=identity,
            records=records,
            access=self.access,
            events=self,
            user=self.user,
        )
        self.listen_address = ""
        self._holding = holding()
        self._limits = Limits()
        self._finding: dict[str, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reports: set[asyncio.Task[None]] = set()

    # --- life -----------------------------------------------------------------------------------

    async def start(self, *, resume: bool) -> None:
        """Listen, share what was shared before, and (`resume`) go on with what was unfinished. Raises
        TrimaranError."""
        kept = await asyncio.to_thread(self.records.limits) or Limits()
        said = {each: getattr(self.settings, each) for each in kept.__struct_fields__}
        limits = structs.replace(kept, **{each: value for each, value in said.items() if value})
        limits.check()
        self.set_limits(limits)
        if not self.identity.certified:
            await self._certify_first()
        else:
            # The trackers may not know this peer yet (another cluster's home, a restore): bind it again, soon.
            self.later(self._certify_soon())
        host, _, port = self.settings.listen.rpartition(":")
        try:
            found_host, found_port = await self.server.start(
                host.strip("[]"), int(port or 0), self.identity.server_context()
            )
        except (OSError, ValueError) as error:
            raise TrimaranError(
                f"This peer cannot listen on {self.settings.listen}: {getattr(error, 'strerror', None) or error}.",
                exit_code=Exit.USAGE,
                code="cannot-listen",
                hint="Choose another address with --listen HOST:PORT.",
            ) from error
        shown = f"[{found_host}]" if ":" in found_host else found_host
        self.listen_address = f"{shown}:{found_port}"
        scheme = "http" if self.identity.insecure else "https"
        self.agent.addresses = list(self.settings.advertise) or advertised(
            scheme, found_host, found_port, self._tracker_hosts()
        )
        await self.links.start()
        if self._holding is not None:
            self._holding.begin()
        self.later(self._expire_recent())
        await self.sharing.restore()
        self.later(self.sharing.look_now_and_then())
        await self.agent.start()
        await self.getting.restore(resume=resume)

    async def stop(self) -> None:
        await self.getting.stop()
        if self._reports:  # a get that has ended well may still owe the others a warning
            await asyncio.wait(self._reports, timeout=REPORT_SECONDS_MAX)
        for task in [*self._tasks, *self._reports]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._reports, return_exceptions=True)
        await self.agent.stop(leaving=True)
        await self.links.stop()
        await self.fetcher.close()
        await self.server.stop()
        self.files.close()
        self.pool.clear()
        self.pieces.shutdown(wait=False, cancel_futures=True)
        self.long.shutdown(wait=False, cancel_futures=True)

    def later(self, work: Any) -> None:
        """Run something in the background, ended with the engine."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _certify_first(self) -> None:
        try:
            await self.agent.certify()
        except TrackerError as error:
            raise TrimaranError(
                f"This peer has no certificate yet, and the trackers gave none: {error.message}.",
                exit_code=Exit.CLUSTER_UNAVAILABLE,
                code=error.code,
                hint=error.hint or "Look at the nodes with: trimaran cluster status",
            ) from error

    async def _certify_soon(self) -> None:
        with contextlib.suppress(TrackerError):
            await self.agent.certify()

    def _tracker_hosts(self) -> list[tuple[str, int]]:
        found = []
        for url in self.client.trackers:
            parts = urlsplit(url)
            if parts.hostname:
                found.append((parts.hostname, parts.port or 443))
        return found

    async def _expire_recent(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            self.recent.expire(asyncio.get_running_loop().time())

    @property
    def longest_block_seconds(self) -> float:
        """The longest hold of the event loop since the start; 0 in a loop that does not measure it."""
        return self._holding.longest_seconds if self._holding is not None else 0.0

    # --- rates ----------------------------------------------------------------------------------

    def limits(self) -> Limits:
        return self._limits

    def set_limits(self, limits: Limits) -> None:
        now = asyncio.get_running_loop().time()
        self._limits = limits
        self.server.set_limits(limits.up_bytes_per_second, limits.up_each_bytes_per_second, limits.up_slots)
        self.down.set_rate(limits.down_bytes_per_second, now)
        self.getting.budgets_changed()

    def _load(self) -> LoadFrame:
        said = self.server.queue.declared(asyncio.get_running_loop().time())
        return LoadFrame(said.bytes_per_second, said.sending, said.slots, said.queued)

    # --- news of links (LinkEvents) -------------------------------------------------------------

    def link_up(self, swarm: Swarm, link: Link) -> None:
        if (driver := self.getting.driver_of(swarm)) is not None:
            driver.linked(link.peer_id, link.addresses, link.have, link.user)

    def link_down(self, swarm: Swarm, peer_id: str, *, reached: bool, leaving: bool) -> None:
        self._feed(swarm, ev.LinkDown(peer_id, reached, leaving))

    def link_have(self, swarm: Swarm, link: Link, new: Mask) -> None:
        self._feed(swarm, ev.Have(link.peer_id, new))

    def link_load(self, swarm: Swarm, link: Link, load: LoadFrame) -> None:
        self._feed(swarm, ev.Load(link.peer_id, load.bytes_per_second, load.sending, load.slots, load.queued))

    def link_latency(self, swarm: Swarm, link: Link, seconds: float) -> None:
        self._feed(swarm, ev.LatencyMeasured(link.peer_id, seconds))

    def link_pex(self, swarm: Swarm, link: Link, peers: list[PexPeer]) -> None:
        driver = self.getting.driver_of(swarm)
        if driver is None or driver.group != link.group:
            return
        for peer in peers:
            if peer.peer_id != self.peer_id:
                driver.feed(ev.PeerJoined(peer.peer_id, tuple(peer.addresses), peer.complete))

    def _feed(self, swarm: Swarm, event: ev.Event) -> None:
        if (driver := self.getting.driver_of(swarm)) is not None:
            driver.feed(event)

    # --- news of trackers (TrackerEvents) -------------------------------------------------------

    def swarm_peer(self, group: str, name: str, peer: dict[str, Any]) -> None:
        swarm = self.swarms.get(str(peer.get("manifest_id", "")))
        driver = None if swarm is None else self.getting.driver_of(swarm)
        peer_id, addresses = peer.get("peer_id"), peer.get("addresses")
        if driver is None or driver.group != group or peer_id == self.peer_id:
            return
        if isinstance(peer_id, str) and isinstance(addresses, list):
            driver.feed(
                ev.PeerJoined(peer_id, tuple(str(each) for each in addresses), bool(peer.get("complete")))
            )

    def swarm_peer_left(self, group: str, name: str, peer_id: str, manifest_id: str) -> None:
        for driver in self.getting.drivers():
            if driver.group == group and manifest_id in ("", driver.swarm.manifest_id):
                driver.feed(ev.PeerLeft(peer_id))

    def rights_changed(self) -> None:
        self.server.recheck()
        self.links.recheck()
        self.getting.rights_changed()

    def file_removed(self, group: str, name: str) -> None:
        self.sharing.file_removed(group, name)
        self.getting.file_removed(group, name)

    def token_renewed(self, group: str) -> None:
        self.links.push_token(group)
        for driver in self.getting.drivers():
            if driver.group == group:
                driver.feed(ev.TokenRenewed())

    def token_expired(self, group: str) -> None:
        for driver in self.getting.drivers():
            if driver.group == group:
                driver.feed(ev.TokenExpired())

    def group_lost(self, group: str, reason: str) -> None:
        self.agent.leave_group(group)
        self.sharing.group_lost(group, reason)
        self.getting.group_lost(group, reason)
        self.rights_changed()

    def fact_dropped(self, key: FactKey, reason: str) -> None:
        self.sharing.fact_dropped(key, reason)

    def trackers_away(self) -> None:
        for driver in self.getting.drivers():
            driver.feed(ev.TrackersAway())

    def trackers_back(self) -> None:
        for driver in self.getting.drivers():
            driver.feed(ev.TrackersBack())

    # --- what downloads ask ---------------------------------------------------------------------

    def find_peers(self, driver: DownloadDriver) -> None:
        """Ask a tracker for the swarm as it is now; not more than once a second for each swarm."""
        now = asyncio.get_running_loop().time()
        key = driver.swarm.manifest_id
        at = max(now, self._finding.get(key, float("-inf")) + FIND_SECONDS_MIN)
        if at - now < FIND_SECONDS_MIN:  # else one is waiting already
            self._finding[key] = at
            self.later(self._find_peers(driver, at - now))

    async def _find_peers(self, driver: DownloadDriver, seconds: float) -> None:
        await asyncio.sleep(seconds)
        for name in sorted(driver.swarm.offers.get(driver.group, ())):
            try:
                client = self.client.within(FIND_SECONDS_MIN) if self.agent.away else self.client
                answer = await client.show_swarm(driver.group, name, manifest_id=driver.swarm.manifest_id)
            except TrackerError:
                # Those last heard of may be there, and tell of others.
                known = self.agent.known.peers(driver.group, driver.swarm.manifest_id)
                self.swarm_told(driver, known)
                return
            self.agent.known.swarm(answer.manifest_id, answer.peers)
            self.swarm_told(driver, answer.peers)

    def swarm_told(self, driver: DownloadDriver, peers: Iterable[t.SwarmPeer]) -> None:
        """Feed a tracker's list into a download."""
        for peer in peers:
            if peer.peer_id != self.peer_id and not peer.quarantined:
                driver.feed(ev.PeerJoined(peer.peer_id, tuple(peer.addresses), peer.complete))

    def report(self, driver: DownloadDriver, peer_id: str, fault: Fault) -> None:
        task = asyncio.ensure_future(self._report(driver, peer_id, fault))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _report(self, driver: DownloadDriver, peer_id: str, fault: Fault) -> None:
        for name in sorted(driver.swarm.offers.get(driver.group, ())):
            body = t.ReportBody(
                name=name, manifest_id=driver.swarm.manifest_id, peer_id=peer_id, fault=fault.value
            )
            trackers = self.client if fault is Fault.BAD_PIECE else self.client.within(OUTDATED_SECONDS)
            with contextlib.suppress(TrackerError):
                await trackers.report_peer(driver.group, body)

    def hold(self, swarm: Swarm) -> None:
        """Tell the trackers how much of a swarm is here and offered."""
        if swarm.gone_reason:
            return
        for group, names in swarm.offers.items():
            for name in names:
                self.agent.hold((group, name, swarm.manifest_id), swarm.held_pieces, complete=swarm.complete)
