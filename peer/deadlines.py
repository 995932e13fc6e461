"""Ends what waits too long: one timer for all that wait equally long, in place of one for each.

Owned here: when. Left to others: what ends, and how (`server.py`, `sending.py`). Belongs to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Deadlines(Generic[_T]):
    """Everything that is added, and not removed before `seconds()` have passed, is given to `over`, once."""

    def __init__(self, seconds: Callable[[], float], over: Callable[[_T], None]) -> None:
        self._seconds = seconds
        self._over = over
        self._since: dict[_T, float] = {}  # the one that waits longest first
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._since)

    def __iter__(self) -> Iterator[_T]:
        return iter(list(self._since))

    def add(self, each: _T, now: float) -> None:
        """It waits from now on (anew, if it waited)."""
        self._since.pop(each, None)
        self._since[each] = now
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(now + self._seconds(), self._look)

    def remove(self, each: _T) -> None:
        self._since.pop(each, None)

    def stop(self) -> None:
        self._since.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        seconds = self._seconds()
        while self._since:
            each, since = next(iter(self._since.items()))
            if since + seconds > loop.time():
                self._timer = loop.call_at(since + seconds, self._look)
                return
            del self._since[each]
            self._over(each)
