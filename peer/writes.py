"""Writes that go on under the key they began with, through kills and restarts.

Owned here: which idempotency key a user's write gets: a new one, or the one of the same write that was begun before and
whose end nobody learnt. With it the trackers give the first answer instead of doing it twice, or refusing what is
done already. Left to others: what is written, and where the keys lie (`records.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from cluster.api import idempotency
from cluster.api.errors import TrackerError

from .records import Records

log = logging.getLogger("trimaran.peer.writes")

REPEATED_SECONDS_MAX: Final = 600.0
"""After so long, the same words are another wish: whoever joined, was put out and joins again must not be told of the
first time."""
_NO_HELP: Final = frozenset({"request-mismatch", "request-too-old"})

A = TypeVar("A")


class Writes:
    """Of one home. Several processes may share it."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def once(self, intent: str, write: Callable[[str], Awaitable[A]], *, body: bytes = b"") -> A:
        """Do what `write` does with the key it is given. `intent` names the write, who wants it included; with another
        `body` it is another one (no secrets: both are kept on disk). Raises what `write` raises."""
        kept = await asyncio.to_thread(self._kept, intent, body)
        if kept is not None:
            try:
                return await self._try(intent, kept, write)
            except TrackerError as error:
                if error.code not in _NO_HELP:
                    raise
        key = idempotency.new_key()
        try:
            await asyncio.to_thread(self._records.put_pending, intent, key, body)
        except (sqlite3.Error, OSError) as error:  # a full disk: better without a net than not at all
            log.warning("the key of %s cannot be kept: %s", intent, error)
        return await self._try(intent, key, write)

    def _kept(self, intent: str, body: bytes) -> str | None:
        pending = self._records.pending(intent)
        if pending is None or pending[1] != body:
            return None
        minted_ms = uuid.UUID(pending[0]).int >> 80
        age_seconds = time.time_ns() / 1e9 - minted_ms / 1e3
        return pending[0] if age_seconds < REPEATED_SECONDS_MAX else None

    async def _try(self, intent: str, key: str, write: Callable[[str], Awaitable[A]]) -> A:
        try:
            answer = await write(key)
        except TrackerError as error:
            if error.outcome == "definite":
                await asyncio.to_thread(self._settle, intent)
            raise
        await asyncio.to_thread(self._settle, intent)
        return answer

    def _settle(self, intent: str) -> None:
        with contextlib.suppress(sqlite3.Error, OSError):  # then it is too old some minutes later
            self._records.settle(intent)
