"""Which piece next: what is here, what is asked for, what is rare. Pure.

A choice weighs, in this order:

1. only pieces that are missing, that the peer in question has, and that nobody was asked for yet;
2. the fewest known copies among the linked peers: what is rare is lost first, and is worth the most to others;
3. at random among equals, so that downloaders with the same view do not all ask for the same.

Copies are counted as news comes in (`Counts`: no scan over pieces, neither per news nor per choice).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import Final

from peer.bitmap import Counts, Mask, any_of, full_mask, without

SHARES: Final = 64  # cells of pieces that are dealt to seeders


class Picker:
    """The state of one download's pieces: here, asked for, missing; and the copies of each in the swarm."""

    def __init__(self, pieces: int, have: Mask, rng: random.Random) -> None:
        self.pieces = pieces
        self._all = full_mask(pieces)
        self.have: Mask = have & self._all
        self._free: Mask = self._all ^ self.have  # missing, and asked of nobody
        self.missing = pieces - self.have.bit_count()
        self.free_count = self.missing
        self._copies = Counts()
        self._rng = rng

    @property
    def free(self) -> Mask:
        """Missing pieces that nobody is asked for."""
        return self._free

    @property
    def complete(self) -> bool:
        return not self.missing

    def is_full(self, mask: Mask) -> bool:
        return mask == self._all

    def holds(self, index: int) -> bool:
        return bool(self.have >> index & 1)

    def peer_has(self, new: Mask) -> None:
        """A linked peer has these (told once for each)."""
        self._copies.add(new & self._all)

    def peer_lost(self, old: Mask) -> None:
        """A peer that had these is gone, or never had them."""
        self._copies.remove(old & self._all)

    def copies(self, index: int) -> int:
        """Known copies of a piece, ours not among them."""
        return self._copies.of(index)

    def pick(self, among: Mask) -> int | None:
        """The rarest free piece of `among`, ties at random; None where there is none."""
        candidates = among & self._free
        if not candidates:
            return None
        return any_of(self._copies.fewest(candidates)[1], self._rng)

    def asked(self, index: int) -> None:
        """The piece is asked of someone: not free."""
        bit = 1 << index
        if self._free & bit:
            self._free ^= bit
            self.free_count -= 1

    def released(self, index: int) -> None:
        """Nobody is asked for the piece any more; free again unless it is here."""
        bit = 1 << index
        if not (self.have | self._free) & bit:
            self._free ^= bit
            self.free_count += 1

    def gained(self, index: int) -> bool:
        """The piece is verified and written. False: it was here already (counted once)."""
        bit = 1 << index
        if self.have & bit:
            return False
        self.have |= bit
        self.missing -= 1
        if self._free & bit:
            self._free ^= bit
            self.free_count -= 1
        return True

    def lost(self, mask: Mask) -> Mask:
        """Pieces that are no longer here; those that were are free, and returned."""
        gone = mask & self.have
        self.have ^= gone
        self._free |= gone
        self.missing += gone.bit_count()
        self.free_count += gone.bit_count()
        return gone


class Shares:
    """Deals the pieces out to several full seeders that choose for us, so that no two choose the same.

    Every downloader that knows the same seeders deals alike (rendezvous hashing: highest random weight), and when one
    comes or goes only its own share moves.
    """

    def __init__(self, pieces: int) -> None:
        cells = min(SHARES, max(pieces, 1))
        every = 0  # one bit in `cells`, doubled until it covers all pieces
        covered = cells
        every = 1
        while covered < pieces:
            every |= every << covered
            covered *= 2
        every &= full_mask(pieces)
        everything = full_mask(pieces)
        self._cells = [(every << cell) & everything for cell in range(cells)]
        self._seeders: tuple[str, ...] = ()
        self._shares: dict[str, Mask] = {}

    def of(self, seeder: str, seeders: Sequence[str]) -> Mask:
        """The share of `seeder` among `seeders` (sorted, at least two)."""
        if tuple(seeders) != self._seeders:
            self._seeders = tuple(seeders)
            self._shares = dict.fromkeys(self._seeders, 0)
            for number, cell in enumerate(self._cells):
                salt = b"%d/" % number
                owner = max(self._seeders, key=lambda name: zlib.crc32(name.encode(), zlib.crc32(salt)))
                self._shares[owner] |= cell
        return self._shares[seeder]


def rest(mask: Mask, share: Mask) -> Mask:
    """`mask` within `share`, or all of it when nothing is left there."""
    return mask & share or without(mask, share)
