"""Sharing: what this peer offers of its user's own files, and of what it has downloaded whole.

Owned here: hash, publish, announce; sharing again after a start without hashing what has not changed; noticing that
a source changed or is gone, and offering it no more; ending a share. Left to others: hashing (`hashing.py`), swarms
under download (`getting.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.api import types as t
from cluster.api.errors import TrackerError

from .bitmap import full_mask
from .content import Content
from .hashing import Hashing, Scan, look, scan
from .home import write_whole
from .manifest import Algorithm, Manifest, ManifestError
from .paths import PathError, check_path
from .records import Print, Record
from .reports import Exit, OnProgress, Progress, ShareReport, State, TrimaranError
from .swarm import Swarm
from .tracker_agent import FactKey
from .trouble import away, of_tracker
from .writes import Writes

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("trimaran.peer.sharing")

PROGRESS_SECONDS = 0.25
LOOK_SECONDS = 30.0


class Sharing:
    """The complete shares of an engine. `states` is what is known of each record, by its key."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.records: dict[FactKey, Record] = {}

    # --- sharing anew ---------------------------------------------------------------------------

    async def share(
        self,
        path: Path,
        group: str,
        name: str | None,
        *,
        replace: bool,
        algorithm: Algorithm,
        on_progress: OnProgress,
    ) -> ShareReport:
        """See `PeerSession.share`."""
        engine = self._engine
        try:
            await engine.agent.ensure_token(group)  # who may not share learns it before anything is hashed
        except TrackerError as error:
            raise of_tracker(error) from error
        found = await asyncio.get_running_loop().run_in_executor(engine.long, scan, path, algorithm)
        shown = name if name is not None else found.path.name
        _check_name(shown)
        manifest = await self._manifest(found, group, shown, on_progress)
        await asyncio.to_thread(
            write_whole, engine.home.manifest_file(manifest.id), await asyncio.to_thread(manifest.encode)
        )
        await asyncio.to_thread(engine.records.put_prints, str(found.path), manifest.id, found.prints)
        await self._publish(manifest, group, shown, replace=replace)
        record = Record(
            group=group,
            name=shown,
            manifest_id=manifest.id,
            user=engine.user,
            origin="share",
            kind=manifest.layout.kind,
            path=str(found.path),
            size_bytes=manifest.size_bytes,
            state=State.COMPLETE,
        )
        await self.keep(record)
        self.offer(record, manifest, Content(found.path, manifest.layout, found.prints))
        try:
            await engine.agent.said()
        except TrackerError as error:
            if not away(error):
                raise of_tracker(error) from error
            log.warning("shared, but no tracker could be told yet: %s", error.message)
        return ShareReport(
            group=group,
            name=shown,
            manifest_id=manifest.id,
            size_bytes=manifest.size_bytes,
            pieces=manifest.pieces,
        )

    async def _manifest(self, found: Scan, group: str, name: str, on_progress: OnProgress) -> Manifest:
        known = await self._known(found)
        if known is not None:
            return known
        engine = self._engine
        loop = asyncio.get_running_loop()
        hashing = Hashing(found, engine.cores)
        size = found.layout.size_bytes
        began = loop.time()
        work = asyncio.create_task(hashing.run(engine.long))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=PROGRESS_SECONDS)
                done = hashing.done_bytes
                rate = done / max(loop.time() - began, 1e-6)
                on_progress(
                    Progress(
                        group=group,
                        name=name,
                        state=State.HASHING,
                        done_bytes=done,
                        size_bytes=size,
                        rate_bytes_per_second=rate,
                        seconds_left=(size - done) / rate if rate else None,
                        peers=0,
                        sources=[],
                    )
                )
            return work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _known(self, found: Scan) -> Manifest | None:
        """The manifest from before, if every file still looks as it did then."""
        known = await asyncio.to_thread(self._engine.records.prints, str(found.path))
        if known is None or known[1] != found.prints:
            return None
        manifest = await self.load_manifest(known[0])
        if manifest is None or manifest.layout.files != found.layout.files:
            return None
        same = (
            manifest.layout.empty_folders == found.layout.empty_folders
            and manifest.layout.algorithm == found.layout.algorithm
            and manifest.layout.kind == found.layout.kind
        )
        return manifest if same else None

    async def load_manifest(self, manifest_id: str) -> Manifest | None:
        """A manifest that the home keeps; None when it is not there, or damaged."""
        return await asyncio.to_thread(
            _load_manifest, self._engine.home.manifest_file(manifest_id), manifest_id
        )

    async def _publish(self, manifest: Manifest, group: str, name: str, *, replace: bool) -> None:
        """Tell the cluster."""
        layout = manifest.layout
        body = t.FileBody(
            kind=layout.kind,
            size_bytes=layout.size_bytes,
            pieces=layout.pieces,
            piece_bytes=layout.piece_bytes,
            algorithm=layout.algorithm,
            manifest_id=manifest.id,
            replace=replace,
        )
        client = self._engine.client
        try:
            await Writes(self._engine.records).once(
                f"{self._engine.user}/publish/{group}/{name}",
                lambda key: client.publish_file(group, name, body, key=key),
                body=msgspec.msgpack.encode(body),
            )
        except TrackerError as error:
            raise of_tracker(error) from error

    # --- what is offered ------------------------------------------------------------------------

    async def keep(self, record: Record) -> None:
        """Remember a record; older versions of the same name that are complete here stay beside it."""
        self.records[record.key] = record
        await asyncio.to_thread(self._engine.records.put, record)

    async def note(self, record: Record) -> None:
        """As `keep`, of what would be found out again: a disk that is full then changes nothing."""
        try:
            await self.keep(record)
        except OSError as error:
            log.warning("not noted of %s/%s: %s", record.group, record.name, error.strerror or error)

    async def keep_whole(self, record: Record, prints: Sequence[Print]) -> None:
        """Remember a record that just became whole, and what its files look like."""
        self.records[record.key] = record
        await asyncio.to_thread(self._engine.records.put_whole, record, prints)

    def offer(self, record: Record, manifest: Manifest, content: Content) -> Swarm:
        """From now on this is served to the record's group."""
        engine = self._engine
        swarm = engine.swarms.get(manifest.id)
        if swarm is None:
            swarm = Swarm(engine.peer_id, manifest, content, full_mask(manifest.pieces))
            engine.swarms.add(swarm)
        elif swarm.gone_reason:
            engine.files.forget(swarm.content)
            swarm.content, swarm.gone_reason = content, ""
        new = swarm.gained(swarm.all)
        if new:
            engine.files.forget(swarm.content)
            swarm.content = content
            engine.links.push_have(swarm, new)
        swarm.offers.setdefault(record.group, set()).add(record.name)
        engine.agent.take_part(record.group)
        engine.hold(swarm)
        return swarm

    def release(self, record: Record, reason: str) -> None:
        """It is offered to this group under this name no more."""
        engine = self._engine
        engine.agent.release(record.key)
        swarm = engine.swarms.get(record.manifest_id)
        if swarm is None:
            return
        names = swarm.offers.get(record.group, set())
        names.discard(record.name)
        if not names:
            swarm.offers.pop(record.group, None)
            engine.links.leave(swarm, reason, record.group)
        if not swarm.offers:
            engine.files.forget(swarm.content)
            engine.swarms.remove(swarm.manifest_id)
        engine.server.recheck()

    def withdraw(self, swarm: Swarm, reason: str) -> None:
        """The source is not what it was: say so, and offer it no more."""
        if swarm.gone_reason:
            return
        swarm.gone_reason = reason
        log.warning("no longer offered: %s", reason)
        engine = self._engine
        state = State.MISSING if "gone" in reason or "cannot be opened" in reason else State.CHANGED
        engine.files.forget(swarm.content)
        engine.links.leave(swarm, "its source changed")
        for record in list(self.records.values()):
            if record.manifest_id == swarm.manifest_id and record.state is State.COMPLETE:
                engine.agent.release(record.key)
                engine.later(self.note(msgspec.structs.replace(record, state=state, reason=reason)))
                self.records[record.key] = msgspec.structs.replace(record, state=state, reason=reason)

    # --- after a start --------------------------------------------------------------------------

    async def restore(self) -> None:
        """Share again what was shared before. Nothing that has not changed is read."""
        for record in await asyncio.to_thread(self._engine.records.all):
            if record.user != self._engine.user or record.part:
                continue
            self.records[record.key] = record
            await self.check(record)

    async def check(self, record: Record) -> Record:
        """Look whether a complete record's files are still as they were; offer it, or say why not."""
        engine = self._engine
        known = await asyncio.to_thread(engine.records.prints, record.path)
        manifest = await self.load_manifest(record.manifest_id)
        state, reason = State.COMPLETE, ""
        if manifest is None:
            state, reason = State.FAILED, "its manifest is not in the home any more: share it again"
        elif known is None or known[0] != record.manifest_id or len(known[1]) != len(manifest.layout.files):
            state, reason = State.CHANGED, f"{record.path} was shared again with other content"
        else:
            same, reason = await asyncio.get_running_loop().run_in_executor(
                engine.long, look, Path(record.path), manifest.layout, known[1]
            )
            if not same:
                state = State.MISSING if reason.endswith("is gone") else State.CHANGED
        if (state, reason) != (record.state, record.reason):
            record = msgspec.structs.replace(record, state=state, reason=reason)
            await self.note(record)
        if state is State.COMPLETE and manifest is not None and known is not None:
            content = Content(Path(record.path), manifest.layout, known[1])
            self.offer(record, manifest, content)
        else:
            log.warning("not offered: %s/%s: %s", record.group, record.name, reason)
        return record

    async def look_now_and_then(self) -> None:
        """Notice what changed or went away though nobody asks for it."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for record in list(self.records.values()):
                swarm = self._engine.swarms.get(record.manifest_id)
                if record.state is not State.COMPLETE or swarm is None or swarm.gone_reason:
                    continue
                content = swarm.content
                if str(content.path) != record.path or content.prints is None:
                    continue
                same, reason = await asyncio.get_running_loop().run_in_executor(
                    self._engine.long, look, content.path, swarm.manifest.layout, content.prints
                )
                if not same and swarm.content is content:
                    self.withdraw(swarm, reason)

    # --- ends -----------------------------------------------------------------------------------

    def find(self, group: str, name: str) -> list[Record]:
        return [each for each in self.records.values() if each.group == group and each.name == name]

    async def unshare(self, group: str, name: str) -> int:
        """See `PeerSession.unshare`. The files stay where they are."""
        engine = self._engine
        try:
            await engine.agent.ensure_token(group)
        except TrackerError as error:
            raise of_tracker(error) from error
        found = self.find(group, name)
        if not found:
            raise TrimaranError(
                f"This peer does not share {group}/{name}.",
                exit_code=Exit.NOT_FOUND,
                code="not-shared",
                hint="See what it shares with: trimaran ps",
            )
        for record in found:
            del self.records[record.key]
            await asyncio.to_thread(engine.records.delete, record)
            self.release(record, "no longer shared")
        try:
            await engine.agent.said()
        except TrackerError as error:
            if not away(error):
                raise of_tracker(error) from error
        return engine.agent.revision

    def group_lost(self, group: str, reason: str) -> None:
        for record in list(self.records.values()):
            if record.group == group:
                self.release(record, reason)
                lost = msgspec.structs.replace(record, state=State.WAITING, reason=reason)
                self._engine.later(self.note(lost))

    def file_removed(self, group: str, name: str) -> None:
        for record in self.find(group, name):
            self.fact_dropped(record.key, "it was taken off the group")

    def fact_dropped(self, key: FactKey, reason: str) -> None:
        """The trackers do not take this share any more: the file was removed, or the user is no member."""
        record = self.records.get(key)
        if record is not None:
            self.release(record, reason)
            self._engine.later(
                self.note(
                    msgspec.structs.replace(record, state=State.WAITING, reason=f"not offered: {reason}")
                )
            )


def _load_manifest(file: Path, manifest_id: str) -> Manifest | None:
    try:
        return Manifest.decode(file.read_bytes(), manifest_id)
    except (OSError, ManifestError):
        return None


def _check_name(name: str) -> None:
    try:
        if "/" in name:
            raise PathError(name, "a slash in the name")
        check_path(name)
    except PathError as error:
        raise TrimaranError(
            f"{name[:300]!a} cannot be the name of a share: {error.reason}.",
            exit_code=Exit.USAGE,
            code="bad-name",
            hint="Choose another with --name.",
        ) from error
