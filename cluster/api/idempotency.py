"""Idempotency keys: UUIDv7 (RFC 9562, section 5.7), one for each logical write."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable


def new_key(
    *,
    wall_milliseconds: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    random_bits: Callable[[int], int] = secrets.randbits,
) -> str:
    """A fresh key: 48 bits of wall clock, then chance. Keep it with a write that must survive a restart."""
    value = (wall_milliseconds() & ((1 << 48) - 1)) << 80
    value |= 0x7 << 76 | random_bits(12) << 64
    value |= 0b10 << 62 | random_bits(62)
    return str(uuid.UUID(int=value))
