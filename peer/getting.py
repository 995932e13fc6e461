"""Downloads: from a name in a group to a whole file under its name, through every interruption.

Owned here: which downloads there are, the verbs on them, and what is told of them. Left to others: the course of each
(`transfer.py`), its manifest (`manifests.py`), what is offered when it is whole (`sharing.py`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError

from . import swarm_events as ev
from .bitmap import from_wire
from .content import Content
from .driver import DownloadDriver
from .hashing import sha256_of
from .manifest import Manifest, ManifestError
from .manifests import ManifestFetcher
from .paths import PathError, check_path
from .records import Record
from .reports import Exit, GetReport, OnProgress, Progress, PsRow, State, TrimaranError
from .store import (
    DiskTroubleError,
    PartStore,
    conflict,
    no_space,
    prints_of,
    private_names,
    same_content,
    wrong_pieces,
)
from .swarm import Swarm
from .telling import piece_map, sources
from .tracker_agent import FactKey
from .transfer import Course, Transfer
from .trouble import away, of_tracker

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("trimaran.peer.getting")

ACTIVE_MAX: Final = 8
PROGRESS_SECONDS: Final = 0.2
AWAY_ASKED_SECONDS: Final = 1.0  # how long trackers are asked that were not heard lately
ALONE_SECONDS: Final = 60.0  # a `get` in the foreground that finds nobody at all ends after so long


class Getting:
    """All downloads of an engine that are not complete."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.transfers: dict[FactKey, Transfer] = {}
        self._turns = asyncio.Semaphore(ACTIVE_MAX)
        self._course = Course(
            engine,
            driving=self.budgets_changed,
            whole=self._forget,
        )
        self._manifests = ManifestFetcher(
            engine.fetcher,
            self._trackers,
            engine.home,
            engine.peer_id,
            lambda group, manifest_id: engine.agent.known.peers(group, manifest_id),
        )

    def _trackers(self) -> TrackerClient:
        """The client; while no tracker is heard, one that does not wait for them."""
        engine = self._engine
        return engine.client.within(AWAY_ASKED_SECONDS) if engine.agent.away else engine.client

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
        target = _target(target_folder, name)
        file = await self._facts(group, name)
        transfer = self._at_rest(group, name, file)
        if transfer is None:
            if file is None:
                raise _unavailable()
            whole = await self._complete_already(file, target)
            if whole is None:
                manifest = await self._manifest(file, on_progress, foreground=foreground)
                whole = await self._there_already(file, manifest, target)
                if whole is None:
                    transfer = await self._begin(file, manifest, target, checksum=checksum)
            if whole is not None:
                return await self._report(whole, target, None, began, checksum=checksum)
        assert transfer is not None
        transfer.down_bytes_per_second = down_bytes_per_second
        self.run(transfer)
        await self._follow(transfer, on_progress, foreground=foreground)
        return await self._report(
            transfer.record, Path(transfer.record.path), transfer, began, checksum=checksum
        )

    async def _facts(self, group: str, name: str) -> t.FileView | None:
        """What the group says of the file; while no tracker can say, what was last heard; None when nothing was (then
        only what was begun goes on)."""
        engine = self._engine
        try:
            await engine.agent.ensure_token(group)
            return (await self._trackers().show_file(group, name)).file
        except TrackerError as error:
            if away(error) and engine.agent.token(group) is not None:
                return engine.agent.known.file(group, name)
            raise of_tracker(error) from error

    def _at_rest(self, group: str, name: str, file: t.FileView | None) -> Transfer | None:
        for transfer in self.transfers.values():
            record = transfer.record
            if (record.group, record.name) == (group, name) and (
                file is None or record.manifest_id == file.manifest_id
            ):
                return transfer
        return None

    async def _complete_already(self, file: t.FileView, target: Path) -> Record | None:
        """A record of a download or share that is whole, under the very path, and looks as it did."""
        sharing = self._engine.sharing
        record = sharing.records.get((file.group, file.name, file.manifest_id))
        if record is None or Path(record.path) != target:
            return None
        record = await sharing.check(record)
        return record if record.state is State.COMPLETE else None

    async def _manifest(self, file: t.FileView, on_progress: OnProgress, *, foreground: bool) -> Manifest:
        def waiting(reason: str) -> None:
            on_progress(_waiting(file, reason))

        token = self._engine.agent.token
        try:
            return await self._manifests.fetch(
                file, token, waiting, patience_seconds=ALONE_SECONDS if foreground else None
            )
        except ManifestError as error:
            raise TrimaranError(
                f"The manifest of {file.group}/{file.name} cannot be used: {error}.",
                exit_code=Exit.INTEGRITY,
                code="bad-manifest",
                hint="Nothing was written. Ask who shared it to share it again.",
            ) from error

    async def _there_already(self, file: t.FileView, manifest: Manifest, target: Path) -> Record | None:
        """The target exists: the same content is done (and shared from now on), other content a conflict."""
        if not target.is_symlink() and not target.exists():
            return None
        engine = self._engine
        prints = await asyncio.get_running_loop().run_in_executor(engine.long, same_content, target, manifest)
        if prints is None:
            raise conflict(target)
        await asyncio.to_thread(engine.records.put_prints, str(target), manifest.id, prints)
        record = self._record(file, target, State.COMPLETE)
        await engine.sharing.keep(record)
        engine.sharing.offer(record, manifest, Content(target, manifest.layout, prints))
        return record

    def _record(self, file: t.FileView, target: Path, state: State) -> Record:
        return Record(
            group=file.group,
            name=file.name,
            manifest_id=file.manifest_id,
            user=self._engine.user,
            origin="get",
            kind=file.kind,
            path=str(target),
            size_bytes=file.size_bytes,
            state=state,
        )

    async def _begin(self, file: t.FileView, manifest: Manifest, target: Path, *, checksum: bool) -> Transfer:
        engine = self._engine
        names = private_names(manifest.id, target, engine.home.maps)
        record = msgspec.structs.replace(
            self._record(file, target, State.DOWNLOADING),
            part=str(names[0]),
            map=str(names[1]),
            checksum=checksum,
        )
        # The record comes first: a kill while the part is made leaves nothing that nobody knows of.
        transfer = Transfer(record, manifest)
        await self._course.remember(transfer)
        try:
            transfer.store = await asyncio.get_running_loop().run_in_executor(
                engine.long, PartStore.create, manifest, target, engine.home.maps, names
            )
        except TrimaranError:
            await asyncio.to_thread(engine.records.delete, record)
            raise
        self.transfers[record.key] = transfer
        return transfer

    async def _follow(self, transfer: Transfer, on_progress: OnProgress, *, foreground: bool) -> None:
        """Wait for the end of a download, telling of it. Raises TrimaranError."""
        loop = asyncio.get_running_loop()
        moved_at, before = loop.time(), -1
        while transfer.running:
            assert transfer.task is not None
            await asyncio.wait({transfer.task}, timeout=PROGRESS_SECONDS)
            told = self.progress(transfer)
            on_progress(told)
            if told.done_bytes != before or told.peers or self._engine.agent.away:
                moved_at, before = loop.time(), told.done_bytes
            elif foreground and loop.time() - moved_at > ALONE_SECONDS:
                await self._stop(transfer, State.WAITING, "no peer of this file can be reached")
        if transfer.error is not None:
            raise transfer.error
        if transfer.state is not State.COMPLETE:
            raise TrimaranError(
                f"{transfer.record.group}/{transfer.record.name} is not complete: "
                f"{transfer.reason or transfer.state.value}.",
                exit_code=Exit.UNFINISHED,
                code="unfinished",
                hint="What was fetched is kept. Get it again to go on where it stopped.",
            )

    async def _report(
        self, record: Record, target: Path, transfer: Transfer | None, began: float, *, checksum: bool
    ) -> GetReport:
        loop = asyncio.get_running_loop()
        driver = transfer.driver if transfer is not None else None
        received = driver.received_bytes if driver is not None else 0
        digest = None
        if checksum and record.kind == "file":
            digest = await loop.run_in_executor(self._engine.long, sha256_of, target)
        report = GetReport(
            path=str(target),
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
        try:
            async with self._turns:
                transfer.state = State.DOWNLOADING
                await self._course.remember(transfer)
                await self._course.run(transfer)
        except DiskTroubleError as trouble:
            transfer.error = _trouble(transfer, trouble)
            transfer.state, transfer.reason = State.FAILED, str(trouble)
            await self._course.remember(transfer)
        except TrimaranError as error:
            transfer.error = error
            transfer.state, transfer.reason = State.FAILED, error.message
            await self._course.remember(transfer)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            met = DiskTroubleError(f"{error.filename or transfer.record.path}: {error.strerror}", full=full)
            transfer.error = _trouble(transfer, met)
            transfer.state, transfer.reason = State.FAILED, str(met)
            await self._course.remember(transfer)
        except Exception as error:
            # A defect. Whoever waits must hear of it, and `ps` must not call it a running download for ever.
            log.exception("the download of %s/%s failed", transfer.record.group, transfer.record.name)
            reason = f"something unexpected happened ({type(error).__name__})"
            transfer.error = TrimaranError(
                f"{transfer.record.group}/{transfer.record.name}: {reason}.",
                exit_code=Exit.UNEXPECTED,
                code="unexpected",
                hint=f"The details are in {self._engine.home.folder / 'peer.log'}; what was fetched is kept.",
            )
            transfer.state, transfer.reason = State.FAILED, reason
            await self._course.remember(transfer)

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
            if await self._came_through(record, manifest):
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

    async def _came_through(self, record: Record, manifest: Manifest) -> bool:
        """A kill came between the rename and its record: the part is gone, the target is whole."""
        engine = self._engine
        part, target = Path(record.part), Path(record.path)
        if part.exists() or not target.exists():
            return False
        prints = await asyncio.get_running_loop().run_in_executor(engine.long, same_content, target, manifest)
        if prints is None:
            return False
        whole = msgspec.structs.replace(record, state=State.COMPLETE, reason="", part="", map="")
        await engine.sharing.keep_whole(whole, prints)
        Path(record.map).unlink(missing_ok=True)
        content = Content(target, manifest.layout, prints)
        engine.sharing.offer(whole, manifest, content)
        return True

    # --- verbs ----------------------------------------------------------------------------------

    def _find(self, group: str, name: str) -> Transfer:
        for transfer in self.transfers.values():
            if (transfer.record.group, transfer.record.name) == (group, name):
                return transfer
        complete = bool(self._engine.sharing.find(group, name))
        raise TrimaranError(
            f"{group}/{name} is complete." if complete else f"This peer does not download {group}/{name}.",
            exit_code=Exit.CONFLICT if complete else Exit.NOT_FOUND,
            code="complete" if complete else "not-downloading",
            hint="See what it has with: trimaran ps",
        )

    async def _stop(self, transfer: Transfer, state: State, reason: str) -> None:
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
        """Whoever waited for it does not any more: it rests until somebody gets or resumes it."""
        for transfer in list(self.transfers.values()):
            if (transfer.record.group, transfer.record.name) == (group, name):
                await self._stop(transfer, State.PAUSED, "interrupted")

    async def cancel(self, group: str, name: str) -> None:
        transfer = self._find(group, name)
        await self._stop(transfer, State.PAUSED, "")
        if transfer.state is State.COMPLETE:
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
            return self.share_row(engine.sharing.records[record.key])
        transfer = self._find(group, name)
        running = transfer.running
        await self._stop(transfer, State.VERIFYING, "")
        store = await self._course.store(transfer)
        wrong = await loop.run_in_executor(engine.long, store.verify)
        transfer.held = from_wire(bytes(store.map.held), transfer.manifest.pieces)
        transfer.state = State.PAUSED
        transfer.reason = f"{len(wrong)} pieces were wrong and will be fetched again" if wrong else ""
        await self._course.remember(transfer)
        if running:
            self.run(transfer)
        return self.row(transfer)

    def group_lost(self, group: str, reason: str) -> None:
        for transfer in list(self.transfers.values()):
            if transfer.record.group == group:
                self._fail(transfer, reason)

    def file_removed(self, group: str, name: str) -> None:
        for transfer in list(self.transfers.values()):
            if (transfer.record.group, transfer.record.name) == (group, name):
                self._fail(transfer, "it was taken off the group")

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

    def progress(self, transfer: Transfer) -> Progress:
        driver = transfer.driver
        state, reason = self._told_state(transfer)
        done = transfer.done_bytes()
        rate = driver.bytes_per_second() if driver is not None and transfer.running else 0.0
        size = transfer.record.size_bytes
        return Progress(
            group=transfer.record.group,
            name=transfer.record.name,
            state=state,
            done_bytes=done,
            size_bytes=size,
            rate_bytes_per_second=rate,
            seconds_left=(size - done) / rate if rate > 0 else None,
            peers=len(driver.machine.linked_peers) if driver is not None else 0,
            sources=sources(driver.sources) if driver is not None else [],
            piece_map=piece_map(transfer.held, transfer.manifest.pieces),
            message=reason,
        )

    def _told_state(self, transfer: Transfer) -> tuple[State, str]:
        if transfer.running and transfer.driver is not None and transfer.driver.waiting is not None:
            return State.WAITING, transfer.driver.waiting.value
        return transfer.state, transfer.reason

    def row(self, transfer: Transfer) -> PsRow:
        told = self.progress(transfer)
        return PsRow(
            group=told.group,
            name=told.name,
            state=told.state,
            done_bytes=told.done_bytes,
            size_bytes=told.size_bytes,
            rate_bytes_per_second=told.rate_bytes_per_second,
            peers=told.peers,
            manifest_id=transfer.record.manifest_id,
            path=transfer.record.path,
            reason=told.message,
            piece_map=told.piece_map,
        )

    def share_row(self, record: Record) -> PsRow:
        swarm = self._engine.swarms.get(record.manifest_id)
        here = record.state is State.COMPLETE
        return PsRow(
            group=record.group,
            name=record.name,
            state=record.state,
            done_bytes=record.size_bytes if here else 0,
            size_bytes=record.size_bytes,
            rate_bytes_per_second=0.0,
            peers=len(swarm.links) if swarm is not None else 0,
            manifest_id=record.manifest_id,
            path=record.path,
            reason=record.reason,
            uploaded_bytes=swarm.uploaded_bytes if swarm is not None else 0,
            piece_map=piece_map(swarm.have, swarm.manifest.pieces) if swarm is not None and here else "",
        )

    def rows(self) -> list[PsRow]:
        rows = [self.row(transfer) for transfer in self.transfers.values()]
        rows += [self.share_row(record) for record in self._engine.sharing.records.values()]
        return sorted(rows, key=lambda row: (row.group, row.name))


def _target(folder: Path, name: str) -> Path:
    try:
        if "/" in name:
            raise PathError(name, "a slash in the name")
        check_path(name)
    except PathError as error:
        raise TrimaranError(
            f"{name[:300]!a} cannot be the name of a file here: {error.reason}.",
            exit_code=Exit.INTEGRITY,
            code="bad-name",
            hint="Nothing was written.",
        ) from error
    return folder.expanduser().absolute() / name


def _sync_and_close(store: PartStore) -> None:
    try:
        store.sync()
    except OSError as error:
        log.warning("syncing %s failed: %s", store.part, error.strerror)
    store.close()


def _trouble(transfer: Transfer, trouble: DiskTroubleError) -> TrimaranError:
    if trouble.full:
        return no_space(Path(transfer.record.path), transfer.record.size_bytes - transfer.done_bytes())
    return TrimaranError(
        f"The disk does not take {transfer.record.group}/{transfer.record.name}: {trouble}.",
        exit_code=Exit.UNFINISHED,
        code="disk-trouble",
        hint="What was fetched is kept. Get it again when the disk works.",
    )


def _unavailable() -> TrimaranError:
    return TrimaranError(
        "No tracker answers, and this peer does not know the file yet.",
        exit_code=Exit.CLUSTER_UNAVAILABLE,
        code="cluster-unavailable",
        hint="Look at the nodes with: trimaran cluster status",
    )


def _waiting(file: t.FileView, reason: str) -> Progress:
    return Progress(
        group=file.group,
        name=file.name,
        state=State.WAITING,
        done_bytes=0,
        size_bytes=file.size_bytes,
        rate_bytes_per_second=0.0,
        seconds_left=None,
        peers=0,
        sources=[],
        message=reason,
    )
