"""One swarm as this peer knows it: the manifest, the pieces that are here, who is linked, which groups may have it.

Owned here: the state that serving, linking and downloading share, and its consistency. Left to others: the wire
(`server.py`, `links.py`), the choice (`sender.py`), fetching (`downloads.py`). Belongs to the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .bitmap import Mask, full_mask, without
from .content import Content
from .manifest import Manifest
from .news import News
from .sender import SendersChoice

if TYPE_CHECKING:
    from .links import Link


class Swarm:
    """`offers` maps each group that may have this content from us to the names under which it has it."""

    def __init__(self, peer_id: str, manifest: Manifest, content: Content, have: Mask) -> None:
        self.manifest = manifest
        self.manifest_id = manifest.id
        self.content = content
        self.have = have
        self.all = full_mask(manifest.pieces)
        self.offers: dict[str, set[str]] = {}
        self.gone_reason = ""  # why it is offered no more
        self.choice = SendersChoice(peer_id, manifest.id, manifest.pieces, have)
        self.news = News(manifest.pieces, have)
        self.links: dict[str, Link] = {}  # by peer_id
        self.banned: set[str] = set()  # sent us wrong pieces: not served, not linked
        self.uploaded_bytes = 0

    def has(self, index: int) -> bool:
        return bool(self.have >> index & 1)

    @property
    def complete(self) -> bool:
        return self.have == self.all

    @property
    def held_pieces(self) -> int:
        return self.have.bit_count()

    @property
    def wanted_by_others(self) -> bool:
        """Whether anybody who is linked lacks a piece."""
        return any(link.have != self.all for link in self.links.values())

    def gained(self, pieces: Mask) -> Mask:
        """These are here now; returns those that were not before."""
        new = without(pieces, self.have)
        if new:
            self.have |= new
            self.choice.gained(new)
        return new

    def lost(self, pieces: Mask) -> None:
        self.have = without(self.have, pieces)
        self.choice.lost(pieces)
        self.news.lost(pieces)

    def offered_to(self, group: str) -> bool:
        return group in self.offers


class Swarms:
    """All swarms of this peer, by manifest."""

    def __init__(self) -> None:
        self._by_id: dict[str, Swarm] = {}

    def __iter__(self) -> Iterator[Swarm]:
        return iter(list(self._by_id.values()))

    def get(self, manifest_id: str) -> Swarm | None:
        return self._by_id.get(manifest_id)

    def add(self, swarm: Swarm) -> None:
        self._by_id[swarm.manifest_id] = swarm

    def remove(self, manifest_id: str) -> None:
        self._by_id.pop(manifest_id, None)
