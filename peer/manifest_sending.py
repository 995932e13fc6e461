"""Sending manifests to those who may have them.

Owned here: how many are sent at once and to whom (they need no upload slot, so that a newcomer need not wait behind
pieces), a little of a large one in memory at a time, the upload rates, who takes nothing, and ending at once what lost
its right. Left to others: the right itself (`access.py`), HTTP (`server.py`).
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from cluster.api.tokens import Claims

from .upload_rates import UploadRates

AT_ONCE_MAX: Final = 32
PER_PEER_MAX: Final = 4  # those that wait among them
TURN_SECONDS_MAX: Final = 8.0
WRITE_BYTES: Final = 256 << 10
BLOCKED_SECONDS_MAX: Final = 10.0


class ManifestsBusyError(Exception):
    """Too many at once, of this peer or in all."""


class ManifestSender:
    """Belongs to the event loop."""

    def __init__(self, rates: UploadRates, seconds_left: Callable[[Claims], float]) -> None:
        self._rates = rates
        self._seconds_left = seconds_left
        self._turns = asyncio.Semaphore(AT_ONCE_MAX)
        self._of_peer: Counter[str] = Counter()
        self._sending: dict[asyncio.Transport, tuple[Claims, str]] = {}

    def recheck(self, allowed: Callable[[Claims, str], bool]) -> None:
        """Something was withdrawn: end what is `allowed` no more (claims, manifest)."""
        for transport, (claims, manifest_id) in list(self._sending.items()):
            if not allowed(claims, manifest_id):
                transport.abort()

    async def send(
        self, request: web.BaseRequest, claims: Claims, manifest_id: str, file: Path
    ) -> web.StreamResponse:
        """Raises ManifestsBusyError, OSError and TimeoutError; after the head has left, the connection is of no use
        then."""
        if self._of_peer[claims.peer_id] >= PER_PEER_MAX:
            raise ManifestsBusyError
        self._of_peer[claims.peer_id] += 1
        try:
            try:
                async with asyncio.timeout(TURN_SECONDS_MAX):
                    await self._turns.acquire()
            except TimeoutError:
                raise ManifestsBusyError from None
            try:
                return await self._send(request, claims, manifest_id, file)
            finally:
                self._turns.release()
        finally:
            self._of_peer[claims.peer_id] -= 1
            if not self._of_peer[claims.peer_id]:
                del self._of_peer[claims.peer_id]

    async def _send(
        self, request: web.BaseRequest, claims: Claims, manifest_id: str, file: Path
    ) -> web.StreamResponse:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the reader went away")
        # Not a FileResponse: over TLS its sendfile fallback fails with an error of its own when the asker goes away.
        descriptor = await asyncio.to_thread(os.open, file, os.O_RDONLY | os.O_CLOEXEC)
        ending = asyncio.get_running_loop().call_later(self._seconds_left(claims), transport.abort)
        self._sending[transport] = claims, manifest_id
        try:
            length = os.fstat(descriptor).st_size
            response = web.StreamResponse(headers={"Content-Type": "application/msgpack"})
            response.content_length = length
            await response.prepare(request)
            offset = 0
            while offset < length:
                data = await asyncio.to_thread(
                    os.pread, descriptor, await self._allowed(claims, length - offset), offset
                )
                if not data:
                    raise OSError(f"{file} is shorter than it was")
                async with asyncio.timeout(BLOCKED_SECONDS_MAX):  # who takes nothing is dropped
                    await response.write(data)
                offset += len(data)
            await response.write_eof()
            return response
        finally:
            ending.cancel()
            del self._sending[transport]
            os.close(descriptor)

    async def _allowed(self, claims: Claims, left: int) -> int:
        """How many of the bytes that are left may leave now, after waiting for them."""
        rates, loop = self._rates, asyncio.get_running_loop()
        if not rates.limited:
            return min(left, WRITE_BYTES)
        count = min(left, rates.stretch_bytes)
        await asyncio.sleep(rates.take_own(claims.peer_id, count, loop.time()))
        await asyncio.sleep(rates.total.take(count, loop.time()))
        return count
