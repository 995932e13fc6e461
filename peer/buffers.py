"""Buffers for pieces on their way, bounded together however many downloads and peers there are.

Owned here: how much memory that is, and who gets it when it runs short. Left to others: what lies in a buffer.

Buffers begin on a page, and are used again, the last one first: touching fresh memory costs more than a piece's hash.
(Cutting them from huge pages was tried: on a virtual machine whose host takes free memory back it cost a fifth more.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from .direct import aligned_buffer


class BufferPool:
    """At most `limit_bytes` of memory. A buffer that is larger than the whole bound is granted when nothing else is out, so
    that any piece can be fetched by any peer."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.out_bytes = 0
        self._free: dict[int, list[memoryview]] = {}
        self._free_bytes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        # Called when there is no room: has a buffer given back that can be spared, and says whether there was one.
        self.reclaim: Callable[[], bool] = lambda: False

    async def acquire(self, size: int) -> memoryview:
        """`take`, waiting for room in the order of asking."""
        buffer = self.take_now(size)
        while buffer is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                self._wake()
                raise
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
            buffer = self.take(size)
        if self._waiting:
            self._wake()  # there may be room for one more
        return buffer

    def take_now(self, size: int) -> memoryview | None:
        """`take`, unless others wait for room."""
        return None if self._waiting else self.take(size)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
                return

    def take(self, size: int) -> memoryview | None:
        """A buffer of exactly `size` bytes, or None while there is no room."""
        while self.out_bytes and self.out_bytes + size > self.limit_bytes:
            if not self.reclaim():
                return None
        self.out_bytes += size
        same = self._free.get(size)
        if same:
            self._free_bytes -= size
            buffer = same.pop()
            if not same:
                del self._free[size]
            return buffer
        while self._free and self.out_bytes + self._free_bytes > self.limit_bytes:
            other = next(iter(self._free))
            self._free_bytes -= len(self._free[other].pop())
            if not self._free[other]:
                del self._free[other]
        return aligned_buffer(size)

    def clear(self) -> None:
        """Let go of the buffers that nobody uses now."""
        self._free.clear()
        self._free_bytes = 0

    def give(self, buffer: memoryview) -> None:
        self.out_bytes -= len(buffer)
        self._free.setdefault(len(buffer), []).append(buffer)
        self._free_bytes += len(buffer)
        self._wake()
