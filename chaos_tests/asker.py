"""A member that never stops asking: what a hostile program would do with a right that it once had.

Owned here: signing up and getting a certificate and a token as any member does, then asking one peer for pieces on
several connections without end, and when the last byte came. Trimaran's own peer would stop by itself when told that
it lost its right, so it cannot show that seeders refuse; this one asks on with the token that it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import time
from collections import Counter
from pathlib import Path

from chaos_tests.people import PASSWORD
from cluster.api import certificates
from cluster.api.client import TrackerClient

READ_BYTES = 32 * 1024
AGAIN_SECONDS = 0.02


class Member:
    """A user with a key, a certificate and, once admitted, a token."""

    def __init__(self, user: str, folder: Path, ca: Path, urls: list[str]) -> None:
        self.user, self.ca = user, ca
        self.folder = folder / user
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key = certificates.load_or_make_key(self.folder / "peer.key")
        self.peer_id = certificates.peer_id_of_key(self.key.public_key())
        self.trackers = TrackerClient(urls, ca=ca)
        self.token = ""
        self.expires_at_ms = 0

    async def sign_up(self) -> None:
        await self.trackers.register(self.user, PASSWORD)
        signed_in = await self.trackers.login(self.user, PASSWORD)
        self.trackers = self.trackers.as_session(signed_in.session)
        answer = await self.trackers.put_peer(self.peer_id, certificates.peer_request(self.key))
        certificates.write_durably(self.folder / "peer.pem", answer.certificate_pem.encode())

    async def join(self, group: str, owner: TrackerClient) -> None:
        """Be admitted by the owner, and get a token for the group."""
        await self.trackers.request_join(group)
        await owner.put_member(group, self.user, "accept")
        await self.renew(group)

    async def renew(self, group: str) -> None:
        answer = await self.trackers.issue_token(group, self.peer_id)
        self.token, self.expires_at_ms = answer.token, answer.expires_at_ms

    def tls(self) -> ssl.SSLContext:
        return certificates.peer_client_context(self.ca, self.folder / "peer.pem", self.folder / "peer.key")

    async def close(self) -> None:
        await self.trackers.close()


class Asker:
    """Asks one peer for the pieces of one manifest, round and round, until `stop`. Times are monotonic seconds."""

    def __init__(
        self, member: Member, host: str, port: int, manifest_id: str, pieces: int, connections: int = 3
    ) -> None:
        self.member, self.host, self.port = member, host, port
        self.manifest_id = manifest_id
        self.bytes = 0
        self.last_byte_at = 0.0
        self.last_byte_wall_ms = 0
        self.answers: Counter[int] = Counter()
        self.cut = 0  # answers that broke off in the middle
        self._indexes = itertools.cycle(range(pieces))
        self._tls = member.tls()
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(connections)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def refused(self) -> int:
        return self.answers[401] + self.answers[403] + self.answers[404]

    async def _ask_on(self) -> None:
        while True:
            writer: asyncio.StreamWriter | None = None
            inside = False
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._tls)
                while True:
                    inside = False
                    path = f"/v1/swarms/{self.manifest_id}/pieces/{next(self._indexes)}"
                    head = f"GET {path} HTTP/1.1\r\nHost: peer\r\nAuthorization: Bearer {self.member.token}\r\n\r\n"
                    writer.write(head.encode())
                    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
                    status = int(lines[0].split()[1])
                    self.answers[status] += 1
                    left = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
                    inside = status in (200, 206)
                    while left:
                        data = await reader.read(min(left, READ_BYTES))
                        if not data:
                            raise ConnectionResetError
                        left -= len(data)
                        if inside:
                            self.bytes += len(data)
                            self.last_byte_at = time.monotonic()
                            self.last_byte_wall_ms = time.time_ns() // 1_000_000
                    if not inside:
                        await asyncio.sleep(AGAIN_SECONDS)
            except (OSError, asyncio.IncompleteReadError, ssl.SSLError):
                self.cut += inside
                await asyncio.sleep(AGAIN_SECONDS)
            finally:
                if writer is not None:
                    with contextlib.suppress(OSError, RuntimeError):
                        writer.transport.abort()
