"""How a download begins: what a name stands for, what of it is here already, its manifest, its part.

Owned here: the steps from a name in a group to a `Transfer` whose part lies beside its target, or to the record of
what was whole already. Left to others: which downloads there are (`getting.py`), their course (`transfer.py`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError

from .content import Content
from .manifest import Manifest, ManifestError
from .manifests import Found, ManifestFetcher
from .paths import PathError, check_path
from .records import Record
from .reports import Exit, OnProgress, State, TrimaranError
from .store import PartStore, conflict, private_names, same_content
from .telling import waiting_for_manifest
from .transfer import Course, Transfer
from .trouble import away, in_quarantine, of_tracker

if TYPE_CHECKING:
    from .engine import Engine

AWAY_ASKED_SECONDS: Final = 1.0  # how long trackers are asked that were not heard lately


class Beginning:
    def __init__(self, engine: Engine, course: Course) -> None:
        self._engine = engine
        self._course = course
        self._manifests = ManifestFetcher(
            engine.fetcher,
            self._trackers,
            engine.home,
            engine.peer_id,
            lambda group, manifest_id: engine.agent.known.peers(group, manifest_id),
            engine.later,
        )

    def _trackers(self) -> TrackerClient:
        """The client; while no tracker is heard, one that does not wait for them."""
        engine = self._engine
        return engine.client.within(AWAY_ASKED_SECONDS) if engine.agent.away else engine.client

    async def facts(self, group: str, name: str, *, begun: bool) -> t.FileView | None:
        """What the group says of the file; while no tracker can say, what was last heard; None when nothing was, or
        without a token: then only what was `begun` goes on, and waits for one."""
        engine = self._engine
        try:
            await engine.agent.ensure_token(group)
            return (await self._trackers().show_file(group, name)).file
        except TrackerError as error:
            if away(error) and engine.agent.token(group) is not None:
                return engine.agent.known.file(group, name)
            if away(error) and begun:
                return None
            raise of_tracker(error) from error

    async def whole_already(self, file: t.FileView, target: Path) -> Record | None:
        """A record of a download or share that is whole, under the very path, and looks as it did."""
        sharing = self._engine.sharing
        record = sharing.records.get((file.group, file.name, file.manifest_id))
        if record is None or Path(record.path) != target:
            return None
        record = await sharing.check(record)
        return record if record.state is State.COMPLETE else None

    async def manifest(
        self, file: t.FileView, on_progress: OnProgress, *, patience_seconds: float | None
    ) -> Found:
        """From a peer that has it; see `ManifestFetcher.fetch`."""
        engine = self._engine

        def waiting(reason: str) -> None:
            if engine.access.in_quarantine(file.group, engine.peer_id):
                raise in_quarantine(file.group, engine.peer_id)
            on_progress(waiting_for_manifest(file, reason))

        try:
            return await self._manifests.fetch(
                file,
                engine.agent.token,
                waiting,
                patience_seconds=patience_seconds,
            )
        except ManifestError as error:
            raise TrimaranError(
                f"The manifest of {file.group}/{file.name} cannot be used: {error}.",
                exit_code=Exit.INTEGRITY,
                code="bad-manifest",
                hint="Nothing was written. Ask who shared it to share it again.",
            ) from error

    async def there_already(self, file: t.FileView, manifest: Manifest, target: Path) -> Record | None:
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

    async def part(self, file: t.FileView, manifest: Manifest, target: Path, *, checksum: bool) -> Transfer:
        """A new download, its room reserved. Raises TrimaranError: then nothing is left of it."""
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
        return transfer

    async def came_through(self, record: Record, manifest: Manifest) -> bool:
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
        engine.sharing.offer(whole, manifest, Content(target, manifest.layout, prints))
        return True


def target_of(folder: Path, name: str) -> Path:
    """Where a shared name goes. Raises TrimaranError for a name that would go elsewhere."""
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
