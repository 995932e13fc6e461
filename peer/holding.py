"""How long the event loop was held: the longest time in which this peer answered nobody.

Owned here: measuring it, without a timer, which would wake a sleeping peer. A hold is the time between two looks of
the loop at its sockets, less the time in which this thread was ready to run and other programs had the processor:
no doing of ours. Left to others: making such a loop (`trimaran/cli/main.py`), who asks (`engine.py`).
"""

from __future__ import annotations

import asyncio
import os
import selectors
import time
from typing import Final

# Between readings of how long the thread has queued. What it queued for between a reading and the beginning of a hold
# is not known: a hold may be told so much too long, never too short.
READING_SECONDS: Final = 0.005


class HoldingSelector(selectors.DefaultSelector):
    """The loop's selector, which notes how long the loop does not come back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest_seconds = 0.0
        self._since: float | None = None
        self._queued_seconds = 0.0
        self._read_at = 0.0
        self._schedstat: int | None = None

    def begin(self) -> None:
        """Forget what was before."""
        self.longest_seconds = 0.0
        self._since = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        since = self._since
        if since is not None:
            held = time.monotonic() - since
            if held > self.longest_seconds:
                queued = self._queued() - self._queued_seconds - (since - self._read_at)
                self.longest_seconds = max(self.longest_seconds, held - max(0.0, queued))
        ready = super().select(timeout)
        self._since = since = time.monotonic()
        if since - self._read_at >= READING_SECONDS:
            self._queued_seconds, self._read_at = self._queued(), since
        return ready

    def close(self) -> None:
        super().close()
        if self._schedstat is not None:
            os.close(self._schedstat)
            self._schedstat = None

    def _queued(self) -> float:
        """For how long this thread was ready and had no processor, so far; 0 where the kernel does not say."""
        try:
            if self._schedstat is None:  # the thread that opens it is the one it tells of
                self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            return int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return 0.0


class HoldingLoop(asyncio.SelectorEventLoop):
    """A loop that knows how long it was held."""

    def __init__(self) -> None:
        self.holding = HoldingSelector()
        super().__init__(self.holding)


def holding() -> HoldingSelector | None:
    """That of the running loop; None if it has none."""
    loop = asyncio.get_running_loop()
    return loop.holding if isinstance(loop, HoldingLoop) else None
