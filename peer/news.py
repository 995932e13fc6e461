"""What each linked peer is told of our new pieces, and when. Pure.

Owned here: who was told what, and when the next frame is worth its cost. In a crowd news costs the square of the
links, and most of it changes nothing: a peer that can still ask us for several pieces it lacks has no use for another
one now, and one that has the piece already has none at all. So what is told at once is what a peer is about to run
out of; the rest goes together, later. Who has everything only wants to know, now and then, that what it sent arrived
(`sender.py` counts it as sent until then). That we are whole ends the asking, and is told at once.
"""

from __future__ import annotations

from typing import Final

from peer.bitmap import Mask, full_mask, without

SOON_SECONDS: Final = 0.002  # what is verified within it goes together
SOON_SECONDS_PER_LINK: Final = 0.0005
LATER_SECONDS_MAX: Final = 0.5
LATER_SHARE: Final = 1 / 16  # of the time in which the peer, at the pace seen so far, has everything
STOCK_PIECES: Final = 2  # that a peer lacks and knows to be here: with fewer it is told soon
CONFIRM_SECONDS: Final = 0.5


class _Neighbour:
    __slots__ = ("_had", "due_at", "have", "since", "told")

    def __init__(self, have: Mask, told: Mask, now: float) -> None:
        self.have = have
        self.told = told
        self.due_at: float | None = None
        self.since = now
        self._had = have.bit_count()

    def seconds_left(self, pieces: int, now: float) -> float:
        """Until it has everything, if it goes on as since it was linked."""
        held = self.have.bit_count()
        gained = held - self._had
        return (pieces - held) * (now - self.since) / gained if gained else float("inf")


class News:
    """Of one swarm. Feed it, and take what is `due` at `wake_at`."""

    def __init__(self, pieces: int, have: Mask) -> None:
        self._pieces = pieces
        self._all = full_mask(pieces)
        self._have = have
        self._neighbours: dict[str, _Neighbour] = {}
        self.wake_at: float | None = None

    def gained(self, pieces: Mask, now: float) -> None:
        """We hold these too."""
        self._have |= pieces
        for neighbour in self._neighbours.values():
            self._plan(neighbour, now)

    def lost(self, pieces: Mask) -> None:
        """We hold these no more; should they come back, that is news."""
        self._have = without(self._have, pieces)
        for neighbour in self._neighbours.values():
            neighbour.told = without(neighbour.told, pieces)

    def linked(self, peer: str, have: Mask, told: Mask, now: float) -> None:
        """A link is up (again: it replaces the old one). `told` is what our hello said."""
        neighbour = self._neighbours[peer] = _Neighbour(have, told, now)
        self._plan(neighbour, now)

    def heard(self, peer: str, new: Mask, now: float) -> None:
        """The peer has these too."""
        neighbour = self._neighbours.get(peer)
        if neighbour is not None:
            neighbour.have |= new
            self._plan(neighbour, now)

    def unlinked(self, peer: str) -> None:
        self._neighbours.pop(peer, None)

    def due(self, now: float) -> list[tuple[Mask, list[str]]]:
        """Whom to tell what, now. Counts as told."""
        telling: dict[Mask, list[str]] = {}
        wake_at: float | None = None
        for peer, neighbour in self._neighbours.items():
            at = neighbour.due_at
            if at is None:
                continue
            if at <= now:
                neighbour.due_at = None
                if new := without(self._have, neighbour.told):
                    telling.setdefault(new, []).append(peer)
                    neighbour.told |= new
            elif wake_at is None or at < wake_at:
                wake_at = at
        self.wake_at = wake_at
        return list(telling.items())

    def _plan(self, neighbour: _Neighbour, now: float) -> None:
        untold = without(self._have, neighbour.told)
        if not untold:
            return
        if self._have == self._all:
            at = now
        elif neighbour.have == self._all:
            at = now + CONFIRM_SECONDS
        elif not without(untold, neighbour.have):
            return
        else:
            delay = SOON_SECONDS + SOON_SECONDS_PER_LINK * len(self._neighbours)
            if without(neighbour.told, neighbour.have).bit_count() >= STOCK_PIECES:
                later = LATER_SHARE * neighbour.seconds_left(self._pieces, now)
                delay = max(delay, min(later, LATER_SECONDS_MAX))
            at = now + delay
        if neighbour.due_at is None or at < neighbour.due_at:
            neighbour.due_at = at
            if self.wake_at is None or at < self.wake_at:
                self.wake_at = at
