"""The requests of one download that have not ended, by number and by piece. Pure.

Owned here: the book-keeping that must never be wrong. A piece is free exactly while it is missing and no request
names it; a peer's pipeline holds exactly its requests that have not arrived.
"""

from __future__ import annotations

from collections.abc import Iterator

from peer import swarm_events as ev
from peer.bitmap import Mask
from peer.picker import Picker
from peer.roster import Roster
from peer.sources import Request, Source, Stage
from peer.swarm_events import Action


class Requests:
    """See the module. Actions go to `out`."""

    def __init__(
        self, picker: Picker, roster: Roster, piece_bytes: int, size_bytes: int, out: list[Action]
    ) -> None:
        self._picker = picker
        self._roster = roster
        self._piece_bytes = piece_bytes
        self._last_piece_bytes = size_bytes - (picker.pieces - 1) * piece_bytes
        self._out = out
        self._of_piece: dict[int, list[Request]] = {}
        self._by_number: dict[int, Request] = {}
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._by_number.values()))

    def get(self, number: int) -> Request | None:
        return self._by_number.get(number)

    def of_piece(self, index: int) -> list[Request]:
        return self._of_piece.get(index, [])

    def length_of(self, index: int) -> int:
        """Bytes of one piece."""
        return self._last_piece_bytes if index == self._picker.pieces - 1 else self._piece_bytes

    def ask(self, source: Source, index: int, want: Mask, now: float) -> None:
        """Ask a peer for a piece, or (index -1) for whichever of `want` it chooses."""
        number = self._next_number
        self._next_number = number + 1
        length = self._piece_bytes if index < 0 else self.length_of(index)
        request = Request(
            number,
            source.peer,
            index,
            length,
            now,
            now,
            want,
            bytes_before=source.delivery.total_bytes,
            alone=not source.in_flight,
        )
        self._by_number[number] = request
        source.requests[number] = request
        if not source.in_flight:
            source.rate.busy(now)
        source.in_flight += 1
        source.in_flight_bytes += length
        if index < 0:
            self._out.append(ev.RequestNext(number, source.peer, want))
        else:
            self._of_piece.setdefault(index, []).append(request)
            self._picker.asked(index)
            self._out.append(ev.RequestPiece(number, source.peer, index, length))

    def chosen(self, request: Request, index: int) -> None:
        """The peer chose: the request is for `index` from now on."""
        length = self.length_of(index)
        self._roster[request.peer].in_flight_bytes += length - request.length_bytes
        request.index = index
        request.want = 0
        request.length_bytes = length
        self._of_piece.setdefault(index, []).append(request)
        self._picker.asked(index)

    def moved(self, request: Request, count: int, now: float) -> None:
        """Bytes of the body came."""
        if request.stage is Stage.CHECKING:
            return
        request.stage = Stage.COMING
        request.heard_at = now
        count = min(count, request.length_bytes - request.got_bytes)
        request.got_bytes += count
        source = self._roster[request.peer]
        source.in_flight_bytes -= count
        source.rate.add(count, now)
        source.delivery.total_bytes += count

    def arrived(self, request: Request, now: float) -> None:
        """The whole body came; the piece is being checked."""
        if request.stage is Stage.CHECKING:
            return
        self.moved(request, request.length_bytes, now)
        source = self._roster[request.peer]
        source.delivery.sample(request.bytes_before, request.asked_at, now)
        self._leave_flight(source, request, now)
        request.stage = Stage.CHECKING
        source.arrived_pieces += 1
        self._roster.stirred.add(request.peer)

    def cancel(self, request: Request, now: float) -> None:
        """We want it no more."""
        if self.end(request, now):
            self._out.append(ev.CancelRequest(request.number))

    def end(self, request: Request, now: float) -> bool:
        """It is over, whatever came of it; the piece is free unless it is here or still asked for elsewhere."""
        if self._by_number.pop(request.number, None) is None:
            return False
        source = self._roster[request.peer]
        del source.requests[request.number]
        if request.stage is not Stage.CHECKING:
            self._leave_flight(source, request, now)
        self._roster.stirred.add(request.peer)
        index = request.index
        if index >= 0:
            others = self._of_piece[index]
            others.remove(request)
            if not others:
                del self._of_piece[index]
                if not self._picker.holds(index):
                    self._picker.released(index)
                    self._roster.stir_all()
        return True

    def _leave_flight(self, source: Source, request: Request, now: float) -> None:
        source.in_flight -= 1
        source.in_flight_bytes -= request.length_bytes - request.got_bytes
        if not source.in_flight:
            source.rate.idle(now)
