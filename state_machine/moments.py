"""Moments as people read them. Owned here: the one way from milliseconds to RFC 3339."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS: Final = 253_402_300_799_999  # the end of the year 9999, the last that RFC 3339 can write


@lru_cache(maxsize=1024)  # what comes together has the same moments
def rfc3339(at_ms: int) -> str:
    """UTC, to the millisecond. What lies outside of what can be written is moved to its edge."""
    moment = _EPOCH + timedelta(milliseconds=min(max(at_ms, 0), _LAST_MS))
    return moment.isoformat(timespec="milliseconds")[: -len("+00:00")] + "Z"
