"""Sets of pieces as whole numbers, and counters over all pieces at once.

A *mask* is an `int` in which bit i stands for piece i. Python's wide integers make "what this peer has and I
want and nobody sends me yet" three operations, whatever the number of pieces (0.1 µs each at 4,096 pieces, 2 to
6 µs at 262,144). On the wire and on disk a set of pieces is BEP 3's bitmap: bit i of byte i // 8, most
significant first.

`Counts` counts copies of every piece in vertical counters (plane k holds bit k of every count), so that adding
a peer's whole bitmap, or finding the rarest among the wanted, costs a few wide operations and never a loop over
pieces.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final, TypeAlias

Mask: TypeAlias = int

_REVERSED_BYTES: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class BitmapError(ValueError):
    """A bitmap from the network that does not fit the manifest."""


def full_mask(pieces: int) -> Mask:
    """All of `pieces`."""
    return (1 << pieces) - 1


def mask_of(indices: Iterable[int]) -> Mask:
    """The set of `indices` (any order, repeats allowed, none negative)."""
    wanted = list(indices)
    if len(wanted) < 8:
        mask = 0
        for index in wanted:
            mask |= 1 << index
        return mask
    flags = bytearray(max(wanted) // 8 + 1)
    for index in wanted:
        flags[index >> 3] |= 1 << (index & 7)
    return int.from_bytes(flags, "little")


def indices_of(mask: Mask) -> list[int]:
    """The pieces in `mask`, ascending."""
    if not mask:
        return []
    digits = bin(mask)[:1:-1]
    found = []
    at = digits.find("1")
    while at >= 0:
        found.append(at)
        at = digits.find("1", at + 1)
    return found


def without(mask: Mask, removed: Mask) -> Mask:
    """`mask & ~removed`, which would be five times slower on wide numbers."""
    return mask ^ (mask & removed)


def to_wire(mask: Mask, pieces: int) -> bytes:
    """BEP 3's bitmap of `mask`, ceil(pieces / 8) bytes."""
    return mask.to_bytes((pieces + 7) // 8, "little").translate(_REVERSED_BYTES)


def from_wire(bitmap: bytes, pieces: int) -> Mask:
    """The mask of a BEP 3 bitmap. Raises `BitmapError` on a wrong length or a bit past the last piece."""
    if len(bitmap) != (pieces + 7) // 8:
        raise BitmapError(
            f"a bitmap of {pieces} pieces has {(pieces + 7) // 8} bytes, this one {len(bitmap)}"
        )
    mask = int.from_bytes(bitmap.translate(_REVERSED_BYTES), "little")
    if mask >> pieces:
        raise BitmapError(f"a bitmap names a piece past the last of {pieces}")
    return mask


def any_of(mask: Mask, rng: random.Random) -> int:
    """One piece of a non-empty `mask`, each equally likely (halving by population count)."""
    width = mask.bit_length()
    wanted = int(rng.random() * mask.bit_count())
    base = 0
    while width > 1:
        half = width >> 1
        low = mask & ((1 << half) - 1)
        below = low.bit_count()
        if wanted < below:
            mask, width = low, half
        else:
            wanted -= below
            mask >>= half
            base += half
            width -= half
    return base


class Counts:
    """How many copies of each piece are known. Counts never go below zero: removing what was never added
    is an error of the caller, and asserted."""

    __slots__ = ("_planes",)

    def __init__(self) -> None:
        self._planes: list[Mask] = []

    def add(self, mask: Mask) -> None:
        """One more copy of each piece in `mask`."""
        planes = self._planes
        for level, plane in enumerate(planes):
            if not mask:
                return
            planes[level] = plane ^ mask
            mask &= plane
        if mask:
            planes.append(mask)

    def remove(self, mask: Mask) -> None:
        """One copy less of each piece in `mask`."""
        planes = self._planes
        for level, plane in enumerate(planes):
            if not mask:
                break
            planes[level] = plane ^ mask
            mask ^= mask & plane
        assert not mask, "a copy was removed that was never counted"
        while planes and not planes[-1]:
            planes.pop()

    def of(self, index: int) -> int:
        """Copies of one piece."""
        return sum(((plane >> index) & 1) << level for level, plane in enumerate(self._planes))

    def at_least_one(self) -> Mask:
        """Every piece that has a copy."""
        seen = 0
        for plane in self._planes:
            seen |= plane
        return seen

    def fewest(self, among: Mask) -> tuple[int, Mask]:
        """The least count found in a non-empty `among`, and all pieces of `among` that have it."""
        count = 0
        for level in range(len(self._planes) - 1, -1, -1):
            present = among & self._planes[level]
            if present == among:
                count |= 1 << level
            else:
                among ^= present
        return count, among
