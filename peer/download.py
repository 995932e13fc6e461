"""One download as a machine without I/O: events in, actions out (`peer.swarm_events` has both, and the order).

Everything that decides which piece is asked of whom, and what a peer's failure means, lives here and in what it
uses: `peer.picker` (which piece), `peer.roster` (who there is), `peer.sources` (what a peer can carry),
`peer.requests` (what is asked). The engine drives it; the simulated swarm in the tests drives hundreds of it with a
fake clock.

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
looked at (`Roster.stirred`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Final

from peer import endgame
from peer import swarm_events as ev
from peer.bitmap import Mask, indices_of, without
from peer.picker import Picker, Shares, rest
from peer.requests import Requests
from peer.roster import Roster
from peer.sources import Request, Source, Stage
from peer.swarm_events import Action, Event, Failure, Fault, WaitReason

CHECK_SECONDS: Final = 0.25  # between looks for stalled requests
FIND_SECONDS: Final = 2.0
FIND_SECONDS_MAX: Final = 30.0
REPORT_AFTER_STALLS: Final = 2
REPORT_AFTER_LOSSES: Final = 6
PART_AFTER_BREACHES: Final = 3
LOCAL_TROUBLE_SECONDS: Final = 0.5
SLOW_SHARE: Final = 0.25  # of the mean rate: below it a peer gets no more than one piece of a scarce budget
ASK_AHEAD_SECONDS: Final = 0.25  # of what all peers together send
ASK_AHEAD_PIECES_MIN: Final = 16
READ_AHEAD_SECONDS: Final = 2.0  # of requests, where our own reading is limited


class Download:
    """One download, or the wish to keep one whole. See the module and `peer.swarm_events`.

    `pieces`, `piece_bytes` and `size_bytes` are the manifest's, `have` what is on disk and verified, `budget_pieces`
    how many pieces may be in memory. `rng` breaks ties; give each peer its own.
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
        self._piece_bytes = piece_bytes
        self._rng = rng or random.Random()  # noqa: S311 - ties and jitter
        self._out: list[Action] = []
        self.picker = Picker(pieces, have, self._rng)
        self.roster = Roster(peer_id, self.picker, self._rng, self._out)
        self._requests = Requests(self.picker, self.roster, piece_bytes, size_bytes, self._out)
        self._shares = Shares(pieces)
        self._budget_pieces = max(1, budget_pieces)
        self._read_bytes_per_second = 0.0
        self._bytes_per_second = 0.0  # of all who have something that is missing, at the last check
        self._news: Mask = 0
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
        self.wake_at: float | None = 0.0
        self.received_bytes = 0  # verified, from peers
        self.duplicate_pieces = 0  # that came, or began to come, though they were here
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            ev.PeerJoined: self.roster.joined,
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
            if self._may_ask:
                if now >= self._hold_until:
                    self._fill(now)
                if self.roster.links_at is not None and self.roster.links_at <= now:
                    self.roster.open_links(now)
        self._tell_news()
        self._tell_state(now)
        self._set_wake(now)
        out = self._out.copy()
        self._out.clear()
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
        """Why nothing moves; None while something does."""
        return self._waiting

    @property
    def in_flight(self) -> int:
        """Requests that have not ended, those being checked among them."""
        return len(self._requests)

    @property
    def linked_peers(self) -> list[str]:
        return [source.peer for source in self.roster.linked_sources()]

    def known_peers(self) -> list[tuple[str, tuple[str, ...], bool]]:
        """(peer, addresses, complete) of every peer worth telling others about: the link's `pex`."""
        return self.roster.known()

    def is_banned(self, peer: str) -> bool:
        """It sent a wrong piece: nothing of it is accepted in this swarm."""
        return self.roster.is_banned(peer)

    def bytes_per_second(self, now: float) -> float:
        """What all peers send now."""
        return sum(
            source.rate.bytes_per_second(now) for source in self.roster.sources.values() if source.in_flight
        )

    @property
    def _may_ask(self) -> bool:
        return self._token_valid and not self._paused

    # ---- peers -----------------------------------------------------------------------------------------------

    def _peer_left(self, event: ev.PeerLeft, now: float) -> None:
        self.roster.left(event.peer)

    def _link_up(self, event: ev.LinkUp, now: float) -> None:
        self.roster.link_up(event, now)
        self._find_pause = FIND_SECONDS

    def _link_down(self, event: ev.LinkDown, now: float) -> None:
        source = self.roster.get(event.peer)
        if source is None:
            return
        if event.leaving:
            for request in [r for r in source.requests.values() if r.stage is Stage.ASKED]:
                self._requests.cancel(request, now)
        self.roster.link_down(source, event, now)

    def _heard_have(self, event: ev.Have, now: float) -> None:
        source = self.roster.get(event.peer)
        if source is not None:
            self.roster.has(source, event.pieces)

    def _heard_load(self, event: ev.Load, now: float) -> None:
        source = self.roster.get(event.peer)
        if source is not None:
            source.load = event

    def _latency_measured(self, event: ev.LatencyMeasured, now: float) -> None:
        source = self.roster.get(event.peer)
        if source is not None:
            source.latency.add(event.seconds, now)

    def _part(self, source: Source, now: float, reason: str, *, banned: bool = False) -> None:
        for request in list(source.requests.values()):
            self._requests.cancel(request, now)
        self.roster.part(source, now, reason, banned=banned)

    # ---- a request goes its way ------------------------------------------------------------------------------

    def _piece_started(self, event: ev.PieceStarted, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        source = self.roster[request.peer]
        if request.alone:
            source.latency.add(now - request.asked_at, now)
            request.alone = False
        request.heard_at = now
        if request.stage is Stage.ASKED:
            request.stage = Stage.COMING
        if request.index == event.index:
            return
        if request.index >= 0 or event.index < 0 or not request.want >> event.index & 1:
            self._requests.cancel(request, now)
            self._breach(source, now)
        elif self._is_superfluous(event.index, now):
            self.duplicate_pieces += 1
            self._requests.cancel(request, now)
        else:
            self._requests.chosen(request, event.index)

    def _is_superfluous(self, index: int, now: float) -> bool:
        """Whether a piece that a seeder chose is here, or coming from elsewhere. Requests for it that only wait
        elsewhere are taken back instead."""
        others = list(self._requests.of_piece(index))
        if self.picker.holds(index) or any(other.stage is not Stage.ASKED for other in others):
            return True
        for other in others:
            self._requests.cancel(other, now)
        return False

    def _bytes_arrived(self, event: ev.BytesArrived, now: float) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            self._requests.moved(request, event.count, now)

    def _piece_arrived(self, event: ev.PieceArrived, now: float) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            self._requests.arrived(request, now)

    def _piece_verified(self, event: ev.PieceVerified, now: float) -> None:
        request = self._requests.get(event.request)
        new = self._gain(event.index, now, keep=request)
        if request is None:
            return
        self._requests.arrived(request, now)
        self._requests.end(request, now)
        if new:
            self.received_bytes += request.length_bytes
            self.roster[request.peer].delivered(request.length_bytes)
        else:
            self.duplicate_pieces += 1

    def _gain(self, index: int, now: float, keep: Request | None = None) -> bool:
        if not self.picker.gained(index):
            return False
        self._news |= 1 << index
        for other in list(self._requests.of_piece(index)):
            if other is not keep:
                self._requests.cancel(other, now)
        return True

    def _piece_wrong(self, event: ev.PieceWrong, now: float) -> None:
        request = self._requests.get(event.request)
        if request is not None:
            source = self.roster[request.peer]
            self.roster.report(source, Fault.BAD_PIECE)
            self._part(source, now, "it sent a wrong piece", banned=True)

    def _piece_failed(self, event: ev.PieceFailed, now: float) -> None:
        request = self._requests.get(event.request)
        if request is None:
            return
        source = self.roster[request.peer]
        silent = request.stage is Stage.ASKED
        self._requests.end(request, now)
        match event.failure:
            case Failure.BUSY:
                source.busy(now, self._rng, event.retry_after_seconds)
            case Failure.NOTHING_TO_CHOOSE:
                self.roster.chooses_no_more(source)
            case Failure.NOT_HELD:
                if request.index >= 0:
                    self.roster.has_not(source, request.index)
                self.roster.chooses_no_more(source)
                source.failed(now, self._rng)
            case Failure.REFUSED:
                source.refused = True
                source.failed(now, self._rng, seconds_min=1.0)
            case Failure.WITHDRAWN:
                self._part(source, now, "its file changed, or it stopped sharing it")
            case Failure.STALLED:
                self._stalled(source, now, silent)
            case Failure.GONE:
                source.failed(now, self._rng)
                if source.failures == REPORT_AFTER_LOSSES:
                    self.roster.report(source, Fault.UNREACHABLE)
            case Failure.GARBLED:
                self._breach(source, now)
            case Failure.LOCAL:
                self._hold_until = max(self._hold_until, now + LOCAL_TROUBLE_SECONDS)

    def _breach(self, source: Source, now: float) -> None:
        source.failed(now, self._rng, seconds_min=1.0)
        if source.failures >= PART_AFTER_BREACHES:
            self._part(source, now, "its answers are not those of a peer")

    def _stalled(self, source: Source, now: float, silent: bool) -> None:
        source.failed(now, self._rng)
        queued = silent and source.load is not None and source.load.queued
        if source.failures >= REPORT_AFTER_STALLS and not queued:
            self.roster.report(source, Fault.STALLED)

    # ---- everything else that happens ------------------------------------------------------------------------

    def _pieces_found(self, event: ev.PiecesFound, now: float) -> None:
        for index in indices_of(without(event.pieces, self.picker.have)):
            if index < self.picker.pieces:
                self._gain(index, now)

    def _pieces_lost(self, event: ev.PiecesLost, now: float) -> None:
        if self.picker.lost(event.pieces):
            self._news = without(self._news, event.pieces)
            self._was_done = False
            self.roster.links_at = now
            self.roster.stir_all()

    def _budget(self, event: ev.Budget, now: float) -> None:
        self._budget_pieces = max(1, event.pieces)
        self._read_bytes_per_second = event.bytes_per_second
        self.roster.stir_all()

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
        for source in self.roster.sources.values():
            if source.refused:
                source.refused = False
                source.failures = 0
                source.back_at = now
        self.roster.links_at = now
        self.roster.stir_all()

    def _pause(self, event: ev.Pause, now: float) -> None:
        self._paused = True
        for request in self._requests:
            if request.stage is not Stage.CHECKING:
                self._requests.cancel(request, now)

    def _resume(self, event: ev.Resume, now: float) -> None:
        self._paused = False
        self.roster.links_at = now
        self.roster.stir_all()

    # ---- decisions -------------------------------------------------------------------------------------------

    def _check_requests(self, now: float) -> None:
        """Take back what stalls; measure what everybody sends together."""
        if now < self._check_at:
            return
        self._check_at = now + CHECK_SECONDS
        self._bytes_per_second = endgame.bytes_per_second(self.roster, self.picker.free, now)
        share = self._read_bytes_per_second / max(1, len(self._requests))
        for request in self._requests:
            silence = now - request.heard_at
            if silence < 1.0 or request.stage is Stage.CHECKING or self._requests.get(request.number) is None:
                continue
            source = self.roster[request.peer]
            started = request.stage is Stage.COMING
            if silence >= source.silence_seconds_max(now, started, share):
                self._requests.cancel(request, now)
                self._stalled(source, now, not started)

    def _fill(self, now: float) -> None:
        """Give the peers with room something to do, the least loaded first, one request each in turn."""
        stirred, self.roster.stirred = self.roster.stirred, set()
        piece_bytes = self._piece_bytes
        room: list[Source] = []
        for peer in stirred:
            source = self.roster.get(peer)
            if source is None or not source.linked:
                continue
            if source.back_at > now:
                self.roster.stirred.add(peer)  # looked at again when it is back
            elif source.in_flight < source.depth(piece_bytes):
                room.append(source)
        if room and self.picker.free_count:
            room.sort(key=lambda source: (source.order(now, piece_bytes), source.peer))
            self._deal(room, now)
        if not self.picker.free_count and self._requests and now >= self._end_at:
            self._end_at = now + endgame.pause_seconds(len(self._requests))
            spare = self._budget_pieces + endgame.BUDGET_EXTRA_PIECES - len(self._requests)
            for source, index in endgame.copies(self.roster, self._requests, self._piece_bytes, spare, now):
                self._requests.ask(source, index, 0, now)

    def _deal(self, room: list[Source], now: float) -> None:
        limit = min(self._budget_pieces, self._worth_asking(now))
        if self._read_bytes_per_second:
            limit = min(limit, max(2, int(2 * self._read_bytes_per_second / self._piece_bytes)))
        slow_below = self._slow_below(now) if len(self._requests) * 2 >= limit else 0.0
        while room:
            again: list[Source] = []
            for source in room:
                if len(self._requests) >= limit:
                    self.roster.stirred.update(other.peer for other in room)
                    return
                if slow_below and source.in_flight and source.bytes_per_second(now) < slow_below:
                    continue
                if self._too_late(source, now):
                    self.roster.stirred.add(source.peer)
                    continue
                if not self._give(source, now):
                    continue
                if source.in_flight < source.depth(self._piece_bytes):
                    again.append(source)
            room = again

    def _worth_asking(self, now: float) -> int:
        """How many requests keep all paths full; more would only wait at their senders, and hold memory here."""
        latency = max((source.latency.seconds for source in self.roster.linked_sources()), default=0.0)
        ahead = self.bytes_per_second(now) * (ASK_AHEAD_SECONDS + 2 * latency)
        return max(2 * self.roster.linked, ASK_AHEAD_PIECES_MIN, int(ahead / self._piece_bytes))

    def _give(self, source: Source, now: float) -> bool:
        useful = source.have & self.picker.free
        if not useful:
            return False
        if source.complete and source.chooses and self.roster.leechers:
            choosers = self.roster.choosers()
            if len(choosers) > 1:
                useful = rest(useful, self._shares.of(source.peer, choosers))
            asked = sum(1 for request in source.requests.values() if request.index < 0)
            if asked >= useful.bit_count():
                return False
            self._requests.ask(source, -1, useful, now)
            return True
        index = self.picker.pick(useful)
        assert index is not None
        self._requests.ask(source, index, 0, now)
        return True

    def _slow_below(self, now: float) -> float:
        rates = [s.bytes_per_second(now) for s in self.roster.sources.values() if s.in_flight and s.bytes_got]
        return SLOW_SHARE * sum(rates) / len(rates) if rates else 0.0

    def _too_late(self, source: Source, now: float) -> bool:
        """Whether what is missing would be here without this peer before it had sent one more piece."""
        if not source.bytes_got or not self._bytes_per_second:
            return False
        finish = source.finish_seconds(now, self._piece_bytes)
        if finish * self._bytes_per_second <= self.picker.free_count * self._piece_bytes:
            return False  # as nearly always: the rest need not be looked at
        left = endgame.seconds_left(self.roster, self.picker.free, self._piece_bytes, now)
        if self.roster.leechers:
            left = endgame.CROWD_RATIO * left + endgame.CROWD_SECONDS
        return finish > left and endgame.somebody_is_faster(self.roster, source, self._piece_bytes, now)

    # ---- what is told ----------------------------------------------------------------------------------------

    def _tell_news(self) -> None:
        if self._news:
            self._out.append(ev.PushHave(self._news))
            self._news = 0

    def _tell_state(self, now: float) -> None:
        if self.picker.complete:
            if not self._was_done:
                self._was_done = True
                self._waiting = None
                self._out.append(ev.Done())
            return
        reason = None if len(self._requests) else self._why_waiting()
        if reason is WaitReason.PIECES_MISSING:
            self.roster.replace_useless(now)
        if (reason is not None or self.roster.linked < 2) and now >= self._find_at and self._may_ask:
            self._find_at = now + self._find_pause * (0.75 + 0.5 * self._rng.random())
            self._find_pause = min(self._find_pause * 1.5, FIND_SECONDS_MAX)
            self._out.append(ev.FindPeers())
        if reason is not self._waiting:
            self._waiting = reason
            self._out.append(ev.Moving() if reason is None else ev.Waiting(reason))

    def _why_waiting(self) -> WaitReason:
        if self._paused:
            return WaitReason.PAUSED
        if not self._token_valid:
            return WaitReason.TOKEN_EXPIRED
        linked = list(self.roster.linked_sources())
        if not linked:
            return WaitReason.NO_PEERS_NO_TRACKER if self._trackers_away else WaitReason.NO_PEERS
        useful = [source for source in linked if source.have & self.picker.free]
        if not useful:
            return WaitReason.PIECES_MISSING
        if all(source.refused for source in useful):
            return WaitReason.REFUSED
        return WaitReason.BUSY

    def _set_wake(self, now: float) -> None:
        self.wake_at = None
        if self.picker.complete:
            return
        times = [self._check_at] if len(self._requests) else []
        if self._may_ask:
            if self._hold_until > now:
                times.append(self._hold_until)
            elif len(self._requests) and not self.picker.free_count:
                times.append(self._end_at)
            if self.roster.links_at is not None:
                times.append(self.roster.links_at)
            if not len(self._requests) or self.roster.linked < 2:
                times.append(self._find_at)
            for peer in self.roster.stirred:
                source = self.roster.get(peer)
                if source is not None and source.linked and source.back_at > now:
                    times.append(source.back_at)
        if times:
            self.wake_at = max(min(times), now)
