"""How long to wait before sending or reading more, under a limit in bytes per second. Pure: callers sleep.

A token bucket that may go into debt: a transfer takes what it wants to move and waits until the debt is paid.
So callers on one bucket are served in the order they came, in the sizes they ask for, and share it evenly
when they ask for even sizes (64 to 256 KiB).
"""

from __future__ import annotations

from typing import Final

BURST_SECONDS: Final = 0.05
BURST_BYTES_MIN: Final = 64 * 1024


class Pacer:
    """One limit. `bytes_per_second` 0 is unlimited."""

    __slots__ = ("_at", "_credit", "_rate")

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self._rate = bytes_per_second
        self._credit = self._burst()
        self._at: float | None = None

    def _burst(self) -> float:
        return max(BURST_BYTES_MIN, self._rate * BURST_SECONDS)

    @property
    def bytes_per_second(self) -> float:
        return self._rate

    def set_rate(self, bytes_per_second: float, now: float) -> None:
        """Change the limit; a debt made under the old one is paid at the new one."""
        self._refill(now)
        self._rate = bytes_per_second
        self._credit = min(self._credit, self._burst())

    def take(self, count: int, now: float) -> float:
        """Take `count` bytes; the seconds to wait before moving them (0: at once)."""
        if not self._rate:
            return 0.0
        self._refill(now)
        self._credit -= count
        return max(0.0, -self._credit / self._rate)

    def give_back(self, count: int) -> None:
        """Bytes that were taken and not moved."""
        if self._rate:
            self._credit = min(self._credit + count, self._burst())

    def is_full(self, now: float) -> bool:
        """Whether it allows as much as a new one."""
        self._refill(now)
        return self._credit >= self._burst()

    def _refill(self, now: float) -> None:
        if self._at is not None and now > self._at:
            self._credit = min(self._credit + (now - self._at) * self._rate, self._burst())
        self._at = now


def take_all(pacers: list[Pacer], count: int, now: float) -> float:
    """Take from several limits at once (the peer's, the total's): the longest wait of them."""
    return max((pacer.take(count, now) for pacer in pacers), default=0.0)
