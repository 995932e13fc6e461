"""Getting a manifest from whichever peer has it, and believing none of them.

Owned here: asking several peers, bounds, and checks against the id and the group's entry. Left to others: what a
manifest is (`manifest.py`). Those whose answer was not needed any more are let finish: their connections are kept, and
the first pieces come on them.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine
from typing import Any, Final

from msgspec import Struct

from cluster.api import types as t
from cluster.api.client import TrackerClient
from cluster.api.errors import TrackerError

from .fetch import Endpoint, Fetcher
from .home import Home, write_whole
from .line import FetchFault, Head
from .manifest import MANIFEST_BYTES_MAX, Manifest, ManifestError
from .reports import Exit, TrimaranError
from .trouble import of_tracker, refused

ASKED_AT_ONCE: Final = 3
RETRY_SECONDS: Final = 1.0
NAMES_BYTES_MAX: Final = 64 << 20
LINGER_SECONDS: Final = 1.0
LINGER_PIECES_MAX: Final = 2048  # a larger manifest is not sent for nothing


class Found(Struct, frozen=True):
    """A manifest, and what was learnt of the swarm on the way. `answered` grows while others still do."""

    manifest: Manifest
    peers: list[t.SwarmPeer]
    answered: set[str]

    def seeders_that_answered(self) -> list[t.SwarmPeer]:
        return [peer for peer in self.peers if peer.complete and peer.peer_id in self.answered]


class ManifestFetcher:
    """Manifests for downloads; they are kept in the home, where the server finds them."""

    def __init__(
        self,
        fetcher: Fetcher,
        client: Callable[[], TrackerClient],
        home: Home,
        peer_id: str,
        known_peers: Callable[[str, str], list[t.SwarmPeer]],
        later: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """`known_peers` answers, for a group and a manifest, with the peers last heard of: asked while no tracker is
        there. `later` runs something in the background."""
        self._fetcher = fetcher
        self._client = client
        self._known_peers = known_peers
        self._home = home
        self._peer_id = peer_id
        self._later = later

    async def fetch(
        self,
        file: t.FileView,
        token: Callable[[str], str | None],
        waiting: Callable[[str], None],
        *,
        patience_seconds: float | None,
    ) -> Found:
        """The manifest of a group's file. Waits for a peer that has it, saying so (`waiting`, which may raise to end
        it); for at most `patience_seconds` while there is none at all. Raises ManifestError when it cannot be used or
        contradicts the group's entry, TrimaranError."""
        kept = await asyncio.to_thread(self._kept, file.manifest_id)
        if kept is not None:
            return Found(self._checked(kept, file), [], set())
        loop = asyncio.get_running_loop()
        began = loop.time()
        answered: set[str] = set()
        while True:
            peers = await self._ask_trackers(file)
            peers = [peer for peer in peers if peer.peer_id != self._peer_id and not peer.quarantined]
            found = await self._ask(file, peers, token(file.group), answered)
            if found is not None:
                manifest = self._checked(found, file)
                await asyncio.to_thread(
                    write_whole,
                    self._home.manifest_file(file.manifest_id),
                    await asyncio.to_thread(found.encode),
                )
                return Found(manifest, peers, answered)
            if patience_seconds is not None and loop.time() - began > patience_seconds:
                raise TrimaranError(
                    f"No peer of {file.group}/{file.name} can be reached.",
                    exit_code=Exit.UNFINISHED,
                    code="no-peers",
                    hint="Get it again when somebody who has it is there. Nothing was written.",
                )
            waiting("no peer of this file can be reached" if peers else "nobody who has this file is there")
            await asyncio.sleep(RETRY_SECONDS * random.uniform(0.75, 1.25))  # noqa: S311 - jitter

    async def _ask_trackers(self, file: t.FileView) -> list[t.SwarmPeer]:
        """Who has it. Raises TrimaranError when they say no."""
        try:
            answer = await self._client().show_swarm(file.group, file.name, manifest_id=file.manifest_id)
        except TrackerError as error:
            if refused(error):
                raise of_tracker(error) from error
            return self._known_peers(file.group, file.manifest_id)
        return answer.peers

    async def _ask(
        self, file: t.FileView, peers: list[t.SwarmPeer], token: str | None, answered: set[str]
    ) -> Manifest | None:
        if token is None:
            return None
        random.shuffle(peers)
        peers.sort(key=lambda peer: not peer.complete)
        waiting = list(peers)
        asked: set[asyncio.Task[Manifest | None]] = set()
        try:
            while waiting or asked:
                while waiting and len(asked) < ASKED_AT_ONCE:
                    asked.add(asyncio.create_task(self._ask_one(file, waiting.pop(0), token, answered)))
                done, asked = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (found := task.result()) is not None:
                        if asked and file.pieces <= LINGER_PIECES_MAX:
                            self._later(_linger(asked))
                            asked = set()
                        return found
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return None

    async def _ask_one(
        self, file: t.FileView, peer: t.SwarmPeer, token: str, answered: set[str]
    ) -> Manifest | None:
        bound = min(MANIFEST_BYTES_MAX, file.pieces * 32 + NAMES_BYTES_MAX)
        body = bytearray()

        def landing(head: Head) -> memoryview:
            if head.length > bound:
                raise FetchFault("protocol", "a manifest that is too long")
            body.extend(bytes(head.length))
            return memoryview(body)

        request = f"GET /v1/swarms/{file.manifest_id}/manifest HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {token}\r\n\r\n"
        try:
            reply = await self._fetcher.ask(
                Endpoint(peer.peer_id, tuple(peer.addresses)), request.encode(), landing
            )
        except FetchFault:
            return None
        if reply.head.status != 200:
            return None
        answered.add(peer.peer_id)
        return await asyncio.to_thread(_decoded, bytes(body), file.manifest_id)

    def _kept(self, manifest_id: str) -> Manifest | None:
        try:
            return Manifest.decode(self._home.manifest_file(manifest_id).read_bytes(), manifest_id)
        except (OSError, ManifestError):
            return None

    @staticmethod
    def _checked(manifest: Manifest, file: t.FileView) -> Manifest:
        manifest.check_facts(
            kind=file.kind,
            size_bytes=file.size_bytes,
            pieces=file.pieces,
            piece_bytes=file.piece_bytes,
            algorithm=file.algorithm,
        )
        return manifest


async def _linger(asked: set[asyncio.Task[Manifest | None]]) -> None:
    """Let them end by themselves, for a moment."""
    try:
        await asyncio.wait(asked, timeout=LINGER_SECONDS)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _decoded(body: bytes, manifest_id: str) -> Manifest | None:
    """None: not the bytes of that id, another peer may have the right ones. Raises ManifestError when they are, and
    still cannot be used: then no peer can help."""
    if hashlib.sha256(body).hexdigest() != manifest_id:
        return None
    return Manifest.decode(body, manifest_id)
