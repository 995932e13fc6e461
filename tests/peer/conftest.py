"""Real peers on loopback around real trackers (over a cluster in memory)."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "cluster"))
from trackers import PASSWORD, Trackers, running

from peer.records import Records
from peer.reports import GetReport, PeerSettings, Progress, ShareReport
from peer.session import LocalSession, open_session


def ignore(progress: Progress) -> None:
    """Nobody looks."""


class Peers:
    """The peers of a test, each with a home and a user of its name, all members of the group `boats`."""

    def __init__(self, trackers: Trackers, folder: Path) -> None:
        self.trackers = trackers
        self.folder = folder
        self._owner = ""
        self._open: list[LocalSession] = []

    def settings(self, user: str, **changes: object) -> PeerSettings:
        return PeerSettings(
            home=self.folder / user,
            trackers=tuple(node.url for node in self.trackers.nodes),
            insecure=True,
            listen="127.0.0.1:0",
            **changes,  # type: ignore[arg-type]
        )

    async def account(self, user: str, group: str = "boats") -> None:
        session = await self.trackers.user(user)
        if not self._owner:
            self._owner = session
            await self.trackers.group(group, session)
        else:
            reply = await self.trackers.call("POST", f"/v1/groups/{group}/join-requests", session=session)
            assert reply.status == 200, reply.body
            await self.trackers.member(group, user, "accept", self._owner)

    @property
    def owner(self) -> str:
        return self._owner

    async def open(self, user: str, **changes: object) -> LocalSession:
        """A signed-in session of the user's home."""
        if not (self.folder / user / "session.json").exists():
            await self.account(user)
        return await self.add(user, **changes)

    async def add(self, user: str, **changes: object) -> LocalSession:
        """The same for a user that has an account already, of whatever groups."""
        known = (self.folder / user / "session.json").exists()
        session = await open_session(self.settings(user, **changes))
        assert isinstance(session, LocalSession)
        self._open.append(session)
        if not known:
            await session.login(user, PASSWORD)
        return session

    async def close(self, session: LocalSession) -> None:
        self._open.remove(session)
        await session.close()

    async def close_all(self) -> None:
        for session in self._open:
            await session.close()


async def share(session: LocalSession, path: Path, name: str | None = None, **options: object) -> ShareReport:
    return await session.share(
        path, "boats", name, replace=bool(options.get("replace")), algorithm=None, on_progress=ignore
    )


async def get(
    session: LocalSession,
    name: str,
    folder: Path,
    *,
    down: int = 0,
    on_progress: Callable[[Progress], None] = ignore,
) -> GetReport:
    return await session.get(
        "boats", name, folder, down_bytes_per_second=down, checksum=False, on_progress=on_progress
    )


class Insistent:
    """Somebody who goes on asking with the token he has, whatever he is told. `last` is when he last got a byte."""

    def __init__(
        self, seeder: str, manifest_id: str, pieces: int, token: str, tls: ssl.SSLContext | None
    ) -> None:
        self._url = f"{'http' if tls is None else 'https'}://{seeder}/v1/swarms/{manifest_id}/pieces"
        self._headers = {"Authorization": f"Bearer {token}"}
        self._pieces = pieces
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self.last = 0.0
        self.bytes = 0
        self.refusals: list[int] = []
        self._task = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        async with aiohttp.ClientSession() as http:
            for index in itertools.cycle(range(self._pieces)):
                try:
                    async with http.get(
                        f"{self._url}/{index}", headers=self._headers, ssl=self._tls
                    ) as answer:
                        if answer.status != 200:
                            self.refusals.append(answer.status)
                            await asyncio.sleep(0.02)
                            continue
                        async for chunk in answer.content.iter_any():
                            self.bytes += len(chunk)
                            self.last = time.monotonic()
                except (aiohttp.ClientError, ConnectionError):
                    await asyncio.sleep(0.02)

    def stop(self) -> None:
        self._task.cancel()


def full(records: Records, is_full: bool) -> None:
    """The database gets no page more, as on a disk without room."""
    with records._mutex:
        (pages,) = records._database.execute("PRAGMA page_count").fetchone()
        records._database.execute(f"PRAGMA max_page_count={pages if is_full else 1 << 30}")


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[Peers]:
    async with running(tmp_path / "trackers", 3) as trackers:
        made = Peers(trackers, tmp_path)
        try:
            yield made
        finally:
            closing = asyncio.create_task(made.close_all())
            await asyncio.wait({closing}, timeout=20)
            if not closing.done():
                for task in asyncio.all_tasks():
                    task.print_stack(limit=8, file=sys.stdout)
                pytest.fail("a peer did not stop; the tasks that still ran are printed")
            closing.result()
