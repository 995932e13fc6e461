"""Measured rates and latencies, from what arrived and when. Pure: every call carries its time in seconds."""

from __future__ import annotations

import math
from typing import Final

RATE_MEMORY_SECONDS: Final = 2.0
LATENCY_MEMORY_SECONDS: Final = 10.0


class Rate:
    """Bytes per second, exponentially forgotten with time constant `memory_seconds`.

    The estimate is bytes over busy time, both decaying alike, so that it is right from the first sample on, and time
    in which nothing was expected does not count against the link (`idle`).
    """

    __slots__ = ("_bytes", "_last", "_memory", "_seconds")

    def __init__(self, memory_seconds: float = RATE_MEMORY_SECONDS) -> None:
        self._memory = memory_seconds
        self._bytes = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def busy(self, now: float) -> None:
        """From here on bytes are expected."""
        if self._last is None:
            self._last = now

    def idle(self, now: float) -> None:
        """From here on nothing is expected until `busy`."""
        self.add(0, now)
        self._last = None

    def add(self, count: int, now: float) -> None:
        """`count` bytes came."""
        if self._last is not None and now > self._last:
            passed = now - self._last
            kept = math.exp(-passed / self._memory)
            self._bytes *= kept
            self._seconds = self._seconds * kept + self._memory * (1.0 - kept)
            self._last = now
        self._bytes += count

    def bytes_per_second(self, now: float) -> float:
        """The estimate now, 0 while nothing is known. Silence counts while bytes are expected."""
        seconds = self._seconds
        carried = self._bytes
        if self._last is not None and now > self._last:
            kept = math.exp(-(now - self._last) / self._memory)
            seconds = seconds * kept + self._memory * (1.0 - kept)
            carried *= kept
        if seconds < 1e-6:
            return 0.0
        return carried / seconds


class Latency:
    """The least round trip seen lately: what the path takes when nothing queues (as BBR's RTprop)."""

    __slots__ = ("_least", "_memory", "_seen_at")

    def __init__(self, memory_seconds: float = LATENCY_MEMORY_SECONDS) -> None:
        self._memory = memory_seconds
        self._least = 0.0
        self._seen_at = 0.0

    def add(self, seconds: float, now: float) -> None:
        """A round trip of `seconds` was measured."""
        if seconds <= 0:
            return
        if not self._least or seconds <= self._least or now - self._seen_at > self._memory:
            self._least = seconds
            self._seen_at = now

    @property
    def seconds(self) -> float:
        """0 while unknown."""
        return self._least


class Delivery:
    """The best rate of delivery seen lately (as BBR's BtlBw): how many bytes came between a request and its end, over
    that time. It doubles with each round trip as the pipeline deepens, where an average would follow slowly."""

    __slots__ = ("_best", "_memory", "_seen_at", "total_bytes")

    def __init__(self, memory_seconds: float = RATE_MEMORY_SECONDS) -> None:
        self._memory = memory_seconds
        self._best = 0.0
        self._seen_at = 0.0
        self.total_bytes = 0

    def sample(self, bytes_before: int, asked_at: float, now: float) -> None:
        """A request ended that was made at `asked_at`, when `total_bytes` was `bytes_before`."""
        rate = (self.total_bytes - bytes_before) / max(now - asked_at, 1e-4)
        if rate >= self._best or now - self._seen_at > self._memory:
            self._best = rate
            self._seen_at = now

    @property
    def bytes_per_second(self) -> float:
        """0 while unknown."""
        return self._best
