"""Downloads: which there are, the verbs on them, and who waits for them, through every interruption.

Owned here: the downloads of an engine that are not complete, starting, stopping and following them. Left to others: how one
begins (`beginning.py`), its course (`transfer.py`), how it is told of (`telling.py`), what is offered when it is
whole (`sharing.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cluster.api import types as t

from . import swarm_events as ev
from .beginning import Beginning, target_of
from .bitmap import from_wire
from .content import Content
from .driver import DownloadDriver
from .hashing import sha256_of
from .records import Record
from .reports import Exit, GetReport, OnProgress, PsRow, State, TrimaranError
from .store import PartStore, prints_of, wrong_pieces
from .swarm import Swarm
from .telling import progress_of, row_of_share, row_of_transfer, sources
from .tracker_agent import FactKey
from .transfer import Course, Transfer
from .trouble import in_quarantine

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("trimaran.peer.getting")

ACTIVE_MAX: Final = 8
PROGRESS_SECONDS: Final = 0.2
ALONE_SECONDS: Final = 60.0  # a `get` in the foreground that finds nobody at all ends after so long


class Getting:
    """All downloads of an engine that are not complete."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.transfers: dict[FactKey, Transfer] = {}
        self._turns = asyncio.Semaphore(ACTIVE_MAX)
        self._beginnings: dict[tuple[str, str], asyncio.Lock] = {}
        self._course = Course(engine, driving=self.budgets_changed, whole=self._forget)
        self._beginning = Beginning(engine, self._course)

    def _forget(self, transfer: Transfer) -> None:
        self.transfers.pop(transfer.key, None)

    # --- who runs -------------------------------------------------------------------------------

    def drivers(self) -> Iterator[DownloadDriver]:
        for transfer in list(self.transfers.values()):
            if transfer.driver is not None and transfer.running:
                yield transfer.driver

    def driver_of(self, swarm: Swarm) -> DownloadDriver | None:
        return next((driver for driver in self.drivers() if driver.swarm is swarm), None)

    def budgets_changed(self) -> None:
        """Share the memory and the rate among what runs."""
        running = list(self.drivers())
        rate = self._engine.down.bytes_per_second
        if not running:
            self._engine.pool.clear()  # a peer that only shares needs no buffers
        for driver in running:
            piece_bytes = driver.swarm.manifest.layout.piece_bytes
            pieces = max(2, self._engine.pool.limit_bytes // piece_bytes // len(running))
            limits = [each for each in (rate / len(running), driver.own_down.bytes_per_second) if each]
            driver.feed(ev.Budget(pieces, min(limits, default=0.0)))

    # --- get ------------------------------------------------------------------------------------

    async def get(
        self,
        group: str,
        name: str,
        target_folder: Path,
        *,
        down_bytes_per_second: int,
        checksum: bool,
        on_progress: OnProgress,
        foreground: bool,
    ) -> GetReport:
        """See `PeerSession.get`."""
        began = asyncio.get_running_loop().time()
        target = target_of(target_folder, name)
        file = await self._beginning.facts(group, name, begun=self._begun(group, name, None) is not None)
        patience_seconds = ALONE_SECONDS if foreground else None
        begun: Transfer | Record | None = self._begun(group, name, file)
        if begun is None:
            if file is None:
                raise _unavailable()
            begun = await self._begin(
                file, target, on_progress, checksum=checksum, patience_seconds=patience_seconds
            )
        if isinstance(begun, Record):
            return await self._report(begun, None, began, checksum=checksum)
        if not _same_place(Path(begun.record.path), target):
            raise _elsewhere(begun)
        begun.down_bytes_per_second = down_bytes_per_second
        self.run(begun)
        await self._follow(begun, on_progress, patience_seconds=patience_seconds)
        return await self._report(begun.record, begun, began, checksum=checksum)

    async def _begin(
        self,
        file: t.FileView,
        target: Path,
        on_progress: OnProgress,
        *,
        checksum: bool,
        patience_seconds: float | None,
    ) -> Transfer | Record:
        """A new download, one that somebody else began meanwhile, or the record of what is whole already."""
        beginning = self._beginning
        whole = await beginning.whole_already(file, target)
        if whole is not None:
            return whole
        found = await beginning.manifest(file, on_progress, patience_seconds=patience_seconds)
        manifest = found.manifest
        async with self._beginnings.setdefault((file.group, file.name), asyncio.Lock()):
            begun = self._begun(file.group, file.name, file)
            if begun is not None:
                return begun
            whole = await beginning.there_already(file, manifest, target)
            if whole is not None:
                return whole
            transfer = await beginning.part(file, manifest, target, checksum=checksum)
            transfer.found = found
            self.transfers[transfer.key] = transfer
            return transfer

    def _begun(self, group: str, name: str, file: t.FileView | None) -> Transfer | None:
        for transfer in self.transfers.values():
            record = transfer.record
            if (record.group, record.name) == (group, name) and (
                file is None or record.manifest_id == file.manifest_id
            ):
                return transfer
        return None

    async def _follow(
        self, transfer: Transfer, on_progress: OnProgress, *, patience_seconds: float | None
    ) -> None:
        """Wait for the end of a download, telling of it. Raises TrimaranError."""
        loop = asyncio.get_running_loop()
        moved_at, before = loop.time(), -1
        transfer.followers += 1
        try:
            while not transfer.rests:
                if transfer.task is not None and not transfer.task.done():
                    await asyncio.wait({transfer.task}, timeout=PROGRESS_SECONDS)
                else:
                    await asyncio.sleep(PROGRESS_SECONDS)  # it is verified, and goes on then
                told = progress_of(transfer)
                on_progress(told)
                if told.done_bytes != before or told.peers or self._engine.agent.away:
                    moved_at, before = loop.time(), told.done_bytes
                elif patience_seconds is not None and loop.time() - moved_at > patience_seconds:
                    await self._stop(transfer, State.WAITING, "no peer of this file can be reached")
        finally:
            transfer.followers -= 1
        if transfer.error is not None:
            raise transfer.error
        if transfer.state is not State.COMPLETE:
            raise _unfinished(transfer)

    async def _report(
        self, record: Record, transfer: Transfer | None, began: float, *, checksum: bool
    ) -> GetReport:
        loop = asyncio.get_running_loop()
        driver = transfer.driver if transfer is not None else None
        received = driver.received_bytes if driver is not None else 0
        digest = None
        if checksum and record.kind == "file":
            digest = await loop.run_in_executor(self._engine.long, sha256_of, Path(record.path))
        report = GetReport(
            path=record.path,
            size_bytes=record.size_bytes,
            manifest_id=record.manifest_id,
            verified=True,
            seconds=round(loop.time() - began, 6),
            received_bytes=received,
            reused_bytes=record.size_bytes - received,
            sources=sources(driver.sources) if driver is not None else [],
            sha256=digest,
        )
        if transfer is not None:
            transfer.driver = None
        return report

    # --- the course of one download -------------------------------------------------------------

    def run(self, transfer: Transfer) -> None:
        """Start it, or start it again."""
        if not transfer.running:
            transfer.error = None
            transfer.driver = None
            transfer.task = asyncio.create_task(self._run(transfer))

    async def _run(self, transfer: Transfer) -> None:
        transfer.state, transfer.reason = State.QUEUED, ""
        async with self._turns:
            await self._course.run(transfer)

    # --- after a start --------------------------------------------------------------------------

    async def restore(self, *, resume: bool) -> None:
        """Take up what was unfinished when the home was last used; `resume`: and go on with it."""
        engine = self._engine
        for record in await asyncio.to_thread(engine.records.all):
            if record.user != engine.user or not record.part:
                continue
            manifest = await engine.sharing.load_manifest(record.manifest_id)
            if manifest is None:
                log.warning("the manifest of %s/%s is gone; get it again", record.group, record.name)
                await asyncio.to_thread(engine.records.delete, record)
                continue
            if await self._beginning.came_through(record, manifest):
                continue
            self.transfers[record.key] = Transfer(record, manifest)
            engine.agent.take_part(record.group)
        if resume:
            await self.resume_all()

    async def resume_all(self) -> None:
        """Go on with everything that nobody paused."""
        for transfer in list(self.transfers.values()):
            if transfer.state is not State.PAUSED:
                self.run(transfer)

    # --- verbs ----------------------------------------------------------------------------------

    def _find(self, group: str, name: str) -> Transfer:
        for transfer in self.transfers.values():
            if (transfer.record.group, transfer.record.name) == (group, name):
                return transfer
        complete = bool(self._engine.sharing.find(group, name))
        raise TrimaranError(
            f"{group}/{name} is complete." if complete else f"This peer has no download {group}/{name}.",
            exit_code=Exit.CONFLICT if complete else Exit.NOT_FOUND,
            code="complete" if complete else "not-downloading",
            hint="See what it has with: trimaran ps",
        )

    async def _stop(self, transfer: Transfer, state: State, reason: str) -> None:
        """Its end is told as `state` and `reason` to those who follow it, unless it is complete before."""
        transfer.state, transfer.reason = state, reason
        task = transfer.task
        if task is not None and not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if transfer.state is State.COMPLETE:
            return
        if transfer.store is not None:
            store, transfer.store = transfer.store, None
            await asyncio.to_thread(_sync_and_close, store)
        transfer.state, transfer.reason = state, reason
        await self._course.remember(transfer)

    async def pause(self, group: str, name: str) -> None:
        await self._stop(self._find(group, name), State.PAUSED, "")

    async def resume(self, group: str, name: str) -> None:
        self.run(self._find(group, name))

    async def interrupt(self, group: str, name: str) -> None:
        """Whoever waited for it does not any more: when nobody does, it rests until somebody gets or resumes it."""
        for transfer in list(self.transfers.values()):
            if (transfer.record.group, transfer.record.name) == (group, name) and not transfer.followers:
                await self._stop(transfer, State.PAUSED, "interrupted")

    async def cancel(self, group: str, name: str) -> None:
        transfer = self._find(group, name)
        transfer.error = _cancelled(transfer)
        await self._stop(transfer, State.PAUSED, "")
        if transfer.state is State.COMPLETE:
            transfer.error = None
            return
        store = await self._course.store(transfer)
        transfer.store = None
        self.transfers.pop(transfer.key, None)
        await asyncio.to_thread(self._engine.records.delete, transfer.record)
        await asyncio.to_thread(store.discard)

    async def verify(self, group: str, name: str, on_progress: OnProgress) -> PsRow:
        """Hash what is here; what is wrong is fetched again (a download) or offered no more (a share)."""
        engine = self._engine
        loop = asyncio.get_running_loop()
        complete = engine.sharing.find(group, name)
        if complete:
            record = await engine.sharing.check(complete[-1])
            swarm = engine.swarms.get(record.manifest_id)
            if record.state is State.COMPLETE and swarm is not None:
                content = Content(Path(record.path), swarm.manifest.layout, None)
                content.prints = await asyncio.to_thread(prints_of, Path(record.path), swarm.manifest.layout)
                wrong = await loop.run_in_executor(
                    engine.long, wrong_pieces, content, swarm.manifest, lambda _: True
                )
                if wrong:
                    engine.sharing.withdraw(
                        swarm, f"{record.path} changed: {len(wrong)} pieces are not right"
                    )
            return self._row_of_share(engine.sharing.records[record.key])
        transfer = self._find(group, name)
        running = transfer.running
        await self._stop(transfer, State.VERIFYING, "")
        try:
            store = await self._course.store(transfer)
            wrong = await loop.run_in_executor(engine.long, store.verify)
            transfer.held = from_wire(bytes(store.map.held), transfer.manifest.pieces)
            transfer.reason = f"{len(wrong)} pieces were wrong and will be fetched again" if wrong else ""
        finally:
            if running:
                self.run(transfer)
            else:
                transfer.state = State.PAUSED
                await self._course.remember(transfer)
        return row_of_transfer(transfer)

    def group_lost(self, group: str, reason: str) -> None:
        for transfer in list(self.transfers.values()):
            if transfer.record.group == group:
                self._fail(transfer, reason)

    def file_removed(self, group: str, name: str) -> None:
        for transfer in list(self.transfers.values()):
            if (transfer.record.group, transfer.record.name) == (group, name):
                self._fail(transfer, "it was taken off the group")

    def rights_changed(self) -> None:
        """What runs in a group where this peer is in quarantine ends, and says so: nobody would serve it."""
        engine = self._engine
        for transfer in list(self.transfers.values()):
            if transfer.running and engine.access.in_quarantine(transfer.record.group, engine.peer_id):
                transfer.error = in_quarantine(transfer.record.group, engine.peer_id)
                engine.later(self._stop(transfer, State.FAILED, "this peer is in quarantine in the group"))

    def _fail(self, transfer: Transfer, reason: str) -> None:
        transfer.error = TrimaranError(
            f"{transfer.record.group}/{transfer.record.name} cannot be fetched any more: {reason}.",
            exit_code=Exit.DENIED,
            code="withdrawn",
            hint="What was fetched is kept until you cancel it.",
        )
        self._engine.later(self._stop(transfer, State.FAILED, reason))

    async def stop(self) -> None:
        """The engine stops: what runs goes on at the next start."""
        for transfer in list(self.transfers.values()):
            state = transfer.state
            await self._stop(transfer, State.WAITING if transfer.running else state, transfer.reason)

    # --- telling --------------------------------------------------------------------------------

    def _row_of_share(self, record: Record) -> PsRow:
        return row_of_share(record, self._engine.swarms.get(record.manifest_id))

    def rows(self) -> list[PsRow]:
        rows = [row_of_transfer(transfer) for transfer in self.transfers.values()]
        rows += [self._row_of_share(record) for record in self._engine.sharing.records.values()]
        return sorted(rows, key=lambda row: (row.group, row.name))


def _sync_and_close(store: PartStore) -> None:
    try:
        store.sync()
    except OSError as error:
        log.warning("syncing %s failed: %s", store.part, error.strerror)
    store.close()


def _unavailable() -> TrimaranError:
    return TrimaranError(
        "No tracker answers, and this peer does not know the file yet.",
        exit_code=Exit.CLUSTER_UNAVAILABLE,
        code="cluster-unavailable",
        hint="Look at the nodes with: trimaran cluster status",
    )


def _same_place(one: Path, other: Path) -> bool:
    """The same name in the same folder, whatever the folder is called."""
    if one == other:
        return True
    try:
        return one.name == other.name and one.parent.samefile(other.parent)
    except OSError:
        return False


def _elsewhere(transfer: Transfer) -> TrimaranError:
    what = f"{transfer.record.group}/{transfer.record.name}"
    path = Path(transfer.record.path)
    return TrimaranError(
        f"{what} was begun at {path} and is not complete. Nothing was changed.",
        exit_code=Exit.CONFLICT,
        code="downloading-elsewhere",
        hint=f"Go on there with: trimaran get {what} -o {path.parent}; or give that up with: trimaran cancel {what}",
    )


def _cancelled(transfer: Transfer) -> TrimaranError:
    return TrimaranError(
        f"{transfer.record.group}/{transfer.record.name} was cancelled from elsewhere; its unfinished part is deleted.",
        exit_code=Exit.UNFINISHED,
        code="cancelled",
        hint="Get it again to begin anew.",
    )


def _unfinished(transfer: Transfer) -> TrimaranError:
    what = f"{transfer.record.group}/{transfer.record.name}"
    if transfer.state is State.PAUSED and not transfer.reason:
        message = f"{what} was paused from elsewhere; what was fetched is kept."
        hint = f"Go on with: trimaran resume {what}; or get it again."
    else:
        message = f"{what} is not complete: {transfer.reason or transfer.state.value}."
        hint = "What was fetched is kept. Get it again to go on where it stopped."
    return TrimaranError(message, exit_code=Exit.UNFINISHED, code="unfinished", hint=hint)
