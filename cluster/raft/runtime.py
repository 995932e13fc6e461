"""Time, turns and chance, as a node sees them: the seam that lets a simulation hold the clock.

Owned here: the protocol `Runtime` and the real one on asyncio. Nothing else under `cluster/raft/` reads a clock,
schedules a call or draws a random number (the transport's sockets excepted, which the simulation replaces whole).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol

from cluster.raft.disk import Syncer


class Handle(Protocol):
    def cancel(self) -> None: ...


class Runtime(Protocol):
    """All callbacks run on one thread, one at a time; nothing re-enters."""

    random: random.Random
    syncer: Syncer

    def now(self) -> float:
        """Monotonic seconds; comparable only with others of the same node's process."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle: ...

    def call_soon(self, callback: Callable[[], None]) -> Handle: ...


class AsyncioRuntime:
    """The real one: the running event loop's clock and queue."""

    def __init__(self, syncer: Syncer, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self.syncer = syncer
        self.random = random.Random()  # noqa: S311 - spreads timers, keeps no secret
        self.now: Callable[[], float] = self._loop.time

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        return self._loop.call_later(seconds, callback)

    def call_soon(self, callback: Callable[[], None]) -> Handle:
        return self._loop.call_soon(callback)
