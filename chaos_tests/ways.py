"""What passes from one node to another, whoever of the two dialled: the hand of a fault on a pair of nodes."""

from __future__ import annotations

from collections.abc import Sequence

from chaos_tests.proxy import Direction


class Way:
    """All bytes from one node to another: forward on the links the first dials, backward on the others."""

    def __init__(self, directions: Sequence[Direction]) -> None:
        self._directions = directions

    def set(self, **faults: float) -> None:
        for direction in self._directions:
            direction.set(**faults)

    def heal(self) -> None:
        for direction in self._directions:
            direction.heal()

    @property
    def bitten(self) -> int:
        return sum(direction.bitten for direction in self._directions)
