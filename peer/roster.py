"""Who is in the swarm, as one download sees it: known, linked, banned, and which links to open next. Pure.

Owned here: the life of a peer from the first word of it to the last, its copies in the picker's count, and how many
links are opened. What is asked of a linked peer is `peer.download`'s; what it can carry `peer.sources`'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

from peer import swarm_events as ev
from peer.bitmap import Mask, without
from peer.picker import Picker
from peer.sources import Source
from peer.swarm_events import Action, Fault

LINKS_MAX: Final = 48  # until then we open links; others may link to us beyond it
# Of them, to peers that have not everything: news of pieces costs the square of it in a crowd. A crowd of 32 ends as
# soon with 6 as with 10 in the model, with a quarter less news, and sooner where processors are the limit.
LEECHER_LINKS_MAX: Final = 6
CONNECTS_AT_ONCE_MAX: Final = 16
REPORT_AFTER_CONNECT_FAILURES: Final = 2
PARTED_FAILURES: Final = 4  # a peer that was dropped counts as that many failures to reach it
REPLACED_SECONDS: Final = 30.0


class Roster:
    """The peers of one swarm. Actions go to `out`; names of peers worth another look to `stirred`."""

    def __init__(self, me: str, picker: Picker, rng: random.Random, out: list[Action]) -> None:
        self._me = me
        self._picker = picker
        self._rng = rng
        self._out = out
        self.sources: dict[str, Source] = {}
        self.stirred: set[str] = set()  # peers that may have room for a request
        self.linked = 0
        self.leechers = 0  # linked or listed peers that have not everything
        self.links_at: float | None = 0.0  # when to look for peers to link to; None: no need
        self._connecting = 0
        self._banned: set[str] = set()
        self._choosers: tuple[str, ...] | None = None  # None: look again

    def __getitem__(self, peer: str) -> Source:
        return self.sources[peer]

    def get(self, peer: str) -> Source | None:
        return self.sources.get(peer)

    def linked_sources(self) -> Iterator[Source]:
        return (source for source in self.sources.values() if source.linked)

    def known(self) -> list[tuple[str, tuple[str, ...], bool]]:
        """(peer, addresses, complete) of every peer worth telling others about."""
        return [
            (peer, source.addresses, source.complete)
            for peer, source in self.sources.items()
            if source.addresses and (source.linked or (source.listed and not source.connect_failures))
        ]

    def is_banned(self, peer: str) -> bool:
        return peer in self._banned

    def choosers(self) -> tuple[str, ...]:
        """The linked full seeders that choose for us, sorted."""
        if self._choosers is None:
            self._choosers = tuple(
                sorted(source.peer for source in self.linked_sources() if source.complete and source.chooses)
            )
        return self._choosers

    def stir_all(self) -> None:
        self.stirred.update(self.sources)

    # ---- news of peers ---------------------------------------------------------------------------------------

    def joined(self, event: ev.PeerJoined, now: float) -> None:
        if event.peer == self._me or event.peer in self._banned:
            return
        source = self._source(event.peer)
        was_leecher = self._is_leecher(source)
        if event.addresses and event.addresses != source.addresses:
            source.addresses = event.addresses
            source.connect_at = min(source.connect_at, now)
        source.listed = True
        if not source.linked:
            source.leaving = False
            source.complete = event.complete
            if not source.connecting:
                self._look_for_links(source.connect_at)
        self.leechers += self._is_leecher(source) - was_leecher

    def left(self, peer: str) -> None:
        """No source lists it any more. A live link stays in use."""
        source = self.sources.get(peer)
        if source is not None:
            was_leecher = self._is_leecher(source)
            source.listed = False
            self.leechers += self._is_leecher(source) - was_leecher
            self._forget_if_idle(source)

    def link_up(self, event: ev.LinkUp, now: float) -> None:
        if event.peer == self._me:
            return
        if event.peer in self._banned:
            self._out.append(ev.DropPeer(event.peer, "it sent a wrong piece before", banned=True))
            return
        source = self._source(event.peer)
        was_leecher = self._is_leecher(source)
        self._no_longer_connecting(source)
        if source.linked:
            self._picker.peer_lost(source.have)
        else:
            source.linked = True
            self.linked += 1
        source.connect_failures = 0
        source.leaving = False
        source.have = event.have
        source.complete = self._picker.is_full(event.have)
        source.chooses = True
        source.latency.add(event.latency_seconds, now)
        self._picker.peer_has(event.have)
        self.leechers += self._is_leecher(source) - was_leecher
        self._choosers = None
        self.stirred.add(event.peer)

    def link_down(self, source: Source, event: ev.LinkDown, now: float) -> None:
        was_leecher = self._is_leecher(source)
        self._no_longer_connecting(source)
        self._unlink(source)
        if event.leaving:
            source.leaving = True
            source.listed = False
        else:
            source.not_reached(now, self._rng)
            if not event.reached and source.connect_failures == REPORT_AFTER_CONNECT_FAILURES:
                self.report(source, Fault.UNREACHABLE)
        self.leechers += self._is_leecher(source) - was_leecher
        self._look_for_links(now)
        self._forget_if_idle(source)

    def has(self, source: Source, pieces: Mask) -> None:
        """News of a linked peer's pieces."""
        new = without(pieces, source.have)
        if not new or not source.linked:
            return
        source.have |= new
        self._picker.peer_has(new)
        if self._picker.is_full(source.have):
            self.leechers -= self._is_leecher(source)
            source.complete = True
            source.chooses = False  # it came by its pieces in this swarm: each has gone out
        if new & self._picker.free:
            self.stirred.add(source.peer)

    def has_not(self, source: Source, index: int) -> None:
        """A piece that a peer was thought to have."""
        if source.have >> index & 1:
            source.have ^= 1 << index
            self._picker.peer_lost(1 << index)
            self.leechers -= self._is_leecher(source)
            source.complete = False
            self.leechers += self._is_leecher(source)
            self._choosers = None

    def chooses_no_more(self, source: Source) -> None:
        source.chooses = False
        self._choosers = None

    def part(self, source: Source, now: float, reason: str, *, banned: bool = False) -> None:
        """Leave a peer: for good if `banned`, else until it is heard of again."""
        self.leechers -= self._is_leecher(source)
        self._unlink(source)
        self._no_longer_connecting(source)
        source.listed = False
        source.connect_failures = max(source.connect_failures, PARTED_FAILURES)
        source.not_reached(now, self._rng)
        if banned:
            self._banned.add(source.peer)
        self._look_for_links(now)
        self._out.append(ev.DropPeer(source.peer, reason, banned))

    def report(self, source: Source, fault: Fault) -> None:
        """Tell the trackers, once per peer and fault."""
        if fault not in source.reported:
            source.reported.add(fault)
            self._out.append(ev.ReportPeer(source.peer, fault))

    # ---- links -----------------------------------------------------------------------------------------------

    def open_links(self, now: float) -> None:
        """Link to some of the peers that are known, seeders and leechers mixed, and none twice."""
        self.links_at = None
        room = min(LINKS_MAX - self.linked, CONNECTS_AT_ONCE_MAX) - self._connecting
        if room <= 0:
            return  # each end of a link or of an attempt looks again
        seeders: list[Source] = []
        leechers: list[Source] = []
        for source in self.sources.values():
            if source.linked or source.connecting or not (source.listed and source.addresses):
                continue
            if source.connect_at <= now:
                (seeders if source.complete else leechers).append(source)
            else:
                self._look_for_links(source.connect_at)
        self._rng.shuffle(seeders)
        self._rng.shuffle(leechers)
        leechers = leechers[: max(0, LEECHER_LINKS_MAX - self._leecher_links())]
        if len(seeders) + len(leechers) > room:
            self._look_for_links(now)
            if len(seeders) > room // 2:  # both kinds: seeders have everything, leechers have time
                seeders = seeders[: max(room // 2, room - len(leechers))]
        for source in (seeders + leechers)[:room]:
            source.connecting = True
            self._connecting += 1
            self._out.append(ev.Connect(source.peer, source.addresses))

    def _leecher_links(self) -> int:
        return sum(
            1 for each in self.sources.values() if (each.linked or each.connecting) and not each.complete
        )

    def replace_useless(self, now: float) -> None:
        """All links are taken, and none has a missing piece: give one of them up for a peer that is only known."""
        if (self.linked < LINKS_MAX and self._leecher_links() < LEECHER_LINKS_MAX) or not any(
            source.listed and not source.linked and source.connect_at <= now
            for source in self.sources.values()
        ):
            return
        for source in self.linked_sources():
            if not source.requests and not source.have & self._picker.free:
                self.leechers -= self._is_leecher(source)
                self._unlink(source)
                self.leechers += self._is_leecher(source)
                source.connect_at = now + REPLACED_SECONDS
                self._out.append(ev.DropPeer(source.peer, "it has none of the missing pieces"))
                self._look_for_links(now)
                return

    def _look_for_links(self, at: float) -> None:
        if self.links_at is None or at < self.links_at:
            self.links_at = at

    def _source(self, peer: str) -> Source:
        source = self.sources.get(peer)
        if source is None:
            source = self.sources[peer] = Source(peer)
        return source

    def _is_leecher(self, source: Source) -> bool:
        return (source.linked or source.listed) and not source.complete

    def _no_longer_connecting(self, source: Source) -> None:
        if source.connecting:
            source.connecting = False
            self._connecting -= 1
            self._look_for_links(0.0)

    def _unlink(self, source: Source) -> None:
        if source.linked:
            source.linked = False
            source.load = None
            self.linked -= 1
            self._picker.peer_lost(source.have)
            source.have = 0
            self._choosers = None

    def _forget_if_idle(self, source: Source) -> None:
        busy = source.linked or source.listed or source.connecting or source.requests
        if not busy and not source.bytes_got:
            del self.sources[source.peer]
