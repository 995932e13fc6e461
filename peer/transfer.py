"""The course of one download, from its part to the whole file under its name.

Owned here: a download's state, taking up or making its part, copying what this peer has already, driving the swarm, the
end, what went wrong, and its record. Left to others: the verbs (`getting.py`), which piece from whom (`download.py`, driven by `driver.py`),
the disk (`store.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from . import swarm_events as ev
from .bitmap import from_wire, mask_of
from .content import Content
from .driver import DownloadDriver
from .manifest import Manifest
from .manifests import Found
from .records import Record
from .reports import Exit, State, TrimaranError
from .reuse import Here, copy_what_is_here
from .store import DiskTroubleError, PartStore, no_space, remove_part
from .swarm import Swarm
from .telling import held_bytes
from .tracker_agent import FactKey

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("trimaran.peer.transfer")


class Transfer:
    """One download: running, waiting its turn, or at rest."""

    def __init__(self, record: Record, manifest: Manifest) -> None:
        self.record = record
        self.manifest = manifest
        self.kept: Record | None = None  # as the home has it
        self.state = record.state
        self.reason = record.reason
        self.store: PartStore | None = None
        self.driver: DownloadDriver | None = None
        self.task: asyncio.Task[None] | None = None
        self.down_bytes_per_second = 0
        self.reused_bytes = 0  # here before this run, or copied
        self.held = 0  # mask of what is here, for telling
        self.error: TrimaranError | None = None
        self.followers = 0  # commands that wait for its end
        self.found: Found | None = None  # as it was begun: who had it a moment ago

    @property
    def key(self) -> FactKey:
        return self.record.key

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def rests(self) -> bool:
        """It does not run, and does not go on by itself."""
        return not self.running and self.state is not State.VERIFYING

    def done_bytes(self) -> int:
        layout = self.manifest.layout
        if self.driver is not None:
            self.held = self.driver.machine.have
        return held_bytes(self.held, layout.pieces, layout.piece_bytes, layout.size_bytes)


class Course:
    """What happens to each download in turn. `driving` is told when a swarm begins or ceases to be driven; `whole` when
    a download is complete."""

    def __init__(
        self, engine: Engine, *, driving: Callable[[], None], whole: Callable[[Transfer], None]
    ) -> None:
        self._engine = engine
        self._driving = driving
        self._whole = whole

    async def run(self, transfer: Transfer) -> None:
        """Until it is complete, or cannot be: then `transfer.error` says why."""
        transfer.state = State.DOWNLOADING
        try:
            await self.remember(transfer)
            await self._take(transfer)
        except DiskTroubleError as trouble:
            await self._failed(transfer, _disk_error(transfer, trouble), str(trouble))
        except TrimaranError as error:
            await self._failed(transfer, error, error.message)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            met = DiskTroubleError(f"{error.filename or transfer.record.path}: {error.strerror}", full=full)
            await self._failed(transfer, _disk_error(transfer, met), str(met))
        except Exception as error:
            # A defect. Whoever waits must hear of it, and `ps` must not call it a running download for ever.
            log.exception("the download of %s/%s failed", transfer.record.group, transfer.record.name)
            reason = f"something unexpected happened ({type(error).__name__})"
            told = TrimaranError(
                f"{transfer.record.group}/{transfer.record.name}: {reason}.",
                exit_code=Exit.UNEXPECTED,
                code="unexpected",
                hint=f"The details are in {self._engine.home.folder / 'peer.log'}; what was fetched is kept.",
            )
            await self._failed(transfer, told, reason)

    async def _failed(self, transfer: Transfer, error: TrimaranError, reason: str) -> None:
        transfer.error = error
        transfer.state, transfer.reason = State.FAILED, reason
        await self.remember(transfer)

    async def _take(self, transfer: Transfer) -> None:
        engine, manifest = self._engine, transfer.manifest
        store = await self.store(transfer)
        layout = manifest.layout
        swarm = engine.swarms.get(manifest.id)
        held = from_wire(bytes(store.map.held), layout.pieces)
        if swarm is None or swarm.gone_reason:
            swarm = Swarm(engine.peer_id, manifest, store.content, held)
            engine.swarms.add(swarm)
        own = swarm.content is store.content
        swarm.offers.setdefault(transfer.record.group, set()).add(transfer.record.name)
        engine.agent.take_part(transfer.record.group)
        if own:
            engine.hold(swarm)
        try:
            held |= await self._copy(transfer, store, swarm)
            transfer.held = held
            if own:
                swarm.gained(held)
            transfer.reused_bytes = transfer.done_bytes()
            if held != swarm.all:
                if not own:
                    # Another download of the same content runs here: what it brings is copied, not fetched twice.
                    await self._after_the_other(transfer, store, swarm)
                else:
                    await self._drive(transfer, store, swarm)
            await self._finish(transfer, store, swarm)
        finally:
            if transfer.driver is not None:
                await transfer.driver.stop()
            if transfer.state is not State.COMPLETE:
                self._unoffer(transfer, swarm, store)

    async def _drive(self, transfer: Transfer, store: PartStore, swarm: Swarm) -> None:
        engine = self._engine
        driver = transfer.driver = DownloadDriver(
            peer_id=engine.peer_id,
            swarm=swarm,
            store=store,
            group=transfer.record.group,
            fetcher=engine.fetcher,
            pool=engine.pool,
            recent=engine.recent,
            checks=engine.checks,
            links=engine.links,
            token=engine.agent.token,
            down=engine.down,
            find_peers=engine.find_peers,
            report=engine.report,
            held_changed=lambda changed: engine.hold(changed.swarm),
        )
        driver.own_down.set_rate(transfer.down_bytes_per_second, asyncio.get_running_loop().time())
        if engine.agent.away:
            driver.feed(ev.TrackersAway())
        driver.start()
        self._driving()
        if transfer.found is not None:
            driver.begin_with(transfer.found.seeders_that_answered())
            engine.swarm_told(driver, transfer.found.peers)
            transfer.found = None
        engine.find_peers(driver)
        try:
            await driver.done
        finally:
            transfer.held = driver.machine.have
            self._driving()

    async def store(self, transfer: Transfer) -> PartStore:
        """The part, taken up where it was left; a new one when there is nothing left of it."""
        if transfer.store is not None:
            return transfer.store
        engine, record = self._engine, transfer.record
        loop = asyncio.get_running_loop()
        store = await loop.run_in_executor(
            engine.long,
            PartStore.resume,
            transfer.manifest,
            Path(record.part),
            Path(record.path),
            Path(record.map),
        )
        if store is None:
            log.warning("what was fetched of %s/%s is gone; it begins anew", record.group, record.name)
            Path(record.map).unlink(missing_ok=True)
            await loop.run_in_executor(engine.long, remove_part, Path(record.part))
            store = await loop.run_in_executor(
                engine.long, PartStore.create, transfer.manifest, Path(record.path), engine.home.maps
            )
            transfer.record = msgspec.structs.replace(record, part=str(store.part), map=str(store.map.path))
            await self.remember(transfer)
        transfer.store = store
        return store

    async def _copy(self, transfer: Transfer, store: PartStore, swarm: Swarm) -> int:
        """Copy what is in this peer's other shares. Returns the mask of what was found."""
        here: list[Here] = []
        for record in self._engine.sharing.records.values():
            other = self._engine.swarms.get(record.manifest_id)
            if record.state is State.COMPLETE and other is not None and other.content is not store.content:
                version = (record.group, record.name) == (transfer.record.group, transfer.record.name)
                here.append(Here(other.manifest, other.content, version=version))
        if not here or not transfer.manifest.pieces:
            return 0
        found: list[int] = []
        stopped = False

        def stop() -> bool:
            return stopped

        try:
            await asyncio.get_running_loop().run_in_executor(
                self._engine.long, copy_what_is_here, store, here, found.append, stop
            )
        finally:
            stopped = True
        return mask_of(found)

    async def _after_the_other(self, transfer: Transfer, store: PartStore, swarm: Swarm) -> None:
        while not swarm.complete:
            if swarm.gone_reason or self._engine.swarms.get(swarm.manifest_id) is not swarm:
                raise TrimaranError(
                    "The other download of the same content ended early.",
                    exit_code=Exit.UNFINISHED,
                    code="unfinished",
                    hint="Get it again to go on.",
                )
            await asyncio.sleep(0.2)
        here = [Here(swarm.manifest, swarm.content, version=False)]
        await asyncio.get_running_loop().run_in_executor(
            self._engine.long, copy_what_is_here, store, here, lambda _: None, lambda: False
        )
        transfer.held = from_wire(bytes(store.map.held), transfer.manifest.pieces)
        if transfer.held != swarm.all:
            raise TrimaranError(
                "The copy on this peer could not be read.",
                exit_code=Exit.UNFINISHED,
                code="unfinished",
                hint="Get it again: what is missing comes from other peers.",
            )

    async def _finish(self, transfer: Transfer, store: PartStore, swarm: Swarm) -> None:
        """Everything is here: under its name with it, and offered as a share from now on."""
        engine = self._engine
        prints = await asyncio.get_running_loop().run_in_executor(engine.long, store.finish)
        record = msgspec.structs.replace(transfer.record, state=State.COMPLETE, reason="", part="", map="")
        # A kill before this leaves a record whose part is gone and whose target is whole, which the next start
        # notices (`_came_through`).
        await engine.sharing.keep_whole(record, prints)
        if swarm.content is store.content:
            engine.files.forget(store.content)
            swarm.content = Content(Path(record.path), transfer.manifest.layout, prints)
        transfer.record, transfer.state, transfer.reason = record, State.COMPLETE, ""
        self._whole(transfer)
        store.map.remove()
        store.close()
        transfer.store = None
        content = Content(Path(record.path), transfer.manifest.layout, prints)
        engine.sharing.offer(record, transfer.manifest, content)

    def _unoffer(self, transfer: Transfer, swarm: Swarm, store: PartStore) -> None:
        engine = self._engine
        engine.agent.release(transfer.key)
        if swarm.content is store.content:
            engine.links.leave(swarm, "paused")
            engine.files.forget(store.content)
            engine.swarms.remove(swarm.manifest_id)
            swarm.offers.clear()
            engine.server.recheck()

    async def remember(self, transfer: Transfer) -> None:
        record = msgspec.structs.replace(transfer.record, state=transfer.state, reason=transfer.reason)
        if record is not transfer.kept and record != transfer.kept:
            await asyncio.to_thread(self._engine.records.put, record)
        transfer.record = transfer.kept = record


def _disk_error(transfer: Transfer, trouble: DiskTroubleError) -> TrimaranError:
    if trouble.full:
        return no_space(Path(transfer.record.path), transfer.record.size_bytes - transfer.done_bytes())
    return TrimaranError(
        f"The disk does not take {transfer.record.group}/{transfer.record.name}: {trouble}.",
        exit_code=Exit.UNFINISHED,
        code="disk-trouble",
        hint="What was fetched is kept. Get it again when the disk works.",
    )
