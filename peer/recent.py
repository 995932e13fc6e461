"""Pieces that were verified a moment ago, still in memory: what the others in the swarm ask for next.

Owned here: which of them are kept, for how long, and when their buffers go back to the pool. Left to others: what the
pool has (`buffers.py`), who may be sent what (`server.py`), sending (`sending.py`).

A fresh piece goes out to several peers within seconds. Pieces are written past the page cache (`direct.py`), so they
would be read from the disk for that. Belongs to the event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from .buffers import BufferPool

KEPT_SECONDS_MAX: Final = 10.0  # since anybody wanted it


class RecentPiece:
    """`data` stays as it is from `take` until `let_go`."""

    __slots__ = ("buffer", "data", "kept", "used_at", "users")

    def __init__(self, buffer: memoryview, length: int, used_at: float) -> None:
        self.buffer = buffer
        self.data = buffer[:length]
        self.used_at = used_at
        self.users = 0
        self.kept = True


class RecentPieces:
    """At most half of the pool's memory, and less whenever the pool runs short."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._pieces: OrderedDict[tuple[str, int], RecentPiece] = (
            OrderedDict()
        )  # the one unused longest first
        self._bytes = 0
        pool.reclaim = self._give_one

    def __len__(self) -> int:
        return len(self._pieces)

    def keep(self, manifest_id: str, index: int, buffer: memoryview, length: int, now: float) -> None:
        """Take over a buffer of the pool that holds this verified piece."""
        self.expire(now)
        if (manifest_id, index) in self._pieces:
            self._pool.give(buffer)
            return
        self._pieces[manifest_id, index] = RecentPiece(buffer, length, now)
        self._bytes += len(buffer)
        while self._bytes > self._pool.limit_bytes // 2 and self._give_one():
            pass

    def take(self, manifest_id: str, index: int, now: float) -> RecentPiece | None:
        """The piece, which stays as it is until it is let go of as often as it was taken; None if it is not here."""
        piece = self._pieces.get((manifest_id, index))
        if piece is not None:
            self._pieces.move_to_end((manifest_id, index))
            piece.used_at = now
            piece.users += 1
        return piece

    def let_go(self, piece: RecentPiece) -> None:
        piece.users -= 1
        if not piece.kept and not piece.users:
            self._pool.give(piece.buffer)

    def expire(self, now: float) -> None:
        """Let go of what nobody has wanted for a while."""
        while self._pieces:
            key, piece = next(iter(self._pieces.items()))
            if now - piece.used_at < KEPT_SECONDS_MAX:
                return
            self._forget(key, piece)

    def _give_one(self) -> bool:
        """Give the pool the buffer that was unused longest. False: there is none to give now."""
        for key, piece in self._pieces.items():
            if not piece.users:
                self._forget(key, piece)
                return True
        return False

    def _forget(self, key: tuple[str, int], piece: RecentPiece) -> None:
        del self._pieces[key]
        self._bytes -= len(piece.buffer)
        piece.kept = False
        if not piece.users:
            self._pool.give(piece.buffer)
