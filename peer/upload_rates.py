"""How fast this peer may send: in all, and to each downloader. Pure: callers sleep.

Owned here: the two limits, what each downloader has had of its own, and how much is sent at a time under a limit. Left
to others: the arithmetic of one limit (`pacer.py`), slots (`sender.py`), sending (`sending.py`, `manifest_sending.py`).

A downloader is a peer, by its `peer_id`, over all its connections and all swarms. Its own limit is asked first, the
total only when that lets the bytes go: a total that was charged for bytes that wait elsewhere would be idle meanwhile.
"""

from __future__ import annotations

from typing import Final

from .pacer import Pacer

STRETCH_BYTES_MAX: Final = 64 << 10
STRETCH_BYTES_MIN: Final = 1 << 10
SHARED_BYTES_MIN: Final = 16 << 10  # less would cost more time than the bytes
STRETCH_SECONDS: Final = 0.1  # of the rate: a reader must not take a slow sender for a silent one
KEPT_MIN: Final = 64  # downloaders


class UploadRates:
    """`total` limits all that is sent. 0 is unlimited."""

    def __init__(self, total: float = 0.0, each: float = 0.0) -> None:
        self.total = Pacer(total)
        self._each = each
        self._own: dict[str, Pacer] = {}
        self._look_at = KEPT_MIN
        self.limited = bool(total or each)
        self.stretch_bytes = _stretch_bytes(total, each)

    def __len__(self) -> int:
        """How many downloaders it remembers."""
        return len(self._own)

    @property
    def each_bytes_per_second(self) -> float:
        return self._each

    @property
    def bytes_per_second(self) -> float:
        """What one downloader may get at most, 0 while unlimited."""
        return min((rate for rate in (self.total.bytes_per_second, self._each) if rate), default=0.0)

    def set_rates(self, total: float, each: float, now: float) -> None:
        """Change the limits; what was sent too early under the old ones is waited for at the new ones."""
        self.total.set_rate(total, now)
        self._each = each
        if each:
            for own in self._own.values():
                own.set_rate(each, now)
        else:
            self._own.clear()
        self.limited = bool(total or each)
        self.stretch_bytes = _stretch_bytes(total, each)

    def stretch_of(self, sends: int) -> int:
        """How much one of a downloader's sends takes at a time. Sends take in turns: so all that it is sent at once gets
        as much of the total as the one send of another."""
        stretch = self.stretch_bytes
        return max(stretch // sends, min(stretch, SHARED_BYTES_MIN))

    def take_own(self, downloader: str, count: int, now: float) -> float:
        """Take `count` bytes of what the downloader may have; the seconds to wait before they may be taken of the
        total (0: at once)."""
        if not self._each:
            return 0.0
        own = self._own.get(downloader)
        if own is None:
            if len(self._own) >= self._look_at:
                self._forget(now)
            own = self._own[downloader] = Pacer(self._each)
        return own.take(count, now)

    def _forget(self, now: float) -> None:
        """Those who have waited for all they got: a newcomer may have as much. Looking at each when their number has
        doubled costs nothing worth naming for one."""
        for downloader in [each for each, own in self._own.items() if own.is_full(now)]:
            del self._own[downloader]
        self._look_at = max(KEPT_MIN, 2 * len(self._own))


def _stretch_bytes(total: float, each: float) -> int:
    rate = min((rate for rate in (total, each) if rate), default=0.0)
    if not rate:
        return STRETCH_BYTES_MAX
    return int(min(STRETCH_BYTES_MAX, max(STRETCH_BYTES_MIN, rate * STRETCH_SECONDS)))
