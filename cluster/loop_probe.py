"""How long the event loop was held: the longest time in which a node answered nothing.

Owned here: measuring it. A timer that is due every few milliseconds notes how much later it ran, and how much
processor time this thread used meanwhile: a long wait without it means that others had the processor, not that
something here was slow. Left to others: who shows it (`metrics.py`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

INTERVAL_SECONDS: Final = 0.02
WINDOW_SECONDS: Final = 60.0


class LoopProbe:
    """The longest hold of the last one to two windows."""

    def __init__(
        self, interval_seconds: float = INTERVAL_SECONDS, window_seconds: float = WINDOW_SECONDS
    ) -> None:
        self._interval_seconds = interval_seconds
        self._window_seconds = window_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._used = 0.0
        self._until = 0.0
        self._now = self._before = (0.0, 0.0)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._until = loop.time() + self._window_seconds
        self._arm(loop)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def longest(self) -> tuple[float, float]:
        """(seconds the loop was held, seconds of processor time this thread used in that time)."""
        return max(self._now, self._before)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + self._interval_seconds
        self._used = time.thread_time()
        self._timer = loop.call_at(self._due, self._fire, loop)

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        if now >= self._until:
            self._until = now + self._window_seconds
            self._before, self._now = self._now, (0.0, 0.0)
        held = (now - self._due, time.thread_time() - self._used)
        if held > self._now:
            self._now = held
        self._arm(loop)
