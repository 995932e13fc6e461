"""One home's peer, as the front door uses it: in this process, or in the one that runs in the home already.

    session = await open_session(settings)
    try:
        report = await session.get("boats", "hull.iso", Path("."), ...)
    finally:
        await session.close()

Owned here: which of the two, who is signed in, and starting the engine only for what needs it. Left to others: the
verbs' work (`sharing.py`, `getting.py`), how commands reach a running peer (`remote.py`, `control.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError
from cluster.api.types import SessionAnswer

from . import control, remote
from .at_rest import rows_at_rest
from .engine import Engine
from .home import Home, HomeInUseError
from .identity import Identity, SignIn
from .manifest import Algorithm
from .records import Records
from .reports import (
    GetReport,
    Limits,
    OnProgress,
    PeerSession,
    PeerSettings,
    PsRow,
    ShareReport,
    WhoReport,
)
from .trouble import away, not_signed_in, of_tracker
from .writes import Writes

OPEN_SECONDS: Final = 5.0
GC_THRESHOLD: Final = 20_000  # new objects between looks for cycles; Python's own 700 is for small programs


async def open_session(settings: PeerSettings) -> PeerSession:
    """The running peer of this home when there is one, else a peer in this process that holds the home's lock.
    Raises TrimaranError."""
    home = Home(settings.home)
    deadline = asyncio.get_running_loop().time() + OPEN_SECONDS
    while True:
        with contextlib.suppress(ConnectionError):
            await control.call(home.socket, "hello", {}, str)
            return remote.remote_session(home)
        try:
            home.lock()
        except HomeInUseError:
            # Held by a command that ends soon, or by a peer that has not begun to answer yet.
            if asyncio.get_running_loop().time() >= deadline:
                raise
            await asyncio.sleep(0.05)
            continue
        try:
            return await asyncio.to_thread(LocalSession, settings, home)
        except BaseException:
            home.unlock()
            raise


class LocalSession:
    """The peer in this process. Fulfils `PeerSession`."""

    remote = False

    def __init__(self, settings: PeerSettings, home: Home) -> None:
        self._settings = settings
        self._home = home
        self._records = Records(home.state_file)
        try:
            self._identity = Identity(home, settings.ca, insecure=settings.insecure)
        except BaseException:
            self._records.close()
            raise
        self._client: TrackerClient | None = None
        self._engine: Engine | None = None
        self._control = control.ControlServer(home.socket, self._perform)
        self._mutex = asyncio.Lock()
        self._writes = Writes(self._records)
        self._foreground = True
        self._closing = False

    async def close(self) -> None:
        self._closing = True  # what runs goes on at the next start
        await self._control.stop()
        await self._stop_engine()
        if self._client is not None:
            await self._client.close()
        await asyncio.to_thread(self._records.close)
        self._home.unlock()

    @property
    def listen_address(self) -> str:
        return self._engine.listen_address if self._engine is not None else ""

    @property
    def longest_block_seconds(self) -> float:
        """For how long the event loop did not turn, at most, since the engine started."""
        return self._engine.longest_block_seconds if self._engine is not None else 0.0

    # --- parts ----------------------------------------------------------------------------------

    def _trackers(self) -> TrackerClient:
        if self._client is None:
            try:
                self._client = TrackerClient(
                    self._settings.trackers, ca=self._settings.ca, insecure=self._settings.insecure
                )
            except TrackerError as error:
                raise of_tracker(error) from error
        return self._client

    def _signed_in(self) -> SignIn:
        if self._identity.sign_in is None:
            raise not_signed_in()
        return self._identity.sign_in

    async def _running(self, *, resume: bool = False) -> Engine:
        async with self._mutex:
            if self._engine is None:
                self._signed_in()
                engine = Engine(self._settings, self._home, self._records, self._identity, self._trackers())
                try:
                    await engine.start(resume=resume)
                except BaseException:
                    await engine.stop()
                    raise
                self._engine = engine
                await self._control.start()
            return self._engine

    async def _stop_engine(self) -> None:
        async with self._mutex:
            engine, self._engine = self._engine, None
            if engine is not None:
                await engine.stop()

    # --- people ---------------------------------------------------------------------------------

    async def register(self, user: str, password: str, invitation: str = "") -> WhoReport:
        try:
            await self._writes.once(
                f"register/{user}", lambda key: self._trackers().register(user, password, invitation, key=key)
            )
        except TrackerError as error:
            raise of_tracker(error) from error
        return WhoReport(user=user, peer_id=self._identity.peer_id)

    async def login(self, user: str, password: str) -> WhoReport:
        try:
            answer = await self._trackers().login(user, password)
            view = self._trackers().as_session(answer.session)
            peer = await view.put_peer(self._identity.peer_id, self._identity.request_pem())
        except TrackerError as error:
            raise of_tracker(error) from error
        await asyncio.to_thread(self._identity.certify, peer.certificate_pem)
        await self._use(answer)
        return WhoReport(user=answer.user, peer_id=self._identity.peer_id)

    async def _use(self, answer: SessionAnswer) -> None:
        """Go on as who just signed in; a running engine begins anew, with what that user shared before."""
        ran = self._engine is not None
        await self._stop_engine()
        sign_in = SignIn(answer.user, answer.session, answer.expires_at)
        await asyncio.to_thread(self._identity.signed_in, sign_in)
        if ran:
            await self._running(resume=True)

    async def logout(self) -> int:
        sign_in = self._signed_in()
        try:
            trackers = self._trackers().as_session(sign_in.session)
            done = await self._writes.once(f"{sign_in.user}/logout", lambda key: trackers.logout(key=key))
            revision = done.revision
        except TrackerError as error:
            if error.code != "unauthenticated":  # ended already: then this is what was wanted
                raise of_tracker(error) from error
            revision = 0
        await self._stop_engine()
        await asyncio.to_thread(self._identity.signed_in, None)
        return revision

    async def whoami(self) -> WhoReport:
        sign_in = self._signed_in()
        try:
            user = (await self._trackers().as_session(sign_in.session).whoami()).user
        except TrackerError as error:
            if not away(error):
                raise of_tracker(error) from error
            user = sign_in.user
        return WhoReport(user=user, peer_id=self._identity.peer_id)

    async def change_password(self, password: str, new_password: str) -> int:
        sign_in = self._signed_in()
        try:
            trackers = self._trackers().as_session(sign_in.session)
            done = await self._writes.once(
                f"{sign_in.user}/passwd",
                lambda key: trackers.change_password(password, new_password, key=key),
            )
            # The change ends all sessions, this one too.
            answer = await self._trackers().login(sign_in.user, new_password)
        except TrackerError as error:
            raise of_tracker(error) from error
        await self._use(answer)
        return done.revision

    # --- sharing --------------------------------------------------------------------------------

    async def share(
        self,
        path: Path,
        group: str,
        name: str | None,
        *,
        replace: bool,
        algorithm: str | None,
        on_progress: OnProgress,
    ) -> ShareReport:
        engine = await self._running()
        chosen: Algorithm = "blake3" if (algorithm or self._settings.algorithm) == "blake3" else "sha256"
        return await engine.sharing.share(
            path, group, name, replace=replace, algorithm=chosen, on_progress=on_progress
        )

    async def unshare(self, group: str, name: str) -> int:
        return await (await self._running()).sharing.unshare(group, name)

    # --- downloading ----------------------------------------------------------------------------

    async def get(
        self,
        group: str,
        name: str,
        target_folder: Path,
        *,
        down_bytes_per_second: int,
        checksum: bool,
        on_progress: OnProgress,
    ) -> GetReport:
        engine = await self._running()
        try:
            return await engine.getting.get(
                group,
                name,
                target_folder,
                down_bytes_per_second=down_bytes_per_second,
                checksum=checksum,
                on_progress=on_progress,
                foreground=self._foreground,
            )
        except asyncio.CancelledError:
            if not self._closing:
                await engine.getting.interrupt(group, name)
            raise

    async def pause(self, group: str, name: str) -> None:
        await (await self._running()).getting.pause(group, name)

    async def resume(self, group: str, name: str) -> None:
        await (await self._running()).getting.resume(group, name)

    async def cancel(self, group: str, name: str) -> None:
        await (await self._running()).getting.cancel(group, name)

    async def verify(self, group: str, name: str, on_progress: OnProgress) -> PsRow:
        return await (await self._running()).getting.verify(group, name, on_progress)

    async def ps(self) -> list[PsRow]:
        if self._engine is not None:
            return self._engine.getting.rows()
        return await asyncio.to_thread(rows_at_rest, self._home, self._records)

    async def limits(self, change: Limits | None) -> Limits:
        kept = await asyncio.to_thread(self._records.limits)
        if change is not None:
            change.check()
            await asyncio.to_thread(self._records.put_limits, change)
            if self._engine is not None:
                self._engine.set_limits(change)
        if self._engine is not None:
            return self._engine.limits()
        return change or kept or Limits()

    async def serve_forever(self, on_ready: Callable[[], None] | None = None) -> None:
        """`on_ready` is called when this peer serves and answers in its home."""
        engine = await self._running(resume=True)
        self._foreground = False
        # What is here now stays: looking through it again and again cost a crowded peer a fifteenth of its time, in
        # pauses of tens of milliseconds.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        await engine.getting.resume_all()
        if on_ready is not None:
            on_ready()
        await asyncio.Event().wait()

    # --- for others' commands -------------------------------------------------------------------

    async def _perform(self, verb: str, given: dict[str, Any], on_progress: OnProgress) -> Any:
        """A call from the control socket."""
        match verb:
            case "hello":
                return self._identity.peer_id
            case "blocked":  # for measurements
                return self.longest_block_seconds
            case _:
                return await remote.perform(self, verb, given, on_progress)
