"""One download as a machine without I/O: events in, actions out (`peer.swarm_events` has both, and the order).

Everything that decides which piece is asked of whom, and what a peer's failure means, lives here and in what it
uses: `peer.picker` (which piece), `peer.sources` (what a peer can carry). The engine drives it; the simulated
swarm in the tests drives hundreds of it with a fake clock.

How it goes on:

- A peer with room in its pipeline is given a piece: the rarest it has. A full seeder is asked to choose by itself
  (`RequestNext`) while other downloaders are about, until it says that nothing is left to choose.
- Rooms are filled from the least loaded peer on, one request each before anyone gets a second.
- A piece that fails, for whatever reason, is free again at once, and goes to another peer.
- When nothing is free any more, peers with room are asked for what others hold up, if they would finish it well before;
  the first copy wins and the others are cancelled.
- A peer that sent a wrong piece is cut off for the swarm.
- Peers become known from trackers and from other peers; nothing here needs a tracker to be there.

Costs are per event and per request, not per piece or per peer: only peers that something happened to are
looked at (`_stirred`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, Final

from peer import swarm_events as ev
from peer.bitmap import Mask, indices_of, without
from peer.picker import Picker, Shares, rest
from peer.sources import Request, Source, Stage
from peer.swarm_events import Action, Event, Failure, Fault, WaitReason

LINKS_MAX: Final = 48  # opened by us; others may link to us beyond it
CONNECTS_AT_ONCE_MAX: Final = 16
COPIES_ASKED_MAX: Final = 3  # of one piece, at the end
CHECK_SECONDS: Final = 0.25  # between looks for stalled requests
END_CHECK_SECONDS: Final = 0.02  # between looks for held-up last pieces, and for each request in flight
END_CHECK_SECONDS_PER_REQUEST: Final = 0.001
HELP_RATIO: Final = 1.5  # a second copy is asked for where it would be here in two thirds of the time
HELP_SECONDS: Final = 0.05  # and this much sooner
FIND_SECONDS: Final = 2.0
FIND_SECONDS_MAX: Final = 30.0
REPORT_AFTER_CONNECT_FAILURES: Final = 2
REPORT_AFTER_STALLS: Final = 2
NEWS_SECONDS_PER_LINK: Final = 0.008  # a crowd of 32 pays 4 % in time, and saves nine frames of ten
NEWS_SECONDS_MAX: Final = 0.25
NEWS_AT_ONCE_LINKS: Final = 8
FAILURES_UNTIL_DROPPED: Final = 6
SLOW_SHARE: Final = 0.25  # of the mean rate: below it a peer gets no more than one piece of a scarce budget


class Download:
    """One download, or the wish to keep one whole. See the module and `peer.swarm_events`.

    `pieces`, `piece_bytes` and `size_bytes` are the manifest's, `have` what is on disk and verified, `budget_pieces` how many
    pieces may be in memory. `rng` breaks ties; give each peer its own.
    """

    def __init__(
        self,
        *,
        peer_id: str,
        pieces: int,
        piece_bytes: int,
        size_bytes: int,
        have: Mask = 0,
        budget_pieces: int = 32,
        rng: random.Random | None = None,
    ) -> None:
        self._me = peer_id
        self._piece_bytes = piece_bytes
        self._size_bytes = size_bytes
        self._last_piece_bytes = size_bytes - (pieces - 1) * piece_bytes if pieces else 0
        self._rng = rng or random.Random()  # noqa: S311 - ties and jitter
        self.picker = Picker(pieces, have, self._rng)
        self.sources: dict[str, Source] = {}
        self._banned: set[str] = set()
        self._requests: dict[int, Request] = {}
        self._of_piece: dict[int, list[Request]] = {}
        self._next_number = 1
        self._shares = Shares(pieces)
        self._choosers: tuple[str, ...] | None = None  # full seeders that choose; None: look again
        self._leechers = 0  # linked or listed peers that are not complete
        self._linked = 0
        self._connecting = 0
        self._budget_pieces = max(1, budget_pieces)
        self._read_bytes_per_second = 0.0
        self._stirred: set[str] = set()  # sources that may have room
        self._look_for_links = True
        self._news: Mask = 0
        self._news_at = 0.0  # not before
        self._check_at = 0.0
        self._end_at = 0.0
        self._find_at = 0.0
        self._find_pause = FIND_SECONDS
        self._hold_until = 0.0
        self._paused = False
        self._token_valid = True
        self._trackers_away = False
        self._waiting: WaitReason | None = None
        self._was_done = False
        self._out: list[Action] = []
        self.wake_at: float | None = 0.0
        self.received_bytes = 0  # verified, of this run
        self.duplicate_pieces = 0
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            ev.PeerJoined: self._peer_joined,
            ev.PeerLeft: self._peer_left,
            ev.LinkUp: self._link_up,
            ev.LinkDown: self._link_down,
            ev.Have: self._heard_have,
            ev.Load: self._heard_load,
            ev.LatencyMeasured: self._latency_measured,
            ev.PieceStarted: self._piece_started,
            ev.BytesArrived: self._bytes_arrived,
            ev.PieceArrived: self._piece_arrived,
            ev.PieceVerified: self._piece_verified,
            ev.PieceWrong: self._piece_wrong,
            ev.PieceFailed: self._piece_failed,
            ev.PiecesFound: self._pieces_found,
            ev.PiecesLost: self._pieces_lost,
            ev.Budget: self._budget,
            ev.TrackersAway: self._trackers_gone,
            ev.TrackersBack: self._trackers_returned,
            ev.TokenExpired: self._token_expired,
            ev.TokenRenewed: self._token_renewed,
            ev.Pause: self._pause,
            ev.Resume: self._resume,
        }

    # ---- what the driver asks --------------------------------------------------------------------------------

    def feed(self, event: Event, now: float) -> None:
        """Something happened. Cheap; decides nothing that can wait for `actions`."""
        self._handlers[type(event)](event, now)

    def actions(self, now: float) -> list[Action]:
        """What to do now, in this order. Sets `wake_at`."""
        if not self.picker.complete:
            self._check_requests(now)
            self._fill(now)
        if self._look_for_links:
            self._open_links(now)
        self._tell_news(now)
        self._tell_state(now)
        self._set_wake(now)
        out, self._out = self._out, []
        return out

    @property
    def have(self) -> Mask:
        """The pieces that are here."""
        return self.picker.have

    @property
    def done(self) -> bool:
        return self.picker.complete

    @property
    def waiting(self) -> WaitReason | None:
        return self._waiting

    @property
    def in_flight(self) -> int:
        """Requests that have not ended, those being checked among them."""
        return len(self._requests)

    @property
    def linked_peers(self) -> list[str]:
        return [peer for peer, source in self.sources.items() if source.linked]

    def known_peers(self) -> list[tuple[str, tuple[str, ...], bool]]:
        """(peer, addresses, complete) of every peer worth telling others about: the link's `pex`."""
        return [
            (peer, source.addresses, source.complete)
            for peer, source in self.sources.items()
            if source.addresses and (source.linked or (source.listed and not source.connect_failures))
        ]

    def is_banned(self, peer: str) -> bool:
        """It sent a wrong piece: nothing of it is accepted in this swarm."""
        return peer in self._banned

    def bytes_per_second(self, now: float) -> float:
        """What all peers send now."""
        return sum(source.rate.bytes_per_second(now) for source in self.sources.values() if source.in_flight)

    def length_of(self, index: int) -> int:
        """Bytes of one piece."""
        return self._last_piece_bytes if index == self.picker.pieces - 1 else self._piece_bytes

    # ---- peers come and go -----------------------------------------------------------------------------------

    def _peer_joined(self, event: ev.PeerJoined, now: float) -> None:
        if event.peer == self._me or event.peer in self._banned:
            return
        source = self._source(event.peer)
        was_leecher = self._is_leecher(source)
        if event.addresses and event.addresses != source.addresses:
            source.addresses = event.addresses
            source.connect_at = min(source.connect_at, now)
        if source.leaving and not source.linked:
            source.leaving = False
        source.listed = True
        if not source.linked:
            source.complete = event.complete
        self._leechers += self._is_leecher(source) - was_leecher
        self._look_for_links = True

    def _peer_left(self, event: ev.PeerLeft, now: float) -> None:
        source = self.sources.get(event.peer)
        if source is None:
            return
        was_leecher = self._is_leecher(source)
        source.listed = False
        self._leechers += self._is_leecher(source) - was_leecher
        self._forget_if_useless(source)

    def _link_up(self, event: ev.LinkUp, now: float) -> None:
        if event.peer == self._me:
            return
        if event.peer in self._banned:
            self._out.append(ev.DropPeer(event.peer, "it sent a wrong piece before", banned=True))
            return
        source = self._source(event.peer)
        was_leecher = self._is_leecher(source)
        if source.linked:
            self.picker.peer_lost(source.have)
        else:
            source.linked = True
            self._linked += 1
        if source.connecting:
            source.connecting = False
            self._connecting -= 1
        source.connect_failures = 0
        source.leaving = False
        source.have = event.have
        source.complete = self.picker.is_full(event.have)
        source.chooses = True
        source.latency.add(event.latency_seconds, now)
        self.picker.peer_has(event.have)
        self._leechers += self._is_leecher(source) - was_leecher
        self._choosers = None
        self._find_pause = FIND_SECONDS
        self._stirred.add(event.peer)

    def _link_down(self, event: ev.LinkDown, now: float) -> None:
        source = self.sources.get(event.peer)
        if source is None:
            return
        was_leecher = self._is_leecher(source)
        if source.connecting:
            source.connecting = False
            self._connecting -= 1
        if source.linked:
            source.linked = False
            self._linked -= 1
            self.picker.peer_lost(source.have)
            source.have = 0
            self._choosers = None
        source.load = None
        if event.leaving:
            source.leaving = True
            source.listed = False
            for request in [r for r in source.requests.values() if r.stage is Stage.ASKED]:
                self._cancel(request, now)
        else:
            source.not_reached(now, self._rng)
            failures = source.connect_failures
            if not event.reached and failures == REPORT_AFTER_CONNECT_FAILURES:
                self._report(source, Fault.UNREACHABLE)
        self._leechers += self._is_leecher(source) - was_leecher
        self._look_for_links = True
        self._forget_if_useless(source)

    def _heard_have(self, event: ev.Have, now: float) -> None:
        source = self.sources.get(event.peer)
        if source is None or not source.linked:
            return
        new = without(event.pieces, source.have)
        if not new:
            return
        source.have |= new
        self.picker.peer_has(new)
        if self.picker.is_full(source.have):
            self._leechers -= self._is_leecher(source)
            source.complete = True
            source.chooses = False  # it came by its pieces in this swarm: each has gone out
        if new & self.picker.free:
            self._stirred.add(event.peer)

    def _heard_load(self, event: ev.Load, now: float) -> None:
        source = self.sources.get(event.peer)
        if source is not None:
            source.load = event

    def _latency_measured(self, event: ev.LatencyMeasured, now: float) -> None:
        source = self.sources.get(event.peer)
        if source is not None:
            source.latency.add(event.seconds, now)

    def _source(self, peer: str) -> Source:
        source = self.sources.get(peer)
        if source is None:
            source = self.sources[peer] = Source(peer)
        return source

    def _is_leecher(self, source: Source) -> bool:
        return (source.linked or source.listed) and not source.complete

    def _forget_if_useless(self, source: Source) -> None:
        idle = not (source.linked or source.listed or source.connecting or source.requests)
        if idle and not source.bytes_got and not source.addresses:
            del self.sources[source.peer]

    # ---- requests go their way -------------------------------------------------------------------------------

    def _piece_started(self, event: ev.PieceStarted, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        source = self.sources[request.peer]
        if request.alone:
            source.latency.add(now - request.asked_at, now)
            request.alone = False
        request.heard_at = now
        if request.stage is Stage.ASKED:
            request.stage = Stage.COMING
        if request.index >= 0:
            if request.index != event.index:
                self._cancel(request, now)
                self._failed_badly(source, now, "it answered with another piece than was asked")
            return
        if event.index < 0 or not request.want >> event.index & 1:
            self._cancel(request, now)
            self._failed_badly(source, now, "it chose a piece that was not wanted")
            return
        if self.picker.holds(event.index):
            self.duplicate_pieces += 1
            self._cancel(request, now)
            return
        others = self._of_piece.get(event.index)
        if others:
            if any(other.stage is not Stage.ASKED for other in others):
                self.duplicate_pieces += 1
                self._cancel(request, now)
                return
            for other in list(others):
                self._cancel(other, now)
        request.index = event.index
        request.want = 0
        length = self.length_of(event.index)
        source.in_flight_bytes += length - request.length_bytes
        request.length_bytes = length
        self._of_piece.setdefault(event.index, []).append(request)
        self.picker.asked(event.index)

    def _bytes_arrived(self, event: ev.BytesArrived, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None or request.stage is Stage.CHECKING:
            return
        request.stage = Stage.COMING
        request.heard_at = now
        count = min(event.count, request.length_bytes - request.got_bytes)
        request.got_bytes += count
        source = self.sources[request.peer]
        source.in_flight_bytes -= count
        source.rate.add(count, now)

    def _piece_arrived(self, event: ev.PieceArrived, now: float) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            self._arrived(request, now)

    def _arrived(self, request: Request, now: float) -> None:
        if request.stage is Stage.CHECKING:
            return
        source = self.sources[request.peer]
        source.rate.add(request.length_bytes - request.got_bytes, now)
        self._leave_flight(source, request, now)
        request.got_bytes = request.length_bytes
        request.stage = Stage.CHECKING
        request.heard_at = now
        source.arrived_pieces += 1
        self._stirred.add(request.peer)

    def _leave_flight(self, source: Source, request: Request, now: float) -> None:
        source.in_flight -= 1
        source.in_flight_bytes -= request.length_bytes - request.got_bytes
        if not source.in_flight:
            source.in_flight_bytes = 0
            source.rate.idle(now)

    def _piece_verified(self, event: ev.PieceVerified, now: float) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            self._arrived(request, now)
            self._end(request, now)
        index = event.index
        if not self.picker.gained(index):
            self.duplicate_pieces += request is not None
            return
        self._news |= 1 << index
        length = self.length_of(index)
        if request is not None:
            self.received_bytes += length
            self.sources[request.peer].delivered(length)
        for other in list(self._of_piece.get(index, ())):
            self._cancel(other, now)

    def _piece_wrong(self, event: ev.PieceWrong, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        peer = request.peer
        source = self.sources[peer]
        self._report(source, Fault.BAD_PIECE)
        self._banned.add(peer)
        self._part(source, now, "it sent a wrong piece", banned=True)

    def _piece_failed(self, event: ev.PieceFailed, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        source = self.sources[request.peer]
        index = request.index
        silent = request.stage is Stage.ASKED
        self._end(request, now)
        match event.failure:
            case Failure.BUSY:
                source.busy(now, self._rng, event.retry_after_seconds)
            case Failure.NOTHING_TO_CHOOSE:
                source.chooses = False
                self._choosers = None
                self._stirred.add(source.peer)
            case Failure.NOT_HELD:
                self._not_held(source, index, now)
            case Failure.REFUSED:
                source.refused = True
                source.failed(now, self._rng, seconds_min=1.0)
            case Failure.WITHDRAWN:
                self._part(source, now, "its file changed, or it stopped sharing it")
            case Failure.STALLED:
                self._stalled(source, now, silent)
            case Failure.GONE:
                source.failed(now, self._rng)
                if source.failures == FAILURES_UNTIL_DROPPED:
                    self._report(source, Fault.UNREACHABLE)
            case Failure.GARBLED:
                self._failed_badly(source, now, "its answers are not those of a peer")
            case Failure.LOCAL:
                self._hold_until = max(self._hold_until, now + 0.5)

    def _not_held(self, source: Source, index: int, now: float) -> None:
        if index >= 0 and source.have >> index & 1:
            source.have ^= 1 << index
            self.picker.peer_lost(1 << index)
            self._leechers -= self._is_leecher(source)
            source.complete = False
            self._leechers += self._is_leecher(source)
            self._choosers = None
        source.chooses = False
        source.failed(now, self._rng)

    def _failed_badly(self, source: Source, now: float, reason: str) -> None:
        source.failed(now, self._rng, seconds_min=1.0)
        if source.failures >= FAILURES_UNTIL_DROPPED // 2:
            self._part(source, now, reason)

    def _stalled(self, source: Source, now: float, silent: bool) -> None:
        source.failed(now, self._rng)
        if source.failures == REPORT_AFTER_STALLS and not (silent and source.load and source.load.queued):
            self._report(source, Fault.STALLED)

    def _part(self, source: Source, now: float, reason: str, *, banned: bool = False) -> None:
        """Leave a peer for good, or until it is heard of again."""
        for request in list(source.requests.values()):
            self._cancel(request, now)
        was_leecher = self._is_leecher(source)
        if source.linked:
            source.linked = False
            self._linked -= 1
            self.picker.peer_lost(source.have)
            source.have = 0
            self._choosers = None
        if source.connecting:
            source.connecting = False
            self._connecting -= 1
        source.listed = False
        source.connect_failures = max(source.connect_failures, 4)
        source.not_reached(now, self._rng)
        self._leechers -= was_leecher
        self._look_for_links = True
        self._out.append(ev.DropPeer(source.peer, reason, banned))

    def _report(self, source: Source, fault: Fault) -> None:
        if fault.value not in source.reported:
            source.reported.add(fault.value)
            self._out.append(ev.ReportPeer(source.peer, fault))

    def _ask(self, source: Source, index: int, want: Mask, now: float) -> None:
        number = self._next_number
        self._next_number = number + 1
        length = self._piece_bytes if index < 0 else self.length_of(index)
        request = Request(number, source.peer, index, length, now, now, want, alone=not source.in_flight)
        self._requests[number] = request
        source.requests[number] = request
        if not source.in_flight:
            source.rate.busy(now)
        source.in_flight += 1
        source.in_flight_bytes += length
        if index < 0:
            self._out.append(ev.RequestNext(number, source.peer, want))
        else:
            self._of_piece.setdefault(index, []).append(request)
            self.picker.asked(index)
            self._out.append(ev.RequestPiece(number, source.peer, index, length))

    def _cancel(self, request: Request, now: float) -> None:
        self._out.append(ev.CancelRequest(request.number))
        self._end(request, now)

    def _end(self, request: Request, now: float) -> None:
        """The request is over, whatever came of it; its piece is free unless others are asked for it, or it is here."""
        if self._requests.pop(request.number, None) is None:
            return
        source = self.sources[request.peer]
        del source.requests[request.number]
        if request.stage is not Stage.CHECKING:
            self._leave_flight(source, request, now)
        self._stirred.add(request.peer)
        index = request.index
        if index < 0:
            return
        others = self._of_piece[index]
        others.remove(request)
        if not others:
            del self._of_piece[index]
            if not self.picker.holds(index):
                self.picker.released(index)
                self._stir_all()

    # ---- everything else that happens ------------------------------------------------------------------------

    def _pieces_found(self, event: ev.PiecesFound, now: float) -> None:
        for index in indices_of(without(event.pieces, self.picker.have)):
            if self.picker.gained(index):
                self._news |= 1 << index
                for other in list(self._of_piece.get(index, ())):
                    self._cancel(other, now)

    def _pieces_lost(self, event: ev.PiecesLost, now: float) -> None:
        if self.picker.lost(event.pieces):
            self._was_done = False
            self._stir_all()
            self._look_for_links = True

    def _budget(self, event: ev.Budget, now: float) -> None:
        self._budget_pieces = max(1, event.pieces)
        self._read_bytes_per_second = event.bytes_per_second
        self._stir_all()

    def _trackers_gone(self, event: ev.TrackersAway, now: float) -> None:
        self._trackers_away = True

    def _trackers_returned(self, event: ev.TrackersBack, now: float) -> None:
        self._trackers_away = False
        self._find_at = now
        self._find_pause = FIND_SECONDS

    def _token_expired(self, event: ev.TokenExpired, now: float) -> None:
        self._token_valid = False

    def _token_renewed(self, event: ev.TokenRenewed, now: float) -> None:
        self._token_valid = True
        for source in self.sources.values():
            if source.refused:
                source.refused = False
                source.failures = 0
                source.back_at = now
        self._stir_all()

    def _pause(self, event: ev.Pause, now: float) -> None:
        self._paused = True
        for request in list(self._requests.values()):
            if request.stage is not Stage.CHECKING:
                self._cancel(request, now)

    def _resume(self, event: ev.Resume, now: float) -> None:
        self._paused = False
        self._look_for_links = True
        self._stir_all()

    def _stir_all(self) -> None:
        self._stirred.update(self.sources)

    # ---- decisions -------------------------------------------------------------------------------------------

    def _check_requests(self, now: float) -> None:
        """Take back what stalls."""
        if now < self._check_at:
            return
        self._check_at = now + CHECK_SECONDS
        share = self._read_bytes_per_second / max(1, len(self._requests))
        for request in list(self._requests.values()):
            silence = now - request.heard_at
            if silence < 1.0 or request.stage is Stage.CHECKING or request.number not in self._requests:
                continue
            source = self.sources[request.peer]
            started = request.stage is Stage.COMING
            if silence >= source.silence_seconds_max(now, started, share):
                self._cancel(request, now)
                self._stalled(source, now, not started)

    def _fill(self, now: float) -> None:
        """Give the peers with room something to do, the least loaded first, one request each in turn."""
        if self._paused or not self._token_valid or now < self._hold_until:
            return
        stirred, self._stirred = self._stirred, set()
        room: list[Source] = []
        for peer in stirred:
            source = self.sources.get(peer)
            if source is None or not source.linked:
                continue
            if source.back_at > now:
                self._stirred.add(peer)  # looked at again when it is back
            elif source.in_flight < source.depth(now, self._piece_bytes):
                room.append(source)
        piece_bytes = self._piece_bytes
        free = self.picker.free
        if room and free:
            if len(room) > 1:
                room.sort(key=lambda source: source.order(now, piece_bytes))
            self._deal(room, now)
        if not self.picker.free_count and self._requests and now >= self._end_at:
            self._help_the_last(now)

    def _deal(self, room: list[Source], now: float) -> None:
        limit = self._budget_pieces
        if self._read_bytes_per_second:
            limit = min(limit, max(2, int(2 * self._read_bytes_per_second / self._piece_bytes)))
        slow_below = self._slow_below(now) if len(self._requests) * 2 >= limit else 0.0
        late = self._seconds_left(now) if self.picker.free_count <= 4 * len(room) + 16 else 0.0
        while room:
            again: list[Source] = []
            for source in room:
                if len(self._requests) >= limit:
                    self._stirred.update(other.peer for other in room)
                    return
                if slow_below and source.in_flight and source.bytes_per_second(now) < slow_below:
                    continue
                if late and self._too_late(source, late, now):
                    self._stirred.add(source.peer)
                    continue
                if not self._give(source, now):
                    continue
                if source.in_flight < source.depth(now, self._piece_bytes):
                    again.append(source)
            room = again

    def _give(self, source: Source, now: float) -> bool:
        useful = source.have & self.picker.free
        if not useful:
            return False
        if source.complete and source.chooses and self._leechers:
            choosers = self._all_choosers()
            if len(choosers) > 1:
                useful = rest(useful, self._shares.of(source.peer, choosers))
            asked = sum(1 for request in source.requests.values() if request.index < 0)
            if asked >= useful.bit_count():
                return False
            self._ask(source, -1, useful, now)
            return True
        index = self.picker.pick(useful)
        assert index is not None
        self._ask(source, index, 0, now)
        return True

    def _all_choosers(self) -> tuple[str, ...]:
        if self._choosers is None:
            self._choosers = tuple(
                sorted(
                    peer
                    for peer, source in self.sources.items()
                    if source.linked and source.complete and source.chooses
                )
            )
        return self._choosers

    def _slow_below(self, now: float) -> float:
        rates = [s.bytes_per_second(now) for s in self.sources.values() if s.in_flight and s.bytes_got]
        return SLOW_SHARE * sum(rates) / len(rates) if rates else 0.0

    def _seconds_left(self, now: float) -> float:
        """How long what is missing takes at the present rate; 0 where nothing can be said."""
        rate = self.bytes_per_second(now)
        if rate <= 0:
            return 0.0
        coming = sum(source.in_flight_bytes for source in self.sources.values() if source.in_flight)
        return (self.picker.free_count * self._piece_bytes + coming) / rate

    def _too_late(self, source: Source, seconds_left: float, now: float) -> bool:
        """Whether a piece given to this peer would hold up the end, which others would reach without it."""
        if not source.bytes_got:
            return False
        finish = source.finish_seconds(now, self._piece_bytes)
        return finish > 1.5 * seconds_left + 0.1 and any(
            other is not source
            and other.in_flight
            and other.finish_seconds(now, self._piece_bytes) < finish / 2
            for other in self.sources.values()
        )

    def _help_the_last(self, now: float) -> None:
        """Nothing is free: ask peers with room for pieces that others hold up, the worst first, where they would be
        here well before."""
        self._end_at = now + max(END_CHECK_SECONDS, END_CHECK_SECONDS_PER_REQUEST * len(self._requests))
        piece_bytes = self._piece_bytes
        helpers = sorted(
            (source.finish_seconds(now, piece_bytes), number, source)
            for number, source in enumerate(self.sources.values())
            if source.ready(now) and source.in_flight < source.depth(now, piece_bytes)
        )
        if not helpers:
            return
        late = HELP_RATIO * helpers[0][0] + HELP_SECONDS
        held_up = sorted(
            (
                (seconds, request)
                for seconds, request in self._expectations(now)
                if seconds > late and len(self._of_piece[request.index]) < COPIES_ASKED_MAX
            ),
            key=lambda pair: -pair[0],
        )
        room = self._budget_pieces + 2 - len(self._requests)
        for seconds, request in held_up[: max(room, 0)]:
            asked = self._of_piece[request.index]
            if len(asked) > 1 and any(
                other.stage is Stage.CHECKING or self._remaining_seconds(other, now) < seconds
                for other in asked
            ):
                continue  # another copy is nearer
            for at, (finish, _, source) in enumerate(helpers):
                if HELP_RATIO * finish + HELP_SECONDS >= seconds:
                    break
                if source.have >> request.index & 1 and all(other.peer != source.peer for other in asked):
                    self._ask(source, request.index, 0, now)
                    del helpers[at]
                    break

    def _expectations(self, now: float) -> Iterable[tuple[float, Request]]:
        for source in self.sources.values():
            if source.in_flight:
                for request in source.requests.values():
                    if request.index >= 0 and request.stage is not Stage.CHECKING:
                        yield self._remaining_seconds(request, now), request

    def _remaining_seconds(self, request: Request, now: float) -> float:
        """When a request is likely to end. One that has been silent is expected to be so for as long again."""
        source = self.sources[request.peer]
        expected = source.in_flight_bytes / source.bytes_per_second(now)
        silence = now - request.heard_at
        return max(expected, silence if silence > 0.5 else 0.0)

    def _open_links(self, now: float) -> None:
        self._look_for_links = False
        if self._paused or self.picker.complete or not self._token_valid:
            return
        room = min(LINKS_MAX - self._linked, CONNECTS_AT_ONCE_MAX) - self._connecting
        if room <= 0:
            return
        candidates = [
            source
            for source in self.sources.values()
            if source.listed
            and source.addresses
            and not source.linked
            and not source.connecting
            and source.connect_at <= now
        ]
        if len(candidates) > room:
            self._rng.shuffle(candidates)
            candidates.sort(key=lambda source: not source.complete)
            seeders = sum(1 for source in candidates if source.complete)
            if seeders > room // 2:  # both kinds: seeders have everything, leechers have time
                candidates = candidates[: room // 2] + candidates[seeders:] + candidates[room // 2 : seeders]
        for source in candidates[:room]:
            source.connecting = True
            self._connecting += 1
            self._out.append(ev.Connect(source.peer, source.addresses))

    def _tell_news(self, now: float) -> None:
        """News of pieces: at once in small swarms, in batches where its cost grows with the square of the crowd."""
        if not self._news or (now < self._news_at and not self.picker.complete):
            return
        if self._linked:
            self._out.append(ev.PushHave(self._news))
        self._news = 0
        if self._linked > NEWS_AT_ONCE_LINKS:
            self._news_at = now + min(NEWS_SECONDS_PER_LINK * self._linked, NEWS_SECONDS_MAX)

    def _tell_state(self, now: float) -> None:
        if self.picker.complete:
            if not self._was_done:
                self._was_done = True
                self._waiting = None
                self._out.append(ev.Done())
            return
        reason = None if self._requests else self._why_waiting(now)
        if reason is not None or self._linked < 2:
            self._find_peers(now)
        if reason is self._waiting:
            return
        self._waiting = reason
        self._out.append(ev.Moving() if reason is None else ev.Waiting(reason))

    def _find_peers(self, now: float) -> None:
        if now >= self._find_at and not self._paused:
            self._find_at = now + self._find_pause * (0.75 + 0.5 * self._rng.random())
            self._find_pause = min(self._find_pause * 1.5, FIND_SECONDS_MAX)
            self._out.append(ev.FindPeers())

    def _why_waiting(self, now: float) -> WaitReason:
        if self._paused:
            return WaitReason.PAUSED
        if not self._token_valid:
            return WaitReason.TOKEN_EXPIRED
        linked = [source for source in self.sources.values() if source.linked]
        if not linked:
            return WaitReason.NO_PEERS_NO_TRACKER if self._trackers_away else WaitReason.NO_PEERS
        useful = [source for source in linked if source.have & self.picker.free]
        if not useful:
            return WaitReason.PIECES_MISSING
        if all(source.refused for source in useful):
            return WaitReason.REFUSED
        return WaitReason.BUSY

    def _set_wake(self, now: float) -> None:
        if self.picker.complete:
            self.wake_at = None
            return
        times: list[float] = []
        if self._news:
            times.append(self._news_at)
        if self._requests:
            times.append(self._check_at)
            if not self.picker.free_count:
                times.append(self._end_at)
        if not self._paused and self._token_valid:
            if self._hold_until > now:
                times.append(self._hold_until)
            times.extend(self._times_to_come(now))
            if not self._requests or self._linked < 2:
                times.append(self._find_at)
        self.wake_at = max(min(times), now) if times else None

    def _times_to_come(self, now: float) -> Iterable[float]:
        for peer in self._stirred:
            source = self.sources.get(peer)
            if source is not None and source.linked and source.back_at > now:
                yield source.back_at
        if self._linked + self._connecting < LINKS_MAX:
            for source in self.sources.values():
                if source.listed and source.addresses and not source.linked and not source.connecting:
                    self._look_for_links = True
                    yield max(source.connect_at, now + CHECK_SECONDS)
