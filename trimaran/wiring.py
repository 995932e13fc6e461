"""Opens what the commands work with: the home's peer and the trackers' client. Nothing here decides.

Owned here: which of the two a command gets, with the home's sign-in, and their end. Imports of the engine
stand inside the functions: `trimaran --help` must not pay for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from .settings import Common, peer_settings

if TYPE_CHECKING:
    from cluster.api.client import TrackerClient
    from peer.identity import SignIn
    from peer.reports import PeerSession, PeerSettings
    from peer.writes import Writes

REVISION_SECONDS = 1.0

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class SignedIn:
    """The trackers, asked as the home's user."""

    trackers: TrackerClient
    user: str
    writes: Writes

    async def once(self, intent: tuple[str, ...], write: Callable[[str], Awaitable[A]]) -> A:
        """A write, called with its key: should we be killed in it, the same again goes on with that key."""
        return await self.writes.once("/".join((self.user, *intent)), write)


@asynccontextmanager
async def peer_session(common: Common, settings: PeerSettings | None = None) -> AsyncIterator[PeerSession]:
    """The running `peer run` of this home when there is one, else an engine in this process."""
    settings = settings or peer_settings(common)
    from peer.session import open_session

    session = await open_session(settings)
    try:
        yield session
    finally:
        await session.close()


@asynccontextmanager
async def signed_in(common: Common) -> AsyncIterator[SignedIn]:
    """Raises `TrimaranError` where nobody is signed in."""
    from peer.home import Home
    from peer.records import Records
    from peer.writes import Writes

    stored = sign_in(common)
    records = await asyncio.to_thread(Records, Home(common.home_folder).state_file)
    try:
        async with trackers(common) as client:
            yield SignedIn(client.as_session(stored.session), stored.user, Writes(records))
    finally:
        await asyncio.to_thread(records.close)


def sign_in(common: Common) -> SignIn:
    """Who is signed in, as the home has it. Raises `TrimaranError` where nobody is."""
    from peer.identity import SignIn
    from peer.trouble import not_signed_in

    try:
        return msgspec.json.decode((peer_settings(common).home / "session.json").read_bytes(), type=SignIn)
    except (OSError, msgspec.DecodeError):
        raise not_signed_in() from None


@asynccontextmanager
async def trackers(
    common: Common, *, certificate: tuple[Path, Path] | None = None
) -> AsyncIterator[TrackerClient]:
    """The trackers' client, signed in as nobody, or as the operator with that certificate and key."""
    settings = peer_settings(common)
    from cluster.api.client import TrackerClient

    async with TrackerClient(
        settings.trackers, ca=settings.ca, insecure=settings.insecure, client_certificate=certificate
    ) as client:
        yield client


@asynccontextmanager
async def as_operator(common: Common, folder: str) -> AsyncIterator[TrackerClient]:
    """The trackers' client, with the operator's certificate that `operating.py` finds."""
    from .operating import operator_of

    operator = operator_of(common, folder)
    async with trackers(operator.common, certificate=operator.certificate) as client:
        yield client


async def known_revision(common: Common) -> int | None:
    """The cluster's revision, for answers to what happens on this peer alone; None while no tracker answers."""
    from cluster.api.errors import TrackerError

    with suppress(TrackerError, TimeoutError):
        async with asyncio.timeout(REVISION_SECONDS), trackers(common) as client:
            return (await client.status()).revision
    return None


async def until_cancelled(work: Awaitable[None]) -> None:
    """Serve until Ctrl-C or SIGTERM, which is how serving ends: nothing was interrupted."""
    with suppress(asyncio.CancelledError):
        await work
